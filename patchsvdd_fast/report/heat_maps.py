"""Heat maps: an anomaly map in colours over its image, and the picture that is saved of one.

Over the image, what lies below the threshold is left as it is, and a line runs along the threshold.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from ..files.whole import written_whole
from ..score.image_result import ImageResult
from ..score.maps import ScoreResult, combine
from .captions import BAD, GOOD, INK, SOFT, write_line
from .map_files import MAP_THRESHOLD
from .summary import verdict_in_words

_Map = npt.NDArray[np.float32]
_Mask = npt.NDArray[np.bool_]
_Colour = tuple[int, int, int]

# Anchors of a perceptually ordered colour scale: dark blue, violet, orange, yellow.
_ANCHORS = np.array(
    [(13, 8, 60), (84, 15, 109), (158, 42, 99), (224, 88, 60), (250, 160, 40), (252, 250, 160)]
)
_FAINTEST, _STRONGEST = 0.3, 0.75  # opacity at the threshold and at the hot end

SCALE_END = 2
"""The multiple of the threshold that has the last colour of a heat map."""

CONTOUR: _Colour = (255, 255, 255)
"""Colour of the line along the threshold."""
TRUTH: _Colour = (16, 224, 160)
"""Colour of the line around what is marked as anomalous. Both lie on a wider dark line."""

_SMALLEST, _LARGEST = 256, 1024  # longer side of a panel, in pixels
_GAP = 8


def colour_scale(values: _Map) -> npt.NDArray[np.uint8]:
    """Colours, uint8 [..., 3], for values [...] in [0, 1]; values outside are clipped."""
    positions = np.clip(values, 0, 1) * (len(_ANCHORS) - 1)
    channels = [np.interp(positions, range(len(_ANCHORS)), _ANCHORS[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


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
    image = Image.fromarray(blocks).resize(size, Image.Resampling.BILINEAR)
    return np.array(image)[:height, :width]


def _step(level_map: _Map) -> int:
    """Rows after which a map's values change: the largest common divisor of where they do."""
    changes = np.flatnonzero((level_map[1:] != level_map[:-1]).any(axis=1)) + 1
    return math.gcd(*changes.tolist()) or len(level_map)


def heat_map_overlay(
    image: Image.Image, anomaly_map: _Map, threshold: float | None, mask: _Mask | None = None
) -> Image.Image:
    """The image under its heat map, RGB, as large as the image.

    anomaly_map: [H, W] float32, interpolated to the image's size; `smooth_map` has no stairs.
    threshold: as for `scale_map`; what lies below it stays as it is, and a white line runs along
        it.
    mask: bool [H, W], outlined in green; None: no outline.
    """
    resized = _resized(anomaly_map, image.size)
    scaled = scale_map(resized, threshold)
    opacity = opacity_scale(scaled, threshold is not None)[..., None]
    pixels = (1 - opacity) * np.asarray(image.convert("RGB")) + opacity * colour_scale(scaled)
    return _outlined(pixels, resized, threshold, mask)


def _outlined(
    pixels: npt.NDArray[np.float32], anomaly_map: _Map, threshold: float | None, mask: _Mask | None
) -> Image.Image:
    """Pixels [H, W, 3] with the contours of a map [H, W] and of a mask of any size on them."""
    if mask is not None and mask.any():
        size = anomaly_map.shape[1], anomaly_map.shape[0]
        pixels = _with_contour(pixels, _softened(mask, size), 0.5, TRUTH)
    if threshold is not None:
        pixels = _with_contour(pixels, anomaly_map, threshold, CONTOUR)
    return Image.fromarray(pixels.round().astype(np.uint8))


def _with_contour(
    pixels: npt.NDArray[np.float32], values: _Map, level: float, colour: _Colour
) -> npt.NDArray[np.float32]:
    """A line where `values` [H, W] cross a level, on a wider dark one, both with soft edges."""
    if not (values > level).any() or min(values.shape) < 2:
        return pixels
    width = max(2.0, max(values.shape) / 300)
    slope = np.hypot(*np.gradient(values))
    distance = np.abs(values - level) / np.maximum(slope, 1e-30)  # to the line, in pixels
    for reach, paint, strength in ((width + 1.2, (0, 0, 0), 0.6), (width / 2, colour, 1.0)):
        covered = strength * np.clip(reach + 0.5 - distance, 0, 1)[..., None]
        pixels = (1 - covered) * pixels + covered * np.array(paint)
    return pixels


def _resized(values: _Map, size: tuple[int, int]) -> _Map:
    """Values [H, W] interpolated to a size (width, height)."""
    if values.shape == size[::-1]:
        return values
    return np.array(Image.fromarray(values).resize(size, Image.Resampling.BILINEAR))


def _softened(mask: _Mask, size: tuple[int, int]) -> _Map:
    """A mask as values that fall from 1 to 0 across its border, at a size (width, height)."""
    larger = max(1.0, size[0] / mask.shape[1])
    return np.asarray(ndimage.gaussian_filter(_resized(mask.astype(np.float32), size), larger))


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
    plain = image.convert("RGB").resize((width, height))
    resized = _resized(anomaly_map, plain.size)
    colours = colour_scale(scale_map(resized, threshold)).astype(np.float32)
    panels = [
        ("image", _outlined(np.asarray(plain, np.float32), resized, None, mask)),
        ("heat map", heat_map_overlay(plain, resized, threshold, mask)),
        ("anomaly map", _outlined(colours, resized, threshold, mask)),
    ]
    if threshold is not None:
        above = np.repeat((255.0 * (resized > threshold))[..., None], 3, axis=-1)
        panels.append(("predicted mask", _outlined(above, resized, None, mask)))

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
    for number, (label, panel) in enumerate(panels):
        left = _GAP + number * step
        write_line(draw, (left, top - line), label, step - _GAP, size, SOFT)
        picture.paste(panel, (left, top))
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

    mask: bool [H, W], True where the image is anomalous; None if unknown. Raises OSError.
    """
    threshold = result.map_threshold
    text = PngInfo()
    if threshold is not None:
        text.add_text(MAP_THRESHOLD, repr(threshold))
    picture = heat_map_picture(
        result.picture,
        smooth_map(result.scores),
        threshold,
        result.name,
        verdict_in_words(result),
        result.anomalous,
        mask,
    )
    with written_whole(path) as partial:
        # In a third of the time, 7 % larger.
        picture.save(partial, format="PNG", compress_level=1, pnginfo=text)
