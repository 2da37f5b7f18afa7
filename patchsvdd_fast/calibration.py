"""A threshold from good images alone: each is scored against the patches of all the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .bank import NormalBank
from .levels import PatchLevel
from .ops import score_map
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
    embeddings: Mapping[PatchLevel, Tensor],
    image_shape: tuple[int, int],
    combination: str,
    contamination: float,
) -> Calibration | None:
    """Score up to 16 training images, each against the bank without its own patches.

    embeddings: those the banks were made of, [N, I, J, D] per level; image_shape: (height, width)
    in pixels. The threshold is the (1 - contamination) quantile of the image scores. None if there
    is only one image.
    """
    num_images = len(next(iter(embeddings.values())))
    if num_images < 2:
        return None
    chosen = torch.linspace(0, num_images - 1, min(num_images, _MOST_IMAGES)).long()
    maps = {}
    for level, bank in banks.items():
        queries = embeddings[level][chosen]  # [n, I, J, D]
        own = bank.groups[chosen.to(bank.device)][:, None, None].expand(queries.shape[:-1])
        distances, _ = bank.nearest(queries, exclude_same_group=own)
        maps[str(level)] = score_map(distances, level.size, level.stride, *image_shape)
    combined = combine(maps, combination)
    scores = combined.amax(dim=(1, 2)).double()
    return Calibration(
        threshold=float(scores.quantile(1 - contamination)), typical=float(combined.median())
    )
