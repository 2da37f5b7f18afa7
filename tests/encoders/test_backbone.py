"""Any backbone as an encoder: its interface, what a patch sees, projections, tiles."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backbones import PadsBySize, Plain, SeesAll
from patchsvdd_fast import PatchLevel
from patchsvdd_fast.encoders import backbone
from patchsvdd_fast.encoders.backbone import BackboneEncoder
from patchsvdd_fast.images.light import constant_mean
from patchsvdd_fast.score.encoding import encode_images, use_encoding_limit

LEVELS = (PatchLevel(24, 8), PatchLevel(16, 16))


def pixels(height, width, count=1, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, 3, height, width), dtype=np.uint8))


def encoded(encoder, images, levels=LEVELS):
    mean = constant_mean(encoder.pixel_mean, *images.shape[-2:])
    return encode_images(encoder, images, mean, levels)


def test_an_embedding_is_the_mean_of_the_maps_over_its_patch():
    encoder = BackboneEncoder(Plain())
    images = torch.randn(2, 3, 96, 112)
    fine, middle, coarse = encoder.backbone(images)
    wide, narrow = encoder.dense(images, LEVELS)
    assert wide.shape == (2, 10, 12, 24)
    assert narrow.shape == (2, 6, 7, 24)
    # The patch of 24 pixels at row 16, column 32 holds 6x6 fine cells and 3x3 of the middle.
    own = wide[:, 2, 4]
    torch.testing.assert_close(own[:, :6], fine[:, :, 4:10, 8:14].mean(dim=(2, 3)))
    torch.testing.assert_close(own[:, 6:14], middle[:, :, 2:5, 4:7].mean(dim=(2, 3)))
    finer = F.interpolate(coarse, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(own[:, 14:], finer[:, :, 2:5, 4:7].mean(dim=(2, 3)))


def test_images_are_normalised_with_the_backbones_constants():
    encoder = BackboneEncoder(Plain(), pixel_mean=(10, 20, 30), pixel_scale=(2, 4, 8))
    images = pixels(64, 64)
    mean, scale = (
        torch.tensor(v)[:, None, None] for v in (encoder.pixel_mean, encoder.pixel_scale)
    )
    (expected,) = encoder.dense((images.float() - mean) / scale, LEVELS[:1])
    (found,) = encoded(encoder, images, LEVELS[:1])
    torch.testing.assert_close(found, expected)


def test_maps_are_chosen_by_number():
    one = BackboneEncoder(Plain(), maps=[2])
    assert one.embedding_dim == 10
    images = torch.randn(1, 3, 64, 64)
    (both,) = BackboneEncoder(Plain()).dense(images, LEVELS[:1])
    torch.testing.assert_close(one.dense(images, LEVELS[:1])[0], both[..., 14:])


# --- what a patch sees ----------------------------------------------------------------------------


def test_surroundings_are_measured():
    """By pixels changed beyond them, which change nothing, and within, which do."""
    encoder = BackboneEncoder(Plain())
    reach = encoder.surroundings
    assert reach % encoder.tile_step == 0
    # Four convolutions of stride 2 see 31 pixels; interpolating and averaging add two coarse cells.
    assert 16 < reach <= 80
    images = torch.randn(1, 3, 320, 320)
    i = 18
    (before,) = encoder.dense(images, LEVELS[:1])
    changed = images.clone()
    changed[..., : 8 * i - reach] += 1
    changed[..., 8 * i + 24 + reach :] += 1
    (after,) = encoder.dense(changed, LEVELS[:1])
    assert torch.equal(before[:, :, i], after[:, :, i])
    near = images.clone()
    near[..., 8 * i - 8 : 8 * i] += 1
    assert not torch.equal(before[:, :, i], encoder.dense(near, LEVELS[:1])[0][:, :, i])


@pytest.mark.parametrize(("height", "width"), [(400, 320), (333, 250), (64, 900), (30, 41)])
def test_tiles_have_no_seams(height, width):
    encoder = BackboneEncoder(Plain())
    images = pixels(height, width, count=2)
    levels = [level for level in LEVELS if level.size <= height]
    whole = encoded(encoder, images, levels)
    with use_encoding_limit(1):
        tiled = encoded(encoder, images, levels)
    for a, b in zip(whole, tiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_backbone_that_sees_the_whole_image_is_never_given_tiles(monkeypatch):
    encoder = BackboneEncoder(SeesAll())
    assert encoder.surroundings is None
    images = pixels(200, 200)
    whole = encoded(encoder, images)
    with use_encoding_limit(1):
        assert all(map(torch.equal, encoded(encoder, images), whole))


def test_other_images_of_a_batch_change_no_bit():
    encoder = BackboneEncoder(Plain())
    images = pixels(96, 80, count=5)
    together = encoded(encoder, images)
    for number in range(5):
        alone = encoded(encoder, images[number : number + 1])
        assert all(torch.equal(a[0], b[number]) for a, b in zip(alone, together, strict=True))


# --- projections ----------------------------------------------------------------------------------


def joined(count=500, seed=0):
    """Rows like joined maps, [M, 24], some channels correlated and one constant."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    rows[:, 5] = 3.0
    return rows + 10


def test_principal_axes_keep_the_most_variance():
    encoder = BackboneEncoder(Plain(), projection="axes", dim=6)
    assert encoder.needs_fit
    rows = joined()
    encoder.fit_projection(rows)
    assert not encoder.needs_fit
    assert encoder.embedding_dim == 6
    axes = encoder.axes.double()
    torch.testing.assert_close(axes.T @ axes, torch.eye(6, dtype=torch.float64), atol=1e-5, rtol=0)
    kept = (rows.double() @ axes).var(dim=0, correction=0)
    largest = torch.linalg.eigvalsh(torch.cov(rows.double().T, correction=0)).flip(0)[:6]
    torch.testing.assert_close(kept, largest, rtol=1e-4, atol=0)


