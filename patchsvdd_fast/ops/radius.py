"""All bank rows within a radius of a query, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _native
from .backends import pointer, reporting_to, search_method
from .checks import (
    NO_GROUPS,
    FloatArray,
    Groups,
    IntArray,
    as_vectors,
    check_finite_rows,
    check_int,
    check_search,
    given_groups,
    like_input,
)
from .cpu_bank import ClusterArrays
from .cpu_codes import CodedRows
from .gpu_bank import SegmentArrays
from .search import is_cosine, normalised

MOST_WITHIN = 100_000_000
"""How many rows `within` returns at most by default: 1.2 GB of distances and indices."""

_MOST_QUERIES = 2**32 - 1  # their numbers have 32 bits in csrc/cpu/matches.h
_LARGEST_INT = 2**63 - 1


class Within(NamedTuple):
    """All rows within a radius of N queries: those of query i are entries starts[i]:starts[i + 1].

    That is the compressed sparse row format (CSR) of SciPy: ``csr_matrix((distances, indices,
    starts), shape=(N, M))``. Tensors, or NumPy arrays.
    """

    starts: Tensor
    """[N + 1] int64: where each query's rows begin; the last is their total number."""
    distances: Tensor
    """[total] float32: each row's distance, ascending per query."""
    indices: Tensor
    """[total] int64: bank rows, in the order in which `nearest` finds them with `k`."""


def within(
    queries: Tensor | FloatArray,
    bank: Tensor | FloatArray,
    radius: float | Tensor | FloatArray,
    *,
    metric: str = "euclidean",
    exclude_same_group: tuple[Tensor | IntArray, Tensor | IntArray] | None = None,
    most: int | None = MOST_WITHIN,
    progress: Callable[[float], None] | None = None,
) -> Within:
    """All bank rows whose exact distance to a query is at most a radius.

    The distances are those of `nearest`, to the bit, so that all rows that are as near to a query
    as its nearest one are ``within(queries, bank, nearest(queries, bank)[0])``.

    queries, bank: [Q, D] and [M, D], as for `nearest`, but on the CPU.
    radius: one for all queries, or of each [Q]; at least 0; rounded to float32 once. Infinity is
        within it.
    metric: "euclidean" or "cosine", as for `nearest`; the radius is a distance of this kind.
    exclude_same_group: as for `nearest`.
    most: how many rows to return at most, over all queries; None: as many as there are. They take
        12 bytes each, and 28 while they are found.
    progress: called now and then with the share done, 0 to 1.

    Returns a `Within`: of each query, rows by ascending canonical squared distance, equally near
    ones by index. Its first are those that `nearest` finds with `k`. They are NumPy arrays if
    `queries` is one or a list, else tensors.

    Raises what `nearest` does; ValueError for a radius that is negative or NaN, and as soon as more
    rows than `most` are found; NotImplementedError for tensors on a GPU: copy them with `.cpu()`,
    or a NormalBank with ``bank.to("cpu")``. Not for `torch.compile` and `torch.vmap`, since nobody
    knows the size of the result before.
    """
    cosine = is_cosine(metric)
    query_tensor = as_vectors("queries", queries)
    bank_tensor = as_vectors("bank", bank, halves=not cosine)
    groups = given_groups(exclude_same_group)
    check_search(query_tensor, bank_tensor, groups)
    if cosine:
        query_tensor = normalised("queries", query_tensor)
        bank_tensor = normalised("bank", bank_tensor)
    found = within_in_bank(
        query_tensor,
        bank_tensor,
        as_radii(radius, query_tensor.shape[:1]),
        groups=groups,
        progress=progress,
        most=most,
        cosine=cosine,
        bank_is_finite=cosine,
    )
    return Within(*like_input(queries, *found))


def as_radii(radius: Any, shape: torch.Size) -> Tensor:
    """Radii [Q] float32 on the CPU, from one or one per query of this shape; checked."""
    is_number = isinstance(radius, int | float | np.number) and not isinstance(radius, bool)
    given = as_vectors("radius", np.array(radius) if is_number else radius).cpu()
    if is_number or given.ndim == 0:
        given = given.reshape(()).expand(shape)
    if given.shape != shape:
        raise ValueError(
            f"radius must be one number or have shape {list(shape)} to match the queries, "
            f"got {list(given.shape)}"
        )
    radii = given.flatten()
    bad = ~(radii >= 0)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(f"radius must be at least 0, got {float(radii[first])} for query {first}")
    return radii.contiguous()


