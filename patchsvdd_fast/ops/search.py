"""Nearest-neighbour searches as torch ops: brute force, and clustered banks of CPU and GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _native, backends
from .backends import define_op, new_workspace, pointer, search_method, workspace_limit
from .checks import (
    NO_GROUPS,
    FloatArray,
    Groups,
    IntArray,
    as_tensor,
    check_finite_rows,
    check_search_operands,
    like_input,
)
from .cpu_bank import ClusterArrays
from .cpu_codes import CodedRows
from .gpu_bank import SegmentArrays, as_cuda

# Torch ops cannot take a `Groups`, so they take its fields one by one.
_GROUPS = "Tensor? query_groups=None, Tensor? bank_groups=None, int rows_per_group=1"
_FOUND = "(Tensor, Tensor)"  # distances [Q] float32 and rows [Q] int64


def _results_of(queries: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised distances [Q] float32 and rows [Q] int64."""
    count = queries.shape[0]
    return queries.new_empty(count), queries.new_empty(count, dtype=torch.int64)


def _checked(queries: Tensor, bank: Tensor, *groups: Any) -> Groups:
    """Check the arguments of a search (ValueError, TypeError); returns its groups, contiguous."""
    check_search_operands(queries, bank)
    together = Groups(*groups)
    together.check(queries, bank.shape[0])
    return together.contiguous()


# --- nearest: brute force -------------------------------------------------------------------------


def _nearest_fake(
    queries: Tensor, bank: Tensor, *groups: Any, bank_is_finite: bool = False
) -> tuple[Tensor, Tensor]:
    _checked(queries, bank, *groups)
    return _results_of(queries)


def _nearest(
    queries: Tensor, bank: Tensor, *groups: Any, bank_is_finite: bool = False
) -> tuple[Tensor, Tensor]:
    together = _checked(queries, bank, *groups)
    check_finite_rows("queries", queries)
    # A search on the CPU sees for itself whether a bank may hold NaN or infinity.
    looks = queries.device.type == "cpu" and len(queries) > 0
    bank = bank.contiguous()
    if not (bank_is_finite or looks):
        check_finite_rows("bank", bank)
    distances, indices, seems_finite = _search_rows(queries, bank, together)
    if not (bank_is_finite or seems_finite):
        check_finite_rows("bank", bank)
    return distances, indices


def _search_rows(
    queries: Tensor,
    bank: Tensor,
    groups: Groups = NO_GROUPS,
) -> tuple[Tensor, Tensor, bool]:
    """`_nearest` without its checks; that for NaN would have to wait for a GPU.

    Returns distances, rows, and whether the bank is certainly finite (true on a GPU, which does not
    look).
    """
    distances, indices = _results_of(queries)
    queries, bank = queries.contiguous(), bank.contiguous()
    rows, dim = bank.shape
    with backends.backend_of(queries) as (backend, context):
        method = getattr(_native.SearchMethod, search_method.get().upper())
        size = backend.nearest_workspace(
            queries=len(queries),
            rows=rows,
            dim=dim,
            method=method,
            has_groups=groups.of_queries is not None,
            limit=workspace_limit.get(),
        )
        workspace = new_workspace(queries, size)
        seems_finite = backend.nearest(
            queries=len(queries),
            bank_rows=rows,
            dim=dim,
            query_data=queries.data_ptr(),
            bank_data=bank.data_ptr(),
            bank_is_half=bank.dtype == torch.float16,
            method=method,
            query_groups=pointer(groups.of_queries),
            bank_groups=pointer(groups.of_bank),
            rows_per_group=groups.rows_per_group,
            distances=distances.data_ptr(),
            indices=indices.data_ptr(),
            workspace=workspace.data_ptr(),
            workspace_limit=workspace_limit.get(),
            context=context,
        )
    return distances, indices, seems_finite


define_op(
    f"nearest(Tensor queries, Tensor bank, {_GROUPS}, *, bool bank_is_finite=False) -> {_FOUND}",
    _nearest,
    _nearest_fake,
)


# --- nearest_in_codes: brute force with kept codes, on the CPU ------------------------------------


