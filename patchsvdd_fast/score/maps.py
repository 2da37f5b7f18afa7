"""From distances to the nearest normal patches to anomaly maps, combined over levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..files.folders import counted
from ..ops import score_map
from ..search.rounds import AnyBank, nearest
from .border import corrected
from .reweighting import check_reweight, image_weights


@dataclass(frozen=True)
class ScoreResult:
    """Scores of N images: of each patch, each pixel and each image."""

    combination: str
    """How the levels' maps are joined: "mult", "sum", or one level, e.g. "K32"."""
    level_maps: dict[str, Tensor]
    """Per level ("K64", "K32"): anomaly map [N, H, W] float32."""
    distances: dict[str, Tensor] = field(repr=False)
    """Per level: L2 distance of each patch to its nearest normal patch, [N, I, J] float32."""
    bank_rows: dict[str, Tensor] = field(repr=False)
    """Per level: row of that normal patch in the bank, [N, I, J] int64."""
    matches: dict[str, Tensor] = field(repr=False)
    """Per level: where that normal patch came from, [N, I, J, 3] int64: number of the training
    image, and row and column in its grid of patches (times the stride: top and left in pixels)."""
    weights: Tensor | None = field(default=None, repr=False)
    """Of re-weighted scores (`score.reweighting`): the factor of each image, [N] float64."""

    def __repr__(self) -> str:
        count, height, width = next(iter(self.level_maps.values())).shape
        levels = ", ".join(self.level_maps)
        images = counted(count, "image")
        return f"ScoreResult({images}, {width}x{height} pixels, {levels}, {self.combination})"

    def item(self) -> NoReturn:
        """Raises TypeError: scikit-learn calls this where it needs one number, and has none."""
        raise TypeError(
            "`score` gives maps and a score of each image, not one number: give GridSearchCV and "
            'cross_val_score a scoring, such as "roc_auc", and labels y, +1 normal and -1 anomalous'
        )

    def image(self, number: int) -> ScoreResult:
        """The scores of one image alone, with N = 1; copied, so that the others can be freed."""
        one = slice(number, number + 1)
        parts = (self.level_maps, self.distances, self.bank_rows, self.matches)
        maps, distances, rows, matches = (
            {name: t[one].clone() for name, t in part.items()} for part in parts
        )
        weights = None if self.weights is None else self.weights[one].clone()
        return ScoreResult(self.combination, maps, distances, rows, matches, weights)

    def map(self, combination: str | None = None) -> Tensor:
        """Anomaly map [N, H, W] under the given combination (default: the result's own)."""
        return combine(self.level_maps, combination or self.combination)

    @property
    def anomaly_map(self) -> Tensor:
        """[N, H, W] float32; higher is more anomalous."""
        return self.map()

    @property
    def image_scores(self) -> Tensor:
        """[N] float32: the maximum of each anomaly map, times the image's weight if it has one."""
        return scores_of(self.anomaly_map, self.weights)


def scores_of(maps: Tensor, weights: Tensor | None = None) -> Tensor:
    """Image scores [N] float32 of maps [N, H, W]: the maximum of each, times its weight if given.

    weights: [N] float64, see `ScoreResult`.
    """
    highest = maps.amax(dim=(1, 2))
    return highest if weights is None else (highest.double() * weights).float()


def combinations_of(levels: Sequence[PatchLevel]) -> list[str]:
    """Every way to turn the levels' maps into one: each alone and, of several, "sum" and "mult"."""
    names = [str(level) for level in levels]
    return names if len(names) == 1 else [*names, "sum", "mult"]


def check_combination(combination: str, levels: Sequence[PatchLevel]) -> None:
    """Raise ValueError for what is no combination of these levels' maps."""
    known = [*(str(level) for level in levels), "sum", "mult"]
    if combination not in known:
        raise ValueError(f"combination must be one of {known}, got {combination!r}")


