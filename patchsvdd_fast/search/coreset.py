"""Coresets: few rows of a bank that no other row is far from, chosen farthest first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.backends import search_method
from ..ops.checks import (
    FloatArray,
    as_vectors,
    check_finite_rows,
    check_int,
    check_shape,
)
from ..ops.cpu_bank import project
from ..ops.search_kernels import MOST_ROWS, Screen, coreset_on_cpu, coreset_on_gpu
from .centroids import can_be_clustered
from .cpu_clusters import principal_axes, spectrum

_LARGEST_INT = 2**63 - 1
# Coordinates of all pairs of a row and a choice: with fewer, a screen takes longer than it saves.
_SMALLEST = 2**33
_LEFT_OUT = 0.15  # share of the variance that the screen's axes may leave out; measured
# Rows far out may be clipped: at most so many, and only what is so many times as far as the others.
_CLIPPED, _FAR_OUT = 64, 4.0
_CODE_LIMIT = 127  # kCodeLimit in csrc/cpu/search_kernels.h


class Coreset(NamedTuple):
    """Rows that stand for all rows."""

    rows: Tensor
    """[count] int64: row numbers in the order in which they were chosen."""
    distances: Tensor
    """[count] float32: each row's distance, when it was chosen, to the nearest row chosen before;
    infinity for the first. They do not rise."""
    radius: float
    """The largest distance of any row to the nearest one chosen. Without the others, the distance
    of a query to its nearest row grows by no more than this."""


def as_count(size: float, rows: int) -> int:
    """How many of `rows`: an integer, or a float, a share of them; ValueError out of range."""
    if not isinstance(size, float):
        return check_int("size", size, 1, rows)
    if not 0 < size <= 1:
        raise ValueError(f"a share of the rows must be above 0, up to 1.0, got {size}")
    return max(1, round(size * rows))


def select_coreset(
    embeddings: Tensor | FloatArray,
    count: int,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Coreset:
    """Choose `count` rows, each the one farthest from those chosen before it.

    This is greedy k-centre selection (Gonzalez 1985), which PatchCore (Roth et al. 2022) thins its
    memory bank with; no choice of `count` rows has less than half of its radius.

    embeddings: [M, D], finite, M < 2^32; real numbers as `NormalBank` takes them.
    count: rows to choose, 1 to M. A smaller coreset is the beginning of a larger one.
    seed: of the first row, which `torch.randint` draws on the CPU, whatever the device.
    progress: called now and then with the share done, 0 to 1.

    A row's distance is the canonical one (see `reference.canonical_squared_distances`) to the
    nearest row chosen; of equally far rows the lowest is chosen, and none twice, though it may
    equal one chosen before. So the choice is the same for every device, instruction set and number
    of threads. Returns tensors on the device of the embeddings.

    Raises ValueError for a wrong shape or count and for values that are not finite, naming the
    first such row; TypeError for what are no real numbers; KeyboardInterrupt soon after Ctrl-C.
    """
    values = as_vectors("embeddings", embeddings, halves=True)
    check_shape("embeddings", values, "M, D")
    rows, dim = values.shape
    if rows == 0 or dim == 0 or rows > MOST_ROWS:
        raise ValueError(
            f"embeddings must have 1 to {MOST_ROWS} rows of at least one value, "
            f"got shape {list(values.shape)}"
        )
    count = check_int("count", count, 1, rows)
    seed = check_int("seed", seed, 0, _LARGEST_INT)
    check_finite_rows("embeddings", values)
    values = values.contiguous()
    generator = torch.Generator("cpu").manual_seed(seed)
    first = int(torch.randint(rows, (), generator=generator, device="cpu"))
    if values.device.type == "cpu":
        screen = _screen(values, count, generator)
        return Coreset(*coreset_on_cpu(values, first, count, screen, progress))
    return Coreset(*coreset_on_gpu(values, first, count, progress))


def is_screened(rows: int, dim: int, count: int) -> bool:
    """Whether a choice of `count` of so many rows on the CPU is made with a screen, if possible."""
    return rows * dim * count >= _SMALLEST


def _screen(embeddings: Tensor, count: int, generator: torch.Generator) -> Screen | None:
    """The screen of embeddings [M, D] on the CPU; None where it is of no use or not possible."""
    method = search_method.get()
    few = not is_screened(len(embeddings), embeddings.shape[1], count) and method != "screened"
    if method == "plain" or few or not can_be_clustered(embeddings):
        return None
    mean, basis, stretch = principal_axes(spectrum(embeddings, generator), _LEFT_OUT)
    projected, errors = project(embeddings, mean, basis, stretch)
    sizes = projected.abs().amax(dim=1)
    common = sizes.kthvalue(len(sizes) - min(_CLIPPED, len(sizes) // 100)).values
    largest = min(float(sizes.max()), _FAR_OUT * float(common))
    return Screen(projected, errors, stretch, max(largest / _CODE_LIMIT, 1e-30))
