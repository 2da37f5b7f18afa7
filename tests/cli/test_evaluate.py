"""`patchsvdd evaluate` and `train` on data sets as they come: masks, layouts, what fails."""

import json
import re
import shutil

import numpy as np
import pytest

from data_sets import (
    MASKS,
    SIDE,
    WRITERS,
    gray,
    mvtec_ad,
    mvtec_ad_2_renamed,
    mvtec_loco_ad,
    noise_images,
    write,
)
from patchsvdd_fast import PatchSVDD
from patchsvdd_fast.files.categories import Category
from processes import one_line_error, run_script

UNTRAINED = ("--untrained", "--mode", "dense", "--resize", "96")


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


NAMES = ("{}.png", "{}_mask.JPG", "{}_mask.PNG", "{}.tiff", "{}_GT.bmp", "{}_Label.Tif")
CASES = {
    **{f"layout {name}": {"lay_out": lay_out} for name, lay_out in WRITERS.items()},
    "layout MVTec AD 2, renamed": {"lay_out": mvtec_ad_2_renamed},
    **{f"mask {kind}": {"kind": kind} for kind in MASKS},
    **{f"mask named {name.format('x')}": {"name": name} for name in NAMES},
}


def lay_out_masks(root, images, kind="255", name=""):
    """The layout of MVTec AD with masks of another kind or another name."""
    mvtec_ad(root, images)
    suffix, make = MASKS.get(kind, ("png", gray(255)))
    for i, mask in enumerate(images["masks"]):
        (root / f"ground_truth/spot/{i:03}_mask.png").unlink()
        file = name.format(f"{i:03}") or f"{i:03}_mask.{suffix}"
        make(mask > 0).save(root / f"ground_truth/spot/{file}", quality=95)


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What evaluating all cases gave, by case."""
    folder, images = tmp_path_factory.mktemp("cases"), noise_images()
    mvtec_ad(folder / "all/expected", images)
    for case, how in CASES.items():
        how.get("lay_out", lay_out_masks)(
            folder / "all" / case, images, **{k: v for k, v in how.items() if k != "lay_out"}
        )
    results = folder / "results.json"
    done = run_script(
        *("-m", "patchsvdd_fast", "evaluate", folder / "all", *UNTRAINED, "--json", results)
    )
    assert (done.returncode, done.stderr) == (0, "")
    return {each["category"]: each for each in json.loads(results.read_text())["results"]}


@pytest.mark.parametrize("case", CASES)
def test_every_layout_and_mask_gives_the_same_figures(figures, case):
    expected, found = figures["expected"], figures[case]
    assert (found["num_good"], found["num_anomalous"]) == (3, 3)
    assert found["no_segmentation"] is None
    has_validation = "LOCO" in case or "AD 2" in case
    assert found["num_validation"] == (3 if has_validation else 0)
    assert (found["num_false_alarms"] is None) != has_validation
    assert expected["percent"]["mult"]["segmentation"] > 60
    if case.endswith("JPG"):  # its edges are not those of the mask, to a pixel
        for combination, percent in expected["percent"].items():
            assert found["percent"][combination] == pytest.approx(percent, abs=0.5)
    else:
        assert found["percent"] == expected["percent"]


def test_false_alarms_are_counted_among_validation_images(evaluated, tmp_path, monkeypatch):
    images, root = noise_images(), tmp_path / "all/loco"
    mvtec_loco_ad(root, images)
    mvtec_ad(tmp_path / "all/ad", images)
    done, before = evaluated(tmp_path / "all")
    alarms = before["loco"]["num_false_alarms"]
    for number in range(4):  # unlike the training images
        write(root / f"validation/good/odd/{number}.png", images["bad"][0] // 2)
    done, after = evaluated(tmp_path / "all")
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 of them with masks, and 7 good ones of validation for false alarms" in done.stdout
    assert after["loco"]["num_validation"] == 7
    assert after["loco"]["num_false_alarms"] == alarms + 4
    assert after["loco"]["percent"] == before["loco"]["percent"] == after["ad"]["percent"]
    assert re.findall(r"(\d+ of 7|-) +│$", done.stdout, re.MULTILINE) == [
        "-",
        *[f"{alarms + 4} of 7"] * 2,  # of loco, and of the mean
    ]
    report = tmp_path / "report"
    evaluated(tmp_path / "all", "--report", report)
    told = f"{alarms + 4} of 7"
    page = (report / "loco/index.html").read_text()
    assert f"<dt>false alarms in validation</dt><dd>{told}</dd>" in page
    assert "in validation" not in (report / "ad/index.html").read_text()
    assert f">{told}</td></tr>" in (report / "index.html").read_text()
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "all/ad").rename(tmp_path / "all/a_name_of_many_letters_1")
    done, _ = evaluated(tmp_path / "all")
    cells = [line.split("│")[1].strip() for line in done.stdout.splitlines() if "│" in line]
    assert "".join(cells) == "a_name_of_many_letters_1locomean"
    (root / "validation/good/odd/0.png").write_text("no image")
    done, after = evaluated(tmp_path / "all")
    assert "error: loco: 1 of 7 images cannot be read" in done.stderr
    done, after = evaluated(tmp_path / "all", "--skip-unreadable")
    assert done.returncode == 0
    assert after["loco"]["num_false_alarms"] == alarms + 3

    shutil.rmtree(root / "validation/good")
    (root / "validation/good").mkdir()
    done, after = evaluated(root)
    assert (done.returncode, done.stderr) == (0, "")
    assert (after["loco"]["num_validation"], after["loco"]["num_false_alarms"]) == (0, None)
    table = [line for line in done.stdout.splitlines() if set(line) & set("┃│")]
    assert table and not any("false" in line for line in table)


def test_folders_of_ones_own_give_the_same_figures(evaluated, figures, tmp_path):
    mvtec_ad(tmp_path, noise_images())
    folders = ("--normal", tmp_path / "test/good", "--anomalous", tmp_path / "test/spot")
    more = ("--masks", tmp_path / "ground_truth/spot", "--train", tmp_path / "train/good")
    done, results = evaluated(*folders, *more)
    assert (done.returncode, done.stderr) == (0, "")
    assert "spot: layout folders of one's own, tested with 3 good and 3 anomalous" in done.stdout
    assert results["spot"]["percent"] == figures["expected"]["percent"]


def test_one_category_that_fails_does_not_end_the_others(evaluated, tmp_path):
    for name in ("empty", "fine", "none", "odd", "untestable"):
        mvtec_ad(tmp_path / f"all/{name}", noise_images())
    for path in (tmp_path / "all/empty/ground_truth").rglob("*.png"):
        write(path, np.zeros((SIDE, SIDE), np.uint8))
    shutil.rmtree(tmp_path / "all/none/ground_truth")
    (tmp_path / "all/odd/ground_truth/spot/001_mask.png").write_text("no image")
    shutil.rmtree(tmp_path / "all/untestable/test/spot")
    done, results = evaluated(tmp_path / "all")
    assert done.returncode == 1
    assert list(results) == ["empty", "fine", "none", "odd"]
    for name, reason in (
        ("empty", "no mask marks anything at 96x96 pixels"),
        ("none", "anomalous images without a mask: 3 of 3"),
        ("odd", "001_mask.png is not an image that can be read"),
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
    b = "b [red] :bug:"  # which means something to what prints
    for name in ("a", b):
        mvtec_ad(tmp_path / f"all/{name}", noise_images())
    (tmp_path / "models").mkdir()
    shutil.copy(ready_model, tmp_path / f"models/{b}.safetensors")
    report = tmp_path / "report"
    (tmp_path / f"all/{b}/ground_truth/spot/001_mask.png").write_text("no image")
    done = here(*("evaluate", tmp_path / "all", "--model", tmp_path / "models", "--report", report))
    assert done.returncode == 1
    assert "needs one file for a, found 0" in done.stderr
    assert (report / b / "index.html").exists()
    assert f"{b}: no segmentation: " in done.stdout
    assert f"│ {b} │" in done.stdout


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
    root = tmp_path / "odd"
    mvtec_ad(root, noise_images())
    (root / "train/good").rename(root / "train/fine")
    model = tmp_path / "m[/odd].safetensors"
    model.parent.mkdir()
    output = ("-o", model, "--resize", "96", "--steps", "1")
    refused = here("train", root, *output)
    assert "no layout that is known" in one_line_error(refused)
    for name in ("000_GT.png", "1.heic", ".hidden.png"):
        (root / "train/fine" / name).write_text("never read")
    done = here("train", root / "train/fine", *output, "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    assert f"wrote {model}: " in done.stdout
    assert "masks by their names or those of their folders: 1 in " in done.stderr
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
