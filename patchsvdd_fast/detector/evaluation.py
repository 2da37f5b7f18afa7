"""Evaluate a detector on the labelled test images of a category."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..files.categories import Category
from ..files.folders import counted, report_unreadable, some_of
from ..files.layouts import LabelledImage, LabelledSet
from ..files.masks import has_proportions_of, read_mask
from ..files.whole import written_whole
from ..images.prepare import UnreadableError
from ..score import metrics
from ..score.image_result import ImageResult
from ..score.maps import combinations_of, combine, scores_of
from ..score.metrics import METRICS
from ..training.workers import Workers, with_failures
from .patch_svdd import PatchSVDD

_MOST = 0.5  # of the pixels of anomalous images: defects are seldom so large, backgrounds are


@dataclass(frozen=True)
class AtThreshold:
    """What a detector's verdicts reach on labelled test images."""

    false_alarm_rate: float
    """Share of good images that may be called anomalous, as the threshold promises."""
    threshold: float
    """Image score above which an image is called anomalous."""
    missed: int
    """Anomalous images called normal."""
    num_anomalous: int
    """Anomalous images."""
    false_alarms: int
    """Good images called anomalous."""
    num_good: int
    """Good images."""
    best_f1: float
    """The highest F1 of any threshold, picked with these labels: what would be possible."""
    best_f1_threshold: float
    """Lowest score that counts as anomalous there."""

    def in_words(self) -> list[str]:
        """Two lines: what the threshold reaches, and what one picked with labels would."""
        return [
            f"at the threshold, which promises at most {self.false_alarm_rate:.2%} false alarms on "
            f"good images like the training images: {self.missed:,} of {self.num_anomalous:,} "
            f"anomalous images missed, {self.false_alarms:,} of {self.num_good:,} good ones called "
            "anomalous",
            f"best F1 {self.best_f1:.3f}, at {self.best_f1_threshold / self.threshold:.3g} x the "
            "threshold, picked with these labels (needs labels, promises nothing)"
            if self.threshold > 0
            else f"best F1 {self.best_f1:.3f}, picked with these labels (needs labels)",
        ]


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
    the last two are None if masks are missing or unusable."""
    no_segmentation: str | None = None
    """Why the last two are None; None if they are not."""
    at_threshold: AtThreshold | None = None
    """Of the detector's verdicts; None without a threshold, and for a mean."""
    num_validation: int = 0
    """Good images that were set apart (`Category.validation_paths`); `percent` is without them."""
    num_false_alarms: int | None = None
    """How many of those score above the detector's threshold; None without them, and for a
    detector that has no threshold."""

    @property
    def validation_alarms(self) -> str | None:
        """`num_false_alarms` in words, "2 of 50"; None if it is None."""
        if self.num_false_alarms is None:
            return None
        return f"{self.num_false_alarms:,} of {self.num_validation:,}"

    def __repr__(self) -> str:
        combination, percent = list(self.percent.items())[-1]  # "mult", or the only level
        figures = [f"{name} {value:.1f}" for name, value in percent.items() if value is not None]
        parts = [f"{self.num_good:,} good, {self.num_anomalous:,} anomalous"]
        parts.append(f"{combination}: {', '.join(figures)}")
        if self.at_threshold is not None:
            reached = self.at_threshold
            parts.append(
                f"{reached.missed:,} missed, {counted(reached.false_alarms, 'false alarm')}"
            )
        return f"CategoryResult({self.category!r}, {'; '.join(parts)})"


