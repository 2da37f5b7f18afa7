"""SVDD' over pairs of patches drawn from dense maps: thousands for the price of encoding a crop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..encoders.patch_svdd import SMALL_PATCH, TRUNK_STRIDE, HierarchicalEncoder
from ..ops.pair_protocol import DIRECTIONS
from .objectives import LevelLoss, TrainingImages, mixed_seed, svdd_loss


def smallest_crop(largest_patch: int) -> int:
    """Side that holds a pair of neighbours, in pixels."""
    return largest_patch + TRUNK_STRIDE * _reach(largest_patch)


def draw_neighbours(
    size: int, crop: int, count: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Corners of neighbouring patches, [P, 2] each: cells of the small encoder's dense map.

    A jitter of K/64 cells, at least one, along one or both axes; clipped to the crop.
    """
    last = (crop - size) // TRUNK_STRIDE
    first = torch.randint(last + 1, (count, 2), generator=generator)
    direction = DIRECTIONS[torch.randint(len(DIRECTIONS), (count,), generator=generator)]
    length = 1 + torch.randint(_reach(size), (count, 1), generator=generator)
    return first, (first + direction * length).clamp(0, last)


def _reach(size: int) -> int:
    """The longest jitter of a patch, in cells."""
    return max(1, size // (32 * TRUNK_STRIDE))


class DensePairs:
    """SVDD' alone, over neighbours drawn from crops that are encoded densely.

    The small encoder runs over a crop once and gives the embeddings of all its patches. As in the
    paper, neighbours carry no noise. There are no position pairs: in minutes of training they
    teach nothing that helps (ARCHITECTURE.md, "Dense pairs").
    """

    def __init__(
        self,
        encoder: HierarchicalEncoder,
        images: TrainingImages,
        seed: int,
        crop_size: int,
        pairs_per_crop: int,
    ) -> None:
        largest = max(encoder.patch_sizes)
        smallest = smallest_crop(largest)
        height, width = images.mean.shape[1:]
        if min(height, width) < smallest:
            raise ValueError(
                f"mode dense takes images of at least {smallest}x{smallest} pixels for patches of "
                f"{largest}, got {width}x{height}; mode faithful takes smaller ones"
            )
        self.classifiers = nn.ModuleDict()  # none: there are no positions to tell
        self.encoder, self.images, self.seed = encoder, images, seed
        self.crop_size = min(max(crop_size, smallest), height, width)
        self.pairs_per_crop = pairs_per_crop

    def losses(self, image_of: Tensor, step: int, share: slice) -> dict[int, LevelLoss]:
        """See `Objective`; an item is a crop."""
        (crops, _), _, _ = self.images.crop_pairs(
            image_of[share], self.crop_size, "neighbour", (self.seed, step), share.start
        )  # [b, C, H, W]; the crop's own neighbour is not needed
        generators = [
            Generator().manual_seed(mixed_seed(self.seed, step, crop))
            for crop in range(share.start, share.stop)
        ]
        # Copied over before the device is at work, so that nothing waits for it.
        cells = {
            size: self._draw(size, generators).to(crops.device)
            for size in reversed(self.encoder.patch_sizes)
        }
        trunk = self.encoder.small(crops).permute(0, 2, 3, 1)  # [b, h, w, D]
        losses = {}
        for size, corners in cells.items():
            near, jittered = embed_cells(self.encoder, size, trunk, corners).chunk(2)
            svdd = svdd_loss(near, jittered)
            losses[size] = LevelLoss(svdd, svdd, near.detach())
        return losses

    def _draw(self, size: int, generators: Sequence[Generator]) -> Tensor:
        """Cells [2 b P, 3] of the first patches of all pairs and crops, then of the second."""
        drawn = [
            draw_neighbours(size, self.crop_size, self.pairs_per_crop, generator)
            for generator in generators
        ]
        return torch.cat([_cells_in_batch(corners) for corners in zip(*drawn, strict=True)])


def embed_cells(encoder: HierarchicalEncoder, size: int, trunk: Tensor, cells: Tensor) -> Tensor:
    """Embeddings [P, D] of patches whose corners are cells [P, 3]: image, row and column.

    trunk: [N, h, w, D], the small encoder's dense map of each image, at stride 2.
    """
    _, height, width, _ = trunk.shape
    rows = (cells[:, 0] * height + cells[:, 1]) * width + cells[:, 2]
    return _embed_rows(encoder, size, trunk.flatten(0, 2), width, rows)


def _embed_rows(
    encoder: HierarchicalEncoder, size: int, trunk: Tensor, width: int, rows: Tensor
) -> Tensor:
    """As `embed_cells`, of cells counted through all maps of `width` columns: trunk [N h w, D]."""
    if size == SMALL_PATCH:
        # Indexing would do, but its gradient is added up in no fixed order; this one's is.
        return F.embedding(rows, trunk)
    half = size // 2
    step = half // TRUNK_STRIDE
    quadrants = [
        _embed_rows(encoder, half, trunk, width, rows + (down * width + right) * step)
        for down in (0, 1)
        for right in (0, 1)
    ]
    joined = torch.stack(quadrants, dim=-1).unflatten(-1, (2, 2))  # [P, D, 2, 2]
    embedded: Tensor = encoder.head(size)(joined).flatten(1)
    return embedded


def _cells_in_batch(corners: tuple[Tensor, ...]) -> Tensor:
    """Corners [P, 2] within each of b crops -> [b P, 3]: crop in the batch, row and column."""
    rows = [
        torch.cat([torch.full((len(cells), 1), crop), cells], dim=1)
        for crop, cells in enumerate(corners)
    ]
    return torch.cat(rows)
