"""Pictures of an HTML report as text: JPEG and PNG in base64, outlines as SVG paths."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from .heat_maps import colour_scale, map_at, opacity_scale

_JPEG_QUALITY = 80
_MOST_PIECES = 3_000  # of a contour
_HEAT_LEVELS = np.linspace(0, 1, 48, dtype=np.float32)  # more take more space and look the same
_PALETTE = colour_scale(_HEAT_LEVELS).tobytes()


def _opacity(has_threshold: bool) -> bytes:
    """Of each colour; the page makes heat maps fainter as a whole, so the last is opaque."""
    opacity = opacity_scale(_HEAT_LEVELS, has_threshold)
    return (255 * opacity / opacity[-1]).round().astype(np.uint8).tobytes()


def jpeg_text(picture: Image.Image, side: int) -> str:
    """The picture as JPEG in base64, shrunk to `side` pixels on its longer side if it is larger."""
    small = picture.convert("RGB")
    small.thumbnail((side, side), reducing_gap=2.0)
    buffer = io.BytesIO()
    # Colours are not subsampled: patches are shown enlarged, and a defect may be a stain alone.
    small.save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def heat_at(
    heat: npt.NDArray[np.float32], size: tuple[int, int], side: int
) -> npt.NDArray[np.float32]:
    """A map [H, W] in the proportions of a picture, to lie over it.

    size: (width, height) of the picture, which is shrunk to `side` pixels on its longer side; half
        of that is enough for a map, which is smooth.
    """
    shrink = max(1.0, max(size) / max(1, side // 2))
    width, height = (max(1, round(length / shrink)) for length in size)
    return np.clip(map_at(heat.astype(np.float32), (width, height)), 0, 1)


def heat_text(heat: npt.NDArray[np.float32], has_threshold: bool) -> str:
    """A map [H, W] in [0, 1] in colours, as PNG in base64.

    has_threshold: whether 0.5 is the threshold, below which nothing is seen.
    """
    return _png_text(_heat_image(heat, has_threshold))


def _heat_image(heat: npt.NDArray[np.float32], has_threshold: bool) -> Image.Image:
    image = Image.fromarray((heat * (len(_HEAT_LEVELS) - 1)).round().astype(np.uint8))
    image.putpalette(_PALETTE)
    image.info["transparency"] = _opacity(has_threshold)
    return image


def scale_text(has_threshold: bool) -> str:
    """The colours of a heat map from 0 to 1: one row of pixels, as PNG in base64."""
    return _png_text(_heat_image(_HEAT_LEVELS[None], has_threshold))


def contour_path(small: npt.NDArray[np.float32], size: tuple[int, int]) -> str:
    """Where a map [H, W] in [0, 1] crosses 0.5, as an SVG path of straight pieces.

    By marching squares; lines are open at the border. "" where they would be so many that they hide
    the image. size: (width, height) of the picture in whose pixels the path is.
    """
    rows, columns = small.shape
    above = small > 0.5
    if min(rows, columns) < 2 or not above.any():
        return ""
    scale = np.array([size[0] / columns, size[1] / rows])
    corners = [(0, 0), (1, 0), (1, 1), (0, 1)]  # (x, y) of a cell's corners, clockwise
    cut = [above[y : rows - 1 + y, x : columns - 1 + x] for x, y in corners]
    mixed = np.any(cut, axis=0) & ~np.all(cut, axis=0)
    if mixed.sum() > _MOST_PIECES:
        return ""
    pieces = []
    for row, column in zip(*(axis.tolist() for axis in np.nonzero(mixed)), strict=True):
        crossings = []
        for number, (x, y) in enumerate(corners):
            x_next, y_next = corners[(number + 1) % 4]
            value, after = small[row + y, column + x], small[row + y_next, column + x_next]
            if (value > 0.5) != (after > 0.5):
                share = float((0.5 - value) / (after - value))
                place = column + x + share * (x_next - x), row + y + share * (y_next - y)
                crossings.append((np.array(place) + 0.5) * scale)
        pieces += [
            f"M{a[0]:.1f} {a[1]:.1f}L{b[0]:.1f} {b[1]:.1f}"
            for a, b in zip(crossings[::2], crossings[1::2], strict=True)
        ]
    return "".join(pieces)


def _png_text(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def outline_path(mask: npt.NDArray[np.bool_]) -> str:
    """The border of a mask [H, W] as an SVG path of straight pieces, in pixels."""
    padded = np.pad(mask, 1)
    across = padded[1:, 1:-1] != padded[:-1, 1:-1]  # [H + 1, W]: borders between rows
    down = (padded[1:-1, 1:] != padded[1:-1, :-1]).T  # [W + 1, H]: between columns
    pieces = [f"M{start} {y}h{length}" for y, start, length in _runs(across)]
    pieces += [f"M{x} {start}v{length}" for x, start, length in _runs(down)]
    return "".join(pieces)


def _runs(lines: npt.NDArray[np.bool_]) -> list[tuple[int, int, int]]:
    """(line, start, length) of each run of True in [lines, N]."""
    steps = np.diff(np.pad(lines, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    line, start = np.nonzero(steps == 1)
    _, end = np.nonzero(steps == -1)
    return list(zip(line.tolist(), start.tolist(), (end - start).tolist(), strict=True))
