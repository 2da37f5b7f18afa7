"""Nearest-neighbour searches as torch ops: brute force, and clustered banks of CPU and GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _native, backends
from .backends import contiguous, define_op, new_workspace, pointer, search_method, workspace_limit
from .checks import (
    FloatArray,
    IntArray,
    as_tensor,
    check_finite_rows,
    check_groups,
    check_search_operands,
    like_input,
)
from .cpu_bank import ClusterArrays
from .gpu_bank import SegmentArrays

_GROUPS = "Tensor? query_groups=None, Tensor? bank_groups=None, int rows_per_group=1"

# --- nearest --------------------------------------------------------------------------------------


def _nearest_fake(
    queries: Tensor,
    bank: Tensor,
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
    rows_per_group: int = 1,
    bank_is_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    check_search_operands(queries, bank)
    check_groups(queries, bank.shape[0], query_groups, bank_groups, rows_per_group)
    count = queries.shape[0]
    return queries.new_empty(count), queries.new_empty(count, dtype=torch.int64)


def _nearest(
    queries: Tensor,
    bank: Tensor,
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
    rows_per_group: int = 1,
    bank_is_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    _nearest_fake(queries, bank, query_groups, bank_groups, rows_per_group)
    check_finite_rows("queries", queries)
    if not bank_is_finite:
        check_finite_rows("bank", bank)
    return _search_rows(queries, bank, query_groups, bank_groups, rows_per_group)


def _search_rows(
    queries: Tensor,
    bank: Tensor,
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
    rows_per_group: int = 1,
) -> tuple[Tensor, Tensor]:
    """`_nearest` of checked arguments: looking for NaN on a GPU waits for it."""
    count, rows = queries.shape[0], bank.shape[0]
    distances, indices = queries.new_empty(count), queries.new_empty(count, dtype=torch.int64)
    query_groups, bank_groups = contiguous(query_groups), contiguous(bank_groups)
    queries, bank = queries.contiguous(), bank.contiguous()
    with backends.backend_of(queries) as (backend, context):
        method = getattr(_native.SearchMethod, search_method.get().upper())
        size = backend.nearest_workspace(
            queries=count,
            rows=rows,
            dim=bank.shape[1],
            method=method,
            has_groups=query_groups is not None,
            limit=workspace_limit.get(),
        )
        workspace = new_workspace(queries, size)
        backend.nearest(
            queries=count,
            bank_rows=rows,
            dim=bank.shape[1],
            query_data=queries.data_ptr(),
            bank_data=bank.data_ptr(),
            bank_is_half=bank.dtype == torch.float16,
            method=method,
            query_groups=pointer(query_groups),
            bank_groups=pointer(bank_groups),
            rows_per_group=rows_per_group,
            distances=distances.data_ptr(),
            indices=indices.data_ptr(),
            workspace=workspace.data_ptr(),
            workspace_limit=workspace_limit.get(),
            context=context,
        )
    return distances, indices


define_op(
    f"nearest(Tensor queries, Tensor bank, {_GROUPS}, bool bank_is_finite=False)"
    " -> (Tensor, Tensor)",
    _nearest,
    _nearest_fake,
)


# --- nearest_in_clusters: on the CPU --------------------------------------------------------------


def _nearest_in_clusters_fake(
    queries: Tensor,
    bank: list[Tensor],
    stretch: float,
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
    rows_per_group: int = 1,
) -> tuple[Tensor, Tensor]:
    return _nearest_fake(queries, bank[0], query_groups, bank_groups, rows_per_group)


def _nearest_in_clusters(
    queries: Tensor,
    bank: list[Tensor],
    stretch: float,
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
    rows_per_group: int = 1,
) -> tuple[Tensor, Tensor]:
    distances, indices = _nearest_in_clusters_fake(
        queries, bank, stretch, query_groups, bank_groups, rows_per_group
    )
    check_finite_rows("queries", queries)
    queries = queries.contiguous()
    query_groups, bank_groups = contiguous(query_groups), contiguous(bank_groups)
    _native.cpu.nearest_in_clusters(
        bank=ClusterArrays(*bank).native(stretch),
        queries=queries.shape[0],
        query_data=queries.data_ptr(),
        query_groups=pointer(query_groups),
        bank_groups=pointer(bank_groups),
        rows_per_group=rows_per_group,
        distances=distances.data_ptr(),
        indices=indices.data_ptr(),
        context=torch.get_num_threads(),
    )
    return distances, indices


define_op(
    f"nearest_in_clusters(Tensor queries, Tensor[] bank, float stretch, {_GROUPS})"
    " -> (Tensor, Tensor)",
    _nearest_in_clusters,
    _nearest_in_clusters_fake,
    devices=("CPU",),
)


# --- nearest_in_segments: clusters on a GPU -------------------------------------------------------

SEGMENT_ROWS = 256
"""Most rows of a segment of a clustered bank on a GPU."""


def visit_tile(embeddings: Tensor) -> int:
    """Queries that look at the same segments of a bank of embeddings [M, D] there."""
    with backends.backend_of(embeddings) as (backend, _):
        return _as_cuda(backend).visit_tile(embeddings.shape[1])


def padded_code_dim(embeddings: Tensor) -> int:
    """Coordinates of the codes of embeddings [M, D] on a GPU, padding included."""
    with backends.backend_of(embeddings) as (backend, _):
        return _as_cuda(backend).padded_dim(embeddings.shape[1])


def encode_segments(arrays: SegmentArrays) -> None:
    """Fill in the codes of a bank on a GPU, and what is known of them."""
    with backends.backend_of(arrays.data) as (backend, context):
        cuda = _as_cuda(backend)
        assert cuda.SEGMENT_ROWS == SEGMENT_ROWS
        cuda.encode_segments(bank=arrays.native(cuda), context=context)


def _nearest_in_segments_fake(
    queries: Tensor,
    bank: list[Tensor],
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
    rows_per_group: int = 1,
) -> tuple[Tensor, Tensor]:
    return _nearest_fake(queries, bank[0], query_groups, bank_groups, rows_per_group)


def _nearest_in_segments(
    queries: Tensor,
    bank: list[Tensor],
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
    rows_per_group: int = 1,
) -> tuple[Tensor, Tensor]:
    _nearest_in_segments_fake(queries, bank, query_groups, bank_groups, rows_per_group)
    check_finite_rows("queries", queries)
    return search_segments(
        queries.contiguous(),
        SegmentArrays(*bank),
        contiguous(query_groups),
        contiguous(bank_groups),
        rows_per_group,
    )


def search_segments(
    queries: Tensor,
    arrays: SegmentArrays,
    query_groups: Tensor | None,
    bank_groups: Tensor | None,
    rows_per_group: int,
    visits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The nearest rows to queries [Q, D]; arguments are contiguous and checked.

    visits: [1] int64, raised by the number of pairs of a tile of queries and a segment looked at.
    """
    # Neighbours in the order of centroids want the same clusters.
    _, own = _search_rows(queries, arrays.centroids)
    own, order = own.sort(stable=True)
    centroids = torch.arange(len(arrays.centroids) + 1, device=own.device)
    own_starts = torch.searchsorted(own, centroids)
    sorted_queries = queries[order]
    sorted_groups = None if query_groups is None else query_groups[order]
    distances, indices = torch.empty_like(queries[:, 0]), torch.empty_like(own)
    with backends.backend_of(queries) as (backend, context):
        cuda = _as_cuda(backend)
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
            bank_groups=pointer(bank_groups),
            rows_per_group=rows_per_group,
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


