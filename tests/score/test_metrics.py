"""Metrics (AUROC, AUPRO) against independent computations."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage

from patchsvdd_fast.score.metrics import aupro, best_f1, detection_auroc, segmentation_auroc


def _aupro_by_thresholds(maps, masks, limit):
    """Every distinct value as a threshold, every region counted by hand."""
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        found = maps >= threshold
        overlaps = []
        for image_found, mask in zip(found, masks, strict=True):
            labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
            overlaps += [image_found[labels == region].mean() for region in range(1, count + 1)]
        points.append((found[~masks].mean(), np.mean(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < limit:
            share = min(1.0, (limit - x0) / (x1 - x0)) if x1 > x0 else 1.0
            area += share * (x1 - x0) * (y0 + (y0 + share * (y1 - y0))) / 2
    return area / limit


def _auroc_by_pairs(scores, labels):
    positive, negative = scores[labels], scores[~labels]
    wins = (positive[:, None] > negative).mean() + 0.5 * (positive[:, None] == negative).mean()
    return float(wins)


@pytest.fixture
def masks():
    masks = np.zeros((3, 16, 17), dtype=bool)
    masks[0, 2:6, 3:9] = True
    masks[0, 10:12, 10:12] = True
    masks[0, 12, 12] = True  # touches the square at a corner only: still the same region
    masks[1, 0, 0] = True
    return masks


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("levels", [4, 1000])
def test_aupro_is_what_thresholds_give(masks, limit, levels):
    rng = np.random.default_rng(levels)
    maps = rng.integers(levels, size=masks.shape) / levels + 0.3 * masks
    maps = np.round(maps * levels) / levels  # ties
    assert aupro(maps, masks, limit) == pytest.approx(_aupro_by_thresholds(maps, masks, limit))


def test_aupro_of_perfect_and_useless_maps(masks):
    assert aupro(masks.astype(float), masks) == pytest.approx(1)
    assert aupro(np.zeros(masks.shape), masks) == pytest.approx(0.15)  # the diagonal


def test_aurocs_are_pairwise_wins(masks):
    rng = np.random.default_rng(0)
    maps = np.round(rng.random(masks.shape) + 0.2 * masks, 1)
    assert segmentation_auroc(maps, masks) == pytest.approx(
        _auroc_by_pairs(maps.ravel(), masks.ravel())
    )
    scores, labels = maps.max(axis=(1, 2)), masks.any(axis=(1, 2))
    assert detection_auroc(scores, labels) == pytest.approx(_auroc_by_pairs(scores, labels))


def test_one_kind_alone_is_an_error(masks):
    maps = np.zeros(masks.shape)
    for function in (aupro, segmentation_auroc):
        with pytest.raises(ValueError, match="both normal and anomalous pixels"):
            function(maps, np.zeros_like(masks))
        with pytest.raises(ValueError, match="shape"):
            function(maps[:2], masks)
    with pytest.raises(ValueError, match="both normal and anomalous images"):
        detection_auroc(np.zeros(3), np.ones(3, dtype=bool))


def test_best_f1_is_that_of_the_best_of_all_thresholds():
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = np.append(rng.random(20) < 0.4, [True, False])
        scores = rng.integers(0, 9, 22) + 2.0 * labels
        found = {}
        for threshold in np.unique(scores):
            called = scores >= threshold
            found[threshold] = 2 * (called & labels).sum() / (called.sum() + labels.sum())
        f1, threshold = best_f1(scores, labels)
        assert f1 == pytest.approx(max(found.values()))
        assert found[threshold] == pytest.approx(f1)
    with pytest.raises(ValueError, match="both normal and anomalous"):
        best_f1(scores, np.ones(22, bool))
