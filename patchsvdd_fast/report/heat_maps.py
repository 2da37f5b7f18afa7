"""Heat maps: an anomaly map in colours over its image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..files.whole import written_whole
from .map_files import MAP_THRESHOLD

# Anchors of a perceptually ordered colour scale: dark blue, violet, orange, yellow.
_ANCHORS = np.array(
    [(13, 8, 60), (84, 15, 109), (158, 42, 99), (224, 88, 60), (250, 160, 40), (252, 250, 160)]
)
_OPACITY = 0.6

SCALE_END = 2
"""The multiple of the threshold that has the last colour of a heat map."""


def colour_scale(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Colours, uint8 [..., 3], for values [...] in [0, 1]; values outside are clipped."""
    positions = np.clip(values, 0, 1) * (len(_ANCHORS) - 1)
    channels = [np.interp(positions, range(len(_ANCHORS)), _ANCHORS[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def scale_map(
    anomaly_map: npt.NDArray[np.float32], threshold: float | None
) -> npt.NDArray[np.float32]:
    """Scale a map [H, W] to [0, 1] for colours: 0.5 is the threshold, 1 is twice that or more.

    threshold: map value from which on a pixel is anomalous, `ImageResult.map_threshold`. Without
    one the map's own range is used, and colours of different images cannot be compared.
    """
    if threshold is not None:
        low, span = 0.0, SCALE_END * threshold
    else:
        low, span = float(anomaly_map.min()), float(np.ptp(anomaly_map)) or 1.0
    return np.clip((anomaly_map - low) / span, 0, 1).astype(np.float32)


def heat_map_overlay(
    image: Image.Image, anomaly_map: npt.NDArray[np.float32], threshold: float | None
) -> Image.Image:
    """The image, and beside it the image under its heat map, as one RGB picture [H, 2 W].

    anomaly_map: [H, W] float32; the image is resized to it. threshold: as for `scale_map`.
    """
    height, width = anomaly_map.shape
    plain = image.convert("RGB").resize((width, height))
    scaled = scale_map(anomaly_map, threshold)
    # The hotter, the more opaque: what is normal stays recognisable.
    opacity = (_OPACITY * (0.25 + 0.75 * scaled))[..., None]
    blended = (1 - opacity) * np.asarray(plain) + opacity * colour_scale(scaled)
    pair = Image.new("RGB", (2 * width, height))
    pair.paste(plain, (0, 0))
    pair.paste(Image.fromarray(blended.round().astype(np.uint8)), (width, 0))
    return pair


def write_heat_map(
    path: Path,
    image: Image.Image,
    anomaly_map: npt.NDArray[np.float32],
    threshold: float | None,
) -> None:
    """Write the picture of `heat_map_overlay` as a PNG, which says its scale. Raises OSError."""
    text = PngInfo()
    if threshold is not None:
        text.add_text(MAP_THRESHOLD, repr(threshold))
    with written_whole(path) as partial:
        pair = heat_map_overlay(image, anomaly_map, threshold)
        # In a third of the time, 7 % larger.
        pair.save(partial, format="PNG", compress_level=1, pnginfo=text)