def _nearest_in_codes_fake(
    queries: Tensor, bank: list[Tensor], *groups: Any
) -> tuple[Tensor, Tensor]:
    return _nearest_fake(queries, bank[0], *groups)


def _nearest_in_codes(queries: Tensor, bank: list[Tensor], *groups: Any) -> tuple[Tensor, Tensor]:
    together = _checked(queries, bank[0], *groups)
    check_finite_rows("queries", queries)
    distances, indices = _results_of(queries)
    queries = queries.contiguous()
    arrays = CodedRows(*bank)
    _native.cpu.nearest_in_codes(
        bank=arrays.native(),
        method=getattr(_native.SearchMethod, search_method.get().upper()),
        queries=len(queries),
        query_data=queries.data_ptr(),
        query_groups=pointer(together.of_queries),
        bank_groups=pointer(together.of_bank),
        rows_per_group=together.rows_per_group,
        distances=distances.data_ptr(),
        indices=indices.data_ptr(),
        context=torch.get_num_threads(),
    )
    return distances, indices


define_op(
    f"nearest_in_codes(Tensor queries, Tensor[] bank, {_GROUPS}) -> {_FOUND}",
    _nearest_in_codes,
    _nearest_in_codes_fake,
    devices=("CPU",),
)


# --- nearest_in_clusters: on the CPU --------------------------------------------------------------


def _nearest_in_clusters_fake(
    queries: Tensor, bank: list[Tensor], stretch: float, *groups: Any
) -> tuple[Tensor, Tensor]:
    return _nearest_fake(queries, bank[0], *groups)


def _nearest_in_clusters(
    queries: Tensor, bank: list[Tensor], stretch: float, *groups: Any
) -> tuple[Tensor, Tensor]:
    together = _checked(queries, bank[0], *groups)
    check_finite_rows("queries", queries)
    return search_clusters(queries, ClusterArrays(*bank), stretch, together)[:2]


def search_clusters(
    queries: Tensor, arrays: ClusterArrays, stretch: float, groups: Groups = NO_GROUPS
) -> tuple[Tensor, Tensor, int]:
    """Search a bank clustered on the CPU, without checking the arguments; groups are contiguous.

    Returns distances [Q], rows [Q], and how many rows were looked at, over all queries.
    """
    distances, indices = _results_of(queries)
    queries = queries.contiguous()
    looked_at = _native.cpu.nearest_in_clusters(
        bank=arrays.native(stretch),
        queries=len(queries),
        query_data=queries.data_ptr(),
        query_groups=pointer(groups.of_queries),
        bank_groups=pointer(groups.of_bank),
        rows_per_group=groups.rows_per_group,
        distances=distances.data_ptr(),
        indices=indices.data_ptr(),
        context=torch.get_num_threads(),
    )
    return distances, indices, looked_at


define_op(
    f"nearest_in_clusters(Tensor queries, Tensor[] bank, float stretch, {_GROUPS}) -> {_FOUND}",
    _nearest_in_clusters,
    _nearest_in_clusters_fake,
    devices=("CPU",),
)


# --- nearest_in_segments: clusters on a GPU -------------------------------------------------------


def _nearest_in_segments_fake(
    queries: Tensor, bank: list[Tensor], *groups: Any
) -> tuple[Tensor, Tensor]:
    return _nearest_fake(queries, bank[0], *groups)


def _nearest_in_segments(
    queries: Tensor, bank: list[Tensor], *groups: Any
) -> tuple[Tensor, Tensor]:
    together = _checked(queries, bank[0], *groups)
    check_finite_rows("queries", queries)
    return search_segments(queries, SegmentArrays(*bank), together)


