"""A threshold from good images alone: each is scored against the patches of all the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .bank import NormalBank
from .levels import PatchLevel
from .ops import nearest, score_map
from .score import combine

_MOST_IMAGES = 16  # spread evenly over the training set; bounds the time spent searching


@dataclass(frozen=True)
class Calibration:
    """What good images the detector has not seen are expected to score."""

    threshold: float
    """Image score above which an image is called anomalous."""
    typical: float
    """Median pixel of the anomaly maps of good images: the low end of a heat map's scale."""


def calibrate(
    banks: Mapping[PatchLevel, NormalBank],
    image_shape: tuple[int, int],
    combination: str,
    contamination: float,
) -> Calibration | None:
    """Score up to 16 training images, each against the bank without its own patches.

    banks: image-major, all of the same images; image_shape: (height, width) in pixels. The
    threshold is the (1 - contamination) quantile of the image scores. None if there is only one
    image.
    """
    height, width = image_shape
    per_image = {level: _product(level.grid_shape(height, width)) for level in banks}
    counts = {level: len(bank) // per_image[level] for level, bank in banks.items()}
    num_images = next(iter(counts.values()))
    if num_images < 2:
        return None
    chosen = torch.linspace(0, num_images - 1, min(num_images, _MOST_IMAGES)).long().tolist()
    maps = {}
    for level, bank in banks.items():
        size = per_image[level]
        distances = torch.stack([_distances_to_others(bank, i * size, size) for i in chosen])
        grid = distances.view(len(chosen), *level.grid_shape(height, width))
        maps[str(level)] = score_map(grid, level.size, level.stride, height, width)
    combined = combine(maps, combination)
    scores = combined.amax(dim=(1, 2)).double()
    return Calibration(
        threshold=float(scores.quantile(1 - contamination)), typical=float(combined.median())
    )


def _distances_to_others(bank: NormalBank, start: int, size: int) -> Tensor:
    """Distances [size] of bank rows [start, start + size) to the nearest row outside them."""
    embeddings = bank.embeddings
    own = embeddings[start : start + size]
    others = [part for part in (embeddings[:start], embeddings[start + size :]) if len(part)]
    return torch.stack([nearest(own, part)[0] for part in others]).amin(dim=0)


def _product(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]
