"""Each op in a few lines of plain torch: the truth that the kernels are tested against.

Clear rather than fast, and never used for scoring.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .levels import PatchLevel

_PARTIAL_SUMS = 16


def extract_patches(images: Tensor, size: int, stride: int, mean: Tensor | None = None) -> Tensor:
    """[N, C, H, W] -> [N, I, J, C, K, K]; with a mean, `(pixel - mean) / 255` in float32."""
    if mean is not None:
        images = (images.float() - mean) / 255
    patches = images.unfold(2, size, stride).unfold(3, size, stride)  # [N, C, I, J, K, K]
    return patches.permute(0, 2, 3, 1, 4, 5).contiguous()


def score_map(distances: Tensor, size: int, stride: int, height: int, width: int) -> Tensor:
    """[N, I, J] -> [N, H, W] in float64: the mean over the patches that cover each pixel."""
    rows, columns = distances.shape[1:]
    total = torch.zeros(distances.shape[0], height, width, dtype=torch.float64)
    count = torch.zeros(height, width, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            patch = (slice(i * stride, i * stride + size), slice(j * stride, j * stride + size))
            total[:, patch[0], patch[1]] += distances[:, i, j, None, None]
            count[patch] += 1
    # A margin that no patch reaches repeats the last covered row and column.
    inside_y = torch.arange(height).clamp(max=(rows - 1) * stride + size - 1)
    inside_x = torch.arange(width).clamp(max=(columns - 1) * stride + size - 1)
    return (total / count)[:, inside_y][:, :, inside_x]


def nearest(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Canonical distance and index of the nearest bank row: [Q, D], [M, D] -> [Q], [Q]."""
    squared = canonical_squared_distances(queries, bank)
    best = squared.min(dim=1).values
    is_best = squared == best[:, None]
    # Through float64, since torch's float32 root is not always the correctly rounded one.
    return best.double().sqrt().float(), is_best.int().argmax(dim=1)  # the first of equals


def canonical_squared_distances(queries: Tensor, bank: Tensor) -> Tensor:
    """All pairs, [Q, D], [M, D] -> [Q, M], in the order of operations that defines the result.

    Sixteen partial sums, acc[j % 16] = fma(t, t, acc[j % 16]) with t = q[j] - b[j] rounded to
    float32, then acc[i] += acc[i + 8], + 4, + 2, + 1.
    """
    sums = [torch.zeros(queries.shape[0], bank.shape[0]) for _ in range(_PARTIAL_SUMS)]
    for j in range(queries.shape[1]):
        difference = queries[:, j, None] - bank[None, :, j]
        sums[j % _PARTIAL_SUMS] = _fma_square(difference, sums[j % _PARTIAL_SUMS])
    half = _PARTIAL_SUMS // 2
    while half:
        sums = [sums[i] + sums[i + half] for i in range(half)]
        half //= 2
    return sums[0]


def _fma_square(difference: Tensor, addend: Tensor) -> Tensor:
    """`fma(t, t, addend)` in float32: one rounding, of the exact value.

    The square is exact in float64; the sum is rounded there to odd (towards zero, with the last
    bit set if anything was lost), after which rounding to float32 equals rounding once.
    """
    square = difference.double() ** 2
    addend = addend.double()
    total = square + addend
    part = total - square
    lost = (square - (total - part)) + (addend - part)  # what `total` lacks, exactly (two-sum)
    inexact_and_even = torch.isfinite(total) & (lost != 0) & (total.view(torch.int64) % 2 == 0)
    step = torch.where(inexact_and_even, lost.sign().long(), 0)
    return (total.view(torch.int64) + step).view(torch.float64).float()


def dense_embeddings_patchwise(
    encoder: torch.nn.Module, images: Tensor, level: PatchLevel
) -> Tensor:
    """Embed every patch of the grid by itself: [N, 3, H, W] -> [N, I, J, D]."""
    patches = extract_patches(images, level.size, level.stride)
    with torch.no_grad():
        embeddings: Tensor = encoder(patches.flatten(0, 2))
    return embeddings.view(*patches.shape[:3], -1)
