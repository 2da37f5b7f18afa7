"""Random pairs follow the protocol of `ops.pair_protocol`."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from patchsvdd_fast import ops
from patchsvdd_fast.ops.pair_protocol import COLOUR_SHIFT, DIRECTIONS, PIXEL_NOISE


def _draw_pairs(kind, size, height, width, redraw_clipped=False, steps=20, pairs=1000):
    """First and second corners and labels of `steps * pairs` pairs."""
    images, mean = (
        torch.zeros(1, 1, height, width, dtype=torch.uint8),
        torch.zeros(1, height, width),
    )
    image_of = torch.zeros(pairs, dtype=torch.int64)
    drawn = [
        ops.crop_pairs(images, mean, image_of, size, kind, 1, step, redraw_clipped)[1:]
        for step in range(steps)
    ]
    corners, labels = zip(*drawn, strict=True)
    return *torch.cat(corners, dim=1), torch.cat(labels)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("redraw_clipped", [False, True])
def test_position_pairs_follow_the_protocol(size, redraw_clipped):
    height, width = 256, 200
    first, second, labels = _draw_pairs("position", size, height, width, redraw_clipped)
    limits = torch.tensor([height - size, width - size])
    for corners in (first, second):
        assert (corners >= 0).all()
        assert (corners <= limits).all()
    offset = second - first
    direction = DIRECTIONS[labels]
    inside = ((second > 0) & (second < limits)).all(dim=1)
    unclipped = torch.ones_like(inside) if redraw_clipped else inside
    assert torch.equal(offset.sign()[unclipped], direction[unclipped])
    length = offset[unclipped].abs()[direction[unclipped] != 0]
    lengths = torch.bincount(length - 3 * size // 4)
    assert len(lengths) == size // 4
    if redraw_clipped:
        assert (offset.sign() == direction).all()
    else:
        assert (lengths * len(lengths) / len(length) - 1).abs().max() < 0.15
        assert (torch.bincount(labels, minlength=8) / len(labels) - 1 / 8).abs().max() < 0.012
        for axis, limit in enumerate(limits.tolist()):
            counts = torch.bincount(first[:, axis])
            assert len(counts) == limit + 1
            assert (counts * len(counts) / len(first) - 1).abs().max() < 0.6  # 5 of deviation
        assert 0.05 < (~inside).float().mean() < 0.9  # clipping happens


def test_redrawing_finds_the_only_places_there_are():
    """In an image of 2K - 1 pixels a diagonal pair of the longest offset fits in one place."""
    first, second, labels = _draw_pairs("position", 8, 15, 15, redraw_clipped=True)
    assert torch.equal((second - first).sign(), DIRECTIONS[labels])
    assert (torch.bincount(labels) > 0).all()
    assert (second - first).abs().max() == 7


@pytest.mark.parametrize("size", [32, 64])
def test_neighbour_pairs_follow_the_protocol(size):
    first, second, labels = _draw_pairs("neighbour", size, 256, 256)
    assert (labels == 0).all()
    reach = size // 32
    offset = second - first
    assert offset.abs().max() == reach
    interior = ((first >= reach) & (first <= 256 - size - reach)).all(dim=1)
    cells = (offset[interior] + reach) @ torch.tensor([2 * reach + 1, 1])
    counts = torch.bincount(cells, minlength=(2 * reach + 1) ** 2)
    middle = len(counts) // 2
    assert counts[middle] == 0
    others = torch.cat([counts[:middle], counts[middle + 1 :]]) / counts.sum()
    assert (others * len(others) - 1).abs().max() < 0.15


@pytest.mark.parametrize("size", [1, 32])
def test_views_are_in_one_place(size):
    height, width = 64, 50
    first, second, labels = _draw_pairs("view", size, height, width)
    assert torch.equal(first, second)
    assert (labels == 0).all()
    for axis, limit in enumerate((height - size, width - size)):
        counts = torch.bincount(first[:, axis])
        assert len(counts) == limit + 1
        expected = len(first) / len(counts)
        assert (counts - expected).abs().max() < 5 * math.sqrt(expected)
    correlation = torch.corrcoef(first.T.double())[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(len(first))


def test_crops_are_the_pixels_they_name():
    images = torch.randint(256, (3, 3, 70, 90), dtype=torch.uint8)
    mean = torch.rand(3, 70, 90) * 255
    image_of = torch.tensor([2, 0, 2, 1])
    patches, corners, _ = ops.crop_pairs(images, mean, image_of, 33, "neighbour", 0, 0)
    for pair, n in enumerate(image_of.tolist()):
        for which in (0, 1):
            top, left = corners[which, pair].tolist()
            window = (slice(None), slice(top, top + 33), slice(left, left + 33))
            assert torch.equal(patches[which, pair], (images[n][window] - mean[window]) / 255)


@pytest.mark.parametrize("kind", ["position", "view"])
def test_perturbation_has_the_stated_deviations(kind):
    """Clean patches are zero here, so what is left is a shift per channel and noise per pixel."""
    images, mean = torch.zeros(1, 3, 20, 20, dtype=torch.uint8), torch.zeros(3, 20, 20)
    image_of = torch.zeros(4000, dtype=torch.int64)
    patches, _, _ = ops.crop_pairs(images, mean, image_of, 8, kind, 0, 0)
    shift = patches.mean(dim=(3, 4), dtype=torch.float64)  # [2, B, 3]
    noise = patches - shift[..., None, None]
    assert float(shift.std()) == pytest.approx(math.hypot(COLOUR_SHIFT, PIXEL_NOISE / 8), rel=0.02)
    assert float(noise.std()) == pytest.approx(PIXEL_NOISE * math.sqrt(63 / 64), rel=0.005)
    assert float(shift.mean()) == pytest.approx(0, abs=4 * COLOUR_SHIFT / math.sqrt(shift.numel()))
    # Each patch and channel has its own shift; each pixel its own noise.
    correlations = torch.corrcoef(shift.permute(0, 2, 1).reshape(6, -1)) - torch.eye(6)
    assert correlations.abs().max() < 0.08
    pixels = noise.permute(0, 2, 3, 4, 1).reshape(2 * 3 * 64, -1)
    correlations = torch.corrcoef(pixels) - torch.eye(len(pixels))
    assert correlations.abs().max() < 0.12  # -1/63 within a channel, and 6 deviations of 1/63


def test_noise_is_normal_into_the_tails():
    images, mean = torch.zeros(1, 4, 64, 64, dtype=torch.uint8), torch.zeros(4, 64, 64)
    patches, _, _ = ops.crop_pairs(
        images, mean, torch.zeros(64, dtype=torch.int64), 64, "position", 0, 0
    )
    noise = patches - patches.mean(dim=(3, 4), keepdim=True)
    noise = (noise / noise.std(dim=(3, 4), keepdim=True)).flatten().numpy()  # 2 million
    assert scipy.stats.kstest(noise, "norm").pvalue > 1e-3
    for deviations in (2, 3, 4):
        expected = 2 * scipy.stats.norm.sf(deviations) * len(noise)
        assert abs((np.abs(noise) > deviations).sum() - expected) < 5 * math.sqrt(expected)
