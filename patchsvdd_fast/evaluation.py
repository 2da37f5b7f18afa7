"""Evaluating a detector on a category in MVTec layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from . import metrics
from .detector import PatchSVDD
from .files import written_whole
from .images import Category, LabelledImage, read_mask
from .score import ScoreResult, combinations_of

METRICS = {
    "detection": "det. AUROC",
    "segmentation": "seg. AUROC",
    "aupro": "AUPRO",
}
"""Metrics by the key they have in results, with the name to show."""


@dataclass(frozen=True)
class CategoryResult:
    """What a detector reaches on one category's test images."""

    category: str
    num_good: int
    num_anomalous: int
    percent: dict[str, dict[str, float | None]]
    """By combination ("K64", "K32", "sum", "mult"), then metric: detection AUROC, segmentation
    AUROC, AUPRO up to 0.3 false positives, in percent. None where labels or masks are missing."""


def evaluate_category(
    detector: PatchSVDD, category: Category, result: ScoreResult | None = None
) -> CategoryResult:
    """Score every test image of the category and compare with its labels and masks.

    result: the scores of `category.test_images()`, if they are known already.
    Raises ValueError if there are no test images, or they are all good or all anomalous.
    """
    tests = category.test_images()
    labels = np.array([image.is_anomalous for image in tests])
    if labels.all() or not labels.any():
        raise ValueError(
            f"{category.root / 'test'} needs good and anomalous images, got only one kind"
        )
    if result is None:
        result = detector.score([image.path for image in tests])
    height, width = result.anomaly_map.shape[1:]
    masks = read_masks(tests, (height, width))
    percent: dict[str, dict[str, float | None]] = {}
    for combination in combinations_of(detector.levels):
        maps = result.map(combination).numpy()
        percent[combination] = {
            "detection": 100 * metrics.detection_auroc(maps.max(axis=(1, 2)), labels),
            "segmentation": None
            if masks is None
            else 100 * metrics.segmentation_auroc(maps, masks),
            "aupro": None if masks is None else 100 * metrics.aupro(maps, masks),
        }
    return CategoryResult(category.name, int((~labels).sum()), int(labels.sum()), percent)


def read_masks(
    tests: Sequence[LabelledImage], size: tuple[int, int]
) -> npt.NDArray[np.bool_] | None:
    """What is anomalous, [N, height, width]; None if an anomalous image has no mask."""
    if any(image.mask is None for image in tests if image.is_anomalous):
        return None
    return np.stack(
        [
            np.zeros(size, dtype=bool)
            if image.mask is None or not image.is_anomalous
            else read_mask(image.mask, size)
            for image in tests
        ]
    )


def mean_result(results: Sequence[CategoryResult]) -> CategoryResult:
    """The mean over categories, per combination and metric; None where a category has none."""
    percent: dict[str, dict[str, float | None]] = {}
    for combination in results[0].percent:
        percent[combination] = {}
        for metric in METRICS:
            values = [result.percent[combination][metric] for result in results]
            known = [value for value in values if value is not None]
            percent[combination][metric] = (
                sum(known) / len(known) if len(known) == len(values) else None
            )
    return CategoryResult(
        "mean",
        sum(result.num_good for result in results),
        sum(result.num_anomalous for result in results),
        percent,
    )


def write_json(results: Sequence[CategoryResult], path: Path, **extra: object) -> None:
    """Write the results, and what else is given, as JSON; the file appears when complete."""
    text = json.dumps({**extra, "results": [asdict(result) for result in results]}, indent=2)
    with written_whole(path) as partial:
        partial.write_text(text + "\n")
