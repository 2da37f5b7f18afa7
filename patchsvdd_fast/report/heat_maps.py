"""Heat maps: an anomaly map in colours over its image, and the picture that is saved of one.

Over the image, what lies below the threshold is left as it is, and a line runs along the threshold.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from ..files.whole import written_whole
from ..score.image_result import ImageResult
from ..score.maps import ScoreResult, combine
from .captions import BAD, GOOD, INK, SOFT, write_line
from .map_files import MAP_THRESHOLD, png_bytes
from .summary import verdict_in_words

_Map = npt.NDArray[np.float32]
_Mask = npt.NDArray[np.bool_]
_Pixels = npt.NDArray[np.uint8]
_Colour = tuple[int, int, int]

# Anchors of a perceptually ordered colour scale: dark blue, violet, orange, yellow.
_ANCHORS = np.array(
    [(13, 8, 60), (84, 15, 109), (158, 42, 99), (224, 88, 60), (250, 160, 40), (252, 250, 160)]
)
_COLOURS = np.stack(  # [steps, 3], more than 8 bits can tell apart
    [
        np.interp(np.linspace(0, len(_ANCHORS) - 1, 1024), range(len(_ANCHORS)), channel)
        for channel in _ANCHORS.T
    ],
    axis=1,
)
_COLOURS = _COLOURS.round().astype(np.uint8)
_FAINTEST, _STRONGEST = 0.3, 0.75  # opacity at the threshold and at the hot end

SCALE_END = 2
"""The multiple of the threshold that has the last colour of a heat map."""

CONTOUR: _Colour = (255, 255, 255)
"""Colour of the line along the threshold."""
TRUTH: _Colour = (16, 224, 160)
"""Colour of the line around what is marked as anomalous. Both lie on a wider dark line."""
_DARK: _Colour = (0, 0, 0)

_SMALLEST, _LARGEST = 256, 1024  # longer side of a panel, in pixels
_GAP = 8


def colour_scale(values: _Map) -> npt.NDArray[np.uint8]:
    """Colours, uint8 [..., 3], for values [...] in [0, 1]; values outside are clipped."""
    steps = (np.clip(values, 0, 1) * (len(_COLOURS) - 1) + 0.5).astype(np.uint16)
    return _COLOURS[steps]


def opacity_scale(values: _Map, has_threshold: bool) -> _Map:
    """Opacity in [0, 1] for scaled values [...] in [0, 1].

    With a threshold, which 0.5 stands for, nothing below it is seen; without one, the hotter the
    more opaque.
    """
    if not has_threshold:
        return (_STRONGEST * np.clip(values, 0, 1)).astype(np.float32)
    above = np.clip(2 * values - 1, 0, 1)
    opacity = np.where(values > 0.5, _FAINTEST + (_STRONGEST - _FAINTEST) * above, 0)
    return opacity.astype(np.float32)


def scale_map(anomaly_map: _Map, threshold: float | None) -> _Map:
    """Scale a map [H, W] to [0, 1] for colours: 0.5 is the threshold, 1 is twice that or more.

    threshold: map value from which on a pixel is anomalous, `ImageResult.map_threshold`. Without
    one the map's own range is used, and colours of different images cannot be compared.
    """
    if threshold is not None:
        low, span = 0.0, SCALE_END * threshold
    else:
        low, span = float(anomaly_map.min()), float(np.ptp(anomaly_map)) or 1.0
    return np.clip((anomaly_map - low) / span, 0, 1).astype(np.float32)


def smooth_map(scores: ScoreResult) -> _Map:
    """The anomaly map [H, W] of one image (N = 1) without stairs, to be looked at.

    A level's map is constant over squares as large as its stride. They are interpolated, level by
    level, before the levels are combined. The result is scaled to have the same maximum, so that it
    exceeds the threshold exactly if the image does.
    """
    levels = {
        name: torch.from_numpy(_without_stairs(level_map[0].numpy()))[None]
        for name, level_map in scores.level_maps.items()
    }
    smooth: _Map = combine(levels, scores.combination)[0].numpy()
    highest, top = float(smooth.max()), float(scores.anomaly_map.max())
    return (
        np.minimum(smooth * np.float32(top / highest), np.float32(top)) if highest > 0 else smooth
    )


def _without_stairs(level_map: _Map) -> _Map:
    """A map [H, W] that is constant over equal blocks, interpolated between their middles."""
    height, width = level_map.shape
    down, across = _step(level_map), _step(level_map.T)
    if down == across == 1:
        return level_map
    blocks = level_map[::down, ::across]
    size = blocks.shape[1] * across, blocks.shape[0] * down
    return _interpolated(blocks, size)[:height, :width]


def _step(level_map: _Map) -> int:
    """Rows after which a map's values change: the largest common divisor of where they do."""
    changes = np.flatnonzero((level_map[1:] != level_map[:-1]).any(axis=1)) + 1
    return math.gcd(*changes.tolist()) or len(level_map)