def search_segments(
    queries: Tensor,
    arrays: SegmentArrays,
    groups: Groups = NO_GROUPS,
    visits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Search a bank clustered on a GPU, without checking the arguments; groups are contiguous.

    visits: [1] int64, to which the number of visits is added: pairs of a tile of queries (see
    `visit_tile`) and a segment it looks at, those of the queries' own clusters left out.
    """
    # Sorted by their nearest centroid, the queries of a tile want the same segments.
    _, own, _ = _search_rows(queries, arrays.centroids)
    own, order = own.sort(stable=True)
    centroids = torch.arange(len(arrays.centroids) + 1, device=own.device)
    own_starts = torch.searchsorted(own, centroids)
    sorted_queries = queries[order].contiguous()
    sorted_groups = None if groups.of_queries is None else groups.of_queries[order]
    distances, indices = _results_of(queries)
    with backends.backend_of(queries) as (backend, context):
        cuda = as_cuda(backend)
        bank = arrays.native(cuda)
        limit = workspace_limit.get()
        size = cuda.nearest_in_segments_workspace(bank=bank, queries=len(queries), limit=limit)
        workspace = new_workspace(queries, size)
        cuda.nearest_in_segments(
            bank=bank,
            queries=len(queries),
            query_data=sorted_queries.data_ptr(),
            own=own.data_ptr(),
            own_starts=own_starts.data_ptr(),
            query_groups=pointer(sorted_groups),
            bank_groups=pointer(groups.of_bank),
            rows_per_group=groups.rows_per_group,
            distances=distances.data_ptr(),
            indices=indices.data_ptr(),
            workspace=workspace.data_ptr(),
            workspace_limit=limit,
            visits=pointer(visits),
            context=context,
        )
    return (
        torch.empty_like(distances).index_copy_(0, order, distances),
        torch.empty_like(indices).index_copy_(0, order, indices),
    )


define_op(
    f"nearest_in_segments(Tensor queries, Tensor[] bank, {_GROUPS}) -> {_FOUND}",
    _nearest_in_segments,
    _nearest_in_segments_fake,
)


# --- public functions -----------------------------------------------------------------------------


def nearest(
    queries: Tensor | FloatArray,
    bank: Tensor | FloatArray,
    *,
    exclude_same_group: tuple[Tensor | IntArray, Tensor | IntArray] | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact L2 distance from each query to its nearest bank row, and that row's index.

    queries: [Q, D] float32.
    bank: [M, D] float32 or float16, M >= 1, on the same device. Queries and bank are tensors, NumPy
        arrays, or arrays of another library with DLPack (CuPy).
    exclude_same_group: the groups of the queries [Q] and of the bank rows [M], int64; a query
        cannot match rows of its own group.
    progress: called now and then with the share done, 0 to 1 (only on the CPU).

    Returns distances [Q] float32 and indices [Q] int64, the lowest index on ties; infinity and -1
    where every row is excluded. They are NumPy arrays if `queries` is one, else tensors. The result
    is that of the canonical distance (see `reference.canonical_squared_distances`), bit for bit, on
    every backend. Not differentiable. Raises ValueError for wrong shapes and values, naming the
    first row that holds NaN or infinity; TypeError for wrong dtypes; KeyboardInterrupt within a
    fraction of a second of Ctrl-C (on the CPU).

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
            query_tensor, bank_tensor, query_groups, bank_groups
        )
    return like_input(queries, *found)


def nearest_in_bank(
    queries: Tensor,
    bank: Tensor | CodedRows | ClusterArrays | SegmentArrays,
    stretch: float = 1.0,
    groups: Groups = NO_GROUPS,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `nearest`, in a bank [M, D], plain, with codes, or clustered on the CPU or on a GPU.

    queries: [Q, D] float32. bank: finite, which is not checked. stretch: for a bank clustered on
    the CPU, an upper bound on the norm of its projection.
    """
    op = torch.ops.patchsvdd_fast
    with _reporting(progress):
        if isinstance(bank, Tensor):
            return op.nearest(queries, bank, *groups, bank_is_finite=True)
        if isinstance(bank, SegmentArrays):
            return op.nearest_in_segments(queries, list(bank), *groups)
        if isinstance(bank, CodedRows):
            return op.nearest_in_codes(queries, list(bank), *groups)
        return op.nearest_in_clusters(queries, list(bank), stretch, *groups)


@contextlib.contextmanager
def _calling_back(progress: Callable[[float], None]) -> Iterator[None]:
    before = _native.cpu.set_progress(progress)
    try:
        yield
    finally:
        _native.cpu.set_progress(before)


def _reporting(progress: Callable[[float], None] | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if progress is None else _calling_back(progress)
