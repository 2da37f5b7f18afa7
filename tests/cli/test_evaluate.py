"""`patchsvdd evaluate` and `train` on data sets as they come: masks, layouts, what fails."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from patchsvdd_fast import PatchSVDD
from patchsvdd_fast.files.categories import Category
from processes import one_line_error

UNTRAINED = ("--untrained", "--mode", "dense", "--resize", "96")


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def category(root, good="good", bad="spot", most=255, suffix="_mask.png"):
    """Noise, and squares of it that are a little brighter; `most`: what masks mark them with."""
    rng = np.random.default_rng(0)
    for i in range(3):
        for part in (f"train/{good}", f"test/{good}", f"test/{bad}"):
            image = rng.integers(60, 120, (128, 128, 3)).astype(np.uint8)
            if part.endswith(bad):
                mask = np.zeros((128, 128), np.uint8)
                mask[30:70, 20 * i :][:, :40] = most
                image[mask > 0] += 25
                write(root / f"ground_truth/{bad}/{i}{suffix}", mask)
            write(root / part / f"{i}.png", image)
    return root


@pytest.fixture
def evaluated(here, tmp_path):
    """Runs the command; returns what it did, and the results by category."""

    def run(*arguments):
        path = tmp_path / "results.json"
        path.unlink(missing_ok=True)
        done = here("evaluate", *arguments, *UNTRAINED, "--json", path)
        found = json.loads(path.read_text()) if path.exists() else {"results": []}
        return done, {result["category"]: result for result in found["results"]}

    return run


def test_layouts_and_masks_give_the_same_figures(evaluated, tmp_path):
    category(tmp_path / "all/mvtec")
    category(tmp_path / "all/visa", most=1, suffix=".png")
    category(tmp_path / "all/btad", good="ok", bad="ko", suffix=".BMP")
    done, results = evaluated(tmp_path / "all")
    assert (done.returncode, done.stderr) == (0, "")
    assert "btad: layout BTAD, tested with 3 good and 3 anomalous images, 3 of them" in done.stdout
    expected = results["mvtec"]["percent"]
    assert expected["K32"]["segmentation"] > 60
    assert results["visa"]["percent"] == expected
    assert results["btad"]["percent"] == expected

    root = tmp_path / "all/mvtec"
    folders = ("--normal", root / "test/good", "--anomalous", root / "test/spot")
    more = ("--masks", root / "ground_truth/spot", "--train", root / "train/good")
    done, results = evaluated(*folders, *more)
    assert (done.returncode, done.stderr) == (0, "")
    assert results["spot"]["percent"] == expected


def test_one_category_that_fails_does_not_end_the_others(evaluated, tmp_path):
    for name in ("empty", "fine", "none", "odd", "untestable"):
        category(tmp_path / f"all/{name}")
    for path in (tmp_path / "all/empty/ground_truth").rglob("*.png"):
        write(path, np.zeros((128, 128), np.uint8))
    shutil.rmtree(tmp_path / "all/none/ground_truth")
    (tmp_path / "all/odd/ground_truth/spot/1_mask.png").write_text("no image")
    shutil.rmtree(tmp_path / "all/untestable/test/spot")
    done, results = evaluated(tmp_path / "all")
    assert done.returncode == 1
    assert list(results) == ["empty", "fine", "none", "odd"]
    for name, reason in (
        ("empty", "no mask marks anything at 96x96 pixels"),
        ("none", "anomalous images without a mask: 3 of 3"),
        ("odd", "1_mask.png is not an image that can be read"),
    ):
        assert results[name]["percent"]["K32"]["segmentation"] is None
        assert results[name]["percent"]["K32"]["detection"] is not None
        assert reason in results[name]["no_segmentation"]
        assert f"{name}: no segmentation: {results[name]['no_segmentation']}" in done.stdout
    assert results["fine"]["no_segmentation"] is None
    assert (
        "warning: masks of anomalous images that mark nothing at 96x96 pixels: 3 (" in done.stderr
    )
    assert "error: untestable: " in done.stderr
    assert "error: 1 of 5 failed: untestable" in done.stderr
    failed = json.loads((tmp_path / "results.json").read_text())["failed"]
    assert "needs good and anomalous test images" in failed["untestable"]


def test_a_category_without_a_model_is_named(here, ready_model, tmp_path):
    for name in ("a", "b"):
        category(tmp_path / f"all/{name}")
    (tmp_path / "models").mkdir()
    shutil.copy(ready_model, tmp_path / "models/b.safetensors")
    report = tmp_path / "report"
    (tmp_path / "all/b/ground_truth/spot/1_mask.png").write_text("no image")
    done = here(*("evaluate", tmp_path / "all", "--model", tmp_path / "models", "--report", report))
    assert done.returncode == 1
    assert "needs one file for a, found 0" in done.stderr
    assert (report / "b/index.html").exists()
    assert "b: no segmentation: " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--normal", "a"), "both --normal and --anomalous"),
        (("a", "--normal", "a"), "not both"),
        (("--normal", "a", "--anomalous", "b"), "need --train"),
        ((), "give DATA"),
        (("--normal", "a", "--anomalous", "b", "--train", "c"), "is not there: a"),
    ],
)
def test_folders_that_do_not_go_together(here, arguments, message):
    assert message in one_line_error(here("evaluate", *arguments, "--untrained"))


def test_training_takes_no_defects(here, tmp_path):
    root = category(tmp_path / "odd")
    (root / "train/good").rename(root / "train/fine")
    output = ("-o", tmp_path / "model.safetensors", "--resize", "96", "--steps", "1")
    refused = here("train", root, *output)
    assert "no layout that is known" in one_line_error(refused)
    for name in ("0_GT.png", "1.heic", ".hidden.png"):
        (root / "train/fine" / name).write_text("never read")
    done = here("train", root / "train/fine", *output, "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    assert "masks of the images beside them: 1 in " in done.stderr
    assert "files .heic, which are not read: 1 (1.heic)" in done.stderr


def test_layouts_are_listed(here):
    done = here("info", "--layouts")
    assert (done.returncode, done.stderr) == (0, "")
    assert "VisA\n  train       Data/Images/Normal" in done.stdout
    assert "give either" in one_line_error(here("info", "x", "--layouts"))


def test_what_a_model_has_of_its_own_is_no_option(here, ready_model, category_folder):
    evaluation = ("evaluate", category_folder, "--model", ready_model)
    for name, value in (("--resize", "64"), ("--mode", "dense"), ("--seed", "1")):
        done = here(*evaluation, name, value)
        assert done.returncode == 2
        assert f"{name}: a model has its own from training" in one_line_error(done)
    done = here("evaluate", category_folder, "--encoder", "efficientnet_lite0", "--seed", "1")
    assert "--seed is for --untrained" in one_line_error(done)


def test_misses_and_false_alarms_at_the_promised_rate(here, ready_model, category_folder, tmp_path):
    results = tmp_path / "results.json"
    done = here("evaluate", category_folder, "--model", ready_model, "--json", results)
    assert done.returncode == 0, done.stderr
    detector = PatchSVDD.load(ready_model)
    tests = Category(category_folder).test_images()
    called = {True: 0, False: 0}
    for image, label in zip(tests, detector.predict([i.path for i in tests]), strict=True):
        called[image.is_anomalous] += int(label == -1)
    reached = json.loads(results.read_text())["results"][0]["at_threshold"]
    assert reached["false_alarm_rate"] == detector.false_alarm_rate_ == 0.2
    assert reached["threshold"] == detector.threshold_
    assert (reached["missed"], reached["num_anomalous"]) == (3 - called[True], 3)
    assert (reached["false_alarms"], reached["num_good"]) == (called[False], 3)
    assert "promises at most 20.00% false alarms" in done.stdout
    assert f"{3 - called[True]} of 3 anomalous images missed" in done.stdout
    assert "best F1 1.000" in done.stdout and "needs labels" in done.stdout
    assert "exists already" in one_line_error(
        here("evaluate", category_folder, "--model", ready_model, "--json", results)
    )