def map_at(anomaly_map: _Map, size: tuple[int, int]) -> _Map:
    """A map [H, W] interpolated smoothly to a size (width, height) in pixels.

    It keeps its maximum, so that it exceeds a threshold exactly if the map does.
    """
    resized = _interpolated(anomaly_map, size)
    highest, top = float(resized.max()), float(anomaly_map.max())
    return resized * np.float32(top / highest) if 0 < highest < top else resized


def _interpolated(values: _Map, size: tuple[int, int]) -> _Map:
    """Values [H, W] at a size (width, height), within their own range."""
    if values.shape == size[::-1]:
        return values
    resized = Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(resized), values.min(), values.max())


def heat_map_overlay(
    image: Image.Image, anomaly_map: _Map, threshold: float | None, mask: _Mask | None = None
) -> Image.Image:
    """The image under its heat map, RGB, as large as the image.

    anomaly_map: [H, W] float32 of any size, interpolated to the image's; `smooth_map` has no
        stairs.
    threshold: as for `scale_map`; what lies below it stays as it is, and a white line runs along
        it.
    mask: bool [H, W] of any size, outlined in green; None: no outline.
    """
    values = map_at(anomaly_map, image.size)
    pixels = np.array(image.convert("RGB"))
    _cover(pixels, values, threshold)
    for line in (_outline(mask, image.size), _threshold_line(values, threshold)):
        _draw(pixels, line)
    return Image.fromarray(pixels)


def _cover(pixels: _Pixels, values: _Map, threshold: float | None) -> None:
    """Lay the colours of a map [H, W] over pixels [H, W, 3], where they are seen."""
    window = _window(values > (-np.inf if threshold is None else threshold), margin=0)
    scaled = scale_map(values, threshold)[window]
    opacity = opacity_scale(scaled, threshold is not None)[..., None]
    mixed = (1 - opacity) * pixels[window] + opacity * colour_scale(scaled)
    pixels[window] = mixed.round().astype(np.uint8)


class _Line(NamedTuple):
    """A line on a wider dark one, both with soft edges, to be drawn on pictures of one size."""

    window: tuple[slice, slice]
    """The part of the picture in which it lies."""
    strokes: tuple[tuple[_Colour, _Map], ...]
    """Colours, each with the opacity [H, W] of its stroke in the window."""


def _line(values: _Map, level: float, colour: _Colour) -> _Line | None:
    """The line where values [H, W] cross a level; None if they do not exceed it."""
    above = values > level
    if not above.any() or min(values.shape) < 2:
        return None
    width = max(2.0, max(values.shape) / 300)
    window = _window(above, margin=math.ceil(width) + 3)
    inside = values[window].astype(np.float32)
    slope = np.hypot(*np.gradient(inside))
    distance = np.abs(inside - np.float32(level)) / np.maximum(slope, 1e-30)  # in pixels
    strokes = tuple(
        (paint, strength * np.clip(reach + 0.5 - distance, 0, 1))
        for reach, paint, strength in ((width + 1.2, _DARK, 0.6), (width / 2, colour, 1.0))
    )
    return _Line(window, strokes)


def _threshold_line(values: _Map, threshold: float | None) -> _Line | None:
    return None if threshold is None else _line(values, threshold, CONTOUR)


def _outline(mask: _Mask | None, size: tuple[int, int]) -> _Line | None:
    """The line around a mask [H, W] of any size, in a picture of this size (width, height)."""
    if mask is None or not mask.any():
        return None
    values = _interpolated(mask.astype(np.float32), size)
    larger = max(1.0, size[0] / mask.shape[1])
    return _line(np.asarray(ndimage.gaussian_filter(values, larger)), 0.5, TRUTH)


def _draw(pixels: _Pixels, line: _Line | None) -> None:
    """Draw a line on pixels [H, W, 3]."""
    if line is None:
        return
    drawn = pixels[line.window].astype(np.float32)
    for colour, covered in line.strokes:
        drawn += covered[..., None] * (np.array(colour, np.float32) - drawn)
    pixels[line.window] = drawn.round().astype(np.uint8)


