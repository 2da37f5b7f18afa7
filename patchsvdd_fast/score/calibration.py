"""Thresholds with a guaranteed false-alarm rate, and p-values, from good images alone.

Each training image is scored against the bank without its own patches, as if it were new. The score
of a new good image is then equally likely to take any rank among theirs. Thresholds and p-values
follow from that alone, whatever the scores' distribution (split conformal prediction; for the share
of pixels, conformal risk control). Nothing is promised for images that differ from the training
images in other ways than these differ from each other, such as in light.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..files.folders import counted
from ..ops.checks import check_type
from ..search.rounds import AnyBank, nearest_of_others, parts_of, processes_of
from .border import RINGS, border_factors, corrected, ring_means
from .maps import MapRule, check_combination, combine, scores_of
from .reweighting import check_reweight, image_weights

_COMBINED = "combined"
_LEVEL, _BORDER = "level.", "border."
_PIXELS_AT_ONCE = 1 << 19  # of the images scored together: 8 of 256x256
_IN_MAPS = 0.8  # about this share of the time after the searches; quantiles take the rest
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
    border: dict[str, Tensor] = field(default_factory=dict)
    """Per level, of an encoder that sees more than its patches: the factors by which maps are
    corrected near the border, [RINGS] float64, see `score.border`; empty for other encoders."""

    def __repr__(self) -> str:
        low, high = float(self.image_scores[0]), float(self.image_scores[-1])
        return f"Calibration({counted(self.num_images, 'image')}, scores {low:.3g} to {high:.3g})"

    def tensors(self) -> dict[str, Tensor]:
        """As tensors by name, which `from_tensors` reads back."""
        levels = {f"{_LEVEL}{name}": scores for name, scores in self.level_scores.items()}
        border = {f"{_BORDER}{name}": factors for name, factors in self.border.items()}
        scores = {"image_scores": self.image_scores, "pixel_values": self.pixel_values}
        return scores | levels | border

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Calibration:
        """A calibration from its `tensors`. Raises ValueError if they are damaged."""
        if "image_scores" not in tensors or "pixel_values" not in tensors:
            raise ValueError("the calibration is incomplete")
        border = {k: v for k, v in tensors.items() if k.startswith(_BORDER)}
        for name, values in border.items():
            if values.dtype != torch.float64 or values.shape != (RINGS,) or not (values >= 1).all():
                raise ValueError(f"the calibration's {name} are damaged")
        for name, values in tensors.items():
            if name in border:
                continue
            count = len(_TAILS) + 1 if name == "pixel_values" else len(tensors["image_scores"])
            fits = values.dtype == torch.float64 and values.shape == (count,) and count > 1
            if not (fits and bool(values.isfinite().all()) and bool((values.diff() >= 0).all())):
                raise ValueError(f"the calibration's {name} are damaged")
        levels = {k.removeprefix(_LEVEL): v for k, v in tensors.items() if k.startswith(_LEVEL)}
        factors = {name.removeprefix(_BORDER): values for name, values in border.items()}
        return cls(tensors["image_scores"], tensors["pixel_values"], levels, factors)

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
        """The highest pixel of all good images' maps: unless re-weighted, the highest score."""
        return float(self.pixel_values[-1])

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
        check_type("a false-alarm rate", rate, Real)
        if not 0 < rate < 1:
            raise ValueError(f"a false-alarm rate must lie between 0 and 1, got {rate:g}")
        if rate < self.smallest_rate * (1 - 1e-9):
            raise ValueError(
                f"{counted(self.num_images, 'training image')} can promise a false-alarm rate of "
                f"{self.smallest_rate:.2%} at the lowest, not of {rate:.2%}: that takes "
                f"{math.ceil(1 / rate - 1e-9) - 1}"
            )