def within_in_bank(
    queries: Tensor,
    bank: Tensor | CodedRows | ClusterArrays | SegmentArrays,
    radii: Tensor,
    stretch: float = 1.0,
    groups: Groups = NO_GROUPS,
    progress: Callable[[float], None] | None = None,
    *,
    appended: Tensor | None = None,
    most: int | None = MOST_WITHIN,
    cosine: bool = False,
    bank_is_finite: bool = True,
) -> Within:
    """As `within`, in a bank [M, D], plain, with codes, or clustered on the CPU.

    queries: [Q, D] float32. radii: [Q], from `as_radii`. stretch, appended: as for
    `search.nearest_in_bank`. cosine: queries and bank are normalised. bank_is_finite: it is known
    to be.
    """
    data = bank if isinstance(bank, Tensor) else bank.data
    if queries.device.type != "cpu" or data.device.type != "cpu":
        raise NotImplementedError(
            f"within searches on the CPU only, got {queries.device} and {data.device}: "
            'use tensors there, or bank.to("cpu")'
        )
    groups = check_search(queries, data, groups, appended)
    check_finite_rows("queries", queries)
    most = _LARGEST_INT if most is None else check_int("most", most, 0, _LARGEST_INT)
    if len(queries) > _MOST_QUERIES:
        raise ValueError(f"queries must be at most {_MOST_QUERIES}, got {len(queries)}")
    queries = queries.contiguous()
    limits = torch.empty_like(radii)
    _native.cpu.squared_limits(
        count=len(radii), radii=radii.data_ptr(), is_cosine=cosine, limits=limits.data_ptr()
    )
    matches = _native.cpu.Matches(most)
    with reporting_to(progress):
        if isinstance(bank, Tensor):
            seems_finite = _search_rows(matches, queries, limits, bank, groups)
            if not bank_is_finite and not (seems_finite and len(queries)):
                check_finite_rows("bank", bank)
        else:
            _search_arrays(matches, queries, limits, bank, stretch, groups)
        if appended is not None:
            first_row = data.shape[0]
            behind = groups.behind(first_row)
            _search_rows(matches, queries, limits, appended, behind, first_row)
    return _in_order(matches, len(queries), cosine)


def _asked(queries: Tensor, groups: Groups) -> dict[str, int]:
    """What every native search takes; the arguments, contiguous, must outlive the call."""
    return {
        "queries": len(queries),
        "query_data": queries.data_ptr(),
        "query_groups": pointer(groups.of_queries),
        "bank_groups": pointer(groups.of_bank),
        "rows_per_group": groups.rows_per_group,
        "context": torch.get_num_threads(),
    }


def _search_rows(
    matches: _native.cpu.Matches,
    queries: Tensor,
    limits: Tensor,
    bank: Tensor,
    groups: Groups,
    first_row: int = 0,
) -> bool:
    """Search all rows of a bank [M, D]; first_row: the number of its first."""
    bank = bank.contiguous()
    return _native.cpu.within(
        **_asked(queries, groups),
        bank_rows=bank.shape[0],
        dim=bank.shape[1],
        bank_data=bank.data_ptr(),
        bank_is_half=bank.dtype == torch.float16,
        method=getattr(_native.SearchMethod, search_method.get().upper()),
        first_row=first_row,
        limits=limits.data_ptr(),
        matches=matches,
    )


def _search_arrays(
    matches: _native.cpu.Matches,
    queries: Tensor,
    limits: Tensor,
    bank: CodedRows | ClusterArrays | SegmentArrays,
    stretch: float,
    groups: Groups,
) -> None:
    """Search a bank with codes or clusters."""
    asked: dict[str, Any] = {
        **_asked(queries, groups),
        "neighbours": 1,
        "squared": limits.data_ptr(),
        "indices": 0,
        "matches": matches,
    }
    if isinstance(bank, CodedRows):
        method = getattr(_native.SearchMethod, search_method.get().upper())
        _native.cpu.nearest_in_codes(bank=bank.native(), method=method, **asked)
    else:
        assert isinstance(bank, ClusterArrays)
        _native.cpu.nearest_in_clusters(bank=bank.native(stretch), **asked)


def _in_order(matches: _native.cpu.Matches, queries: int, cosine: bool) -> Within:
    total = matches.total()
    found = Within(
        torch.empty(queries + 1, dtype=torch.int64, device="cpu"),
        torch.empty(total, dtype=torch.float32, device="cpu"),
        torch.empty(total, dtype=torch.int64, device="cpu"),
    )
    matches.take(
        queries=queries,
        starts=found.starts.data_ptr(),
        squared=found.distances.data_ptr(),
        ids=found.indices.data_ptr(),
        context=torch.get_num_threads(),
    )
    finish = _native.cpu.finish_cosine_search if cosine else _native.cpu.finish_search
    finish(
        count=total,
        distances=found.distances.data_ptr(),
        indices=found.indices.data_ptr(),
        context=torch.get_num_threads(),
    )
    return found