def _window(marked: _Mask, margin: int) -> tuple[slice, slice]:
    """The smallest window with all that is marked [H, W], and so many pixels around it."""
    rows, columns = (np.flatnonzero(marked.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return slice(0), slice(0)
    return (
        slice(max(0, int(rows[0]) - margin), int(rows[-1]) + margin + 1),
        slice(max(0, int(columns[0]) - margin), int(columns[-1]) + margin + 1),
    )


# --- saved pictures -------------------------------------------------------------------------------


def heat_map_picture(
    image: Image.Image,
    anomaly_map: _Map,
    threshold: float | None,
    name: str = "",
    verdict: str = "",
    anomalous: bool | None = None,
    mask: _Mask | None = None,
) -> Image.Image:
    """What is saved of an image, side by side, below its name and verdict, as one RGB picture.

    The image; the image under its heat map; the map in full colours; and, with a threshold, the
    predicted mask. Below them the colours, with the threshold marked. Panels have the image's size,
    or up to 1,024 pixels of it; images smaller than 256 pixels are enlarged.

    image, anomaly_map, threshold, mask: as for `heat_map_overlay`.
    name: of the image, cut in its middle if it is long. verdict: in words.
    anomalous: gives the verdict its colour; None: none.
    """
    longer = max(image.size)
    scale = min(max(longer, _SMALLEST), _LARGEST) / longer
    width, height = (max(1, round(side * scale)) for side in image.size)
    plain = image.convert("RGB")
    if plain.size != (width, height):
        plain = plain.resize((width, height), reducing_gap=2.0)
    values = map_at(anomaly_map, plain.size)
    covered = np.array(plain)
    _cover(covered, values, threshold)
    panels = {
        "image": np.array(plain),
        "heat map": covered,
        "anomaly map": colour_scale(scale_map(values, threshold)),
    }
    if threshold is not None:
        above = np.where(values > threshold, np.uint8(255), np.uint8(0))
        panels["predicted mask"] = np.repeat(above[..., None], 3, axis=-1)
    outline, contour = _outline(mask, plain.size), _threshold_line(values, threshold)
    for label, pixels in panels.items():
        _draw(pixels, outline)
        if label in ("heat map", "anomaly map"):
            _draw(pixels, contour)

    step = max(width, _SMALLEST // 2) + _GAP  # room for the words above narrow panels
    total = len(panels) * step + _GAP
    size = max(13, total // 80)
    line = round(1.5 * size)
    top = _GAP + 3 * line
    picture = Image.new("RGB", (total, top + height + _GAP + 2 * line + _GAP), "white")
    draw = ImageDraw.Draw(picture)
    colour = INK if anomalous is None else BAD if anomalous else GOOD
    write_line(draw, (_GAP, _GAP), name, total - 2 * _GAP, size)
    write_line(draw, (_GAP, _GAP + line), verdict, total - 2 * _GAP, size, colour)
    for number, (label, pixels) in enumerate(panels.items()):
        left = _GAP + number * step
        write_line(draw, (left, top - line), label, step - _GAP, size, SOFT)
        picture.paste(Image.fromarray(pixels), (left, top))
    place = (_GAP, top + height + _GAP)
    marked = mask is not None and bool(mask.any())
    _draw_legend(picture, place, size, threshold is not None, marked)
    return picture


def _draw_legend(
    picture: Image.Image, place: tuple[int, int], size: int, has_threshold: bool, has_mask: bool
) -> None:
    """The colours with the threshold marked, and what the lines mean. size: of the font."""
    draw = ImageDraw.Draw(picture)
    left, top = place
    width = min(picture.width - 2 * left, 20 * size)
    ramp = colour_scale(np.linspace(0, 1, width, dtype=np.float32))[None]
    picture.paste(Image.fromarray(ramp.repeat(size, axis=0)), (left, top))
    below = top + size + 3
    ends = ("0", f"{SCALE_END} x") if has_threshold else ("low", "high")
    write_line(draw, (left, below), ends[0], width // 3, size, SOFT)
    write_line(draw, (left + width - 2 * size, below), ends[1], 3 * size, size, SOFT)
    if has_threshold:
        middle = left + width // 2
        draw.rectangle((middle - 1, top - 2, middle + 1, below + 1), fill=CONTOUR, outline=INK)
        write_line(draw, (middle - round(2.5 * size), below + 1), "threshold", width, size, SOFT)
    keys = [(CONTOUR, "at the threshold")] * has_threshold + [(TRUTH, "ground truth")] * has_mask
    x = left + width + 2 * size
    for colour, words in keys:
        draw.line((x, top + size // 2, x + 2 * size, top + size // 2), fill=(90, 90, 90), width=6)
        draw.line((x, top + size // 2, x + 2 * size, top + size // 2), fill=colour, width=2)
        write_line(draw, (x + 2 * size + 6, top - size // 5), words, 10 * size, size, SOFT)
        x += 12 * size


def write_heat_map(path: Path, result: ImageResult, mask: _Mask | None = None) -> None:
    """Write the picture of `heat_map_picture` of a result as a PNG, which says its scale.

    The image is `ImageResult.original_picture`.

    mask: bool [H, W], True where the image is anomalous; None if unknown. Raises OSError.
    """
    threshold = result.map_threshold
    picture = heat_map_picture(
        result.original_picture,
        smooth_map(result.scores),
        threshold,
        result.name,
        verdict_in_words(result),
        result.anomalous,
        mask,
    )
    text = {} if threshold is None else {MAP_THRESHOLD: repr(threshold)}
    with written_whole(path) as partial:
        partial.write_bytes(png_bytes(np.asarray(picture), text))
