"""Detection and segmentation metrics over a set of test images."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import integrate, ndimage
from sklearn.metrics import precision_recall_curve, roc_auc_score

FloatArray = npt.NDArray[np.floating[Any]]
BoolArray = npt.NDArray[np.bool_]

METRICS = {
    "detection": "det. AUROC",
    "segmentation": "seg. AUROC",
    "aupro": "AUPRO",
}
"""The metrics' names to show, by their key in results."""


def detection_auroc(image_scores: FloatArray, is_anomalous: BoolArray) -> float:
    """Area under the ROC curve over images: scores [N], labels [N]; 0.5 is chance.

    Raises ValueError unless there are both normal and anomalous images.
    """
    _require_both("images", is_anomalous)
    return float(roc_auc_score(is_anomalous, image_scores))


def segmentation_auroc(maps: FloatArray, masks: BoolArray) -> float:
    """Area under the ROC curve over the pixels of all images: maps and masks [N, H, W].

    Raises ValueError unless there are both normal and anomalous pixels.
    """
    _require_same_shape(maps, masks)
    _require_both("pixels", masks)
    return float(roc_auc_score(masks.ravel(), maps.ravel()))


def aupro(maps: FloatArray, masks: BoolArray, max_false_positive_rate: float = 0.3) -> float:
    """Area under the per-region overlap curve up to a false-positive rate, scaled to [0, 1].

    The curve has a point per threshold: the share of an anomalous region (8-connected) that lies
    above it, averaged over all regions, against the share of normal pixels above it. It is
    integrated by trapezoids up to `max_false_positive_rate` (Bergmann et al. 2021).

    maps, masks: [N, H, W]. Raises ValueError unless there are both normal and anomalous pixels.
    """
    _require_same_shape(maps, masks)
    _require_both("pixels", masks)
    if not 0 < max_false_positive_rate <= 1:
        raise ValueError(
            f"max_false_positive_rate must be in (0, 1], got {max_false_positive_rate}"
        )

    # Each anomalous pixel adds 1 / (its region's size) / (number of regions) to the overlap.
    eight_connected = np.ones((3, 3), dtype=bool)
    gain = np.zeros(maps.shape)
    regions = 0
    for image_gain, mask in zip(gain, masks, strict=True):
        labels, count = ndimage.label(mask, structure=eight_connected)
        sizes = np.bincount(labels.ravel())
        image_gain[mask] = 1 / sizes[labels[mask]]
        regions += count
    normal = ~masks

    order = np.argsort(-maps, axis=None, kind="stable")
    overlap = np.cumsum(gain.ravel()[order]) / regions
    false_positives = np.cumsum(normal.ravel()[order]) / normal.sum()
    scores = maps.ravel()[order]
    last_of_score = np.append(scores[1:] != scores[:-1], True)
    x = np.append(0.0, false_positives[last_of_score])
    y = np.append(0.0, overlap[last_of_score])

    inside = x <= max_false_positive_rate
    edge = np.interp(max_false_positive_rate, x, y)
    x = np.append(x[inside], max_false_positive_rate)
    y = np.append(y[inside], edge)
    return float(integrate.trapezoid(y, x) / max_false_positive_rate)


def best_f1(image_scores: FloatArray, is_anomalous: BoolArray) -> tuple[float, float]:
    """The highest F1 that any threshold reaches, and that threshold: scores [N], labels [N].

    Images with at least this score count as found; of equally good thresholds it is the highest.
    It is picked with the labels, so it says what is possible, not what a detector will do.

    Raises ValueError unless there are both normal and anomalous images.
    """
    _require_both("images", is_anomalous)
    precision, recall, thresholds = precision_recall_curve(is_anomalous, image_scores)
    both = precision[:-1] + recall[:-1]
    f1 = 2 * precision[:-1] * recall[:-1] / np.where(both > 0, both, 1)
    best = len(f1) - 1 - int(np.argmax(f1[::-1]))
    return float(f1[best]), float(thresholds[best])


def _require_both(what: str, labels: BoolArray) -> None:
    if labels.all() or not labels.any():
        raise ValueError(f"needs both normal and anomalous {what}, got only one kind")


def _require_same_shape(maps: FloatArray, masks: BoolArray) -> None:
    if maps.ndim != 3 or maps.shape != masks.shape:
        raise ValueError(
            f"maps and masks must both have shape [N, H, W], got {maps.shape} and {masks.shape}"
        )
