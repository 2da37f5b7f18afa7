"""Thresholds with a guaranteed false-alarm rate, and p-values, from good images alone.

Each training image is scored against the bank without its own patches, as if it were new. The score
of a new good image is then equally likely to take any rank among theirs. Thresholds and p-values
follow from that alone, whatever the scores' distribution (split conformal prediction; for the share
of pixels, conformal risk control). Nothing is promised for images that differ from the training
images in other ways than these differ from each other, such as in light.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..search.bank import NormalBank
from .maps import search_levels

_COMBINED = "combined"
_LEVEL = "level."
_PIXELS_AT_ONCE = 1 << 19  # of the images scored together: 8 of 256x256
_MOST_PIXELS = 1 << 22  # over all maps, for the quantiles; of more only every `step`-th is taken
_TAILS = 10 ** -np.linspace(0, 6, 301)  # shares of pixels; for each, the value it exceeds is kept


@dataclass(frozen=True)
class Calibration:
    """The scores of N training images, each scored as if it were new."""

    image_scores: Tensor
    """[N] float64, ascending."""
    pixel_values: Tensor
    """[302] float64, ascending: the map values that at most a share of 1, 10^-0.02, 10^-0.04, ...
    10^-6 and 0 of all pixels exceeds."""
    level_scores: dict[str, Tensor] = field(default_factory=dict)
    """Per level: the maximum of its own map for each image, [N] float64, ascending."""

    def tensors(self) -> dict[str, Tensor]:
        """As tensors by name, which `from_tensors` reads back."""
        levels = {f"{_LEVEL}{name}": scores for name, scores in self.level_scores.items()}
        return {"image_scores": self.image_scores, "pixel_values": self.pixel_values, **levels}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Calibration:
        """A calibration from its `tensors`. Raises ValueError if they are damaged."""
        if "image_scores" not in tensors or "pixel_values" not in tensors:
            raise ValueError("the calibration is incomplete")
        for name, values in tensors.items():
            count = len(_TAILS) + 1 if name == "pixel_values" else len(tensors["image_scores"])
            fits = values.dtype == torch.float64 and values.shape == (count,) and count > 1
            if not (fits and bool(values.isfinite().all()) and bool((values.diff() >= 0).all())):
                raise ValueError(f"the calibration's {name} are damaged")
        levels = {k.removeprefix(_LEVEL): v for k, v in tensors.items() if k.startswith(_LEVEL)}
        return cls(tensors["image_scores"], tensors["pixel_values"], levels)

    @property
    def num_images(self) -> int:
        """N, how many images were scored."""
        return len(self.image_scores)

    @property
    def smallest_rate(self) -> float:
        """The lowest false-alarm rate that N images can promise, 1 / (N + 1)."""
        return 1 / (self.num_images + 1)

    @property
    def typical(self) -> float:
        """Median pixel of good images' maps: the low end of a heat map's scale."""
        return self.exceeded_by(0.5)

    @property
    def highest(self) -> float:
        """The highest image score: the highest pixel of all good images' maps."""
        return float(self.image_scores[-1])

    def level_of_alarm(self, values: Mapping[str, float]) -> str:
        """The level that stands out most: by value / highest value of its maps of good images.

        values: per level, the value of its map at some pixel.
        """
        highest = {name: float(scores[-1]) for name, scores in self.level_scores.items()}
        return max(values, key=lambda name: values[name] / max(highest[name], 1e-30))

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
        # Even if all pixels of the new image exceed it (a share of 1), the mean share over the
        # N + 1 images, (N allowed + 1) / (N + 1), is the rate.
        allowed = (false_alarm_rate * (self.num_images + 1) - 1) / self.num_images
        return self.exceeded_by(max(allowed, 0.0))

    def exceeded_by(self, share: float) -> float:
        """Map value that at most this share of the good images' pixels exceeds."""
        tails = np.append(_TAILS, 0.0)
        return float(self.pixel_values[np.argmax(tails <= share + 1e-12)])

    def p_values(self, image_scores: Tensor | npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """The probability that a good image scores at least so high, [N'] for image scores [N'].

        p = (1 + number of calibration scores that are no lower) / (N + 1). At most a share p of
        good images has a p-value of p or less.
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

    banks: one per level, all of the same images [N, I, J, D], each image a group of its own.
    image_shape: (height, width) in pixels. combination: as for `maps.combine`. progress: called now
    and then with the share done. Returns None if there is only one image.
    """
    num_images = len(next(iter(banks.values())).groups)
    if num_images < 2:
        return None
    height, width = image_shape
    embeddings = [
        bank.embeddings.view(num_images, *level.grid_shape(height, width), bank.dim)
        for level, bank in banks.items()
    ]
    groups = next(iter(banks.values())).groups
    step = max(1, math.isqrt(num_images * height * width // _MOST_PIXELS))
    scores: dict[str, list[Tensor]] = {}
    pixels = []
    for numbers in torch.arange(num_images).split(max(1, _PIXELS_AT_ONCE // (height * width))):
        mine = [values[numbers.to(values.device)].float() for values in embeddings]
        there = groups[numbers.to(groups.device)]
        result = search_levels(banks, mine, image_shape, combination, there)
        maps = result.level_maps | {_COMBINED: result.anomaly_map}
        for name, values in maps.items():
            scores.setdefault(name, []).append(values.double().amax(dim=(1, 2)))
        pixels.append(result.anomaly_map.double()[:, ::step, ::step].flatten())
        if progress is not None:
            progress((int(numbers[-1]) + 1) / num_images)
    ordered = {name: torch.cat(parts).sort().values for name, parts in scores.items()}
    image_scores = ordered.pop(_COMBINED)
    quantiles = _upper_quantiles(torch.cat(pixels), image_scores[-1:])
    return Calibration(image_scores, quantiles, ordered)


def _upper_quantiles(values: Tensor, largest: Tensor) -> Tensor:
    """For each share in `_TAILS`, the lowest of `values` [P] that at most this share exceeds.

    largest: [1], appended for a share of 0.
    """
    ordered = values.sort().values
    above = torch.from_numpy(np.floor(_TAILS * len(values) + 1e-9)).long()
    return torch.cat([ordered[(len(values) - 1 - above).clamp(min=0)], largest])