def test_whitening_makes_axes_equally_long():
    rows = joined()
    encoder = BackboneEncoder(Plain(), projection="whiten", dim=20, shrinkage=0)
    encoder.fit_projection(rows)
    deviations = (rows.double() @ encoder.axes.double()).std(dim=0)
    assert float(deviations.max() / deviations.min()) == pytest.approx(1, abs=1e-3)
    shrunk = BackboneEncoder(Plain(), projection="whiten", dim=20, shrinkage=1e6)
    shrunk.fit_projection(rows)
    plain = BackboneEncoder(Plain(), projection="axes", dim=20)
    plain.fit_projection(rows)
    torch.testing.assert_close(shrunk.axes, plain.axes, rtol=1e-3, atol=1e-4)


def test_a_constant_channel_does_not_become_noise():
    encoder = BackboneEncoder(Plain(), projection="whiten", shrinkage=0)
    encoder.fit_projection(joined())
    assert bool(encoder.axes.isfinite().all())
    assert float(encoder.axes[5].abs().max()) < 1e5


def test_a_projection_is_fitted_once():
    encoder = BackboneEncoder(Plain(), projection="axes")
    encoder.fit_projection(joined())
    with pytest.raises(ValueError, match="fitted before"):
        encoder.fit_projection(joined())
    with pytest.raises(ValueError, match="no projection"):
        BackboneEncoder(Plain()).fit_projection(joined())


# --- bad input ------------------------------------------------------------------------------------


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, images):
        return self.make(images)


def cells(images, stride, channels=2):
    count, _, height, width = images.shape
    return images.new_zeros(count, channels, height // stride, width // stride)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: cells(x, 8), TypeError, "must return a list of feature maps, got Tensor"),
        (lambda x: {"a": cells(x, 8)}, TypeError, "got dict: in timm"),
        (lambda x: [], ValueError, "maps must name at least one map"),
        (lambda x: [x.mean(dim=(2, 3))], TypeError, r"map 0 .* must be a tensor \[B, C, h, w\]"),
        (lambda x: [cells(x, 14)], ValueError, "powers of two, got one of 9x9 cells"),
        (lambda x: [F.avg_pool2d(x, 24, 8)], ValueError, "powers of two"),
    ],
)
def test_backbones_that_do_not_fit_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        BackboneEncoder(Returns(make))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"maps": [0, 7]}, "has maps 0 to 2, not 7"),
        ({"maps": []}, "at least one map"),
        ({"projection": "pca"}, "projection must be one of"),
        ({"projection": "axes", "dim": 25}, "dim must be in 1 to 24"),
        ({"projection": "axes", "dim": 0}, "dim must be in 1 to 24"),
        ({"shrinkage": -1}, "shrinkage must not be negative"),
        ({"pixel_mean": (1, 2)}, "pixel_mean must have a value for each of 3 channels, got 2"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BackboneEncoder(Plain(), **arguments)


def test_other_levels_and_small_images_are_refused():
    encoder = BackboneEncoder(Plain())
    with pytest.raises(ValueError, match="multiple of 8 pixels, got 20 and 4"):
        encoder.dense(torch.zeros(1, 3, 64, 64), [PatchLevel(20, 4)])
    with pytest.raises(ValueError, match=r"at least 24x24 pixels .* got 64x16"):
        encoder.dense(torch.zeros(1, 3, 16, 64))


def test_cells_that_move_with_the_size_of_an_image_are_never_cut():
    """A tile's cells would not be those of the whole image."""
    assert BackboneEncoder(Plain()).surroundings is not None
    encoder = BackboneEncoder(PadsBySize())
    assert encoder.surroundings is None
    images = pixels(301, 300)
    whole = encoded(encoder, images)
    with use_encoding_limit(1):
        again = encoded(encoder, images)
    assert all(map(torch.equal, whole, again))


class Pools(nn.Module):
    """Has neither parameters nor buffers."""

    def forward(self, images):
        return [F.avg_pool2d(images, 4), F.max_pool2d(images, 8)]


def test_a_backbone_without_weights_will_do():
    (found,) = encoded(BackboneEncoder(Pools()), pixels(64, 64), LEVELS[:1])
    assert found.shape == (1, 6, 6, 6)


class Fixed(nn.Module):
    """Takes images of one size, as vision transformers do."""

    def forward(self, images):
        assert images.shape[2] == 224, "Input height doesn't match model"
        return [images]


@pytest.mark.parametrize("network", [Fixed(), nn.Conv2d(3, 4, 3).half()])
def test_a_backbone_that_fails_is_named_with_the_size(network):
    with pytest.raises(ValueError, match=r"backbone of mine fails on an image of 128x128 pixels"):
        BackboneEncoder(network, name="mine")


def test_a_projection_is_fitted_in_parts(monkeypatch):
    embeddings = torch.randn(999, 24, generator=torch.Generator().manual_seed(0))
    axes = []
    for at_once in (10, 10_000):
        monkeypatch.setattr(backbone, "_ROWS_AT_ONCE", at_once)
        encoder = BackboneEncoder(Plain(), projection="whiten", dim=8)
        encoder.fit_projection(embeddings)
        axes.append(encoder.axes)
    torch.testing.assert_close(axes[0].abs(), axes[1].abs(), rtol=1e-4, atol=1e-5)
