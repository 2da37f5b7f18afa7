"""Judging an encoder without labels: does it find defects drawn into normal images?

A few normal images are set aside; defects are drawn into copies of them, always the same ones. The
encoder under test scores the clean and the defective images against the other normal images, and
is judged by how well that tells defective from clean. No image with a real defect is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..encoders.patch_svdd import HierarchicalEncoder
from ..images.drawn_defects import DEFECTS, Strength, draw_defects
from ..images.light import match_illumination
from ..score import metrics
from ..score.encoding import fill_banks, score_images
from .record import Quality

_MOST_HELD_OUT = 8
_MOST_IN_BANK = 16
# What is drawn into copies of each image set aside: kinds, which take turns, and their strength.
# Faint ones alone are lost in what differs between normal images, plain ones are found by all.
_DRAWN = (
    (tuple(DEFECTS), Strength(size=2.0, contrast=1.5)),
    (("spot", "scratch"), Strength(size=1.5, contrast=3.0)),
)
_COPIES = 2  # of an image with each of these


class DefectCheck:
    """Call it with an encoder to get its Quality.

    images: [N, 3, H, W] uint8, N >= 2, good ones; mean: [3, H, W] float32; combination: how the
    levels' maps become one; light: [3], the colour that images are matched to before they are
    scored (`images.match_illumination`), or None. Up to 8 images are set aside for the check; they
    are trained on like the others, but not in the check's bank. Raises ValueError if there is only
    one image.
    """

    def __init__(
        self,
        images: Tensor,
        mean: Tensor,
        levels: Sequence[PatchLevel],
        combination: str = "mult",
        light: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        if len(images) < 2:
            raise ValueError("a check of what was learned needs at least two images, got one")
        held_out = _spread(len(images), min(_MOST_HELD_OUT, len(images) // 2))
        others = np.setdiff1d(np.arange(len(images)), held_out)
        others = others[_spread(len(others), min(_MOST_IN_BANK, len(others)))]
        self.mean, self.levels, self.combination = mean, list(levels), combination
        self.bank_images = images[torch.from_numpy(others)]
        clean = images[torch.from_numpy(held_out)]
        defective, masks = _with_defects(clean, np.random.default_rng(seed))
        # As in use, where the defect has its part in an image's mean.
        self.images = torch.cat([clean, match_illumination(defective, light)])
        self.labels = np.arange(len(self.images)) >= len(clean)
        self.masks = np.concatenate([np.zeros((len(clean), *masks.shape[1:]), dtype=bool), masks])

    def __call__(self, encoder: HierarchicalEncoder) -> Quality:
        """Score the clean and the defective images and compare with what is known."""
        banks = fill_banks(encoder, self.bank_images, self.mean, self.levels)
        result = score_images(encoder, banks, self.images, self.mean, self.combination)
        maps = result.anomaly_map.numpy()
        return Quality(
            100 * metrics.detection_auroc(maps.max(axis=(1, 2)), self.labels),
            100 * metrics.segmentation_auroc(maps, self.masks),
        )


def _spread(count: int, chosen: int) -> np.ndarray:
    """`chosen` of the numbers below `count`, evenly spread."""
    return np.linspace(0, count - 1, chosen).round().astype(np.int64)


def _with_defects(images: Tensor, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """Copies of uint8 images [N, 3, H, W] with a defect each, and their masks."""
    drawn = [
        draw_defects(image, rng, kind=kinds[(number + copy) % len(kinds)], strength=strength)
        for number, image in enumerate(images)
        for copy in range(_COPIES)
        for kinds, strength in _DRAWN
    ]
    defective, masks = zip(*drawn, strict=True)
    return torch.stack(defective), torch.stack(masks).numpy()
