"""Maps of encoders that see more than their patches: the border's factors, interpolation."""

import numpy as np
import pytest
import torch

from patchsvdd_fast import NormalBank, PatchLevel
from patchsvdd_fast.score.border import MOST, RINGS, border_factors, corrected, ring_means
from patchsvdd_fast.score.calibration import calibrate
from patchsvdd_fast.score.maps import MapRule, search_levels

LEVEL = PatchLevel(24, 8)


def test_rings_are_counted_from_the_border():
    rows, columns = 2 * RINGS + 3, 2 * RINGS + 2
    up = np.minimum(np.arange(rows), np.arange(rows)[::-1])[:, None]
    aside = np.minimum(np.arange(columns), np.arange(columns)[::-1])[None]
    rings = torch.from_numpy(np.minimum(np.minimum(up, aside), RINGS).astype(np.float32))
    means = ring_means(rings.expand(2, -1, -1) + 1)
    assert torch.equal(means, torch.arange(1.0, RINGS + 2, dtype=torch.float64).expand(2, -1))
    factors = torch.arange(2.0, RINGS + 2)
    expected = 1 / torch.cat([factors, torch.ones(1)])[rings.long()]
    assert torch.equal(corrected(torch.ones(3, rows, columns), factors)[2], expected)


def test_factors_never_enlarge_a_distance():
    means = torch.tensor([[3.0, 2.0, 1.0, 0.5, 1.0]])
    assert border_factors(means).tolist() == [[3, 2, 1, 1]]
    assert border_factors(torch.zeros(5)).tolist() == [1] * RINGS  # as of twins


@pytest.mark.parametrize("side", [2 * RINGS, 2 * RINGS + 1])
def test_a_grid_without_an_inside_is_left_alone(side):
    distances = torch.rand(2, side, 2 * RINGS + 1)
    distances[:, RINGS:-RINGS, RINGS:-RINGS] /= 100  # a single patch, or none
    factors = border_factors(ring_means(distances).mean(dim=0))
    assert torch.equal(corrected(distances, factors), distances)


def test_no_factor_blinds_the_border():
    """Images that are still inside and textured at the border differ there by nature."""
    distances = torch.rand(2, 13, 14)
    distances[:, RINGS:-RINGS, RINGS:-RINGS] = 0
    factors = border_factors(ring_means(distances).mean(dim=0))
    assert factors.tolist() == [MOST] * RINGS


def test_interpolated_maps_pass_through_the_centres_of_patches():
    distances = torch.rand(2, 5, 7)
    height, width = 24 + 4 * 8, 24 + 6 * 8
    found = MapRule(interpolate=True).map(distances, LEVEL, (height, width))
    assert found.shape == (2, height, width)
    # The centre of patch (i, j) is the corner between four pixels around (8i + 12, 8j + 12).
    around = found[:, 11 + 8 * 3 : 13 + 8 * 3, 11 + 8 * 4 : 13 + 8 * 4].mean(dim=(1, 2))
    low, high = distances[:, 2:5, 3:6].amin(dim=(1, 2)), distances[:, 2:5, 3:6].amax(dim=(1, 2))
    assert ((around >= low) & (around <= high)).all()
    assert torch.allclose(around, distances[:, 3, 4], atol=0.15)
    assert torch.equal(found[:, 0, 0], distances[:, 0, 0])  # constant beyond the outermost
    assert torch.equal(found[:, -1, -1], distances[:, -1, -1])
    flat = MapRule(interpolate=True).map(torch.full((1, 5, 7), 2.0), LEVEL, (height + 5, width + 3))
    assert torch.equal(flat, torch.full((1, height + 5, width + 3), 2.0))


def test_a_maps_maximum_is_about_the_largest_distance():
    distances = torch.zeros(1, 5, 7)
    distances[0, 2, 3] = 1.0
    assert 0.85 < float(MapRule(interpolate=True).map(distances, LEVEL, (56, 72)).max()) <= 1
    assert float(MapRule().map(distances, LEVEL, (56, 72)).max()) < 0.5  # the mean of nine patches


@pytest.fixture
def embeddings():
    """Good images [12, 13, 14, 8] whose border varies three times as much as their inside."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(12, 13, 14, 8, generator=generator)
    values[:, RINGS:-RINGS, RINGS:-RINGS] /= 3
    return values


def test_calibration_learns_the_border(embeddings):
    shape = (24 + 12 * 8, 24 + 13 * 8)
    banks = {LEVEL: NormalBank(embeddings)}
    seeing = calibrate(banks, shape, "mult", sees_surroundings=True)
    (factors,) = seeing.border.values()
    assert factors.shape == (RINGS,)
    assert (factors > 1.5).all()
    assert calibrate(banks, shape, "mult").border == {}

    # An image is corrected by the others' distances, as a new one is by those of all.
    others = {LEVEL: NormalBank(embeddings[1:])}
    rule = MapRule(True, calibrate(others, shape, "mult", sees_surroundings=True).border)
    first = search_levels(others, [embeddings[:1]], shape, rule=rule)
    score = float(first.image_scores)
    assert float((seeing.image_scores - score).abs().min()) < 0.05 * score
    plain = search_levels(others, [embeddings[:1]], shape)
    assert torch.equal(first.distances["K24"], plain.distances["K24"])
