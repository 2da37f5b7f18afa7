"""The command line, run in a process of its own as a user would type it."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import plain_image, script_environment, truncated_image
from patchsvdd_fast import PatchSVDD
from patchsvdd_fast.cli import training_sets as commands
from patchsvdd_fast.cli.training_sets import TrainingSet, training_sets
from patchsvdd_fast.detector.evaluation import evaluate_category
from patchsvdd_fast.files.categories import Category
from processes import COMMAND, one_line_error

FAST = [
    *("--mode", "faithful", "--resize", "96", "--steps", "2", "--batch-size", "4"),
    *("--initialization", "kaiming", "--learning-rate", "3e-4"),
]


def run(*arguments, cwd=None):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        env=os.environ | {"COLUMNS": "200"},
    )


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
    picture = np.asarray(Image.open(pictures[-1])).astype(int)
    panels = [picture[68:324, left : left + 256] for left in range(8, 1064, 264)]
    with Image.open(category_folder / "test/spot/2.png") as image:
        assert np.array_equal(panels[0], np.asarray(image.resize((256, 256))))
    defect = np.s_[90:150, 63:123]  # where the spot is, see category_folder
    changed = np.abs(panels[1] - panels[0]).mean(axis=-1)
    assert changed[defect].mean() > 20 and (panels[3][defect] == 255).mean() > 0.5

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
        *("evaluate", category_folder.parent, "--untrained", "--resize", "96", "--json", results),
        *("--report", tmp_path / "report"),
    )
    assert done.returncode == 0, done.stderr
    start = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    for name in ("stripes", "unmasked"):
        assert f'<a href="{name}/index.html">' in start
        assert (tmp_path / "report" / name / "index.html").is_file()
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
    assert "none of faithful, dense" in one_line_error(
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
    other = tmp_path / "other.safetensors"
    refused = run("train", category_folder, "-o", other, "--log", tmp_path / "log.txt")
    assert ".jsonl or .csv" in one_line_error(refused)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "holds no images"),
        (lambda folder: (folder / "a.png").write_text("hello"), "a.png is not an image"),
        (lambda folder: truncated_image(folder / "a.png"), "cannot read image"),
        (lambda folder: plain_image(folder / "a.png", 20), "20x20 pixels, less than one patch"),
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
    plain_image(good_folder / "wide.png", 120)
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


def test_a_model_is_replaced_only_when_asked(here, ready_model, category_folder, tmp_path):
    output = tmp_path / "model.safetensors"
    shutil.copy(ready_model, output)
    before = output.read_bytes()
    train = ("train", category_folder, "-o", output, "--resize", "96", "--encoder", ready_model)
    assert "exists already: --overwrite" in one_line_error(here(*train))
    assert f"{output} is done already" in here(*train, "--resume").stdout
    update = ("update", ready_model, "--add", category_folder / "test/good", "-o", output)
    assert "exists already" in one_line_error(here(*update))
    assert "gone does not exist" in one_line_error(
        here("update", output, "--add", tmp_path / "gone")
    )
    assert output.read_bytes() == before
    for command in (train, update):
        done = here(*command, "--overwrite")
        assert done.returncode == 0, done.stderr
        assert output.read_bytes() != before
        before = output.read_bytes()
    data = tmp_path / "data"
    shutil.copytree(category_folder, data / "first")
    models = tmp_path / "models"
    models.mkdir()
    (models / "first.safetensors").write_text("of another run")
    refused = one_line_error(here("train", data, "-o", models, "--encoder", ready_model))
    assert "first.safetensors: --overwrite replaces them, --resume makes" in refused


def test_a_folder_that_is_not_there_is_told_before_anything_else(here, tmp_path):
    done = here("train", tmp_path / "nowhere")
    assert one_line_error(done).endswith("nowhere does not exist")
    assert done.stdout == ""


def test_outputs_of_one_file_are_replaced_only_when_asked(
    here, ready_model, category_folder, tmp_path
):
    log, model = tmp_path / "log.jsonl", tmp_path / "model.safetensors"
    log.write_text('{"step": 1}\n')
    done = here("train", category_folder, "-o", model, *FAST, "--log", log)
    assert "log.jsonl exists already" in one_line_error(done)
    assert log.read_text() == '{"step": 1}\n'
    onnx = tmp_path / "encoder.onnx"
    onnx.write_text("mine")
    refused = here("export", ready_model, "-o", onnx)
    assert "encoder.onnx exists already" in one_line_error(refused)
    assert onnx.read_text() == "mine"


def test_a_demo_takes_the_place_of_nothing_of_the_users(here, tmp_path):
    output = tmp_path / "demo"
    output.mkdir()
    (output / "model.safetensors").write_text("mine")
    for options in ([], ["--overwrite"]):
        done = here("demo", "-o", output, "--steps", "1", *options)
        assert "model.safetensors" in one_line_error(done)
    assert [path.name for path in output.iterdir()] == ["model.safetensors"]
    assert (output / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands(shell):
    script = (
        "import sys; sys.argv = ['patchsvdd']; from patchsvdd_fast.__main__ import main; main()"
    )
    environment = script_environment() | {
        "_PATCHSVDD_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "patchsvdd ev",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "patchsvdd ev",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert "evaluate" in done.stdout, done.stderr
    assert "demo" not in done.stdout
