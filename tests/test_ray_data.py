"""Scoring with Ray Data: a batch at a time, without Ray, and in a cluster that loses an actor."""

import os
import re
import secrets
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, script_environment, texture, truncated_image
from patchsvdd_fast import PatchSVDD
from patchsvdd_fast.detector.categories import CategoryDetectors
from patchsvdd_fast.ray_data import MAP_COLUMN, Scorer
from patchsvdd_fast.report.table import CATEGORY, COLUMNS, arrow_table, row_of

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

GIVEN = {"mode": "dense", "initialization": "kaiming", "image_size": 64, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a model of two categories, and images: good, of 16 bits, with a spot, truncated."""
    root = tmp_path_factory.mktemp("ray")
    rng = np.random.default_rng(0)
    good = [texture(rng) for _ in range(6)]
    detector = PatchSVDD(**GIVEN)
    encoder = detector.untrained_encoder()
    detector.fit(good, encoder=encoder).save(root / "model.safetensors")
    categories = {"fine": good, "coarse": [np.ascontiguousarray(image[::-1]) for image in good]}
    both = CategoryDetectors.fit(PatchSVDD(**GIVEN), categories, encoder=encoder)
    both.save(root / "both.safetensors")
    for kind in ("coarse", "new"):
        (root / kind).mkdir()
        for number in range(3):
            image = texture(rng)
            if number == 1:
                image[40:60, 60:90] = 250, 20, 20
            Image.fromarray(image).save(root / kind / f"{number}.png")
    deep = (texture(rng)[..., 0].astype(np.uint16) << 8) + 77
    Image.fromarray(deep).save(root / "new/deep.png")
    truncated_image(root / "new/truncated.png")
    return root


def images_of(folder, kind="new"):
    return sorted(map(str, (folder / kind).iterdir()))


def expected(detector, paths, columns=COLUMNS):
    """What `score_stream` says of the images, as a table."""
    rows, failed = [], {}
    for result in detector.score_stream(paths, on_error=lambda p, e: failed.update({p: str(e)})):
        rows.append(row_of(result))
    rows += [{"image": path, "error": message} for path, message in failed.items()]
    return arrow_table(sorted(rows, key=lambda row: row["image"]), columns)


def read(paths):
    return [Path(path).read_bytes() for path in paths]


def batches(paths):
    """The same images as Ray's batch formats give them, and as paths alone."""
    arrow = pyarrow.table({"bytes": read(paths), "path": paths})
    numpy = {name: np.array(arrow[name].to_pylist(), object) for name in arrow.column_names}
    return {"arrow": arrow, "numpy": numpy, "pandas": arrow.to_pandas(), "paths": {"path": paths}}


@pytest.mark.filterwarnings("ignore:.* has 16-bit samples")
def test_every_kind_of_batch_is_scored_as_paths_are(folder):
    paths = images_of(folder)
    scorer = Scorer(folder / "model.safetensors", device="cpu")
    wanted = expected(PatchSVDD.load(folder / "model.safetensors", "cpu"), paths)
    assert wanted["error"].null_count == len(paths) - 1  # the truncated image's
    assert set(wanted["verdict"].to_pylist()) == {"normal", "anomalous", None}
    for kind, batch in batches(paths).items():
        assert scorer(batch).equals(wanted), kind


def test_arrays_have_the_names_of_their_paths(folder):
    paths = [path for path in images_of(folder) if path[-5].isdigit()]
    arrays = np.stack([np.asarray(Image.open(path)) for path in paths])
    scorer = Scorer(folder / "model.safetensors", device="cpu")
    wanted = expected(PatchSVDD.load(folder / "model.safetensors", "cpu"), paths)
    assert scorer({"image": arrays, "path": paths}).equals(wanted)
    small = scorer({"image": [arrays[0], arrays[0][:9]], "path": ["a.png", "b.png"]})
    assert small["image"].to_pylist() == ["a.png", "b.png"]
    assert small["error"][0].as_py() is None
    assert small["error"][1].as_py().startswith("b.png has 96x9 pixels")


@pytest.mark.filterwarnings("ignore:.* has 16-bit samples")
def test_columns_have_one_type_whatever_the_batch_holds(folder):
    paths = images_of(folder)
    scorer = Scorer(folder / "model.safetensors", device="cpu", maps=True)
    whole, bad = (scorer({"path": some}) for some in (paths, ["missing.png"]))
    empty = scorer({"path": []})
    assert whole.schema == bad.schema == empty.schema
    assert whole.column_names == [*COLUMNS, MAP_COLUMN]
    assert "missing.png" in bad["error"][0].as_py()
    result = PatchSVDD.load(folder / "model.safetensors", "cpu").score(paths[0])
    found = np.array(whole[MAP_COLUMN][0].as_py(), np.float32)
    assert np.array_equal(found, result.anomaly_map[0].numpy())
    assert bad[MAP_COLUMN][0].as_py() is None


def test_categories(folder):
    model, columns = folder / "both.safetensors", (*COLUMNS, CATEGORY)
    paths = images_of(folder, "coarse")
    wanted = expected(CategoryDetectors.load(model, "cpu"), paths, columns)
    assert set(wanted[CATEGORY].to_pylist()) == {"coarse"}
    for kind, batch in batches(paths).items():
        assert Scorer(model, device="cpu")(batch).equals(wanted), kind
    arrays = [np.asarray(Image.open(path)) for path in paths]
    assert Scorer(model, device="cpu")({"image": arrays, "path": paths}).equals(wanted)
    fine = Scorer(model, device="cpu", category="fine")({"path": paths})
    assert set(fine[CATEGORY].to_pylist()) == {"fine"}


def test_the_rate_decides(folder):
    path = images_of(folder)[:1]
    model = folder / "model.safetensors"
    usual, other = (
        Scorer(model, device="cpu", false_alarm_rate=rate)({"path": path}) for rate in (None, 0.3)
    )
    assert usual["threshold"][0] != other["threshold"][0]
    assert usual["score"] == other["score"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("missing.safetensors", {}, "missing.safetensors"),
        ("model.safetensors", {"category": "fine"}, "has no categories"),
        ("both.safetensors", {"category": "third"}, "no category 'third'"),
        ("model.safetensors", {"false_alarm_rate": 2.0}, "a false-alarm rate must lie"),
        ("model.safetensors", {"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_at_once(folder, model, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        Scorer(folder / model, device="cpu", **options)


def test_batches_without_names_are_refused(folder):
    scorer = Scorer(folder / "model.safetensors", device="cpu")
    with pytest.raises(ValueError, match=r"must have a column .*, got 'bytes'"):
        scorer({"bytes": [b""]})
    with pytest.raises(ValueError, match='"path" must hold text, got 3'):
        scorer({"path": [3]})


def test_what_has_no_content_is_an_error_of_its_row(folder):
    scorer = Scorer(folder / "model.safetensors", device="cpu")
    found = scorer({"path": ["a.png", "b.png"], "bytes": [None, b"no image"]})
    assert found["error"].to_pylist() == [
        f"{name} is not an image that can be read" for name in ("a.png", "b.png")
    ]


def rows_in(folder):
    """The rows of all Parquet files in a folder, by their images."""
    files = sorted(folder.glob("*.parquet"))
    return pyarrow.concat_tables(map(parquet.read_table, files)).sort_by("image")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Ray on two nodes, both on this machine, that needs no network and leaves nothing at home."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'ray[data]'")
    pytest.importorskip("ray.data")
    from ray.cluster_utils import Cluster

    token = tmp_path_factory.mktemp("cluster") / "token"
    monkeypatch = pytest.MonkeyPatch()
    token.write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", script_environment()["PYTHONPATH"])  # of the workers
    node = {"num_cpus": 2, "object_store_memory": 100_000_000, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=node)
    try:
        nodes.add_node(num_cpus=2, object_store_memory=100_000_000)
        ray.init(nodes.address, logging_level="error", log_to_driver=False)
        yield ray
    finally:
        ray.shutdown()
        nodes.shutdown()
        monkeypatch.undo()


def test_the_program_of_the_page(folder, cluster, tmp_path, monkeypatch):
    page = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n([^`]*\nimport ray\n[^`]*)^```$", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/new").symlink_to(folder / "coarse")
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    exec(program, {})
    names = [f"{tmp_path}/images/new/{number}.png" for number in range(3)]
    detector = PatchSVDD.load(folder / "model.safetensors", "cpu")
    assert rows_in(tmp_path / "scores").equals(expected(detector, names))


def test_nothing_is_lost_or_scored_twice_when_an_actor_dies(folder, cluster, tmp_path):
    """It dies once, with a batch scored and not handed over."""
    rng = np.random.default_rng(1)
    images, mark, output = tmp_path / "images", tmp_path / "died", tmp_path / "scores"
    images.mkdir()
    for number in range(23):
        Image.fromarray(texture(rng)).save(images / f"{number:02}.png")
    truncated_image(images / "23.png")

    class DiesOnce(Scorer):
        def __call__(self, batch):
            found = super().__call__(batch)
            if any(path.endswith("17.png") for path in batch["path"].to_pylist()):
                try:
                    os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    return found
                os._exit(1)
            return found

    dataset = cluster.data.read_binary_files(str(images), include_paths=True)
    scored = dataset.map_batches(
        DiesOnce,
        fn_constructor_args=(str(folder / "model.safetensors"),),
        fn_constructor_kwargs={"device": "cpu", "threads": 1},
        batch_size=3,
        batch_format="pyarrow",
        concurrency=2,
    )
    scored.write_parquet(str(output))
    assert mark.exists()
    detector = PatchSVDD.load(folder / "model.safetensors", "cpu")
    wanted = expected(detector, images_of(tmp_path, "images"))
    assert rows_in(output).equals(wanted)
    assert wanted["error"].null_count == 23
