"""Convolutions in bfloat16 on a CPU: near those in float32, and where they are worth it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from backbones import Plain
from patchsvdd_fast import HierarchicalEncoder, PatchLevel
from patchsvdd_fast.encoders import precision
from patchsvdd_fast.encoders.backbone import BackboneEncoder
from patchsvdd_fast.encoders.levels import DEFAULT_LEVELS
from patchsvdd_fast.score.encoding import encode_images, use_encoding_limit

CPU = torch.device("cpu")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=["patch-svdd", "backbone"])
def encoder(request):
    torch.manual_seed(0)
    if request.param == "backbone":
        return BackboneEncoder(Plain())
    return HierarchicalEncoder(16).eval()


def encoded(encoder, images, how):
    levels = DEFAULT_LEVELS if encoder.surroundings == 0 else (PatchLevel(24, 8),)
    mean = torch.full((3, *images.shape[2:]), 128.0)
    return encode_images(encoder, images, mean, levels, precision=how)


def test_embeddings_in_bfloat16_are_near_those_in_float32(encoder, rng):
    images = torch.from_numpy(rng.integers(0, 256, (2, 3, 96, 96), dtype="uint8"))
    for exact, rough in zip(
        encoded(encoder, images, "float32"), encoded(encoder, images, "bfloat16"), strict=True
    ):
        assert rough.dtype == torch.float32
        assert not torch.equal(exact, rough)
        spread = float((exact - exact.mean(dim=(0, 1, 2))).square().mean().sqrt())
        assert float((exact - rough).square().mean().sqrt()) < 0.05 * spread


def test_the_outputs_of_patch_svdd_are_not_rounded(rng):
    """Neighbours differ by less than the step of bfloat16."""
    encoder = HierarchicalEncoder(16)
    patches = torch.from_numpy(rng.random((4, 3, 64, 64), dtype="float32"))
    for size in (32, 64):
        with precision.computing_in("bfloat16", CPU):
            found = encoder(patches[:, :, :size, :size])
        assert found.dtype == torch.float32
        assert float((found == found.bfloat16().float()).float().mean()) < 0.1
        found.sum().backward()  # gradients pass both precisions
    assert all(p.grad.isfinite().all() and p.grad.any() for p in encoder.parameters())


def test_tiles_and_batches_change_little_in_bfloat16(encoder, rng):
    images = torch.from_numpy(rng.integers(0, 256, (3, 3, 160, 160), dtype="uint8"))
    whole = encoded(encoder, images, "bfloat16")
    with use_encoding_limit(1):
        tiled = encoded(encoder, images, "bfloat16")
    alone = encoded(encoder, images[:1], "bfloat16")
    for all_at_once, in_tiles, one in zip(whole, tiled, alone, strict=True):
        assert torch.allclose(all_at_once, in_tiles, rtol=0.02, atol=1e-3)
        assert torch.allclose(all_at_once[:1], one, rtol=0.02, atol=1e-3)


def test_the_context_ends(rng):
    layer = torch.nn.Conv2d(3, 4, 3)
    values = torch.from_numpy(rng.random((1, 3, 8, 8), dtype="float32"))
    with precision.computing_in("bfloat16", CPU):
        with precision.computing_in("float32", CPU):
            assert layer(values).dtype == torch.float32
        assert layer(values).dtype == torch.bfloat16
    assert layer(values).dtype == torch.float32
    with (
        pytest.raises(ValueError, match="precision must be one of"),
        precision.computing_in("float16", CPU),
    ):
        pass


def test_whether_this_cpu_has_bfloat16():
    described = Path("/proc/cpuinfo")
    if not described.exists() or not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("nothing to compare with")
    flags = described.read_text().split()
    assert precision.has_bfloat16() == ("avx512_bf16" in flags or "amx_bf16" in flags)


def test_a_cpu_without_it_is_slower(monkeypatch, recwarn):
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    precision.warn_of_slow_bfloat16(CPU)
    assert not recwarn.list
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match="float32 is faster"):
        precision.warn_of_slow_bfloat16(CPU)
