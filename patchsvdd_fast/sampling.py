"""Random pairs of patches for training: where they lie, what they look like.

Coordinates come from a CPU generator, so that a seed means the same pairs on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from .levels import PatchLevel

PairKind = Literal["position", "neighbour"]

DIRECTIONS = torch.tensor([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)])
"""[8, 2]: the direction (down, right) that each position label stands for."""

COLOUR_SHIFT = 0.02
PIXEL_NOISE = 0.02
MAX_REDRAWS = 10_000


@dataclass(frozen=True)
class PatchPairs:
    """Pairs of patches of one size, within one image each."""

    size: int
    """Side of the patches, pixels."""
    image: Tensor
    """[B] int64: the image both patches are in."""
    first: Tensor
    """[B, 2] int64: top and left of the first patch, pixels."""
    second: Tensor
    """[B, 2] int64: top and left of the second."""
    label: Tensor
    """[B] int64: direction from first to second as an index into DIRECTIONS, before clipping."""


def sample_position_pairs(
    image: Tensor,
    size: int,
    height: int,
    width: int,
    generator: Generator,
    redraw_clipped: bool = False,
) -> PatchPairs:
    """Pairs for the relative-position task: the second patch lies 3/4 to 1 patch away.

    Per axis, the offset is the direction times (3K/4 + U{0 .. K/4 - 1}). The second patch is
    clipped to the image, after which its label may be wrong: that is the paper's protocol.
    `redraw_clipped` draws such pairs again instead. image: [B] int64, which image each is from.
    """
    limits = _corner_limits(size, height, width)
    if redraw_clipped and int(limits.min()) < size - 1:
        smallest = 2 * size - 1
        raise ValueError(
            f"redraw_clipped needs images of at least {smallest}x{smallest} pixels for patches of "
            f"{size}, got {width}x{height}"
        )
    count = image.shape[0]

    def draw(pairs: int) -> tuple[Tensor, Tensor, Tensor]:
        first = _uniform_corners(pairs, limits, generator)
        label = torch.randint(len(DIRECTIONS), (pairs,), generator=generator)
        jitter = torch.randint(size // 4, (pairs, 2), generator=generator)
        return first, first + DIRECTIONS[label] * (3 * size // 4 + jitter), label

    first, second, label = draw(count)
    for _ in range(MAX_REDRAWS if redraw_clipped else 0):
        outside = ((second < 0) | (second > limits)).any(dim=1).nonzero().flatten()
        if len(outside) == 0:
            break
        first[outside], second[outside], label[outside] = draw(len(outside))
    return PatchPairs(
        size, image, first, second.clamp(min=torch.zeros(2).long(), max=limits), label
    )


def sample_neighbour_pairs(
    image: Tensor, size: int, height: int, width: int, generator: Generator
) -> PatchPairs:
    """Pairs for SVDD': the second patch is jittered by up to K/32 pixels, never by (0, 0)."""
    limits = _corner_limits(size, height, width)
    count = image.shape[0]
    reach = size // 32
    side = 2 * reach + 1
    # One number for both axes; skipping the middle one leaves out (0, 0).
    cell = torch.randint(side * side - 1, (count,), generator=generator)
    cell += cell >= side * side // 2
    jitter = torch.stack([cell // side - reach, cell % side - reach], dim=1)
    first = _uniform_corners(count, limits, generator)
    second = (first + jitter).clamp(min=torch.zeros(2).long(), max=limits)
    return PatchPairs(size, image, first, second, torch.zeros(count, dtype=torch.int64))


def crop_patches(images: Tensor, mean: Tensor, image: Tensor, corners: Tensor, size: int) -> Tensor:
    """Cut patches out of the images and normalise them.

    images: [N, 3, H, W] uint8; mean: [3, H, W] float32; image: [B] int64; corners: [B, 2] int64
    (top, left). Returns `(pixel - mean) / 255` as [B, 3, size, size] float32.
    """
    device = images.device
    span = torch.arange(size)
    y = (corners[:, :1] + span).to(device)[:, :, None]  # [B, K, 1]
    x = (corners[:, 1:] + span).to(device)[:, None, :]  # [B, 1, K]
    pixels = images[image.to(device)[:, None, None], :, y, x]  # [B, K, K, 3]
    average = mean.permute(1, 2, 0)[y, x]  # [B, K, K, 3]
    return ((pixels - average) / 255).permute(0, 3, 1, 2).contiguous()


def perturb(patches: Tensor, generator: Generator) -> Tensor:
    """Shift each patch's colours and add noise to its pixels, both normal with deviation 0.02.

    patches: [B, 3, K, K] float32, normalised; generator: on the same device.
    """

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=patches.device)

    shift = normal((*patches.shape[:2], 1, 1))
    noise = normal(tuple(patches.shape))
    return patches + COLOUR_SHIFT * shift + PIXEL_NOISE * noise


def _corner_limits(size: int, height: int, width: int) -> Tensor:
    """[2]: the largest top and left a patch can have."""
    PatchLevel(size, 1).grid_shape(height, width)  # refuses images smaller than a patch
    return torch.tensor([height - size, width - size])


def _uniform_corners(count: int, limits: Tensor, generator: Generator) -> Tensor:
    axes = [torch.randint(int(limit) + 1, (count,), generator=generator) for limit in limits]
    return torch.stack(axes, dim=1)
