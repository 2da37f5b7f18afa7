"""Native searches and choices of coresets, without checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native, backends
from .backends import new_workspace, pointer, reporting_to, search_method, workspace_limit
from .checks import NO_GROUPS, Groups
from .cpu_bank import ClusterArrays
from .cpu_codes import CodedRows
from .gpu_bank import SegmentArrays, as_cuda

MOST_NEIGHBOURS = 32
"""The largest k (kMostNeighbours in csrc/params.h)."""

NO_ROW = 2**63 - 1
"""In a `Found`, of no row; kNoRow in csrc/params.h."""


class Found(NamedTuple):
    """The nearest rows of each query so far: a search starts from them and improves them in place.

    So the parts of a bank are searched one after the other, each with the bounds that those before
    have found. Ascending by canonical squared distance, then by row; infinity and `NO_ROW` where
    there is none yet. Distances would not do: unequal squared distances may have equal roots.
    """

    squared: Tensor
    """[Q, k] float32: canonical squared distances."""
    rows: Tensor
    """[Q, k] int64: row numbers."""

    @classmethod
    def nothing(cls, queries: Tensor, k: int | None) -> Found:
        """Nothing yet, for queries [Q, D]."""
        shape = (queries.shape[0], k or 1)
        return cls(
            queries.new_full(shape, torch.inf),
            torch.full(shape, NO_ROW, dtype=torch.int64, device=queries.device),
        )

    def shifted(self, by: int) -> Found:
        """With row numbers that are higher by so much."""
        return self._replace(rows=self.rows.where(self.rows == NO_ROW, self.rows + by))

    def finish(self, k: int | None, cosine: bool = False) -> tuple[Tensor, Tensor]:
        """Distances and rows, [Q] if k is None, else [Q, k]; this must not be used afterwards.

        cosine: distances are half of the squared ones, instead of their roots.
        """
        with backends.backend_of(self.squared) as (backend, context):
            arrays = {
                "count": self.squared.numel(),
                "distances": self.squared.data_ptr(),
                "indices": self.rows.data_ptr(),
            }
            if not cosine:
                backend.finish_search(**arrays, context=context)
            elif self.squared.device.type == "cpu":
                _native.cpu.finish_cosine_search(**arrays, context=context)
            else:
                self.squared.mul_(0.5)
                self.rows.masked_fill_(self.rows == NO_ROW, -1)
        if k is None:
            return self.squared.view(-1), self.rows.view(-1)
        return self.squared, self.rows


def _pointers(found: Found, queries: Tensor, groups: Groups) -> dict[str, int]:
    """What every native search takes; the arguments, contiguous, must outlive the call."""
    return {
        "queries": len(queries),
        "query_data": queries.data_ptr(),
        "query_groups": pointer(groups.of_queries),
        "bank_groups": pointer(groups.of_bank),
        "rows_per_group": groups.rows_per_group,
        "squared": found.squared.data_ptr(),
        "indices": found.rows.data_ptr(),
    }


def search_rows(
    found: Found,
    queries: Tensor,
    bank: Tensor,
    groups: Groups = NO_GROUPS,
    *,
    first_row: int = 0,
    ids: Tensor | None = None,
) -> bool:
    """Search all rows of a bank [M, D] without checking them; groups are contiguous.

    first_row: the number of the first row, in `found`. ids: [M] int64, the number of each row, in
    any order, instead; groups go by numbers then, too.

    Returns whether the bank is certainly finite, as far as was seen (a GPU does not look).
    """
    queries, bank = queries.contiguous(), bank.contiguous()
    rows, dim = bank.shape
    with backends.backend_of(queries) as (backend, context):
        method = getattr(_native.SearchMethod, search_method.get().upper())
        neighbours = found.rows.shape[1]
        size = backend.nearest_workspace(
            queries=len(queries),
            rows=rows,
            dim=dim,
            method=method,
            has_groups=groups.of_queries is not None,
            neighbours=neighbours,
            limit=workspace_limit.get(),
        )
        workspace = new_workspace(queries, size)
        return backend.nearest(
            **_pointers(found, queries, groups),
            bank_rows=rows,
            dim=dim,
            bank_data=bank.data_ptr(),
            bank_is_half=bank.dtype == torch.float16,
            method=method,
            neighbours=neighbours,
            ids=pointer(ids),
            first_row=first_row,
            workspace=workspace.data_ptr(),
            workspace_limit=workspace_limit.get(),
            context=context,
        )


def search_codes(
    found: Found, queries: Tensor, arrays: CodedRows, groups: Groups = NO_GROUPS
) -> None:
    """Search a bank with codes on the CPU, without checking it; groups are contiguous."""
    queries = queries.contiguous()
    _native.cpu.nearest_in_codes(
        bank=arrays.native(),
        method=getattr(_native.SearchMethod, search_method.get().upper()),
        **_pointers(found, queries, groups),
        neighbours=found.rows.shape[1],
        matches=None,
        context=torch.get_num_threads(),
    )


def search_clusters(
    found: Found,
    queries: Tensor,
    arrays: ClusterArrays,
    stretch: float,
    groups: Groups = NO_GROUPS,
) -> int:
    """Search a bank clustered on the CPU, without checking the arguments; groups are contiguous.

    Returns how many rows were looked at, over all queries.
    """
    queries = queries.contiguous()
    return _native.cpu.nearest_in_clusters(
        bank=arrays.native(stretch),
        **_pointers(found, queries, groups),
        neighbours=found.rows.shape[1],
        matches=None,
        context=torch.get_num_threads(),
    )


def search_segments(
    found: Found,
    queries: Tensor,
    arrays: SegmentArrays,
    groups: Groups = NO_GROUPS,
    visits: Tensor | None = None,
) -> None:
    """Search a bank clustered on a GPU, without checking the arguments; groups are contiguous.

    For more than one neighbour all rows are compared: its segments are made for one.

    visits: [1] int64, to which the number of visits is added: pairs of a tile of queries (see
    `visit_tile`) and a segment it looks at, those of the queries' own clusters left out.
    """
    if found.rows.shape[1] > 1:
        search_rows(found, queries, arrays.data, groups, ids=arrays.ids)
        return
    # Sorted by their nearest centroid, the queries of a tile want the same segments.
    nearest_centroid = Found.nothing(queries, None)
    search_rows(nearest_centroid, queries, arrays.centroids)
    own, order = nearest_centroid.rows.view(-1).sort(stable=True)
    centroids = torch.arange(len(arrays.centroids) + 1, device=own.device)
    own_starts = torch.searchsorted(own, centroids)
    sorted_queries = queries[order].contiguous()
    if groups.of_queries is not None:
        groups = groups._replace(of_queries=groups.of_queries[order])
    in_order = Found(found.squared[order], found.rows[order])
    with backends.backend_of(queries) as (backend, context):
        cuda = as_cuda(backend)
        bank = arrays.native(cuda)
        limit = workspace_limit.get()
        size = cuda.nearest_in_segments_workspace(bank=bank, queries=len(queries), limit=limit)
        workspace = new_workspace(queries, size)
        cuda.nearest_in_segments(
            bank=bank,
            **_pointers(in_order, sorted_queries, groups),
            own=own.data_ptr(),
            own_starts=own_starts.data_ptr(),
            workspace=workspace.data_ptr(),
            workspace_limit=limit,
            visits=pointer(visits),
            context=context,
        )
    found.squared.index_copy_(0, order, in_order.squared)
    found.rows.index_copy_(0, order, in_order.rows)


# --- coresets -------------------------------------------------------------------------------------

MOST_ROWS = 2**32 - 1
"""Row numbers have 32 bits in the keys that rows are compared by."""

_LOW = 2**32 - 1  # the lower half of a key: this less the row; the upper: a squared distance
_INFINITY = 0x7F800000  # the bits of that float32
_STEPS_AT_ONCE = 256  # on a GPU, between two looks for Ctrl-C


class Screen(NamedTuple):
    """What the CPU needs to tell from few coordinates that rows are far apart."""

    projected: Tensor
    """[M, A] float32, on the CPU: the rows on A axes, as from `cpu_bank.project`."""
    errors: Tensor
    """[M] float32: bounds on their rounding error."""
    stretch: float
    """Bound on the factor by which the projection lengthens a vector."""
    scale: float
    """What one unit of an 8-bit code of a coordinate stands for, > 0."""


Chosen = tuple[Tensor, Tensor, float]
"""Rows [count] int64 in the order chosen, their distances [count] float32, and the radius."""


def coreset_on_cpu(
    embeddings: Tensor,
    first: int,
    count: int,
    screen: Screen | None = None,
    progress: Callable[[float], None] | None = None,
) -> Chosen:
    """`reference.coreset` by the CPU's kernels, arguments unchecked.

    embeddings: [M, D] float32 or float16, finite, contiguous, on the CPU. screen: None compares
    canonically only. With `use_method("plain")` every row is compared with every choice.
    """
    rows, dim = embeddings.shape
    chosen = torch.empty(count, dtype=torch.int64, device="cpu")
    distances = torch.empty(count, dtype=torch.float32, device="cpu")
    with reporting_to(progress):
        radius = _native.cpu.coreset(
            rows=rows,
            dim=dim,
            count=count,
            first=first,
            data=embeddings.data_ptr(),
            is_half=embeddings.dtype == torch.float16,
            method=getattr(_native.SearchMethod, search_method.get().upper()),
            projected=pointer(None if screen is None else screen.projected),
            errors=pointer(None if screen is None else screen.errors),
            axes=0 if screen is None else screen.projected.shape[1],
            stretch=1.0 if screen is None else screen.stretch,
            scale=1.0 if screen is None else screen.scale,
            chosen=chosen.data_ptr(),
            distances=distances.data_ptr(),
            context=torch.get_num_threads(),
        )
    return chosen, distances, radius


def coreset_on_gpu(
    embeddings: Tensor, first: int, count: int, progress: Callable[[float], None] | None = None
) -> Chosen:
    """`reference.coreset` by the GPU's kernels, arguments unchecked.

    embeddings: [M, D] float32 or float16, finite, contiguous, on a GPU.
    """
    rows, dim = embeddings.shape
    squared = torch.full((rows,), torch.inf, dtype=torch.float32, device=embeddings.device)
    keys = torch.zeros(count + 1, dtype=torch.int64, device=embeddings.device)
    keys[0] = _INFINITY << 32 | _LOW - first
    with backends.backend_of(embeddings) as (backend, context):
        for begin in range(0, count, _STEPS_AT_ONCE):
            end = min(count, begin + _STEPS_AT_ONCE)
            as_cuda(backend).coreset_steps(
                rows=rows,
                dim=dim,
                data=embeddings.data_ptr(),
                is_half=embeddings.dtype == torch.float16,
                begin=begin,
                end=end,
                squared=squared.data_ptr(),
                keys=keys.data_ptr(),
                context=context,
            )
            keys[end].item()  # waits, so that Ctrl-C and progress are not far behind the GPU
            if progress is not None:
                progress(end / count)
    squares = (keys >> 32).int().view(torch.float32)
    # Through float64, since torch's float32 root is not always the correctly rounded one.
    distances = squares.double().sqrt().float()
    return _LOW - (keys[:count] & _LOW), distances[:count].contiguous(), float(distances[count])
