"""Nearest-neighbour searches as torch ops: brute force, and clustered banks of CPU and GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _native
from .backends import define_op
from .checks import (
    NO_GROUPS,
    FloatArray,
    Groups,
    IntArray,
    as_tensor,
    check_finite_rows,
    check_int,
    check_search_operands,
    like_input,
)
from .cpu_bank import ClusterArrays
from .gpu_bank import SegmentArrays
from .search_kernels import MOST_NEIGHBOURS, Found, search_clusters, search_rows, search_segments

# Torch ops cannot take a `Groups`, so they take its fields one by one.
_GROUPS = "Tensor? query_groups=None, Tensor? bank_groups=None, int rows_per_group=1"
# k: how many neighbours; None: one, without an axis for it. appended: [T, D], more rows of the
# bank, whose numbers follow those of `bank`.
_OPTIONS = "int? k=None, Tensor? appended=None"
_FOUND = "(Tensor, Tensor)"  # distances [Q] float32 and rows [Q] int64; [Q, k] where k is given


def _checked(
    queries: Tensor, bank: Tensor, groups: tuple[Any, ...], k: int | None, appended: Tensor | None
) -> Groups:
    """Check the arguments of a search (ValueError, TypeError); returns its groups, contiguous."""
    check_search_operands(queries, bank)
    if k is not None and not 1 <= k <= MOST_NEIGHBOURS:
        raise ValueError(f"k must be at least 1 and at most {MOST_NEIGHBOURS}, got {k}")
    rows = bank.shape[0]
    if appended is not None:
        check_search_operands(queries, appended)
        rows += appended.shape[0]
    together = Groups(*groups)
    together.check(queries, rows)
    return together.contiguous()


def _found_fake(
    queries: Tensor, bank: Tensor, groups: tuple[Any, ...], k: int | None, appended: Tensor | None
) -> tuple[Tensor, Tensor]:
    _checked(queries, bank, groups, k, appended)
    shape = (queries.shape[0],) if k is None else (queries.shape[0], k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


def _search_appended(
    found: Found, queries: Tensor, appended: Tensor | None, first_row: int, groups: Groups
) -> None:
    """Search the rows behind a bank of `first_row` rows, which holds whole images (groups)."""
    if appended is None:
        return
    if groups.of_bank is not None:
        behind = groups.of_bank[first_row // groups.rows_per_group :]
        groups = groups._replace(of_bank=behind)
    search_rows(found, queries, appended, groups, first_row=first_row)


# --- nearest: brute force -------------------------------------------------------------------------


def _nearest_fake(
    queries: Tensor,
    bank: Tensor,
    *groups: Any,
    k: int | None = None,
    appended: Tensor | None = None,
    bank_is_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    return _found_fake(queries, bank, groups, k, appended)


def _nearest(
    queries: Tensor,
    bank: Tensor,
    *groups: Any,
    k: int | None = None,
    appended: Tensor | None = None,
    bank_is_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    together = _checked(queries, bank, groups, k, appended)
    check_finite_rows("queries", queries)
    if not bank_is_finite:
        check_finite_rows("bank", bank)
    found = Found.nothing(queries, k)
    search_rows(found, queries, bank, together)
    _search_appended(found, queries, appended, len(bank), together)
    return found.finish(k)


define_op(
    f"nearest(Tensor queries, Tensor bank, {_GROUPS}, *, {_OPTIONS}, bool bank_is_finite=False)"
    f" -> {_FOUND}",
    _nearest,
    _nearest_fake,
)


# --- nearest_in_clusters: on the CPU --------------------------------------------------------------


def _nearest_in_clusters_fake(
    queries: Tensor,
    bank: list[Tensor],
    stretch: float,
    *groups: Any,
    k: int | None = None,
    appended: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _found_fake(queries, bank[0], groups, k, appended)


def _nearest_in_clusters(
    queries: Tensor,
    bank: list[Tensor],
    stretch: float,
    *groups: Any,
    k: int | None = None,
    appended: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    together = _checked(queries, bank[0], groups, k, appended)
    check_finite_rows("queries", queries)
    found = Found.nothing(queries, k)
    search_clusters(found, queries, ClusterArrays(*bank), stretch, together)
    _search_appended(found, queries, appended, len(bank[0]), together)
    return found.finish(k)


define_op(
    f"nearest_in_clusters(Tensor queries, Tensor[] bank, float stretch, {_GROUPS}, *, {_OPTIONS})"
    f" -> {_FOUND}",
    _nearest_in_clusters,
    _nearest_in_clusters_fake,
    devices=("CPU",),
)


# --- nearest_in_segments: clusters on a GPU -------------------------------------------------------


def _nearest_in_segments_fake(
    queries: Tensor,
    bank: list[Tensor],
    *groups: Any,
    k: int | None = None,
    appended: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _found_fake(queries, bank[0], groups, k, appended)


def _nearest_in_segments(
    queries: Tensor,
    bank: list[Tensor],
    *groups: Any,
    k: int | None = None,
    appended: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    together = _checked(queries, bank[0], groups, k, appended)
    check_finite_rows("queries", queries)
    found = Found.nothing(queries, k)
    search_segments(found, queries, SegmentArrays(*bank), together)
    _search_appended(found, queries, appended, len(bank[0]), together)
    return found.finish(k)


define_op(
    f"nearest_in_segments(Tensor queries, Tensor[] bank, {_GROUPS}, *, {_OPTIONS}) -> {_FOUND}",
    _nearest_in_segments,
    _nearest_in_segments_fake,
)


# --- public functions -----------------------------------------------------------------------------


def nearest(
    queries: Tensor | FloatArray,
    bank: Tensor | FloatArray,
    *,
    k: int | None = None,
    exclude_same_group: tuple[Tensor | IntArray, Tensor | IntArray] | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact L2 distance from each query to its nearest bank row, and that row's index.

    queries: [Q, D] float32.
    bank: [M, D] float32 or float16, M >= 1, on the same device. Queries and bank are tensors, NumPy
        arrays, or arrays of another library with DLPack (CuPy).
    k: how many neighbours to find, 1 to 32; None: one, and no axis for it in the results.
    exclude_same_group: the groups of the queries [Q] and of the bank rows [M], int64; a query
        cannot match rows of its own group.
    progress: called now and then with the share done, 0 to 1 (only on the CPU).

    Returns distances [Q] float32 and indices [Q] int64, the lowest index on ties; infinity and -1
    where every row is excluded. With k, both are [Q, k]: neighbours by ascending distance, equally
    near ones by index, and infinity and -1 beyond the rows that a query may match. They are NumPy
    arrays if `queries` is one, else tensors. The result is that of the canonical distance (see
    `reference.canonical_squared_distances`), bit for bit, on every backend. Not differentiable.
    Raises ValueError for wrong shapes and values, naming the first row that holds NaN or infinity;
    TypeError for wrong dtypes; KeyboardInterrupt within a fraction of a second of Ctrl-C (on the
    CPU).

    Can be captured in a CUDA graph. Values cannot be checked then: a query that holds NaN gets the
    distance NaN instead of an error, and a bank row that holds NaN is never the nearest.
    """
    if exclude_same_group is not None and len(exclude_same_group) != 2:
        raise ValueError(
            "exclude_same_group must hold the groups of the queries and of the bank, "
            f"got {len(exclude_same_group)} items"
        )
    # Detached: a distance that says it has a gradient would have none.
    query_tensor = as_tensor("queries", queries).detach()
    bank_tensor = as_tensor("bank", bank).detach()
    query_groups, bank_groups = (
        (None, None)
        if exclude_same_group is None
        else map(as_tensor, ("query_groups", "bank_groups"), exclude_same_group)
    )
    with _reporting(progress):
        found = torch.ops.patchsvdd_fast.nearest(
            query_tensor, bank_tensor, query_groups, bank_groups, k=as_neighbours(k)
        )
    return like_input(queries, *found)


