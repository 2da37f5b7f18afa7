"""`train --together`, and the commands with a model of several categories."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from conftest import texture
from patchsvdd_fast import PatchSVDD
from patchsvdd_fast.detector.categories import CategoryDetectors, open_detectors
from processes import one_line_error

FAST = [
    *("--mode", "dense", "--resize", "96", "--steps", "2", "--check-every", "0"),
    *("--initialization", "kaiming", "--device", "cpu"),
]


@pytest.fixture
def data(category_folder, tmp_path):
    """Two categories: one of stripes, the other brighter and coarser."""
    for name in ("fine", "coarse"):
        shutil.copytree(category_folder, tmp_path / "data" / name)
    for path in (tmp_path / "data/coarse").rglob("*.png"):
        if "ground_truth" not in path.parts:
            image = Image.open(path).crop((0, 0, 48, 48)).resize((96, 96))
            image.point(lambda value: value // 2 + 120).save(path)
    return tmp_path / "data"


@pytest.fixture
def model(data, tmp_path, here):
    path = tmp_path / "both.safetensors"
    done = here("train", data, "--together", "-o", path, *FAST)
    assert done.returncode == 0, done.stderr
    for line in (
        r"fine: layout MVTec AD, 4 images to train on",
        r"wrote \S+: 2 training steps, 2 categories, \d+ s",
        r"coarse: 4 images, banks of 36 and 1,156 patches",
        r"fine: threshold on the image score: \S+, exceeded by at most 0.2 of good images",
    ):
        assert re.search(line, done.stdout), done.stdout
    assert re.search(r"coarse +│ 3\+3 .*fine +│ 3\+3 .*mean +│ 6\+6 ", done.stdout, re.DOTALL)
    return path


def new_images(count):
    return [texture(np.random.default_rng(number)) for number in range(count)]


def rows_of(folder):
    with (folder / "scores.csv").open() as file:
        return list(csv.DictReader(file))


def test_score_says_which_category_it_compared_with(model, data, tmp_path, here):
    out, report = tmp_path / "scores", tmp_path / "report"
    images = (data / "fine/test", data / "coarse/test")
    done = here("score", model, *images, "-o", out, "--report", report, "--maps", "png")
    assert done.returncode == 0, done.stderr
    assert re.search(r"scored 12 images in \S+ s \(coarse 6, fine 6\), \d+ anomalous", done.stdout)
    assert f"report: {report / 'index.html'}" in done.stdout.replace("\n", "")
    rows = rows_of(out)
    assert len(rows) == 12
    detectors = CategoryDetectors.load(model, "cpu")
    for row in rows:
        folder = "fine" if "/fine/" in row["image"] else "coarse"
        assert row["category"] == folder
        result = next(detectors[folder].score_stream([row["image"]]))
        assert float(row["score"]) == result.score
        assert float(row["threshold"]) == result.threshold
    start = (report / "index.html").read_text()
    assert f"Model: {model}. Images: {images[0]} {images[1]}." in start
    for name in ("fine", "coarse"):
        assert (
            f'<a href="{name}/index.html">{name}</a></th><td data-heading="images">6</td>' in start
        )
        page = (report / name / "index.html").read_text()
        assert page.count(f"data/{name}/test") >= 6

    again = here("score", model, *images, "-o", out, "--resume")
    assert again.stdout.startswith("scored 0 images")
    other = here("score", model, data, "-o", out, "--resume", "--false-alarm-rate", "0.5")
    assert "was written with threshold" in one_line_error(other)
    assert rows_of(out) == rows
    done = here("score", model, data / "fine/test/spot/0.png", "-o", tmp_path / "one")
    assert re.search(r"spot/0.png +fine: anomalous, ", done.stdout)


def test_the_category_may_be_given_or_found(model, data, tmp_path, here):
    loose = tmp_path / "loose"
    loose.mkdir()
    for name in ("fine", "coarse"):
        shutil.copy(data / name / "test/good/0.png", loose / f"{name}.png")

    def categories(*options):
        folder = tmp_path / f"scores{len(list(tmp_path.iterdir()))}"
        done = here("score", model, loose, "-o", folder, "--format", "jsonl", *options)
        assert done.returncode == 0, done.stderr
        lines = (folder / "scores.jsonl").read_text().splitlines()
        return {row["image"].split("/")[-1]: row["category"] for row in map(json.loads, lines)}

    assert categories() == {"fine.png": "fine", "coarse.png": "coarse"}
    assert categories("--category", "coarse") == {"fine.png": "coarse", "coarse.png": "coarse"}
    refused = here("score", model, loose, "-o", tmp_path / "none", "--category", "third")
    assert one_line_error(refused) == "error: no category 'third', only coarse, fine"
    assert not (tmp_path / "none/scores.csv").exists()


def test_parquet_has_the_category(model, data, tmp_path, here):
    parquet = pytest.importorskip("pyarrow.parquet")
    done = here("score", model, data / "fine/test", "-o", tmp_path / "p", "--format", "parquet")
    assert done.returncode == 0, done.stderr
    table = parquet.read_table(tmp_path / "p/scores.parquet")
    assert table.column("category").to_pylist() == ["fine"] * 6


def test_commands_for_one_category(model, data, tmp_path, here):
    spot = data / "coarse/test/spot/0.png"
    for command in (
        ("explain", model, spot, "-o", tmp_path / "why"),
        ("export", model, "-o", tmp_path / "detector.onnx"),
        (
            *("evaluate", "--normal", data / "fine/test/good", "--model", model),
            *("--anomalous", data / "fine/test/spot"),
        ),
        ("update", model, "--remove", "0"),
    ):
        message = one_line_error(here(*command))
        assert "coarse, fine" in message and "--category" in message
    done = here("explain", model, spot, "-o", tmp_path / "why", "--category", "coarse")
    assert done.returncode == 0, done.stderr
    assert "nearest at distance" in done.stdout
    info = here("info", model).stdout
    assert "coarse: bank K64" in info and "fine: threshold" in info

    done = here("update", model, "--remove", "0", "--category", "fine")
    assert "4 training images of fine before, 3 now" in done.stdout
    new = tmp_path / "new"
    new.mkdir()
    for number, pixels in enumerate(new_images(3)):
        Image.fromarray(pixels).save(new / f"{number}.png")
    done = here("update", model, "--replace", new, "--category", "third")
    assert "0 training images of third before, 3 now" in done.stdout
    changed = open_detectors(model, "cpu")
    assert {name: one.num_images for name, one in changed.items()} == {
        **{"coarse": 4, "fine": 3, "third": 3}
    }
    done = here("export", model, "--encoder-only", "-o", tmp_path / "encoder.onnx")
    assert done.returncode == 0, done.stderr
    refused = here("update", model, "--replace", tmp_path, "--category", "a/b")
    assert "a category's name must be that of a folder" in one_line_error(refused)
    missing = here("update", model, "--remove", "0", "--category", "fourth")
    assert "no category 'fourth', only coarse, fine, third" in one_line_error(missing)


def test_models_of_several_are_merged(model, data, tmp_path, here):
    detectors = CategoryDetectors.load(model, "cpu")
    line2 = CategoryDetectors(
        {"fine": detectors["fine"].refit(new_images(3)), "third": detectors["coarse"]}
    )
    line2.save(tmp_path / "line2.safetensors")

    def update(*options):
        output = ("-o", tmp_path / "out.safetensors", "--overwrite")
        return here("update", model, "--merge", tmp_path / "line2.safetensors", *output, *options)

    done = update()
    assert done.returncode == 0, done.stderr
    assert "4 training images of fine before, 7 now" in done.stdout
    assert "0 training images of third before, 4 now" in done.stdout
    merged = CategoryDetectors.load(tmp_path / "out.safetensors", "cpu")
    assert {name: one.num_images for name, one in merged.items()} == {
        **{"coarse": 4, "fine": 7, "third": 4}
    }
    done = update("--category", "coarse", "--merge-category", "fine", "--remove-category", "fine")
    assert done.returncode == 0, done.stderr
    assert "without fine\n4 training images of coarse before, 7 now" in done.stdout
    message = one_line_error(update("--category", "coarse"))
    assert "has several categories, fine, third: --merge-category names one" in message
    for names in (("coarse", "fine"), ("none",)):
        options = [word for name in names for word in ("--remove-category", name)]
        message = one_line_error(here("update", model, *options))
        assert "only" in message
    assert CategoryDetectors.load(model, "cpu").keys() == {"coarse", "fine"}


def test_going_on_keeps_the_choice_and_reports_none_of_another_run(model, data, tmp_path, here):
    out, report = tmp_path / "scores", tmp_path / "report"
    spot = data / "coarse/test/spot"
    chosen = ("score", model, "-o", out, "--category", "coarse")
    assert here(*chosen, spot / "0.png").returncode == 0
    message = one_line_error(here("score", model, "-o", out, "--resume", spot))
    assert "was begun with --category coarse: go on so" in message
    assert "scored 2 images" in here(*chosen, spot, "--resume").stdout

    everything = ("score", model, "-o", out, "--report", report, "--overwrite")
    assert here(*everything, data / "fine/test/spot", spot).returncode == 0
    mine = report / "mine/index.html"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert here(*everything, spot).returncode == 0
    assert sorted(path.name for path in report.iterdir()) == ["coarse", "index.html", "mine"]


def test_what_a_category_lacks_is_said(model, data, tmp_path, here):
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(data / "fine/test/good/0.png", one)
    assert here("update", model, "--replace", one, "--category", "only").returncode == 0
    spot = data / "fine/test/spot/0.png"
    done = here("score", model, spot, "-o", tmp_path / "none", "--masks")
    assert "which only of this model has not" in one_line_error(done)
    done = here("score", model, spot, "-o", tmp_path / "none", "--false-alarm-rate", "0.1")
    assert one_line_error(done).startswith("error: coarse: 4 training images can promise")


def test_evaluate_takes_each_categorys_own(model, data, tmp_path, here):
    done = here("evaluate", data, "--model", model, "--json", tmp_path / "all.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "all.json").read_text())["results"]
    assert [result["category"] for result in results] == ["coarse", "fine"]
    good, bad = data / "fine/test/good", data / "fine/test/spot"
    folders = ("evaluate", "--normal", good, "--anomalous", bad, "--model", model)
    assert "no category 'spot', only coarse, fine" in one_line_error(here(*folders))
    done = here(*folders, "--category", "fine", "--json", tmp_path / "own.json")
    assert done.returncode == 0, done.stderr
    (own,) = json.loads((tmp_path / "own.json").read_text())["results"]
    (fine,) = (result for result in results if result["category"] == "fine")
    for combination, values in fine["percent"].items():
        assert own["percent"][combination]["detection"] == values["detection"]
    several = here("evaluate", data, "--model", model, "--category", "fine")
    assert "images of one category" in one_line_error(several)


def test_a_single_model_has_no_categories(ready_model, data, tmp_path, here):
    image = data / "fine/test/spot/0.png"
    for command in (
        ("score", ready_model, image, "-o", tmp_path / "s", "--category", "fine"),
        ("evaluate", data / "fine", "--model", ready_model, "--category", "fine"),
        ("explain", ready_model, image, "-o", tmp_path / "e", "--category", "fine"),
        ("update", ready_model, "--remove", "0", "-o", tmp_path / "u", "--category", "fine"),
    ):
        assert "no categories" in one_line_error(here(*command)), command
    assert not (tmp_path / "u").exists()


def test_folders_of_good_images_are_categories_too(data, tmp_path, here):
    plain = tmp_path / "plain"
    for name in ("one", "two"):
        shutil.copytree(data / "fine/train/good", plain / name)
    (plain / "empty").mkdir()
    model = tmp_path / "plain.safetensors"
    done = here("train", plain, "--together", "-o", model, *FAST)
    assert done.returncode == 0, done.stderr
    assert "det. AUROC" not in done.stdout  # nothing to test on
    assert list(CategoryDetectors.load(model, "cpu")) == ["one", "two"]
    again = here("train", plain, "--together", "-o", model, *FAST)
    assert "exists" in one_line_error(again)
    done = here("train", plain, "--together", "-o", model, *FAST, "--resume")
    assert "is done already" in done.stdout
    for folder in (plain / "one", data / "fine"):
        message = one_line_error(here("train", folder, "--together", "-o", tmp_path / "x", *FAST))
        assert "must hold at least two categories, or folders of good images" in message
    mixed = tmp_path / "mixed"
    shutil.copytree(data, mixed)
    shutil.copytree(data / "fine/train/good", mixed / "plain")
    done = here("train", mixed, "--together", "-o", tmp_path / "mixed.st", *FAST)
    assert list(open_detectors(tmp_path / "mixed.st", "cpu")) == ["coarse", "fine", "plain"]


def test_folders_of_other_images_are_no_categories(data, tmp_path, here):
    for names in (("good", "bad"), ("train", "test", "ground_truth")):
        folder = tmp_path / names[-1]
        for name in names:
            shutil.copytree(data / "fine/test/spot", folder / "all" / name)
        message = one_line_error(here("train", folder / "all", "--together", "-o", tmp_path / "x"))
        assert "would be trained on as a category of good images" in message
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_gone_on_with_is_said(model, data, ready_model, tmp_path, here):
    shutil.copytree(data / "fine", data / "third")
    for output in (model, ready_model):
        done = here("train", data, "--together", "-o", output, *FAST, "--resume")
        assert "cannot be gone on with: --overwrite trains a new one" in one_line_error(done)
    done = here("train", data / "fine", "-o", model, *FAST, "--resume")
    assert f"{model} is a model of coarse, fine" in one_line_error(done)


def test_links_to_categories_keep_their_names(data, tmp_path, here):
    links, model = tmp_path / "links", tmp_path / "links.st"
    links.mkdir()
    for name in ("fine", "coarse"):
        (links / f"my_{name}").symlink_to(data / name)
    assert here("train", links, "--together", "-o", model, *FAST).returncode == 0
    done = here("evaluate", links, "--model", model)
    assert done.returncode == 0, done.stderr


def test_reports_in_the_way_are_found_before_anything_is_scored(model, data, tmp_path, here):
    out, report = tmp_path / "scores", tmp_path / "report"
    assert here("score", model, data / "fine/test", "-o", out).returncode == 0
    before = rows_of(out)
    (report / "coarse").mkdir(parents=True)
    (report / "coarse/index.html").write_text("mine")
    for option in ("--overwrite", "--resume"):
        done = here("score", model, data, "-o", out, "--report", report, option)
        assert "coarse/index.html" in one_line_error(done)
    assert rows_of(out) == before
    assert (report / "coarse/index.html").read_text() == "mine"


def test_names_that_spreadsheets_would_take_for_formulas(data, tmp_path, here):
    for name in ("fine", "coarse"):
        (data / name).rename(data / f"-{name}")
    model, out = tmp_path / "odd.st", tmp_path / "scores"
    assert here("train", data, "--together", "-o", model, *FAST).returncode == 0
    for option in ((), ("--resume",)):
        done = here("score", model, data / "-fine/test", "-o", out, *option)
        assert done.returncode == 0, done.stderr
    assert {row["category"] for row in rows_of(out)} == {"./-fine"}


def test_training_together_goes_on_after_an_interrupt(data, tmp_path, here, monkeypatch):
    """The checkpoint is that of the one training, and the result the same as in one go."""
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    assert here("train", data, "--together", "-o", whole, *FAST).returncode == 0
    fit = CategoryDetectors.fit.__func__

    def interrupted(cls, *given, on_step, **options):
        def stop(step):
            on_step(step)
            raise KeyboardInterrupt

        return fit(cls, *given, on_step=stop, **options)

    with monkeypatch.context() as patched:
        patched.setattr(CategoryDetectors, "fit", classmethod(interrupted))
        assert here("train", data, "--together", "-o", parts, *FAST).returncode == 130
    assert (tmp_path / "parts.safetensors.checkpoint").exists()
    done = here("train", data, "--together", "-o", parts, *FAST, "--resume")
    assert "going on from" in done.stdout
    one, other = (CategoryDetectors.load(path, "cpu") for path in (whole, parts))
    assert {name: made.threshold_ for name, made in one.items()} == {
        name: made.threshold_ for name, made in other.items()
    }
    assert isinstance(other["fine"], PatchSVDD)
