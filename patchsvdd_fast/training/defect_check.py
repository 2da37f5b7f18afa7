"""Judging an encoder without labels: does it find synthetic defects in normal images?

A few normal images are set aside, and synthetic defects are drawn into copies of them, the same in
each check. The encoder scores the clean and the defective images against the other normal images,
and is judged by how well that tells the two apart. No image with a real defect is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..encoders.patch_svdd import HierarchicalEncoder
from ..images.drawn_defects import DEFECTS, Strength, draw_defects
from ..images.gallery import evenly_spread
from ..images.light import match_illumination
from ..score import metrics
from ..score.encoding import fill_banks, score_images
from .record import Quality
from .settings import TrainingSettings

_MOST_HELD_OUT = 8
_MOST_IN_BANK = 16
# What is drawn into copies of each image set aside: faint and plain defects, of kinds that take
# turns. Faint ones alone are lost among the differences of normal images, plain ones always found.
_DRAWN = (
    (tuple(DEFECTS), Strength(size=2.0, contrast=1.5)),
    (("spot", "scratch"), Strength(size=1.5, contrast=3.0)),
)
_COPIES = 2  # of each image, for each of these
# Synthetic defects are no real ones: by a few points an encoder finds them better and the real ones
# worse, above all on objects. So a gain has to be plain before it counts (docs/design/training.md).
_LEAST_GAIN = {"texture": 3.0, "object": 15.0}
_IN_ENCODING = 0.7  # about this share of a check's time; searches take the rest
_SHARED_BY_OBJECTS = 0.2  # least share of variance that images of objects have in common


class DefectCheck:
    """Call it with an encoder to get its Quality.

    images: [N, 3, H, W] uint8, N >= 2, good ones, already matched to `light`.
    mean: [3, H, W] float32, what is subtracted from images.
    levels, combination: the levels to score at, and how their maps become one.
    light: [3], the colour that images are matched to before they are scored, or None; see
        `images.light.match_illumination`.
    seed: of the synthetic defects.

    `least_gain` is the gain over the untrained encoder, in points of `Quality.criterion`, below
    which nothing trained is worth keeping. It is larger for objects than for textures.

    Up to 8 images are set aside for the check: training uses them like the others, but they are not
    in the check's banks. `on_progress` may be set to what is called with the share of a check that
    is done, 0 to 1. Raises ValueError if there is only one image.
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
            raise ValueError(
                f"a check of what was learned needs at least two images, got {len(images)}"
            )
        held_out = evenly_spread(len(images), min(_MOST_HELD_OUT, len(images) // 2))
        others = np.setdiff1d(np.arange(len(images)), held_out)
        others = others[evenly_spread(len(others), min(_MOST_IN_BANK, len(others)))]
        self.mean, self.levels, self.combination = mean, list(levels), combination
        self.on_progress: Callable[[float], None] = lambda share: None
        self.bank_images = images[torch.from_numpy(others)]
        clean = images[torch.from_numpy(held_out)]
        is_object = shared_variance(images) >= _SHARED_BY_OBJECTS
        self.least_gain = _LEAST_GAIN["object" if is_object else "texture"]
        defective, masks = _with_defects(clean, np.random.default_rng(seed))
        # Matched again, as in use, where a defect has its part in the image's mean colour.
        self.images = torch.cat([clean, match_illumination(defective, light)])
        self.labels = np.arange(len(self.images)) >= len(clean)
        self.masks = np.concatenate([np.zeros((len(clean), *masks.shape[1:]), dtype=bool), masks])

    def __call__(self, encoder: HierarchicalEncoder) -> Quality:
        """Score the clean and the defective images; AUROCs against the known defects."""

        def encoded(images: Tensor, before: int) -> Callable[[float], None]:
            total = len(self.bank_images) + len(self.images)
            return lambda share: self.on_progress(
                _IN_ENCODING * (before + share * len(images)) / total
            )

        self.on_progress(0.0)
        to_bank, to_score = (
            encoded(self.bank_images, 0),
            encoded(self.images, len(self.bank_images)),
        )
        how = self.combination, to_score
        banks = fill_banks(encoder, self.bank_images, self.mean, self.levels, progress=to_bank)
        result = score_images(encoder, banks, self.images, self.mean, *how)
        maps = result.anomaly_map.numpy()
        quality = Quality(
            100 * metrics.detection_auroc(maps.max(axis=(1, 2)), self.labels),
            100 * metrics.segmentation_auroc(maps, self.masks),
        )
        self.on_progress(1.0)
        return quality


def check_of(
    settings: TrainingSettings,
    images: Tensor,
    mean: Tensor,
    levels: Sequence[PatchLevel],
    combination: str,
    light: Tensor | None,
) -> DefectCheck | None:
    """The check that the settings ask for; None without one, or, with a warning, of one image."""
    if settings.check_every is None:
        return None
    if len(images) == 1:
        warnings.warn("one image: what is learned cannot be checked", stacklevel=3)
        return None
    return DefectCheck(images, mean, levels, combination, light)


def shared_variance(images: Tensor) -> float:
    """Share of the pixels' variance that images have in common: that depends on the place alone.

    images: [N, 3, H, W] uint8, N >= 2; brightness and colour of each image as a whole do not
    count. Near 0 for textures, which look alike all over; 0.3 and more for objects, which lie in
    the same place.
    """
    count = len(images)
    total = torch.zeros(images.shape[1:], dtype=torch.float64)
    within = 0.0
    for image in images:
        values = image.double()
        values -= values.mean(dim=(1, 2), keepdim=True)
        within += float(values.square().mean()) / count
        total += values / count
    if within == 0:
        return 0.0
    # The mean of N images without anything in common still has 1 / N of their variance.
    of_mean = float(total.square().mean())
    return (of_mean - within / count) / (1 - 1 / count) / within


def _with_defects(images: Tensor, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """Four copies of each uint8 image [N, 3, H, W] with one defect each, and masks [4 N, H, W]."""
    drawn = [
        draw_defects(image, rng, kind=kinds[(number + copy) % len(kinds)], strength=strength)
        for number, image in enumerate(images)
        for copy in range(_COPIES)
        for kinds, strength in _DRAWN
    ]
    defective, masks = zip(*drawn, strict=True)
    return torch.stack(defective), torch.stack(masks).numpy()
