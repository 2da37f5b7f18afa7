"""Pictures of an HTML report as text: JPEG and PNG in base64, outlines as SVG paths."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from .heat_maps import colour_scale

_JPEG_QUALITY = 80
_HEAT_LEVELS = np.linspace(0, 1, 48, dtype=np.float32)  # more take more space and look the same
_PALETTE = colour_scale(_HEAT_LEVELS).tobytes()
_OPACITY = (255 * (0.1 + 0.9 * _HEAT_LEVELS)).round().astype(np.uint8).tobytes()


def jpeg_text(picture: Image.Image, side: int) -> str:
    """The picture as JPEG in base64, shrunk to `side` pixels on its longer side if it is larger."""
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    # Colours are not subsampled: patches are shown enlarged, and a defect may be a stain alone.
    small.save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def heat_text(heat: npt.NDArray[np.float32], side: int) -> str:
    """A map [H, W] in [0, 1] in colours, as PNG in base64; `side` is that of the picture below it.

    It is half as large as the picture: maps are smooth, as patches are much larger than two pixels.
    """
    height, width = heat.shape
    shrink = max(1.0, max(height, width) / max(1, side // 2))
    size = (max(1, round(width / shrink)), max(1, round(height / shrink)))
    small = Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BOX)
    return _png_text(_heat_image(np.asarray(small)))


def _heat_image(heat: npt.NDArray[np.float32]) -> Image.Image:
    """A map [H, W] in [0, 1] in colours; the hotter, the more opaque."""
    image = Image.fromarray((heat * (len(_HEAT_LEVELS) - 1)).round().astype(np.uint8))
    image.putpalette(_PALETTE)
    image.info["transparency"] = _OPACITY
    return image


def scale_text() -> str:
    """The colours of a heat map from 0 to 1: one row of pixels, as PNG in base64."""
    return _png_text(_heat_image(_HEAT_LEVELS[None]))


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