def evaluate_category(
    detector: PatchSVDD,
    category: Category,
    on_result: Callable[[LabelledImage, ImageResult], None] | None = None,
    test_set: LabelledSet | None = None,
    skip_unreadable: bool = False,
    keep_originals: bool = False,
    workers: Workers | None = None,
) -> CategoryResult:
    """Score every test image of the category and compare with its labels and masks.

    Images for validation, in layouts that have them, are scored too: good ones that the detector
    was not trained on, of which those above its threshold are false alarms.

    on_result: called with each test image and its result, as soon as it is scored.
    test_set: what `category.test_set()` gave; None: it is called.
    skip_unreadable: leave out images that cannot be read, with a warning that lists them.
    keep_originals: as for `PatchSVDD.score_stream`, for what `on_result` draws.
    workers: processes among which the images are divided; this is the first, and the others call
        `share_evaluation` meanwhile. None: this process alone.

    Masks that cannot be used end nothing: segmentation is left out, with the reason. Warns of masks
    that match no image, and of masks that mark nothing. Raises ValueError unless there are both
    good and anomalous test images, if their maps differ in size, and at the end for all images that
    cannot be read.
    """
    workers = workers or Workers()
    test_set = category.test_set() if test_set is None else test_set
    for remark in test_set.remarks:
        warnings.warn(f"{category.name}: {remark}", stacklevel=2)
    tests = test_set.images
    _labels(category, tests)
    readable: list[LabelledImage] = []
    parts: dict[str, list[Tensor]] = {}
    weights: list[Tensor] = []  # of re-weighted scores
    originals: list[tuple[int, int]] = []
    verdicts: list[tuple[float, bool | None]] = []
    left = iter(tests)
    paths = [image.path for image in tests]
    for result in _results(detector, paths, skip_unreadable, workers, keep_originals):
        image = next(one for one in left if one.path == result.source)
        readable.append(image)
        originals.append(result.original_size)
        verdicts.append((result.score, result.anomalous))
        for name, level_map in result.scores.level_maps.items():
            parts.setdefault(name, []).append(level_map)
        if result.scores.weights is not None:
            weights.append(result.scores.weights)
        if on_result is not None:
            on_result(image, result)
    good_paths = category.validation_paths()
    alarms = [one.anomalous for one in _results(detector, good_paths, skip_unreadable, workers)]
    tests, labels = readable, _labels(category, readable)
    shapes = {tuple(level_map.shape[1:]) for level_map in next(iter(parts.values()))}
    if len(shapes) > 1:
        sizes = ", ".join(f"{width}x{height}" for height, width in sorted(shapes))
        raise ValueError(f"test images must have one size to be evaluated, got {sizes}")
    ((height, width),) = shapes
    level_maps = {name: torch.cat(maps) for name, maps in parts.items()}
    masks, missing = masks_or_reason(tests, (height, width), originals)
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
    good, anomalous = int((~labels).sum()), int(labels.sum())
    reached = _at_threshold(detector, verdicts, labels)
    return CategoryResult(
        category.name,
        good,
        anomalous,
        percent,
        missing,
        reached,
        num_validation=len(alarms),
        num_false_alarms=_sum(alarms),
    )


def share_evaluation(
    detector: PatchSVDD,
    category: Category,
    workers: Workers,
    test_set: LabelledSet | None = None,
    skip_unreadable: bool = False,
    keep_originals: bool = False,
) -> None:
    """Score this process's share of the images of `evaluate_category`, which the first one runs."""
    test_set = category.test_set() if test_set is None else test_set
    paths = [image.path for image in test_set.images]
    for _ in _results(detector, paths, skip_unreadable, workers, keep_originals):
        pass
    for _ in _results(detector, category.validation_paths(), skip_unreadable, workers):
        pass


def _at_threshold(
    detector: PatchSVDD,
    verdicts: Sequence[tuple[float, bool | None]],
    labels: npt.NDArray[np.bool_],
) -> AtThreshold | None:
    """verdicts: of each image its score, and whether it was called anomalous. labels: [N]."""
    threshold = detector.threshold_or_none()
    if threshold is None:
        return None
    called = np.array([bool(anomalous) for _, anomalous in verdicts])
    best, at = metrics.best_f1(np.array([score for score, _ in verdicts]), labels)
    return AtThreshold(
        false_alarm_rate=detector.false_alarm_rate_,
        threshold=threshold,
        missed=int((~called & labels).sum()),
        num_anomalous=int(labels.sum()),
        false_alarms=int((called & ~labels).sum()),
        num_good=int((~labels).sum()),
        best_f1=best,
        best_f1_threshold=at,
    )


def _results(
    detector: PatchSVDD,
    paths: Sequence[Path],
    skip_unreadable: bool,
    workers: Workers,
    keep_originals: bool = False,
) -> Iterator[ImageResult]:
    """Score files, in their order; those that cannot be read are reported at the end.

    Of several processes each scores its share, and the first has the results of all.
    """
    failed: list[Exception] = []

    def note(_: Path, error: Exception) -> None:
        if not isinstance(error, OSError | UnreadableError):
            raise error
        failed.append(error)

    def own_results() -> Iterator[ImageResult | Exception]:
        own = workers.own(paths)
        with detector.score_stream(own, on_error=note, keep_originals=keep_originals) as stream:
            yield from with_failures(stream, failed)

    unreadable: list[Exception] = []
    for result in workers.in_order(own_results()):
        if isinstance(result, Exception):
            unreadable.append(result)
        else:
            yield result
    report_unreadable(unreadable, len(paths), skip_unreadable)


