"""The encoder: dense encoding equals patch by patch, official weights the official embeddings."""

import pickle

import numpy as np
import pytest
import torch

from patchsvdd_fast import HierarchicalEncoder, PatchLevel, load_official_checkpoint
from patchsvdd_fast.encoders import patch_svdd as encoder_module
from patchsvdd_fast.ops.reference import dense_embeddings_patchwise

CATEGORIES = ("hazelnut", "leather")


def test_has_the_published_number_of_parameters():
    encoder = HierarchicalEncoder()
    assert sum(p.numel() for p in encoder.parameters()) == 401_984
    assert sum(p.numel() for p in encoder.small.parameters()) == 360_832


@pytest.mark.parametrize(
    "levels",
    [
        [PatchLevel(64, 16), PatchLevel(32, 4)],
        [PatchLevel(32, 2), PatchLevel(64, 6)],
        [PatchLevel(64, 64)],
        [PatchLevel(128, 16), PatchLevel(64, 24), PatchLevel(32, 32)],
        [PatchLevel(256, 2)],
    ],
)
@pytest.mark.parametrize("initialization", ["default", "kaiming"])
def test_dense_equals_patch_by_patch(levels, initialization):
    largest = max(level.size for level in levels)
    encoder = HierarchicalEncoder(
        embedding_dim=16, num_levels=(largest // 32).bit_length(), initialization=initialization
    ).eval()
    images = torch.rand(2, 3, largest + 7, largest + 34) - 0.5
    with torch.no_grad():
        dense = encoder.dense(images, levels)
    for level, embeddings in zip(levels, dense, strict=True):
        patchwise = dense_embeddings_patchwise(encoder, images, level.size, level.stride)
        assert embeddings.shape == (2, *level.grid_shape(*images.shape[-2:]), 16)
        # 0 where the convolution library sums in one order, 1e-6 where it picks several
        torch.testing.assert_close(embeddings, patchwise, rtol=0, atol=1e-6)


@pytest.mark.skipif(encoder_module._convolution_in_onednn is None, reason="not an x86 CPU")
@pytest.mark.parametrize("shape", [(2, 33, 40), (3, 64, 96), (2, 256, 256), (64, 32, 32)])
@pytest.mark.parametrize("dim", [5, 64])
@pytest.mark.parametrize("step", [1, 2, 8])
def test_the_layout_of_onednn_changes_no_bit(monkeypatch, shape, dim, step):
    torch.manual_seed(0)
    small = HierarchicalEncoder(embedding_dim=dim, initialization="kaiming").eval().small
    count, height, width = shape
    # Not one alone: PyTorch gives the layers of a small one to another library.
    images = torch.rand(count, 3, height, width) - 0.5
    with torch.no_grad():
        assert small._stays_in_onednn(images)
        found = small(images, step)
        monkeypatch.setattr(encoder_module, "_convolution_in_onednn", None)
        assert not small._stays_in_onednn(images)
        assert torch.equal(found, small(images, step))
        assert torch.equal(found, small(images)[:, :, ::step, ::step])


def test_sizes_together_are_sizes_apart():
    torch.manual_seed(0)
    encoder = HierarchicalEncoder(embedding_dim=8, num_levels=3, initialization="kaiming").eval()
    batches = [torch.rand(count, 3, size, size) for count, size in ((2, 128), (3, 32), (4, 64))]
    passes = []
    encoder.small.register_forward_hook(lambda *call: passes.append(call))
    with torch.no_grad():
        together = encoder.forward_sizes(batches)
        assert len(passes) == 1
        for batch, embedded in zip(batches, together, strict=True):
            torch.testing.assert_close(embedded, encoder(batch), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="patch size must be one of"):
        encoder.forward_sizes([torch.rand(1, 3, 48, 48)])


def test_embed_is_forward_in_passes():
    encoder = HierarchicalEncoder(embedding_dim=8).eval()
    patches = torch.rand(5000, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.embed(patches), encoder(patches), rtol=0, atol=1e-6)
    assert encoder.embed(patches[:0]).shape == (0, 8)


@pytest.mark.parametrize("category", CATEGORIES)
def test_official_checkpoint_gives_reference_embeddings(reference_dir, category):
    encoder = _official(reference_dir, category)
    images, reference = _reference_images(reference_dir, category)
    with torch.no_grad():
        dense = encoder.dense(images)
        exact = encoder.double().dense(images.double())
    for level, ours, in_float64 in zip(("emb64", "emb32"), dense, exact, strict=True):
        expected = torch.from_numpy(reference[level])
        # Both sides carry float32 rounding: neither is farther from the other than from float64
        # arithmetic, where the reference is off by up to 4.3e-7.
        assert (ours - expected).abs().max() <= 5e-7
        assert (ours - in_float64).abs().max() <= 5e-7


@pytest.mark.parametrize("category", CATEGORIES)
def test_official_checkpoint_dense_equals_patch_by_patch(reference_dir, category):
    encoder = _official(reference_dir, category)
    images, _ = _reference_images(reference_dir, category)
    with torch.no_grad():
        dense = encoder.dense(images[:1])
    for level, ours in zip((PatchLevel(64, 16), PatchLevel(32, 4)), dense, strict=True):
        patchwise = dense_embeddings_patchwise(encoder, images[:1], level.size, level.stride)
        torch.testing.assert_close(ours, patchwise, rtol=0, atol=1e-6)


def test_kaiming_embeddings_vary_and_default_ones_hardly_do():
    spreads = {}
    for initialization in ("default", "kaiming"):
        torch.manual_seed(0)
        encoder = HierarchicalEncoder(initialization=initialization)
        embeddings = encoder.embed(torch.rand(64, 3, 32, 32) - 0.5)
        spreads[initialization] = float(embeddings.std(dim=0).mean())
    assert spreads["kaiming"] > 100 * spreads["default"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e(torch.rand(1, 3, 48, 48)), "patch size must be one of"),
        (lambda e: e(torch.rand(1, 1, 32, 32)), r"\[B, 3, K, K\]"),
        (lambda e: e.dense(torch.rand(1, 3, 60, 99)), "at least 64x64"),
        (lambda e: e.dense(torch.rand(1, 3, 99, 99), [PatchLevel(32, 3)]), "even stride"),
        (lambda e: e.dense(torch.rand(3, 99, 99)), r"\[N, 3, H, W\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(HierarchicalEncoder(embedding_dim=4))


def test_checkpoints_of_another_kind_are_refused(tmp_path):
    torch.save({"weight": torch.rand(3)}, tmp_path / "other.pkl")
    (tmp_path / "text.pkl").write_text("hello")
    (tmp_path / "code.pkl").write_bytes(pickle.dumps(_Unsafe()))
    for name in ("other.pkl", "text.pkl", "code.pkl"):
        with pytest.raises(ValueError, match=name):
            load_official_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_official_checkpoint(tmp_path / "missing.pkl")


class _Unsafe:
    def __reduce__(self):
        raise_if_run = "raise SystemExit('the pickle was executed')"
        return exec, (raise_if_run,)


def _official(reference_dir, category):
    folder = reference_dir / "official_checkpoints"
    return load_official_checkpoint(folder / f"{category}_enchier.pkl")


def _reference_images(reference_dir, category):
    reference = np.load(reference_dir / f"{category}.npz")
    images = torch.from_numpy(reference["image_uint8"]).permute(0, 3, 1, 2)
    mean = torch.from_numpy(reference["mean"]).permute(2, 0, 1)
    return ((images - mean) / 255).contiguous(), reference
