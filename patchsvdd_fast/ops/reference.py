"""Each op in a few lines of plain torch: the truth that the kernels are tested against.

Clear rather than fast, and never used for scoring.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .pair_protocol import COLOUR_SHIFT, DIRECTIONS, MAX_REDRAWS, PIXEL_NOISE, Draw

_PARTIAL_SUMS = 16
# The purposes of random numbers, part of their counters (docs/design/training.md, "Counters").
_PLACES, _SHIFTS, _NOISE = {"position": 0, "neighbour": 1, "view": 6}, 2, 4


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


def nearest(
    queries: Tensor,
    bank: Tensor,
    *,
    exclude_same_group: tuple[Tensor, Tensor] | None = None,
    k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.nearest`: canonical distances and indices, [Q, D], [M, D] -> [Q], or [Q, k] with k."""
    squared = canonical_squared_distances(queries, bank)
    rows = torch.arange(len(bank)).expand_as(squared)
    if exclude_same_group is not None:
        of_queries, of_bank = exclude_same_group
        excluded = of_queries[:, None] == of_bank
        squared = squared.masked_fill(excluded, torch.inf)
        rows = rows.masked_fill(excluded, -1)
    missing = (k or 1) - len(bank)
    if missing > 0:
        squared = torch.nn.functional.pad(squared, (0, missing), value=torch.inf)
        rows = torch.nn.functional.pad(rows, (0, missing), value=-1)
    # Excluded rows last, the lowest index first on ties: both sorts keep the order of equals.
    order = torch.argsort((rows < 0).int(), dim=1, stable=True)
    order = order.gather(1, torch.argsort(squared.gather(1, order), dim=1, stable=True))
    nearest_ones = order[:, : k or 1]
    # Through float64, since torch's float32 root is not always the correctly rounded one.
    distances = squared.gather(1, nearest_ones).double().sqrt().float()
    indices = rows.gather(1, nearest_ones)
    return (distances[:, 0], indices[:, 0]) if k is None else (distances, indices)


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


