"""Pairs of patches drawn from dense maps: thousands for the price of encoding a crop twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from .encoder import SMALL_PATCH, TRUNK_STRIDE, HierarchicalEncoder
from .light import Light, LightChange
from .losses import NUM_POSITIONS
from .objectives import LevelLoss, TrainingImages, classifier_of, mixed_seed, pair_loss
from .sampling import DIRECTIONS

_LEAST_SPREAD = 1e-12


class CellPairs(NamedTuple):
    """Pairs of one crop and patch size: cells (row, column) of the small encoder's dense map."""

    first: Tensor  # [P, 2]
    second: Tensor  # [P, 2]
    first_view: Tensor
    """[P], 0 or 1; the second patch is of the other view."""
    labels: Tensor  # [P]


def smallest_crop(largest_patch: int) -> int:
    """Side that holds every position pair, in pixels: the longest offset is a patch less a cell."""
    return 2 * largest_patch - TRUNK_STRIDE


def draw_positions(size: int, crop: int, count: int, generator: Generator) -> CellPairs:
    """Position pairs as in the paper, to whole cells; the first patch lies where both fit."""
    last = (crop - size) // TRUNK_STRIDE
    labels = torch.randint(NUM_POSITIONS, (count,), generator=generator)
    nearest, jitter = 3 * size // (4 * TRUNK_STRIDE), size // (4 * TRUNK_STRIDE)
    offset = DIRECTIONS[labels] * (nearest + torch.randint(jitter, (count, 2), generator=generator))
    least = (-offset).clamp(min=0)
    room = last - offset.abs() + 1
    first = least + (torch.rand(count, 2, generator=generator) * room).long()
    views = torch.randint(2, (count,), generator=generator)
    return CellPairs(first, first + offset, views, labels)


def draw_neighbours(size: int, crop: int, count: int, generator: Generator) -> CellPairs:
    """Neighbour pairs: a jitter of K/64 cells, at least one, along one or both axes."""
    last = (crop - size) // TRUNK_STRIDE
    reach = max(1, size // (32 * TRUNK_STRIDE))
    first = torch.randint(last + 1, (count, 2), generator=generator)
    labels = torch.randint(NUM_POSITIONS, (count,), generator=generator)
    length = 1 + torch.randint(reach, (count, 1), generator=generator)
    second = (first + DIRECTIONS[labels] * length).clamp(0, last)
    views = torch.randint(2, (count,), generator=generator)
    return CellPairs(first, second, views, labels)


class DensePairs:
    """Two views of each crop, differing in light and noise, encoded densely: pairs for little.

    The small encoder runs over a view once and gives the embeddings of all its patches; position
    and neighbour pairs are then drawn from the maps, the first patch from one view, the second
    from the other. So the neighbours' distance also teaches to see past light and noise. Positions
    are never clipped.

    Embeddings enter the losses relative to the size of their differences (`in_units_of_spread`).
    Else the easiest way to tell positions is to grow the embeddings until tanh saturates, after
    which they show where a patch lies and nothing else.
    """

    def __init__(
        self,
        encoder: HierarchicalEncoder,
        classifiers: nn.ModuleDict,
        images: TrainingImages,
        seed: int,
        svdd_weight: float,
        crop_size: int,
        pairs_per_crop: int,
        light: Light,
    ) -> None:
        largest = max(encoder.patch_sizes)
        smallest = smallest_crop(largest)
        crop_size = min(crop_size, *images.mean.shape[1:])
        if crop_size < smallest:
            raise ValueError(
                f"crop_size must be at least {smallest} pixels for pairs of patches of {largest}, "
                f"in images no smaller, got {crop_size}; mode faithful takes smaller ones"
            )
        self.encoder, self.classifiers, self.images = encoder, classifiers, images
        self.seed, self.svdd_weight = seed, svdd_weight
        self.crop_size, self.pairs_per_crop, self.light = crop_size, pairs_per_crop, light

    def losses(self, image_of: Tensor, step: int, share: slice) -> dict[int, LevelLoss]:
        """See `Objective`; an item is a crop."""
        views, _, _ = self.images.crop_pairs(
            image_of[share], self.crop_size, "view", (self.seed, step), share.start
        )  # [2, b, C, H, W]
        views = views.transpose(0, 1).flatten(0, 1)  # both of a crop in a row
        generators = [
            Generator().manual_seed(mixed_seed(self.seed, step, crop))
            for crop in range(share.start, share.stop)
        ]
        if self.light != Light():
            changes = [self.light.draw(views.shape[1], generator) for generator in generators]
            views = LightChange(*map(torch.cat, zip(*changes, strict=True))).apply(views)
        trunk = self.encoder.small(views).permute(0, 2, 3, 1)  # [2b, h, w, D]
        return {
            size: self._level(size, trunk, generators)
            for size in reversed(self.encoder.patch_sizes)
        }

    def _level(self, size: int, trunk: Tensor, generators: Sequence[Generator]) -> LevelLoss:
        cells, labels = [], []
        for draw in (draw_positions, draw_neighbours):
            drawn = [
                draw(size, self.crop_size, self.pairs_per_crop, generator)
                for generator in generators
            ]
            for which in ("first", "second"):
                cells.append(_cells_in_batch(drawn, which))
            labels.append(torch.cat([pairs.labels for pairs in drawn]))
        embedded = embed_cells(self.encoder, size, trunk, torch.cat(cells).to(trunk.device))
        parts = embedded.chunk(4)
        first, second, near, jittered = in_units_of_spread(len(generators), *parts)
        loss = pair_loss(
            classifier_of(self.classifiers, size),
            (first, second),
            labels[0].to(trunk.device),
            (near, jittered),
            self.svdd_weight,
        )
        return loss._replace(embeddings=parts[2].detach())


def in_units_of_spread(
    crops: int, first: Tensor, second: Tensor, near: Tensor, jittered: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings [crops * P, D] divided by their crop's root mean square of `first - second`.

    The losses of what is returned neither shrink nor grow with all embeddings.
    """
    squares = (first - second).float().square().unflatten(0, (crops, -1))
    unit = squares.mean(dim=(1, 2)).sqrt() + _LEAST_SPREAD
    unit = unit.repeat_interleave(len(first) // crops)[:, None]
    return first / unit, second / unit, near / unit, jittered / unit


def embed_cells(encoder: HierarchicalEncoder, size: int, trunk: Tensor, cells: Tensor) -> Tensor:
    """Embeddings [P, D] of patches whose corners are cells [P, 3]: image, row and column.

    trunk: [N, h, w, D], the small encoder's dense map of each image, at stride 2.
    """
    if size == SMALL_PATCH:
        return trunk[cells[:, 0], cells[:, 1], cells[:, 2]]
    half = size // 2
    step = half // TRUNK_STRIDE
    quadrants = [
        embed_cells(encoder, half, trunk, cells + cells.new_tensor([0, down * step, right * step]))
        for down in (0, 1)
        for right in (0, 1)
    ]
    joined = torch.stack(quadrants, dim=-1).unflatten(-1, (2, 2))  # [P, D, 2, 2]
    embedded: Tensor = encoder.head(size)(joined).flatten(1)
    return embedded


def _cells_in_batch(drawn: Sequence[CellPairs], which: str) -> Tensor:
    """[b P, 3]: view in the batch, row and column of the first or the second patch of all pairs."""
    rows = []
    for crop, pairs in enumerate(drawn):
        cells, view = pairs.first, pairs.first_view
        if which == "second":
            cells, view = pairs.second, 1 - pairs.first_view
        rows.append(torch.cat([(2 * crop + view)[:, None], cells], dim=1))
    return torch.cat(rows)