def as_neighbours(k: int | None) -> int | None:
    """A number of neighbours, checked: TypeError for what is no integer, ValueError if too many."""
    return None if k is None else check_int("k", k, 1, MOST_NEIGHBOURS)


def nearest_in_bank(
    queries: Tensor,
    bank: Tensor | ClusterArrays | SegmentArrays,
    stretch: float = 1.0,
    groups: Groups = NO_GROUPS,
    progress: Callable[[float], None] | None = None,
    *,
    k: int | None = None,
    appended: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `nearest`, in a plain bank [M, D], one clustered on the CPU, or one clustered on a GPU.

    queries: [Q, D] float32. bank: finite, which is not checked. stretch: for a bank clustered on
    the CPU, an upper bound on the norm of its projection. appended: [T, D], more rows of the bank,
    whose numbers follow; also finite.
    """
    op = torch.ops.patchsvdd_fast
    options = {"k": k, "appended": appended}
    with _reporting(progress):
        if isinstance(bank, Tensor):
            return op.nearest(queries, bank, *groups, **options, bank_is_finite=True)
        if isinstance(bank, SegmentArrays):
            return op.nearest_in_segments(queries, list(bank), *groups, **options)
        return op.nearest_in_clusters(queries, list(bank), stretch, *groups, **options)


@contextlib.contextmanager
def _calling_back(progress: Callable[[float], None]) -> Iterator[None]:
    before = _native.cpu.set_progress(progress)
    try:
        yield
    finally:
        _native.cpu.set_progress(before)


def _reporting(progress: Callable[[float], None] | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if progress is None else _calling_back(progress)