def pixel_step(num_images: int, image_shape: tuple[int, int]) -> int:
    """The step between the pixels of so many maps (height, width) that thresholds are set by."""
    return max(1, math.isqrt(num_images * image_shape[0] * image_shape[1] // _MOST_PIXELS))


def calibrate(
    banks: Mapping[PatchLevel, AnyBank],
    image_shape: tuple[int, int],
    combination: str,
    progress: Callable[[float], None] | None = None,
    sees_surroundings: bool = False,
    embeddings: Sequence[Tensor] | None = None,
    reweight: int | None = None,
    begin_maps: Callable[[], Callable[[float], None] | None] = lambda: None,
) -> Calibration | None:
    """Score each image of the banks against the banks without its own patches.

    banks: one per level, all of the same images [N, I, J, D], each image a group of its own.
    image_shape: (height, width) in pixels. combination: as for `maps.combine`.
    progress: called now and then with the share of the searches that is done.
    sees_surroundings: whether the encoder sees more than its patches, so that maps are
        interpolated, and corrected near the border.
    embeddings: of all patches of the images, [N, I, J, D] per level; None: what the banks hold,
        which must be all.
    reweight: as for `maps.search_levels`; an image's own rows have no part in its weight.
    begin_maps: called after the searches; what it returns is told the share of the rest done.

    Of banks in several processes all call this at once, and get the same: each searches for the
    images that it holds, which `embeddings` are then of.

    Returns None if there is only one image. Raises ValueError for coresets without `embeddings`,
    and as `maps.search_levels`.
    """
    num_images = len(next(iter(banks.values())).groups)
    if num_images < 2:
        return None
    check_combination(combination, list(banks))
    check_reweight(reweight, list(banks))
    at_once = max(1, _PIXELS_AT_ONCE // (image_shape[0] * image_shape[1]))
    images = {
        level: _OwnImages(bank, None if embeddings is None else embeddings[number], at_once)
        for number, (level, bank) in enumerate(banks.items())
    }
    together = processes_of(banks)
    distances = _own_distances(images, progress)
    border = {}
    if sees_surroundings:
        for name, values in distances.items():
            own = ring_means(values)
            means = together.joined(own)
            border[name] = border_factors(means.mean(dim=0))
            # An image is corrected as a new one would be: by the others' distances.
            others = (means.sum(dim=0) - own) / (num_images - 1)
            distances[name] = corrected(values, border_factors(others))  # by [N, RINGS]
    maps_made = begin_maps()
    rule = MapRule(interpolate=sees_surroundings)
    step = pixel_step(num_images, image_shape)
    scores: dict[str, list[Tensor]] = {}
    pixels, highest, done = [], [], 0
    first = next(iter(images.values()))
    every_weight = None if reweight is None else _own_weights(first, distances, reweight)
    for size in first.sizes():
        some = slice(done, done + size)
        found = {level: distances[str(level)][some] for level in banks}
        maps = {str(level): rule.map(found[level], level, image_shape).cpu() for level in banks}
        combined = combine(maps, combination)
        weights = None if every_weight is None else every_weight[some]
        for name, level_map in maps.items():
            scores.setdefault(name, []).append(scores_of(level_map).double())
        scores.setdefault(_COMBINED, []).append(scores_of(combined, weights).double())
        pixels.append(combined[:, ::step, ::step].flatten().double())
        highest.append(combined.amax().double())
        done += size
        if maps_made is not None:
            maps_made(_IN_MAPS * done / len(first))
    ordered = {
        name: together.joined(torch.cat(parts)).sort().values for name, parts in scores.items()
    }
    image_scores = ordered.pop(_COMBINED)
    quantiles = _upper_quantiles(
        together.joined(torch.cat(pixels)),
        together.joined(torch.stack(highest)).amax(dim=0, keepdim=True),
    )
    if maps_made is not None:
        maps_made(1.0)
    return Calibration(image_scores, quantiles, ordered, border)


class _OwnImages:
    """The images of a bank that lie in this process, some at a time.

    embeddings: of their patches, [N, I, J, D]; None: the bank holds them all.
    """

    def __init__(self, bank: AnyBank, embeddings: Tensor | None, at_once: int) -> None:
        parts = parts_of(bank)
        if embeddings is None and any(part.is_coreset for part in parts):
            raise ValueError(
                "a coreset lacks some patches of its images, so that it cannot be calibrated "
                "without them: fit the detector again"
            )
        self.bank, self._at_once = bank, at_once
        self._embeddings = embeddings
        self._groups = [part.groups for part in parts]
        if embeddings is not None:
            self._groups = [torch.cat(self._groups)]

    def __len__(self) -> int:
        return sum(map(len, self._groups))

    def sizes(self) -> Iterator[int]:
        """How many images each batch has."""
        for groups in self._groups:
            yield from map(len, groups.split(self._at_once))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Embeddings [n, I, J, D] float32 on the bank's device, and groups [n], of each batch."""
        for number, groups in enumerate(self._groups):
            values = self._embeddings
            if values is None:
                bank = parts_of(self.bank)[number]
                values = bank.embeddings.view(-1, *bank.grid, bank.dim)
            batches = zip(values.split(self._at_once), groups.split(self._at_once), strict=True)
            for some, own in batches:
                yield some.to(self.bank.device).float(), own


def _own_distances(
    images: Mapping[PatchLevel, _OwnImages], progress: Callable[[float], None] | None
) -> dict[str, Tensor]:
    """Per level, the distances [N, I, J] of each image's patches to those of the other images."""
    works = {  # all queries in all rows
        level: float(math.prod(one.bank.grid) * len(one.bank)) for level, one in images.items()
    }
    distances, done = {}, 0.0
    for level, one in images.items():
        found = torch.empty(len(one), *one.bank.grid, device=one.bank.device)
        first = 0
        for answer, _ in nearest_of_others(one.bank, one.batches()):
            found[first : first + len(answer)] = answer
            first += len(answer)
            done += len(answer) / len(one) * works[level] / sum(works.values())
            if progress is not None:
                progress(min(1.0, done))
        distances[str(level)] = found
    return distances


def _own_weights(images: _OwnImages, distances: Mapping[str, Tensor], reweight: int) -> Tensor:
    """The weights of this process's images, [N] float64; see `image_weights`."""
    bank, (values,) = images.bank, distances.values()
    most = max(processes_of({"": bank}).told(len(list(images.sizes()))))
    weights, done = [], 0
    for queries, own in images.batches():
        found = values[done : done + len(own)]
        weights.append(image_weights(bank, queries, found, reweight, own))
        done += len(own)
    for _ in range(most - len(weights)):  # others have more
        image_weights(bank, queries[:0], values[:0], reweight, own[:0])
    return torch.cat(weights)


def _upper_quantiles(values: Tensor, largest: Tensor) -> Tensor:
    """For each share in `_TAILS`, the lowest of `values` [P] that at most this share exceeds.

    largest: [1], appended for a share of 0.
    """
    ordered = values.sort().values
    above = torch.from_numpy(np.floor(_TAILS * len(values) + 1e-9)).long()
    return torch.cat([ordered[(len(values) - 1 - above).clamp(min=0)], largest])
