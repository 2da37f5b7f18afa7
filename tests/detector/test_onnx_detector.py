"""`export_detector`: what the model computes is what the detector says, whatever its settings."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.exceptions import NotFittedError

from backbones import Plain
from conftest import texture
from patchsvdd_fast import PatchSVDD, load_official_checkpoint
from patchsvdd_fast.detector import onnx as export
from patchsvdd_fast.detector.onnx import export_detector
from patchsvdd_fast.encoders import onnx_encoder
from patchsvdd_fast.score import onnx_scoring
from processes import openvino

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(0)
GOOD = [texture(RNG) for _ in range(6)]
NEW = np.stack([texture(RNG) for _ in range(3)])
NEW[1, 40:60, 60:90] = 250, 20, 20
KAIMING = {"image_size": 96, "initialization": "kaiming", "device": "cpu"}


def fitted(images=GOOD, **parameters):
    detector = PatchSVDD(**KAIMING | parameters)
    encoder = None if "encoder" in parameters else detector.untrained_encoder()
    return detector.fit(images, encoder=encoder)


def in_onnxruntime(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images):
        return dict(zip(names, session.run(None, {"images": images}), strict=True))

    return run


def in_openvino(path):
    options = {"INFERENCE_PRECISION_HINT": "f32"}  # else bfloat16 where the processor has it
    compiled = openvino().Core().compile_model(path, "CPU", options)

    def run(images):
        found = compiled({"images": images})
        return {name: found[name].copy() for name in ("score", "anomaly_map", "anomalous")}

    return run


RUNTIMES = pytest.mark.parametrize("runtime", [in_onnxruntime, in_openvino])


def planes(images):
    """[N, H, W, 3] -> [N, 3, H, W]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def assert_says_the_same(run, detector, images, rtol=1e-4, threshold=None):
    """Of uint8 images [N, H, W, 3], all at once and one by one."""
    expected = detector.score(images)
    scores = expected.image_scores.numpy()
    for found in (
        run(planes(images)),
        {
            name: np.concatenate(values)
            for name, values in together([run(planes(image[None])) for image in images]).items()
        },
    ):
        np.testing.assert_allclose(found["score"], scores, rtol=rtol)
        maps = expected.anomaly_map.numpy()
        np.testing.assert_allclose(
            found["anomaly_map"], maps, rtol=10 * rtol, atol=rtol * maps.max()
        )
        threshold = detector.threshold_ if threshold is None else threshold
        assert found["anomalous"].tolist() == (scores > threshold).tolist()


def together(results):
    return {name: [result[name] for result in results] for name in results[0]}


@RUNTIMES
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"mode": "dense", "combination": "sum", "levels": [(64, 16), (32, 8)]},
        {"mean": "channel", "combination": "K32", "coreset": 0.2},
        {"mean": "paper", "levels": [(64, 8)], "reweight": 5},
        {"encoder": Plain(), "projection": "whiten"},
        {"encoder": Plain(), "reweight": 9, "coreset": 0.3, "image_size": (104, 72)},
    ],
)
def test_every_setting(tmp_path, runtime, parameters):
    detector = fitted(**parameters)
    path = tmp_path / "detector.onnx"
    assert export_detector(detector, path) < 1e-4
    run = runtime(path)
    assert_says_the_same(run, detector, NEW)
    larger = [Image.fromarray(image).resize((140, 130)) for image in NEW]
    # A grey level in a few pixels, where Pillow rounds a half to the other side.
    assert_says_the_same(run, detector, np.stack(larger), rtol=5e-3)


@RUNTIMES
def test_images_of_any_size_that_are_not_resized(tmp_path, runtime):
    detector = fitted(image_size=None, mean="channel")
    export_detector(detector, tmp_path / "detector.onnx")
    run = runtime(tmp_path / "detector.onnx")
    assert_says_the_same(run, detector, NEW)
    assert_says_the_same(run, detector, NEW[:, :71, :83])
    assert run(planes(NEW[:1, :71, :83]))["anomaly_map"].shape == (1, 71, 83)


