"""The objective of mode "dense": SVDD' over neighbouring patches from dense maps of crops.

A dense map holds the embedding of every patch of a crop. Encoding the crop once gives thousands of
embeddings for the price of a few dozen patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..encoders.patch_svdd import SMALL_PATCH, TRUNK_STRIDE, HierarchicalEncoder
from ..ops.pair_protocol import DIRECTIONS
from .objectives import LevelLoss, TrainingImages, mixed_seed, svdd_loss


def smallest_crop(largest_patch: int) -> int:
    """Side of the smallest crop that holds a pair of neighbours, in pixels."""
    return largest_patch + TRUNK_STRIDE * _reach(largest_patch)


def draw_neighbours(
    size: int, crop: int, count: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Top left corners of first and second patches of neighbour pairs, [P, 2] and [P, 2].

    size: K, the patches' side in pixels. crop: its side in pixels. count: P. Corners are rows and
    columns of the small encoder's dense map. The second patch is 1 to max(1, K/64) cells
    away in one of eight directions, clipped to the crop.
    """
    last = (crop - size) // TRUNK_STRIDE
    first = torch.randint(last + 1, (count, 2), generator=generator)
    direction = DIRECTIONS[torch.randint(len(DIRECTIONS), (count,), generator=generator)]
    length = 1 + torch.randint(_reach(size), (count, 1), generator=generator)
    return first, (first + direction * length).clamp(0, last)


def _reach(size: int) -> int:
    """The longest way from a patch to its neighbour along an axis, in cells."""
    return max(1, size // (32 * TRUNK_STRIDE))


class DensePairs:
    """SVDD' alone, over neighbours drawn from crops that are encoded densely.

    As in the paper, neighbours carry no noise. There are no position pairs: in minutes of training
    they teach nothing that helps (docs/design/training.md, "Dense pairs").

    crop_size: wanted side of a crop in pixels; at least what holds a pair of the largest patches is
    taken, and at most the image. pairs_per_crop: per patch size. Raises ValueError if the images
    are smaller than the smallest crop.
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
        # Copied to the device before it encodes: a copy would wait for that work to end.
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
        """Corners [2 b P, 3] for `embed_cells`: of all first patches, then of all second ones.

        generators: one for each of the b crops; P pairs are drawn with each.
        """
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
    """As `embed_cells`, but trunk: [N h w, D], maps of `width` columns; rows: [P], cells in it."""
    if size == SMALL_PATCH:
        # Unlike the gradient of indexing, that of an embedding is summed in a fixed order.
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