def within(
    queries: Tensor,
    bank: Tensor,
    radii: Tensor,
    *,
    exclude_same_group: tuple[Tensor, Tensor] | None = None,
    cosine: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.within`, radii [Q]: starts [Q + 1], distances and indices."""
    if cosine:
        queries, bank = normalise(queries), normalise(bank)
    squared = canonical_squared_distances(queries, bank)
    exact = squared.double()
    distances = (exact / 2 if cosine else exact.sqrt()).float()
    inside = distances <= radii[:, None]
    if exclude_same_group is not None:
        inside &= exclude_same_group[0][:, None] != exclude_same_group[1]
    counts, found, rows = [0], [torch.empty(0)], [torch.empty(0, dtype=torch.int64)]
    for q in range(len(queries)):
        order = torch.argsort(squared[q], stable=True)
        order = order[inside[q, order]]
        counts.append(len(order))
        found.append(distances[q, order])
        rows.append(order)
    return torch.tensor(counts).cumsum(0), torch.cat(found), torch.cat(rows)


def normalise(vectors: Tensor) -> Tensor:
    """Vectors [N, D], none of zeros, divided by their canonical distance to zero."""
    largest = vectors.abs().amax(dim=1, keepdim=True).double()
    exponent = torch.frexp(largest).exponent - 1  # brings the largest value to [1, 2)
    scaled = torch.ldexp(vectors.double(), -exponent).float()
    zero = torch.zeros(1, vectors.shape[1])
    norms = canonical_squared_distances(scaled, zero).double().sqrt().float()
    return scaled / norms


def coreset(embeddings: Tensor, first: int, count: int) -> tuple[Tensor, Tensor, float]:
    """Greedy k-centre selection: rows [count], their distances [count] when chosen, the radius."""
    values = embeddings.float()
    squared = torch.full((len(values),), torch.inf)
    free = torch.ones(len(values), dtype=torch.bool)
    rows, distances = [first], [torch.inf]
    while True:
        newest = values[rows[-1]][None]
        squared = squared.minimum(canonical_squared_distances(newest, values)[0])
        free[rows[-1]] = False
        candidates = squared.where(free, -1)
        farthest = int((candidates == candidates.max()).int().argmax())  # the lowest on ties
        distance = float(squared[farthest].double().sqrt().float()) if free.any() else 0.0
        if len(rows) == count:
            return torch.tensor(rows), torch.tensor(distances), distance
        rows.append(farthest)
        distances.append(distance)


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
    encoder: torch.nn.Module, images: Tensor, size: int, stride: int
) -> Tensor:
    """Embed every patch of the grid by itself: [N, 3, H, W] -> [N, I, J, D]."""
    patches = extract_patches(images, size, stride)
    with torch.no_grad():
        embeddings: Tensor = encoder(patches.flatten(0, 2))
    return embeddings.view(*patches.shape[:3], -1)


def philox(seed: int, *counter: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Philox4x32-10: random words [4, ...] of counters, whose four words are broadcast."""
    a, b, c, d = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    half, low = np.uint64(32), np.uint64(2**32 - 1)
    for r in range(10):
        key = [np.uint64((seed + r * 0x9E3779B9) % 2**32)]
        key.append(np.uint64(((seed >> 32) + r * 0xBB67AE85) % 2**32))
        left, right = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b = (right >> half) ^ b ^ key[0], right & low
        c, d = (left >> half) ^ d ^ key[1], left & low
    return np.stack([a, b, c, d])


def normals(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Standard normal numbers [4, ...] from random words [4, ...], after Box and Muller."""
    radius = np.sqrt(-2 * np.log(((words[0::2] >> np.uint64(8)) + 1.0) / 2**24))
    angle = words[1::2] * (2 * np.pi / 2**32)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)  # [2, 2, ...]
    return pairs.reshape(words.shape)


def crop_pairs(
    images: Tensor,
    mean: Tensor,
    image_of: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of patches [2, B, C, K, K] in float64, corners [2, B, 2] and labels [B].

    options: those of `ops.crop_pairs`, see `Draw`.
    """
    draw = Draw(*options)
    size, seed = draw.size, draw.seed
    channels, height, width = mean.shape
    patches = torch.empty(2, len(image_of), channels, size, size, dtype=torch.float64)
    corners = torch.empty(2, len(image_of), 2, dtype=torch.int64)
    labels = torch.empty(len(image_of), dtype=torch.int64)
    row = -(-size // 4)  # counters per row of a patch, each for four pixels
    quads = np.arange(channels * size * row)
    for b, image in enumerate(image_of.tolist()):
        counter = (draw.first_pair + b, draw.step)
        corners[:, b], labels[b] = _place_pair(draw, height, width, counter)
        for which, (top, left) in enumerate(corners[:, b].tolist()):
            window = (slice(None), slice(top, top + size), slice(left, left + size))
            patch = (images[image][window] - mean[window].double()) / 255
            if draw.kind != "neighbour":
                what = (size << 3) + _SHIFTS + which
                shift = torch.from_numpy(normals(philox(seed, np.arange(channels), what, *counter)))
                what = (size << 3) + _NOISE + which
                noise = torch.from_numpy(normals(philox(seed, quads, what, *counter)))
                noise = noise.T.reshape(channels, size, 4 * row)[..., :size]
                patch = patch + COLOUR_SHIFT * shift[0, :, None, None] + PIXEL_NOISE * noise
            patches[which, b] = patch
    return patches, corners, labels


def _place_pair(
    draw: Draw, height: int, width: int, counter: tuple[int, int]
) -> tuple[Tensor, int]:
    """Corners [2, 2] of a pair's patches, and its label. counter: number of the pair, step."""
    size, kind = draw.size, draw.kind
    limit = torch.tensor([height - size, width - size])

    def random(index: int, *counts: int) -> Tensor:
        words = philox(draw.seed, index, (size << 3) + _PLACES[kind], *counter)
        return torch.tensor([int(words[i]) * count >> 32 for i, count in enumerate(counts)])

    redraws = MAX_REDRAWS if draw.redraw_clipped and kind == "position" else 0
    for redraw in range(1 + redraws):
        if kind == "neighbour":
            reach = size // 32
            side = 2 * reach + 1
            top, left, cell = random(0, height - size + 1, width - size + 1, side**2 - 1).tolist()
            cell += cell >= side**2 // 2  # skips (0, 0)
            label, offset = 0, torch.tensor([cell // side - reach, cell % side - reach])
        elif kind == "view":
            top, left = random(0, height - size + 1, width - size + 1).tolist()
            label, offset = 0, torch.zeros(2, dtype=torch.int64)
        else:
            top, left = random(2 * redraw, height - size + 1, width - size + 1).tolist()
            label, *jitter = random(2 * redraw + 1, 8, size // 4, size // 4).tolist()
            offset = DIRECTIONS[label] * (3 * size // 4 + torch.tensor(jitter))
        first = torch.tensor([top, left])
        second = (first + offset).clamp(min=torch.zeros(2).long(), max=limit)
        if torch.equal(second, first + offset):
            break
    return torch.stack([first, second]), label