def _as_cuda(backend: Any) -> type[_native.Cuda]:
    if backend is _native.cpu:
        raise TypeError("a bank clustered for a GPU can only be searched there")
    return backend


define_op(
    f"nearest_in_segments(Tensor queries, Tensor[] bank, {_GROUPS}) -> (Tensor, Tensor)",
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

    queries: [Q, D] float32, bank: [M, D] float32 or float16, M >= 1, same device; tensors, NumPy
    arrays, or arrays of another library with DLPack (CuPy). exclude_same_group: int64 groups of the
    queries [Q] and of the bank rows [M]; rows of a query's own group are passed over. progress:
    called now and then with the share done.

    Returns distances [Q] float32 and indices [Q] int64, the lowest on ties; infinity and -1 where
    every row is excluded; NumPy arrays if `queries` is one. The result is that of the canonical
    distance (see `reference.canonical_squared_distances`), bit for bit, on every backend. Not
    differentiable. Raises ValueError naming the first row that holds NaN or infinity;
    KeyboardInterrupt within a fraction of a second of Ctrl-C (on the CPU).

    Can be captured in a CUDA graph. Values cannot be checked then: a query that holds NaN gets the
    distance NaN instead of an error, and a bank row that holds NaN is nobody's nearest.
    """
    query_tensor, bank_tensor = as_tensor("queries", queries), as_tensor("bank", bank)
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
    bank: Tensor | ClusterArrays | SegmentArrays,
    stretch: float = 1.0,
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
    rows_per_group: int = 1,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `nearest`, in a plain bank or one made by `build_clusters` or `build_segments` (GPU).

    queries: [Q, D] float32. bank: finite, as whoever made it has checked. query_groups: [Q] int64;
    bank_groups: int64, the group of row r is entry r // rows_per_group.
    """
    op = torch.ops.patchsvdd_fast
    groups = (query_groups, bank_groups, rows_per_group)
    with _reporting(progress):
        if isinstance(bank, Tensor):
            return op.nearest(queries, bank, *groups, bank_is_finite=True)
        if isinstance(bank, SegmentArrays):
            return op.nearest_in_segments(queries, list(bank), *groups)
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