def combine(level_maps: Mapping[str, Tensor], combination: str) -> Tensor:
    """Join the levels' maps [N, H, W]: their product ("mult"), sum ("sum"), or one by name.

    Raises ValueError for another combination.
    """
    if combination in level_maps:
        return level_maps[combination]
    stacked = torch.stack(list(level_maps.values()))
    if combination == "mult":
        return stacked.prod(dim=0)
    if combination == "sum":
        return stacked.sum(dim=0)
    raise ValueError(
        f"combination must be one of {[*level_maps, 'sum', 'mult']}, got {combination!r}"
    )


@dataclass(frozen=True)
class MapRule:
    """How the distances of a level's patches become its anomaly map."""

    interpolate: bool = False
    """False: a pixel's value is the mean over all patches that cover it, as in the paper. True: it
    is interpolated between the centres of patches, so that the map's maximum is about the largest
    distance: for encoders that see more than their patches."""
    border: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """Per level: factors that distances near the border are divided by, see `score.border`."""

    def map(self, distances: Tensor, level: PatchLevel, image_shape: tuple[int, int]) -> Tensor:
        """The map [N, H, W] of distances [N, I, J]."""
        values = self.values(distances, level)
        if self.interpolate:
            return _interpolated(values, level, image_shape)
        return score_map(values, level.size, level.stride, *image_shape)

    def values(self, distances: Tensor, level: PatchLevel) -> Tensor:
        """What the map shows of distances [N, I, J]: these, corrected near the border."""
        factors = self.border.get(str(level))
        return distances if factors is None else corrected(distances, factors)


def _interpolated(values: Tensor, level: PatchLevel, image_shape: tuple[int, int]) -> Tensor:
    """Bilinear between the centres of patches, constant beyond the outermost: [N, H, W]."""
    down, across = (
        interpolation_weights(pixels, count, level).to(values)
        for pixels, count in zip(image_shape, values.shape[1:], strict=True)
    )
    return down @ values @ across.T


def interpolation_weights(pixels: int, count: int, level: PatchLevel) -> Tensor:
    """What each of `count` patches along an axis has to say to each pixel: [pixels, count] float64.

    Bilinear between the patches' centres; a pixel's weights add up to 1.
    """
    centres = torch.arange(pixels, dtype=torch.float64) + 0.5
    place = ((centres - level.size / 2) / level.stride).clamp(0, count - 1)
    number = torch.arange(count, dtype=torch.float64)
    return (1 - (place[:, None] - number).abs()).clamp(min=0)


DEFAULT_RULE = MapRule()
"""That of encoders that see nothing but their patches."""


def search_levels(
    banks: Mapping[PatchLevel, AnyBank],
    encoded: Sequence[Tensor],
    image_shape: tuple[int, int],
    combination: str = "mult",
    groups: Tensor | None = None,
    rule: MapRule = DEFAULT_RULE,
    reweight: int | None = None,
) -> ScoreResult:
    """Score images by their embeddings, one [N, I, J, D] per level of the banks, in their order.

    image_shape: (height, width) in pixels. groups: [N] int64, one per image, whose patches match
    no bank rows of that group. rule: how maps are made; it changes no distance. reweight: multiply
    image scores as PatchCore does, by this many neighbours, 2 to 32, see `score.reweighting`; None:
    they are the maxima of the maps. Of banks in several processes all call this at once, each with
    its own images, maybe none. Results lie on the CPU. Raises ValueError for another combination
    than `combine` takes, and for `reweight` with several levels.
    """
    check_combination(combination, list(banks))
    check_reweight(reweight, list(banks))
    maps, distances, rows, matches = {}, {}, {}, {}
    weights = None
    for (level, bank), embeddings in zip(banks.items(), encoded, strict=True):
        own = None if groups is None else groups.to(bank.device)
        found, row = nearest(bank, embeddings, exclude_same_group=own)  # [N, I, J]
        name = str(level)
        maps[name] = rule.map(found, level, image_shape).cpu()
        distances[name], rows[name] = found.cpu(), row.cpu()
        matches[name] = bank.source(row).cpu()
        if reweight is not None:
            weights = image_weights(bank, embeddings, rule.values(found, level), reweight, own)
    return ScoreResult(combination, maps, distances, rows, matches, weights)