def _sum(counts: Sequence[int | None]) -> int | None:
    """Of those that are known; None if none is."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def masks_or_reason(
    tests: Sequence[LabelledImage],
    size: tuple[int, int],
    originals: Sequence[tuple[int, int]] | None = None,
) -> tuple[npt.NDArray[np.bool_] | None, str | None]:
    """The masks of all test images, bool [N, height, width]; or None, and why in words.

    originals: (height, width) of each image's file, in pixels; None: not known.

    Warns of masks that mark nothing, of those with other proportions than their image, and if all
    together mark most of their images.
    """
    anomalous = [image for image in tests if image.is_anomalous]
    without = [image for image in anomalous if not image.masks]
    if without:
        few = f"{len(without):,} of {len(anomalous):,}, such as {without[0].path}"
        return None, f"anomalous images without a mask: {few}"
    try:
        masks = [mask_of(image, size) for image in tests]
    except (ValueError, OSError) as error:
        return None, str(error)
    odd = [
        path
        for image, original in zip(tests, originals or (), strict=originals is not None)
        if image.is_anomalous
        for path in image.masks
        if not has_proportions_of(path, original)
    ]
    if odd:
        warnings.warn(
            "masks with other proportions than their images, which are stretched to them (turned, "
            f"or cut?): {some_of(odd)}",
            stacklevel=3,
        )
    known = [mask for mask in masks if mask is not None]
    empty = [
        image.masks[0]
        for image, mask in zip(tests, known, strict=True)
        if image.is_anomalous and not mask.any()
    ]
    if empty:
        at = f"at {size[1]}x{size[0]} pixels"
        warnings.warn(
            f"masks of anomalous images that mark nothing {at}: {len(empty):,} "
            f"({', '.join(map(str, empty[:3]))}{', ...' if len(empty) > 3 else ''})",
            stacklevel=3,
        )
    if len(empty) == len(anomalous):
        return None, f"no mask marks anything {at}" if empty else "no image is anomalous"
    if all(mask.all() for mask in known):
        return None, "the masks mark every pixel"
    share = float(np.mean([mask for mask in known if mask.any()]))
    if share > _MOST:
        warnings.warn(
            f"the masks mark {share:.0%} of the pixels of anomalous images: are black and white "
            "exchanged? What is anomalous should not be black",
            stacklevel=3,
        )
    return np.stack(known), None


def _labels(category: Category, tests: Sequence[LabelledImage]) -> npt.NDArray[np.bool_]:
    """Which test images are anomalous [N]. Raises ValueError unless there are both kinds."""
    labels = np.array([image.is_anomalous for image in tests])
    if labels.all() or not labels.any():
        raise ValueError(f"{category.root} needs good and anomalous test images, got only one kind")
    return labels


def read_masks(
    tests: Sequence[LabelledImage], size: tuple[int, int]
) -> npt.NDArray[np.bool_] | None:
    """The masks of all test images, bool [N, height, width]; None if they cannot be used."""
    return masks_or_reason(tests, size)[0]


def mask_of(image: LabelledImage, size: tuple[int, int]) -> npt.NDArray[np.bool_] | None:
    """The mask of a test image, bool [height, width]; None if it is anomalous and has none.

    Several masks are joined. Raises ValueError or OSError for one that cannot be read.
    """
    if not image.is_anomalous:
        return np.zeros(size, dtype=bool)
    if not image.masks:
        return None
    joined: npt.NDArray[np.bool_] = np.any([read_mask(path, size) for path in image.masks], axis=0)
    return joined


def mean_result(results: Sequence[CategoryResult]) -> CategoryResult:
    """The mean over categories, per combination and metric; numbers of images are summed.

    A metric is None if any category lacks it.
    """
    lacking = [result.category for result in results if result.no_segmentation]
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
        f"not known of {', '.join(lacking)}" if lacking else None,
        num_validation=sum(result.num_validation for result in results),
        num_false_alarms=_sum([result.num_false_alarms for result in results]),
    )


def write_json(results: Sequence[CategoryResult], path: Path, **extra: object) -> None:
    """Write the results as JSON, `extra` as further fields; the file appears when complete."""
    text = json.dumps({**extra, "results": [asdict(result) for result in results]}, indent=2)
    with written_whole(path) as partial:
        partial.write_text(text + "\n")