def test_images_of_one_size_that_are_not_resized(tmp_path):
    detector = fitted(image_size=None, mean="pixel")
    export_detector(detector, tmp_path / "detector.onnx")
    run = in_onnxruntime(tmp_path / "detector.onnx")
    assert_says_the_same(run, detector, NEW)
    with pytest.raises(Exception, match="Got invalid dimensions for input: images"):
        run(planes(NEW[:, :71, :83]))


@RUNTIMES
def test_a_large_bank_is_searched_in_chunks(tmp_path, monkeypatch, runtime):
    monkeypatch.setattr(onnx_scoring, "_PRODUCTS_AT_ONCE", 1)
    detector = fitted()
    export_detector(detector, tmp_path / "detector.onnx")
    assert len(detector.banks_[detector.levels_[1]]) > onnx_scoring._SMALLEST_CHUNK
    assert_says_the_same(runtime(tmp_path / "detector.onnx"), detector, NEW)


@RUNTIMES
def test_rows_in_float16_take_half_the_size(tmp_path, runtime):
    detector = fitted()
    sizes = {}
    for storage in ("float32", "float16"):
        path = tmp_path / f"{storage}.onnx"
        assert export_detector(detector, path, storage=storage) < 2e-3
        sizes[storage] = path.stat().st_size
    rows = sum(len(bank) * bank.dim for bank in detector.banks_.values())
    assert sizes["float32"] - sizes["float16"] == pytest.approx(2 * rows, rel=0.01)
    assert_says_the_same(runtime(tmp_path / "float16.onnx"), detector, NEW, rtol=2e-3)


@RUNTIMES
@pytest.mark.parametrize("category", ["hazelnut", "leather"])
def test_trained_encoders_whose_embeddings_lie_close_together(
    tmp_path, reference_dir, categories_dir, runtime, category
):
    """Leather's K64 embeddings differ by about as much as float32 rounds (docs/onnx.md)."""
    file = reference_dir / "official_checkpoints" / f"{category}_enchier.pkl"
    detector = PatchSVDD(mean="paper", device="cpu", combination="K32", coreset=0.02)
    good = sorted((categories_dir / category / "train/good").iterdir())[:6]
    detector.fit(good, encoder=load_official_checkpoint(file))
    export_detector(detector, tmp_path / "detector.onnx")
    tests = sorted((categories_dir / category / "test").rglob("*.png"))[::8]
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in tests])
    rtol = {"hazelnut": 1e-4, "leather": 2e-2}[category]
    assert_says_the_same(runtime(tmp_path / "detector.onnx"), detector, images, rtol=rtol)


def test_metadata_say_what_the_model_is(tmp_path):
    detector = fitted(mode="dense", reweight=None)
    export_detector(detector, tmp_path / "detector.onnx", false_alarm_rate=0.4)
    session = onnxruntime.InferenceSession(tmp_path / "detector.onnx")
    texts = session.get_modelmeta().custom_metadata_map
    assert json.loads(texts["threshold"]) == detector.threshold(0.4)
    assert json.loads(texts["false_alarm_rate"]) == 0.4
    assert json.loads(texts["image_size"]) == [96, 96]
    assert json.loads(texts["levels"]) == [[64, 16], [32, 4]]
    assert torch.equal(torch.tensor(json.loads(texts["light"])), detector.light_)
    expected = {"combination": "mult", "encoder": "patch-svdd", "illumination": "matched"}
    assert {name: texts[name] for name in expected} == expected
    assert session.get_inputs()[0].shape == ["N", 3, "H", "W"]
    assert [output.shape for output in session.get_outputs()] == [["N"], ["N", 96, 96], ["N"]]


def test_the_rate_sets_the_threshold(tmp_path):
    detector = fitted()
    export_detector(detector, tmp_path / "detector.onnx", false_alarm_rate=0.8)
    threshold = detector.threshold(0.8)
    assert threshold < detector.threshold_
    images = np.concatenate([NEW, np.stack(GOOD)])
    run = in_onnxruntime(tmp_path / "detector.onnx")
    assert_says_the_same(run, detector, images, threshold=threshold)
    with pytest.raises(ValueError, match="can promise a false-alarm rate of"):
        export_detector(detector, tmp_path / "detector.onnx", false_alarm_rate=0.01)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 1.0, 1e-9, 123.456])
