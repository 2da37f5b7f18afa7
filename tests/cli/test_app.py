"""The command line as a user types it, in a process of its own."""

import csv
import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import texture
from patchsvdd_fast import PatchLevel, PatchSVDD
from patchsvdd_fast.cli import app as cli
from patchsvdd_fast.cli import training_sets as commands
from patchsvdd_fast.cli.training_sets import TrainingSet, training_sets
from patchsvdd_fast.detector.evaluation import evaluate_category
from patchsvdd_fast.files.folders import Category
from patchsvdd_fast.files.whole import written_whole

FAST = [
    *("--mode", "faithful", "--resize", "96", "--steps", "2", "--batch-size", "4"),
    *("--initialization", "kaiming", "--learning-rate", "3e-4"),
]
COMMAND = [sys.executable, "-m", "patchsvdd_fast"]


def run(*arguments, cwd=None):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        env=os.environ | {"COLUMNS": "200"},
    )


def one_line_error(done):
    """The message of a failed command, which must be one line and no traceback."""
    assert done.returncode not in (0, None)
    lines = [line for line in done.stderr.strip().splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def model(category_folder, tmp_path):
    done = run("train", category_folder, "-o", tmp_path / "model.safetensors", *FAST)
    assert done.returncode == 0, done.stderr
    assert "2 training steps" in done.stdout
    return tmp_path / "model.safetensors"


def test_train_score_evaluate(model, category_folder, tmp_path):
    assert not model.with_name("model.safetensors.checkpoint").exists()

    out = tmp_path / "scores"
    done = run("score", model, category_folder / "test", "-o", out)
    assert done.returncode == 0, done.stderr
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert {row["verdict"] for row in rows if "/spot/" in row["image"]} == {"anomalous"}
    pictures = sorted((out / "heat-maps").rglob("*.png"))
    assert [str(p.relative_to(out)) for p in pictures] == [
        f"heat-maps/{d}/{i}.png" for d in ("good", "spot") for i in range(3)
    ]
    overlay = np.asarray(Image.open(pictures[-1]))
    assert overlay.shape == (96, 192, 3)
    plain, heat = overlay[:, :96], overlay[:, 96:]
    assert np.array_equal(plain, np.asarray(Image.open(category_folder / "test/spot/2.png")))
    assert np.abs(heat.astype(int) - plain).mean() > 5

    results = tmp_path / "results.json"
    done = run("evaluate", category_folder, "--model", model, "--json", results)
    assert done.returncode == 0, done.stderr
    assert "stripes" in done.stdout
    (result,) = json.loads(results.read_text())["results"]
    assert result["num_good"] == result["num_anomalous"] == 3
    for metrics in result["percent"].values():
        assert all(0 <= value <= 100 for value in metrics.values())
    assert result["percent"]["K32"]["detection"] == 100


def test_evaluate_several_categories(category_folder, tmp_path):
    second = category_folder.parent / "unmasked"
    second.mkdir()
    for part in ("train", "test"):
        (second / part).symlink_to(category_folder / part)
    results = tmp_path / "results.json"
    done = run(
        *("evaluate", category_folder.parent, "--untrained", "--resize", "96", "--json", results)
    )
    assert done.returncode == 0, done.stderr
    assert "mean" in done.stdout
    stripes, unmasked = json.loads(results.read_text())["results"]
    assert (stripes["category"], unmasked["category"]) == ("stripes", "unmasked")
    assert unmasked["percent"]["mult"]["detection"] == stripes["percent"]["mult"]["detection"]
    assert unmasked["percent"]["mult"]["segmentation"] is None
    assert stripes["percent"]["mult"]["segmentation"] is not None


def test_untrained_is_where_the_mode_begins(category_folder, tmp_path):
    results = tmp_path / "results.json"
    done = run(
        *("evaluate", category_folder, "--untrained", "--mode", "dense", "--resize", "96"),
        *("--json", results),
    )
    assert done.returncode == 0, done.stderr
    detector = PatchSVDD(image_size=96, mode="dense", device="cpu")
    detector.fit(category_folder, encoder=detector.untrained_encoder())
    expected = evaluate_category(detector, Category(category_folder)).percent
    assert json.loads(results.read_text())["results"][0]["percent"] == expected
    faithful = PatchSVDD(image_size=96, device="cpu")
    faithful.fit(category_folder, encoder=faithful.untrained_encoder())
    assert evaluate_category(faithful, Category(category_folder)).percent != expected
    assert "mode must be" in one_line_error(
        run("evaluate", category_folder, "--untrained", "--mode", "best")
    )


def test_an_encoder_brings_how_its_images_were_prepared(category_folder, tmp_path):
    file, model, results = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c"))
    detector = PatchSVDD(image_size=96, mode="dense", mean="channel", device="cpu")
    detector.fit(category_folder, encoder=detector.untrained_encoder()).save(file)
    done = run("train", category_folder, "-o", model, "--resize", "96", "--encoder", file)
    assert done.returncode == 0, done.stderr
    made = PatchSVDD.load(model)
    assert (made.mean, made.illumination) == ("channel", "matched")
    assert torch.equal(made.mean_, detector.mean_)
    done = run(
        *("evaluate", category_folder, "--resize", "96", "--encoder", file, "--json", results)
    )
    assert done.returncode == 0, done.stderr
    expected = evaluate_category(detector, Category(category_folder)).percent
    assert json.loads(results.read_text())["results"][0]["percent"] == expected


def test_info():
    done = run("info")
    assert done.returncode == 0
    for topic in ("patchsvdd_fast", "PyTorch", "CPU search", "CUDA kernels", "GPU"):
        assert topic in done.stdout


def test_interrupted_training_leaves_a_checkpoint(category_folder, tmp_path):
    output = tmp_path / "model.safetensors"
    process = subprocess.Popen(
        [
            *(*COMMAND, "train", category_folder, "-o", output, "--resize", "96"),
            *("--mode", "faithful", "--batch-size", "4", "--checkpoint-minutes", "0"),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    checkpoint = tmp_path / "model.safetensors.checkpoint"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert str(checkpoint) in stderr
    assert not output.exists()
    done = run("train", category_folder, "-o", output, "--resize", "96", "--encoder", checkpoint)
    assert done.returncode == 0, done.stderr
    assert checkpoint.exists()
    assert "0 training steps" in done.stdout


def test_several_categories_train_in_one_command(category_folder, tmp_path):
    data, models = tmp_path / "data", tmp_path / "models"
    for name in ("first", "second", "third"):
        shutil.copytree(category_folder, data / name)
    shutil.rmtree(data / "second" / "test")
    (data / "third" / "train" / "good" / "broken.png").write_text("no image")
    done = run("train", data, "-o", models, *FAST, "--log", "any.jsonl")
    assert done.returncode == 1
    assert "error: third: " in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in models.iterdir()) == [
        *("first.jsonl", "first.safetensors", "second.jsonl", "second.safetensors"),
    ]
    table = done.stdout[done.stdout.index("AUROC") - 200 :]
    assert "first" in table
    assert "second" not in table  # has nothing to test on
    assert "folder for models" in one_line_error(run("train", data, "-o", models / "first.jsonl"))


def test_models_go_where_their_number_suggests(category_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(category_folder, Path("data/first"))
    assert [one.output for one in training_sets(category_folder, None)] == [
        Path("model.safetensors")
    ]
    assert not Path("models").exists()
    assert [one.output for one in training_sets(Path("data"), None)] == [
        Path("models/first.safetensors")
    ]


def test_training_says_what_it_chose_and_how_long_it_takes(category_folder, tmp_path):
    output, log = tmp_path / "model.safetensors", tmp_path / "log.csv"
    arguments = ("train", category_folder, "-o", output, "--resize", "136", "--batch-size", "1")
    done = run(*arguments, "--steps", "14", "--check-every", "7", "--log", log, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "no GPU: training in mode dense" in done.stdout
    assert "14 steps, about" in done.stdout
    assert "kept the weights of step" in done.stdout
    assert len(log.read_text().splitlines()) == 15
    refused = run("train", category_folder, "-o", output, "--log", tmp_path / "log.txt")
    assert ".jsonl or .csv" in one_line_error(refused)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "holds no images"),
        (lambda folder: (folder / "a.png").write_text("hello"), "a.png is not an image"),
        (lambda folder: _truncated(folder / "a.png"), "cannot read image"),
        (lambda folder: _plain(folder / "a.png", 20), "20x20 pixels, less than one patch"),
    ],
)
def test_bad_images_end_in_one_line(tmp_path, prepare, message):
    folder = tmp_path / "images"
    folder.mkdir()
    prepare(folder)
    output = tmp_path / "model.safetensors"
    assert message in one_line_error(run("train", folder, "-o", output, *FAST))
    assert not output.exists()


def test_mixed_sizes_end_in_one_line_unless_resized(good_folder, tmp_path):
    _plain(good_folder / "wide.png", 120)
    output = tmp_path / "model.safetensors"
    done = run("train", good_folder, "-o", output, *FAST, "--resize", "none")
    assert "images must all have one size" in one_line_error(done)
    assert run("train", good_folder, "-o", output, *FAST).returncode == 0


def test_other_bad_input_ends_in_one_line(
    here, ready_model, category_folder, tmp_path, monkeypatch
):
    model = ready_model
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other.safetensors"
    other.write_text("not a model")
    cases = [
        (("score", other, category_folder / "test"), "not a model file"),
        (("score", tmp_path / "missing.safetensors", category_folder), "missing.safetensors"),
        (("score", model, tmp_path / "missing.png"), "missing.png"),
        (("evaluate", category_folder / "test", "--model", model), "no category"),
        (("evaluate", category_folder), "exactly one of"),
        (("score", model, category_folder / "test", "-o", other), "is a file"),
        (("evaluate", category_folder, "--untrained", "--json", "no/x.json"), "does not exist"),
        (("train", tmp_path / "missing"), "missing"),
        (("train", category_folder, "-o", tmp_path / "no" / "m"), "does not exist"),
        (("train", category_folder, "--resize", "big"), "--resize takes"),
        (("train", category_folder, "--lambda", "-1"), "svdd_weight"),
        (("nonsense",), "nonsense"),
    ]
    for arguments, message in cases:
        assert message in one_line_error(here(*arguments))


def test_a_model_that_cannot_be_saved_is_kept_elsewhere(category_folder, tmp_path, capsys):
    detector = PatchSVDD(image_size=96, steps=1, batch_size=2).fit(category_folder)
    missing = tmp_path / "gone" / "model.safetensors"
    with pytest.raises(OSError, match="cannot write"):
        commands._save_or_rescue(detector, TrainingSet(category_folder, missing))
    kept = Path("".join(capsys.readouterr().err.split()).removeprefix("themodeliskeptin"))
    assert PatchSVDD.load(kept).threshold_ == detector.threshold_


def test_a_file_is_replaced_only_when_whole(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("before")
    with (
        pytest.raises(OSError, match=r"cannot write .*scores.csv: No space left"),
        written_whole(path) as partial,
    ):
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with written_whole(path) as partial:
        partial.write_text("after")
    assert path.read_text() == "after"


# --- score and watch ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ready_model(tmp_path_factory):
    """A model file of an untrained encoder, which tells red squares from stripes as well."""
    rng = np.random.default_rng(0)
    detector = PatchSVDD(
        image_size=96,
        levels=(PatchLevel(64, 16), PatchLevel(32, 8)),
        embedding_dim=16,
        initialization="kaiming",
        device="cpu",
    )
    detector.fit([texture(rng) for _ in range(4)], encoder=detector.untrained_encoder())
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    detector.save(path)
    return path


@pytest.fixture
def here(monkeypatch, capsys):
    """As `run`, in this process: what the command's entry point does, without importing it anew."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back afterwards
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("COLUMNS", "200")

    def run_here(*arguments, listed=b""):
        monkeypatch.setattr(sys, "argv", ["patchsvdd", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed), encoding="ascii"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
            cli.main()
        return subprocess.CompletedProcess(arguments, ended.value.code, *capsys.readouterr())

    return run_here


def spotted(rng, spot=True):
    picture = texture(rng)
    if spot:
        picture[30:60, 20:50] = (250, 20, 20)
    return picture


def image_folder(folder, names, seed=2):
    """Images of these names, every other one with a red square."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(spotted(rng, number % 2 == 1)).save(path, format="PNG")
    return folder


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def rows_of(output):
    if (output / "scores.jsonl").exists():
        lines = (output / "scores.jsonl").read_text().splitlines()
        return [json.loads(line, parse_constant=no_constant) for line in lines]
    if not (output / "scores.csv").exists():
        return []
    content = (output / "scores.csv").read_bytes().decode("utf-8", "surrogateescape")
    return list(csv.DictReader(io.StringIO(content, newline="")))


def names_of(output):
    return [str(Path(row["image"])) for row in rows_of(output)]


def pictures_of(output, kind="heat-maps"):
    folder = output / kind
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_bad_images_are_reported_and_skipped(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", ["a.png", "c.png", "f.png", "z.png"])
    (folder / "b.png").write_text("hello")
    (folder / "d.png").write_bytes(b"")
    _truncated(folder / "e.png")
    _plain(folder / "g.png", 20)
    Image.new("1", (20_000, 20_000)).save(folder / "h.png")  # of 50 kB
    (folder / "i.png").symlink_to("nowhere.png")
    output, report = tmp_path / "out", tmp_path / "report"
    done = here("score", ready_model, folder, "-o", output, "--report", report)
    assert done.returncode == 3
    rows = rows_of(output)
    assert names_of(output) == [str(folder / f"{name}.png") for name in "abcdefghiz"]
    reasons = {
        "b": "b.png is not an image",
        "d": "d.png is not an image",
        "e": "cannot read image",
        "g": "20x20 pixels, less than one patch of 64x64",
        "h": "--max-pixels",
        "i": "No such file",
    }
    stderr = done.stderr.splitlines()
    assert len(stderr) == len(reasons)
    for line, (name, reason) in zip(stderr, reasons.items(), strict=True):
        assert line.startswith("error: ")
        assert f"{name}.png" in line
        assert reason in line
    for row in rows:
        name = Path(row["image"]).stem
        assert reasons.get(name, "") in row["error"]
        assert bool(row["error"]) == (row["score"] == "") == (name in reasons)
    assert "scored 4 images" in done.stdout
    assert "6 could not be read" in done.stdout
    assert pictures_of(output) == ["a.png", "c.png", "f.png", "z.png"]
    page = (report / "index.html").read_text()
    assert all(reason in page for reason in ("b.png is not an image", "--max-pixels"))
    assert here("score", ready_model, folder / "a.png", "-o", output).returncode == 0


def test_scores_are_the_detectors(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", [f"{number:02}.png" for number in range(20)])
    output = tmp_path / "out"
    done = here(
        *("score", ready_model, folder, "-o", output, "--format", "jsonl"),
        *("--maps", "npy", "--false-alarm-rate", "0.25"),
    )
    assert done.returncode == 0, done.stderr
    detector = PatchSVDD.load(ready_model)
    expected = detector.score(folder)
    rows = rows_of(output)
    assert [row["score"] for row in rows] == expected.image_scores.tolist()
    assert [row["p_value"] for row in rows] == detector.p_values(expected.image_scores).tolist()
    threshold = detector.threshold(0.25)
    assert {row["threshold"] for row in rows} == {threshold}
    assert [row["verdict"] for row in rows] == [
        "anomalous" if score > threshold else "normal" for score in expected.image_scores.tolist()
    ]
    assert all(row["verdict"] == "anomalous" for row in rows[1::2])
    for number, row in enumerate(rows):
        stored = np.load(output / "maps" / f"{number:02}.npy")
        assert np.array_equal(stored, expected.anomaly_map[number].numpy())
        if row["verdict"] == "anomalous":
            assert row["level"] in ("K64", "K32")
            assert row["regions"][0]["peak"] == row["score"]


ODD_NAMES = (
    'new\nline, "quoted".png',
    os.fsdecode(b"no \xff\xfe text.png"),
    "=1+1.png",
    "\x1b]0;title\x07.png",
    "画像.png",
    "[/bold] markup [red].png",
    "x" * 251 + ".png",
    "a.jpg",
    "a.jpg.png",
    "A.PNG",
    "a.png",
    "a.npy/b.png",
    "a.tiff.png/b.png",
)


@pytest.mark.parametrize(("table", "maps"), [("csv", "png"), ("jsonl", "tiff"), ("parquet", "npy")])
def test_files_of_any_name(here, ready_model, tmp_path, monkeypatch, table, maps):
    if table == "parquet":
        pytest.importorskip("pyarrow")
    image_folder(tmp_path / "in", ODD_NAMES)
    monkeypatch.chdir(tmp_path / "in")
    listed = os.fsencode("\n".join(name for name in ODD_NAMES if "\n" not in name))
    output = tmp_path / "[/out]"  # what markup would make an error
    arguments = ("score", ready_model, ODD_NAMES[0], "-", "-o", output)
    arguments += ("--format", table, "--maps", maps)
    done = here(*arguments, listed=listed)
    assert done.returncode == 0, done.stderr
    assert "see " + str(output) in done.stdout
    assert names_of(output) == list(ODD_NAMES)
    heat_maps = pictures_of(output)
    assert len(heat_maps) == len(pictures_of(output, "maps")) == len(ODD_NAMES)
    assert all(name.isprintable() for name in heat_maps)
    before = rows_of(output)
    done = here(*arguments, "--resume", listed=listed)
    assert "scored 0 images" in done.stdout
    assert rows_of(output) == before
    if table == "parquet":
        from pyarrow import parquet

        scores = parquet.read_table(output / "scores.parquet")["score"].to_pylist()
        assert scores == [row["score"] for row in before]


def test_listed_paths_write_inside_of_output_only(here, ready_model, tmp_path, monkeypatch):
    names = ["x.png", "work/x.png", "work/deep/x.png"]
    image_folder(tmp_path, names)
    monkeypatch.chdir(tmp_path / "work")
    before = sorted(tmp_path.rglob("*"))
    paths = ["../x.png", f"{tmp_path}/x.png", "deep/../../x.png", "x.png", "deep/x.png", "./x.png"]
    output = tmp_path / "out"
    done = here("score", ready_model, "-", "-o", output, listed="\n".join(paths).encode())
    assert done.returncode == 0, done.stderr
    assert len(rows_of(output)) == 6
    assert len(pictures_of(output)) == 5  # ./x.png is x.png
    assert [path for path in sorted(tmp_path.rglob("*")) if output not in path.parents] == sorted(
        [*before, output]
    )


def test_own_pictures_are_not_scored(here, ready_model, tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "in", ["a.png", "z.png"])
    monkeypatch.chdir(folder)
    for _ in range(2):
        done = here("score", ready_model, ".", "--maps", "png")
        assert done.returncode == 0, done.stderr
        assert names_of(folder / "scores") == ["a.png", "z.png"]
    assert here("score", ready_model, "**/*.png").returncode == 0
    assert names_of(folder / "scores") == ["a.png", "z.png"]


def test_resume_does_what_is_left(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", [f"{number}.png" for number in range(6)])
    output = tmp_path / "out"
    arguments = ("score", ready_model, folder, "-o", output)
    assert here(*arguments).returncode == 0
    whole, rows = (output / "scores.csv").read_bytes(), rows_of(output)
    lines = whole.splitlines(keepends=True)
    (output / "scores.csv").write_bytes(b"".join(lines[:3]) + lines[3][:-9])
    (output / "heat-maps" / "0.png").unlink()  # to see that it is not made again
    broken = folder / "1.png"
    content = broken.read_bytes()
    broken.write_text("broken")
    done = here(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert "scored 4 images" in done.stdout
    assert (output / "scores.csv").read_bytes() == whole
    assert not (output / "heat-maps" / "0.png").exists()

    assert here(*arguments).returncode == 3
    assert rows_of(output)[1]["error"] != ""
    broken.write_bytes(content)
    done = here(*arguments, "--resume")  # what failed is tried again
    assert "scored 1 images" in done.stdout
    assert sorted(rows_of(output), key=str) == sorted(rows, key=str)

    other = here(*arguments, "--resume", "--false-alarm-rate", "0.5")
    assert "another model or rate" in one_line_error(other)
    assert here(*arguments, "--resume").returncode == 0


def test_a_full_disk_ends_in_one_line_and_resume_goes_on(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", [f"{number}.png" for number in range(8)])
    (folder / "3.png").write_text("broken")
    output = tmp_path / "out"
    arguments = ("score", ready_model, folder, "-o", output, "--format", "jsonl")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Neither a table of all rows nor a heat map fits.
    for size, options, message in (
        (3_000, ["--no-heat-maps"], "scores.jsonl"),
        (9_000, [], "heat-maps/0.png"),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            done = here(*arguments, *options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: cannot write ")
        assert message in last
        assert last.endswith("File too large")
        assert "Traceback" not in done.stderr
        part = rows_of(output)
        assert len(part) < 8
        assert not list(output.rglob("*.partial"))
        done = here(*arguments, *options, "--resume")
        assert done.returncode == 3
        rows = rows_of(output)
        assert sorted(names_of(output)) == [str(folder / f"{number}.png") for number in range(8)]
        assert [row for row in part if "error" not in row] == rows[: len(part)][
            : sum("error" not in row for row in part)
        ]
    assert len(pictures_of(output)) == 7


def test_the_limit_of_pixels_can_be_moved(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", ["a.png"])
    arguments = ("score", ready_model, folder, "-o", tmp_path / "out")
    for limit, refused in ((9_215, True), (4_000, True), (9_216, False), (0, False)):
        done = here("--max-pixels", limit, *arguments)
        assert done.returncode == (3 if refused else 0)
        if refused:
            assert f"more than the limit of {limit:,} (--max-pixels" in one_line_error(done)
    assert here("--max-pixels", "-1", *arguments).returncode == 2


def test_one_training_image_gives_scores_without_a_verdict(here, tmp_path):
    detector = PatchSVDD(image_size=96, mean="channel", embedding_dim=16, device="cpu")
    detector.fit([texture(np.random.default_rng(0))], encoder=detector.untrained_encoder())
    detector.save(tmp_path / "one.safetensors")
    folder = image_folder(tmp_path / "in", ["a.png", "b.png"])
    arguments = ("score", tmp_path / "one.safetensors", folder, "-o", tmp_path / "out")
    for options in ([], ["--resume"]):
        assert here(*arguments, *options, "--maps", "png").returncode == 0
        for row in rows_of(tmp_path / "out"):
            assert float(row["score"]) > 0
            assert row["p_value"] == row["threshold"] == row["verdict"] == row["error"] == ""
    assert pictures_of(tmp_path / "out", "maps") == ["a.png", "b.png"]


def test_wrong_usage_of_score_and_watch(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", ["a.png"])
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (("score", ready_model, folder, "--format", "xml"), 1, "--format must be one of"),
        (("score", ready_model, folder, "--maps", "bmp"), 1, "--maps must be one of"),
        (("score", ready_model, folder, "-o", ready_model), 1, "is a file"),
        (("score", ready_model, empty, "-o", tmp_path / "o"), 1, "holds no images"),
        (("score", ready_model, "*.gif", "-o", tmp_path / "o"), 1, "holds no images"),
        (("score", ready_model, folder, "--false-alarm-rate", "0.01"), 1, "at the lowest"),
        (("score", ready_model, "-", "-o", tmp_path / "o"), 1, "one path a line"),
        (("score", ready_model), 2, "Missing argument"),
        (("watch", ready_model, tmp_path / "missing"), 1, "is not a folder"),
        (("watch", ready_model, folder, "-o", folder / "scores"), 1, "which is watched"),
        (("watch", ready_model, folder, "--format", "parquet"), 2, "has no end"),
        (("watch", ready_model, folder, "--interval", "0"), 2, "--interval"),
    ]
    for arguments, status, message in cases:
        done = here(*arguments, listed=b"a.png\0b.png\0")
        assert done.returncode == status, arguments
        assert message in one_line_error(done)


def started(*arguments, **options):
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_until(condition, *processes):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def ended(process):
    """Its output and errors; its standard input stays open until it has ended by itself."""
    process.wait(timeout=60)
    with process.stdout, process.stderr:
        return process.stdout.read(), process.stderr.read()


def test_a_run_is_gone_on_with_after_a_kill_and_after_ctrl_c(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", [f"{number}.png" for number in range(5)])
    paths = "".join(f"{folder}/{number}.png\n" for number in range(5))
    assert here("score", ready_model, folder, "-o", tmp_path / "whole").returncode == 0
    expected = rows_of(tmp_path / "whole")
    killed, interrupted = tmp_path / "killed", tmp_path / "interrupted"
    processes = [
        started("score", ready_model, "-", "-o", output, stdin=subprocess.PIPE)
        for output in (killed, interrupted)
    ]
    for process in processes:
        process.stdin.write(paths[: len(paths) * 3 // 5])
        process.stdin.flush()
    for output in (killed, interrupted):  # although the list has not ended
        wait_until(lambda output=output: len(rows_of(output)) == 3, *processes)
    processes[0].kill()
    processes[1].send_signal(signal.SIGINT)
    ended(processes[0])
    assert ended(processes[1]) == ("", "interrupted\n")
    assert processes[1].returncode == 130
    with (killed / "scores.csv").open("ab") as file:
        file.write(b"half a row,0.12")
    for process, output in zip(processes, (killed, interrupted), strict=True):
        process.stdin.close()
        assert rows_of(output)[:3] == expected[:3]
        done = here("score", ready_model, "-", "-o", output, "--resume", listed=paths.encode())
        assert "scored 2 images" in done.stdout
        assert rows_of(output) == expected
        assert len(pictures_of(output)) == 5


def test_watch_scores_what_arrives_until_it_is_ended(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", ["done.png", "sub/there.png"])
    outputs = [tmp_path / "interrupted", tmp_path / "terminated"]
    for output in outputs:
        assert here("score", ready_model, folder / "done.png", "-o", output).returncode == 0
    processes = [
        started("watch", ready_model, folder, "-o", output, "--interval", "0.1")
        for output in outputs
    ]

    def all_have(*names):
        good = [
            {Path(row["image"]).name for row in rows_of(output) if not row["error"]}
            for output in outputs
        ]
        return all(set(names) <= found for found in good)

    wait_until(lambda: all_have("done.png", "there.png"), *processes)
    content = (folder / "done.png").read_bytes()
    (folder / "slow.png").write_bytes(content[:3000])
    odd = folder / os.fsdecode(b"odd\n\xff[x].png")
    odd.write_bytes(content)
    (folder / "bad.png").write_text("no image")
    wait_until(lambda: all_have(odd.name), *processes)
    with (folder / "slow.png").open("ab") as file:
        file.write(content[3000:])
    wait_until(lambda: all_have("slow.png"), *processes)
    ends = ((signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"))
    for process, (number, _, _) in zip(processes, ends, strict=True):
        process.send_signal(number)
    for process, (_, status, word) in zip(processes, ends, strict=True):
        stdout, stderr = ended(process)
        assert process.returncode == status
        errors = stderr.splitlines()
        assert errors.pop() == word
        assert errors
        assert all(line.startswith("error: ") and ".png" in line for line in errors)
        lines = stdout.splitlines()
        assert "watching" in lines.pop(0)
        assert [line for line in lines if "odd\\n\\udcff[x].png" in line]
        assert [line for line in lines if "slow.png" in line]
        assert not [line for line in lines if "done.png" in line]
    for output in outputs:
        good = [Path(row["image"]).name for row in rows_of(output) if not row["error"]]
        assert sorted(good) == sorted(["done.png", "there.png", odd.name, "slow.png"])
        assert {Path(row["image"]).name for row in rows_of(output) if row["error"]} >= {"bad.png"}


def _plain(path, side):
    Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(path)


def _truncated(path):
    pixels = np.random.default_rng(0).integers(256, size=(90, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:5000])
