"""Evaluate a detector on the labelled test images of a category in MVTec layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..files.folders import Category, LabelledImage
from ..files.whole import written_whole
from ..images.prepare import UnreadableError, read_mask, report_unreadable
from ..score import metrics
from ..score.image_result import ImageResult
from ..score.maps import combinations_of, combine, scores_of
from ..score.metrics import METRICS
from .patch_svdd import PatchSVDD


@dataclass(frozen=True)
class CategoryResult:
    """The metrics of a detector on one category's test images."""

    category: str
    """Its name."""
    num_good: int
    """Good test images."""
    num_anomalous: int
    """The other test images."""
    percent: dict[str, dict[str, float | None]]
    """By combination of the levels' maps ("K64", "K32", "sum", "mult"), then by key of `METRICS`:
    detection AUROC, segmentation AUROC, and AUPRO up to a false-positive rate of 0.3. In percent;
    the last two are None if an anomalous image has no mask."""


def evaluate_category(
    detector: PatchSVDD,
    category: Category,
    on_result: Callable[[LabelledImage, ImageResult], None] | None = None,
    skip_unreadable: bool = False,
) -> CategoryResult:
    """Score every test image of the category and compare with its labels and masks.

    on_result: called with each test image and its result, as soon as it is scored.
    skip_unreadable: leave out test images that cannot be read, with a warning that lists them.

    Raises ValueError unless there are both good and anomalous test images, if their maps differ in
    size, and at the end for all test images that cannot be read.
    """
    tests = category.test_images()
    _labels(category, tests)
    unreadable: dict[Path, Exception] = {}

    def note(path: Path, error: Exception) -> None:
        if not isinstance(error, OSError | UnreadableError):
            raise error
        unreadable[path] = error

    readable: list[LabelledImage] = []
    parts: dict[str, list[Tensor]] = {}
    weights: list[Tensor] = []  # of re-weighted scores
    with detector.score_stream((image.path for image in tests), on_error=note) as stream:
        left = iter(tests)
        for result in stream:
            image = next(one for one in left if one.path not in unreadable)
            readable.append(image)
            for name, level_map in result.scores.level_maps.items():
                parts.setdefault(name, []).append(level_map)
            if result.scores.weights is not None:
                weights.append(result.scores.weights)
            if on_result is not None:
                on_result(image, result)
    report_unreadable(list(unreadable.values()), len(tests), skip_unreadable)
    tests, labels = readable, _labels(category, readable)
    shapes = {tuple(level_map.shape[1:]) for level_map in next(iter(parts.values()))}
    if len(shapes) > 1:
        sizes = ", ".join(f"{width}x{height}" for height, width in sorted(shapes))
        raise ValueError(f"test images must have one size to be evaluated, got {sizes}")
    ((height, width),) = shapes
    level_maps = {name: torch.cat(maps) for name, maps in parts.items()}
    masks = read_masks(tests, (height, width))
    percent: dict[str, dict[str, float | None]] = {}
    for combination in combinations_of(detector.levels_):
        combined = combine(level_maps, combination)
        scores = scores_of(combined, torch.cat(weights) if weights else None).numpy()
        maps = combined.numpy()
        percent[combination] = {
            "detection": 100 * metrics.detection_auroc(scores, labels),
            "segmentation": None
            if masks is None
            else 100 * metrics.segmentation_auroc(maps, masks),
            "aupro": None if masks is None else 100 * metrics.aupro(maps, masks),
        }
    return CategoryResult(category.name, int((~labels).sum()), int(labels.sum()), percent)


def _labels(category: Category, tests: Sequence[LabelledImage]) -> npt.NDArray[np.bool_]:
    """Which test images are anomalous [N]. Raises ValueError unless there are both kinds."""
    labels = np.array([image.is_anomalous for image in tests])
    if labels.all() or not labels.any():
        raise ValueError(
            f"{category.root / 'test'} needs good and anomalous images, got only one kind"
        )
    return labels


def read_masks(
    tests: Sequence[LabelledImage], size: tuple[int, int]
) -> npt.NDArray[np.bool_] | None:
    """The masks of all test images, bool [N, height, width]; None if an anomalous one has none."""
    masks = [mask_of(image, size) for image in tests]
    known = [mask for mask in masks if mask is not None]
    return np.stack(known) if len(known) == len(masks) else None


def mask_of(image: LabelledImage, size: tuple[int, int]) -> npt.NDArray[np.bool_] | None:
    """The mask of a test image, bool [height, width]; None if it is anomalous and has none."""
    if not image.is_anomalous:
        return np.zeros(size, dtype=bool)
    return None if image.mask is None else read_mask(image.mask, size)


def mean_result(results: Sequence[CategoryResult]) -> CategoryResult:
    """The mean over categories, per combination and metric; numbers of images are summed.

    A metric is None if any category lacks it.
    """
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
    """Write the results as JSON, `extra` as further fields; the file appears when complete."""
    text = json.dumps({**extra, "results": [asdict(result) for result in results]}, indent=2)
    with written_whole(path) as partial:
        partial.write_text(text + "\n")