def test_a_threshold_in_float32_decides_alike(threshold):
    rounded = export._rounded_down(threshold)
    nearest = np.float32(threshold)
    for score in (
        np.nextafter(nearest, np.float32(0)),
        nearest,
        np.nextafter(nearest, np.float32(1e9)),
    ):
        assert (score > np.float32(rounded)) == (float(score) > threshold)


def test_one_training_image_has_no_threshold(tmp_path):
    detector = fitted(GOOD[:1], mean="channel")
    export_detector(detector, tmp_path / "detector.onnx")
    found = in_onnxruntime(tmp_path / "detector.onnx")(planes(NEW))
    assert found.keys() == {"score", "anomaly_map"}
    np.testing.assert_allclose(found["score"], detector.score(NEW).image_scores, rtol=1e-4)


def test_a_detector_without_pictures_is_checked_with_random_images(tmp_path):
    assert export_detector(fitted(keep_images=False), tmp_path / "detector.onnx") < 1e-4


@pytest.mark.parametrize("wrong", ["search", "encoder"])
def test_a_model_that_differs_is_not_written(tmp_path, monkeypatch, wrong):
    path = tmp_path / "detector.onnx"
    path.write_text("as before")
    if wrong == "encoder":
        monkeypatch.setattr(onnx_encoder, "LEAKY_SLOPE", 0.101)
        message = r"embeddings of onnxruntime must be within .* no model was written"
    else:
        monkeypatch.setattr(onnx_scoring.BankNodes, "centred", lambda self, queries: queries)
        message = r"image scores of onnxruntime must be within .* no model was written"
    with pytest.raises(RuntimeError, match=message):
        export_detector(fitted(), path)
    assert path.read_text() == "as before"


def test_what_does_not_fit_in_a_file_is_refused_at_once(tmp_path, monkeypatch):
    detector = fitted()
    rows = sum(len(bank) * bank.dim for bank in detector.banks_.values())
    weights = sum(tensor.numel() for tensor in detector.encoder_.state_dict().values())
    rest = 4 * weights + 4 * sum(map(len, detector.banks_.values()))
    monkeypatch.setattr(export, "LARGEST_FILE", rest + 3 * rows)
    with pytest.raises(ValueError, match=r"--coreset 0\.1\), or keep rows in float16"):
        export_detector(detector, tmp_path / "detector.onnx")
    export_detector(detector, tmp_path / "detector.onnx", storage="float16")
    monkeypatch.setattr(export, "LARGEST_FILE", rest + rows)
    with pytest.raises(ValueError, match=r"fit with a coreset, such as coreset=0\.1") as refused:
        export_detector(detector, tmp_path / "other.onnx")
    assert "float16" not in str(refused.value)
    assert not (tmp_path / "other.onnx").exists()


def test_other_refusals(tmp_path, monkeypatch):
    path = tmp_path / "detector.onnx"
    with pytest.raises(NotFittedError):
        export_detector(PatchSVDD(), path)
    with pytest.raises(ValueError, match="storage must be one of"):
        export_detector(fitted(), path, storage="int8")
    with pytest.raises(ValueError, match="encoded in bfloat16, but ONNX"):
        export_detector(fitted(encoding_precision="bfloat16"), path)
    with pytest.raises(OSError, match=r"cannot write .*missing"):
        export_detector(fitted(), tmp_path / "missing" / "a.onnx")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnx", None)
        with pytest.raises(ValueError, match=r"pip install onnx"):
            export_detector(fitted(), path)
    assert not path.exists()


def test_without_onnxruntime_it_is_not_checked_and_says_so(tmp_path, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnxruntime", None)
        with pytest.warns(RuntimeWarning, match=r"not checked .* onnx"):
            assert export_detector(fitted(), tmp_path / "detector.onnx") is None
    assert_says_the_same(in_onnxruntime(tmp_path / "detector.onnx"), fitted(), NEW)
