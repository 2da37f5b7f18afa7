"""Why an image is anomalous: its regions, and the normal patch nearest to each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ..encoders.levels import PatchLevel
from .calibration import Calibration
from .maps import ScoreResult


@dataclass(frozen=True)
class Region:
    """A part of an image that looks anomalous. All positions are pixels of the anomaly map."""

    left: int
    """First column of its box."""
    top: int
    """First row of its box."""
    width: int
    """Columns of its box."""
    height: int
    """Rows of its box."""
    area: int
    """Pixels that belong to it."""
    peak: float
    """Highest value of the anomaly map in it."""
    level: str
    """The level that raised the alarm, e.g. "K32": the one scored by, or of several the one whose
    map stands out most at the peak, see `Calibration.level_of_alarm`."""
    distance: float
    """L2 distance at that level from the patch at the peak to its nearest normal patch."""
    patch: tuple[int, int, int]
    """Left, top and size of that patch of this image."""
    match_image: int
    """Number of the training image that holds the nearest normal patch."""
    match_name: str
    """Name of that training image."""
    match: tuple[int, int, int]
    """Left, top and size of the nearest normal patch in it."""


def find_regions(
    result: ScoreResult,
    levels: Sequence[PatchLevel],
    calibration: Calibration | None,
    threshold: float | None,
    names: Sequence[str],
) -> list[Region]:
    """The anomalous regions of one image, the most anomalous first.

    A region is a connected part of the map whose peak exceeds the threshold, times the image's
    weight if scores are re-weighted. It ends where the map falls to the value that one pixel in a
    thousand of good images exceeds (or to the threshold, if that is lower). So there are regions
    exactly if the image is called anomalous; for others see `highest_place`.

    result: of one image (N = 1); names: of the training images. Without a calibration or threshold
    there are no regions.
    """
    if calibration is None or threshold is None:
        return []
    anomaly_map = result.anomaly_map[0].double().numpy()
    weight = 1.0 if result.weights is None else float(result.weights[0])
    low = min(calibration.exceeded_by(0.001), threshold)
    labels, count = ndimage.label(anomaly_map > low, structure=np.ones((3, 3)))
    regions = []
    for number, window in enumerate(ndimage.find_objects(labels, count), start=1):
        inside = np.where(labels[window] == number, anomaly_map[window], -np.inf)
        if float(np.float32(inside.max() * weight)) > threshold:  # rounded as image scores are
            y, x = np.unravel_index(inside.argmax(), inside.shape)
            peak = int(window[0].start + y), int(window[1].start + x)
            box = (window[1].start, window[0].start, inside.shape[1], inside.shape[0])
            area = int((labels[window] == number).sum())
            regions.append(_region(box, area, peak, result, levels, calibration, names))
    return sorted(regions, key=lambda region: -region.peak)


def highest_place(
    result: ScoreResult,
    levels: Sequence[PatchLevel],
    calibration: Calibration | None,
    names: Sequence[str],
) -> Region:
    """The highest pixel of one image's map, anomalous or not, as a region of 1x1.

    Arguments as for `find_regions`; without a calibration the first level explains it.
    """
    y, x = _peak(result)
    return _region((x, y, 1, 1), 1, (y, x), result, levels, calibration, names)


def level_of_peak(result: ScoreResult, calibration: Calibration | None) -> str:
    """The level of `highest_place`, by name."""
    return _level_at(_peak(result), result, calibration)


def _peak(result: ScoreResult) -> tuple[int, int]:
    """(y, x) of the highest pixel of one image's map."""
    anomaly_map = result.anomaly_map[0].numpy()
    y, x = np.unravel_index(anomaly_map.argmax(), anomaly_map.shape)
    return int(y), int(x)


def _level_at(pixel: tuple[int, int], result: ScoreResult, calibration: Calibration | None) -> str:
    """The level that raised the alarm at (y, x), see `Region.level`."""
    values = {name: float(maps[0][pixel]) for name, maps in result.level_maps.items()}
    if result.combination in values:
        return result.combination
    return next(iter(values)) if calibration is None else calibration.level_of_alarm(values)


def _region(
    box: tuple[int, int, int, int],
    area: int,
    peak: tuple[int, int],
    result: ScoreResult,
    levels: Sequence[PatchLevel],
    calibration: Calibration | None,
    names: Sequence[str],
) -> Region:
    name = _level_at(peak, result, calibration)
    level = next(level for level in levels if str(level) == name)
    distances = result.distances[name][0].numpy()  # [I, J]
    i, j = _patch_at(peak, level, distances)
    image, row, column = (int(value) for value in result.matches[name][0, i, j])
    left, top, width, height = box
    return Region(
        left=left,
        top=top,
        width=width,
        height=height,
        area=area,
        peak=float(result.anomaly_map[0][peak]),
        level=name,
        distance=float(distances[i, j]),
        patch=(j * level.stride, i * level.stride, level.size),
        match_image=image,
        match_name=names[image] if image < len(names) else f"image {image}",
        match=(column * level.stride, row * level.stride, level.size),
    )


def _patch_at(
    pixel: tuple[int, int], level: PatchLevel, distances: npt.NDArray[np.float32]
) -> tuple[int, int]:
    """Of the patches that cover a pixel, grid row and column of that with the largest distance.

    pixel: (y, x). At a margin that no patch reaches, the patches nearest to it are taken.
    """
    first, last = [], []
    for place, count in zip(pixel, distances.shape, strict=True):
        last.append(min(place // level.stride, count - 1))
        first.append(min(max(0, -(-(place - level.size + 1) // level.stride)), last[-1]))
    window = distances[first[0] : last[0] + 1, first[1] : last[1] + 1]
    i, j = np.unravel_index(window.argmax(), window.shape)
    return first[0] + int(i), first[1] + int(j)
