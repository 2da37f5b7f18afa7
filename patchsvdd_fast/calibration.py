"""What good images score, from good images alone: thresholds with a guarantee, and p-values.

Each training image is scored against the bank without its own patches, as a new one would be. A new
good image is then one more of the same kind, equally likely to take any place among their scores;
thresholds and p-values follow from that alone, whatever the scores' distribution (split conformal
prediction; for the share of pixels, conformal risk control). They say nothing of images that differ
from the training images in other ways than these differ among themselves, such as in light.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .bank import NormalBank
from .levels import PatchLevel
from .ops import score_map
from .score import combine

_IMAGES_PER_PASS = 8  # bounds the memory of maps
_MOST_PIXELS = 1 << 22  # of all maps together, that quantiles are taken of
_TAILS = 10 ** -np.linspace(0, 6, 301)  # shares of pixels above each of the values that are kept


@dataclass(frozen=True)
class Calibration:
    """What N good images score that the detector has not seen."""

    image_scores: Tensor
    """[N] float64, ascending."""
    pixel_values: Tensor
    """[302] float64, ascending: what shares 1, 10^-0.02, ... 10^-6 and 0 of the pixels exceed."""

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.image_scores)

    @property
    def smallest_rate(self) -> float:
        """The lowest false-alarm rate that so many images can promise, 1 / (N + 1)."""
        return 1 / (self.num_images + 1)

    @property
    def typical(self) -> float:
        """Median pixel of good images' maps: the low end of a heat map's scale."""
        return float(self.pixel_values[np.searchsorted(-_TAILS, -0.5)])

    @property
    def highest(self) -> float:
        """The highest score, which is the highest pixel, of a good image."""
        return float(self.image_scores[-1])

    def threshold(self, false_alarm_rate: float) -> float:
        """Image score that a new good image exceeds with at most this probability.

        The ceil((N + 1) (1 - rate))-th smallest score. Raises ValueError for a rate outside of
        [1 / (N + 1), 1).
        """
        self._check_rate(false_alarm_rate)
        rank = math.ceil((self.num_images + 1) * (1 - false_alarm_rate) - 1e-9)
        return float(self.image_scores[max(rank, 1) - 1])

    def pixel_threshold(self, false_alarm_rate: float) -> float:
        """Map value above which at most this share of a new good image's pixels lies, on average.

        Raises ValueError for a rate outside of [1 / (N + 1), 1).
        """
        self._check_rate(false_alarm_rate)
        # With a share of 1 assumed of the new image, the mean over all N + 1 is still the rate.
        allowed = (false_alarm_rate * (self.num_images + 1) - 1) / self.num_images
        tails = np.append(_TAILS, 0.0)
        return float(self.pixel_values[np.argmax(tails <= max(allowed, 0.0) + 1e-12)])

    def p_values(self, image_scores: Tensor | npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """How probable a good image scores so high, [N'] for image scores [N'].

        (1 + number of calibration scores that are no lower) / (N + 1): of good images, at most a
        share p has a p-value of p or less.
        """
        scores = np.asarray(image_scores, dtype=np.float64)
        below = np.searchsorted(self.image_scores.numpy(), scores, side="left")
        values: npt.NDArray[np.float64] = (1 + self.num_images - below) / (1 + self.num_images)
        return values

    def _check_rate(self, rate: float) -> None:
        if not 0 < rate < 1:
            raise ValueError(f"a false-alarm rate must lie between 0 and 1, got {rate:g}")
        if rate < self.smallest_rate * (1 - 1e-9):
            raise ValueError(
                f"{self.num_images} training images can promise a false-alarm rate of "
                f"{self.smallest_rate:.2%} at the lowest, not of {rate:.2%}: that takes "
                f"{math.ceil(1 / rate - 1e-9) - 1}"
            )


def calibrate(
    banks: Mapping[PatchLevel, NormalBank],
    image_shape: tuple[int, int],
    combination: str,
    progress: Callable[[float], None] | None = None,
) -> Calibration | None:
    """Score each image of the banks against the banks without its own patches.

    banks: of the same images, [N, I, J, D] each, every image a group of its own; image_shape:
    (height, width) in pixels. progress: called now and then with the share done. None if there is
    only one image.
    """
    num_images = len(next(iter(banks.values())).groups)
    if num_images < 2:
        return None
    height, width = image_shape
    queries = {
        level: bank.embeddings.view(num_images, *level.grid_shape(height, width), bank.dim)
        for level, bank in banks.items()
    }
    step = max(1, math.isqrt(num_images * height * width // _MOST_PIXELS))
    scores, pixels = [], []
    for numbers in torch.arange(num_images).split(_IMAGES_PER_PASS):
        maps = {}
        for level, bank in banks.items():
            there = numbers.to(bank.device)
            mine = queries[level][there].float()  # [n, I, J, D]
            own = bank.groups[there][:, None, None].expand(mine.shape[:-1])
            distances, _ = bank.nearest(mine, exclude_same_group=own)
            maps[str(level)] = score_map(distances, level.size, level.stride, height, width)
        combined = combine(maps, combination).cpu().double()
        scores.append(combined.amax(dim=(1, 2)))
        pixels.append(combined[:, ::step, ::step].flatten())
        if progress is not None:
            progress((int(numbers[-1]) + 1) / num_images)
    image_scores = torch.cat(scores).sort().values
    return Calibration(image_scores, _upper_quantiles(torch.cat(pixels), image_scores[-1:]))


def _upper_quantiles(values: Tensor, largest: Tensor) -> Tensor:
    """For each of the tails a value that no more than this share exceeds; then the largest."""
    ordered = values.sort().values
    above = torch.from_numpy(np.floor(_TAILS * len(values) + 1e-9)).long()
    return torch.cat([ordered[(len(values) - 1 - above).clamp(min=0)], largest])
