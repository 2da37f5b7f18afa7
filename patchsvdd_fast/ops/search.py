"""Nearest-neighbour searches as torch ops: brute force, and clustered banks of CPU and GPU.

And what the cosine distance needs beside them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native
from .backends import define_op, reporting_to
from .checks import (
    NO_GROUPS,
    FloatArray,
    Groups,
    IntArray,
    as_vectors,
    check_dtype,
    check_finite_rows,
    check_int,
    check_search,
    check_shape,
    given_groups,
    like_input,
)
from .cpu_bank import ClusterArrays
from .cpu_codes import CodedRows
from .gpu_bank import SegmentArrays
from .search_kernels import (
    MOST_NEIGHBOURS,
    Found,
    search_clusters,
    search_codes,
    search_rows,
    search_segments,
)

# Torch ops cannot take a `Groups` or an `_Options`, so they take their fields one by one.
_OPTIONS = (
    "Tensor? query_groups=None, Tensor? bank_groups=None, int rows_per_group=1, "
    "Tensor? appended=None, int? k=None, bool cosine=False, bool finished=True, "
    "Tensor? squared_so_far=None, Tensor? rows_so_far=None"
)
_FOUND = "(Tensor, Tensor)"  # distances [Q] float32 and rows [Q] int64; [Q, k] where k is given


METRICS = ("euclidean", "cosine")


def is_cosine(metric: Any) -> bool:
    """Whether the metric is "cosine"; ValueError unless it is one of `METRICS`."""
    if metric not in METRICS:
        raise ValueError(f"metric must be {' or '.join(map(repr, METRICS))}, got {metric!r}")
    return bool(metric == "cosine")


class _Options(NamedTuple):
    """What all searches take besides queries and bank."""

    query_groups: Tensor | None = None
    bank_groups: Tensor | None = None
    rows_per_group: int = 1
    appended: Tensor | None = None  # [T, D]: more rows of the bank, whose numbers follow
    k: int | None = None  # neighbours; None: one, without an axis for it
    cosine: bool = False  # half of the squared distances, instead of their roots
    finished: bool = True  # else a `Found`, for a search that goes on elsewhere
    squared_so_far: Tensor | None = None  # [Q, k] float32, of a `Found` to start from, or None
    rows_so_far: Tensor | None = None  # [Q, k] int64

    def checked_groups(self, queries: Tensor, bank: Tensor) -> Groups:
        """Check all arguments of a search (ValueError, TypeError); its groups, contiguous."""
        groups = Groups(self.query_groups, self.bank_groups, self.rows_per_group)
        groups = check_search(queries, bank, groups, self.appended)
        if self.k is not None:
            check_int("k", self.k, 1, MOST_NEIGHBOURS)
        return groups


def _nearest_in_arrays_fake(
    queries: Tensor, bank: list[Tensor], *options: Any
) -> tuple[Tensor, Tensor]:
    return _found_fake(queries, bank[0], _Options(*options))


def _found_fake(queries: Tensor, bank: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    options.checked_groups(queries, bank)
    shape = (queries.shape[0],) if options.k is None else (queries.shape[0], options.k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


def _found(
    queries: Tensor, bank: Tensor, options: _Options, search: Callable[[Found, Groups], object]
) -> tuple[Tensor, Tensor]:
    """Check, and search the rows of `bank` by `search`, then those behind it."""
    groups = options.checked_groups(queries, bank)
    check_finite_rows("queries", queries)
    found = Found.nothing(queries, options.k)
    if options.squared_so_far is not None and options.rows_so_far is not None:
        found.squared.copy_(options.squared_so_far)
        found.rows.copy_(options.rows_so_far)
    search(found, groups)
    if options.appended is not None:
        first_row = bank.shape[0]
        behind = groups.behind(first_row)  # the bank holds whole images
        search_rows(found, queries, options.appended, behind, first_row=first_row)
    if options.finished:
        return found.finish(options.k, options.cosine)
    return (found.squared[:, 0], found.rows[:, 0]) if options.k is None else (*found,)


# --- nearest: brute force -------------------------------------------------------------------------


def _nearest_fake(
    queries: Tensor, bank: Tensor, *options: Any, bank_is_finite: bool = False
) -> tuple[Tensor, Tensor]:
    return _found_fake(queries, bank, _Options(*options))


def _nearest(
    queries: Tensor, bank: Tensor, *options: Any, bank_is_finite: bool = False
) -> tuple[Tensor, Tensor]:
    # A search on the CPU sees for itself whether a bank may hold NaN or infinity.
    looks = queries.device.type == "cpu" and len(queries) > 0

    def search(found: Found, groups: Groups) -> None:
        if not (bank_is_finite or looks):
            check_finite_rows("bank", bank)
        seems_finite = search_rows(found, queries, bank, groups)
        if not (bank_is_finite or seems_finite):
            check_finite_rows("bank", bank)

    return _found(queries, bank, _Options(*options), search)


define_op(
    f"nearest(Tensor queries, Tensor bank, {_OPTIONS}, *, bool bank_is_finite=False) -> {_FOUND}",
    _nearest,
    _nearest_fake,
)


# --- nearest_in_codes: brute force with kept codes, on the CPU ------------------------------------


def _nearest_in_codes(queries: Tensor, bank: list[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    def search(found: Found, groups: Groups) -> None:
        search_codes(found, queries, CodedRows.of_tensors(bank), groups)

    return _found(queries, bank[0], _Options(*options), search)


define_op(
    f"nearest_in_codes(Tensor queries, Tensor[] bank, {_OPTIONS}) -> {_FOUND}",
    _nearest_in_codes,
    _nearest_in_arrays_fake,
    devices=("CPU",),
)


# --- nearest_in_clusters: on the CPU --------------------------------------------------------------


def _nearest_in_clusters_fake(
    queries: Tensor, bank: list[Tensor], stretch: float, *options: Any
) -> tuple[Tensor, Tensor]:
    return _found_fake(queries, bank[0], _Options(*options))


def _nearest_in_clusters(
    queries: Tensor, bank: list[Tensor], stretch: float, *options: Any
) -> tuple[Tensor, Tensor]:
    def search(found: Found, groups: Groups) -> None:
        search_clusters(found, queries, ClusterArrays(*bank), stretch, groups)

    return _found(queries, bank[0], _Options(*options), search)


define_op(
    f"nearest_in_clusters(Tensor queries, Tensor[] bank, float stretch, {_OPTIONS}) -> {_FOUND}",
    _nearest_in_clusters,
    _nearest_in_clusters_fake,
    devices=("CPU",),
)


# --- nearest_in_segments: clusters on a GPU -------------------------------------------------------


def _nearest_in_segments(
    queries: Tensor, bank: list[Tensor], *options: Any
) -> tuple[Tensor, Tensor]:
    def search(found: Found, groups: Groups) -> None:
        search_segments(found, queries, SegmentArrays(*bank), groups)

    return _found(queries, bank[0], _Options(*options), search)


define_op(
    f"nearest_in_segments(Tensor queries, Tensor[] bank, {_OPTIONS}) -> {_FOUND}",
    _nearest_in_segments,
    _nearest_in_arrays_fake,
)


# --- normalise: vectors for the cosine distance ---------------------------------------------------


def _normalise_fake(vectors: Tensor) -> Tensor:
    check_shape("vectors", vectors, "N, D")
    check_dtype("vectors", vectors, torch.float32)
    if vectors.shape[1] == 0:
        raise ValueError(f"vectors must have at least one value, got {list(vectors.shape)}")
    return torch.empty_like(vectors, memory_format=torch.contiguous_format)


def _normalise(vectors: Tensor) -> Tensor:
    _normalise_fake(vectors)
    check_finite_rows("vectors", vectors)
    values = vectors.cpu().contiguous()  # a GPU's own roots might round otherwise
    normalised = torch.empty_like(values)
    zero = _native.cpu.normalise(
        rows=values.shape[0],
        dim=values.shape[1],
        data=values.data_ptr(),
        normalised=normalised.data_ptr(),
        context=torch.get_num_threads(),
    )
    if zero >= 0:
        raise ValueError(f"vectors must have a direction, got only zeros in row {zero}")
    return normalised.to(vectors.device)


define_op("normalise(Tensor vectors) -> Tensor", _normalise, _normalise_fake)


def normalised(name: str, vectors: Tensor) -> Tensor:
    """`normalise` of a tensor [N, D] float32; errors call it `name`."""
    try:
        result: Tensor = torch.ops.patchsvdd_fast.normalise(vectors)
    except ValueError as error:
        raise ValueError(str(error).replace("vectors", name, 1)) from None
    return result


# --- under torch.vmap -----------------------------------------------------------------------------


def _over_a_batch(
    op: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any, **options: Any
) -> tuple[Any, tuple[int, int]]:
    """Search for a batch of sets of queries, as one set; of banks and groups there is no batch."""
    queries, *others = args
    if any(dim is not None for dim in torch.utils._pytree.tree_leaves(in_dims[1:])):
        raise NotImplementedError("torch.vmap can map a search over queries, not banks or groups")
    sets = queries.movedim(in_dims[0], 0)
    found = op(sets.flatten(0, 1), *others, **options)
    return tuple(t.unflatten(0, sets.shape[:2]) for t in found), (0, 0)


if hasattr(torch.library, "register_vmap"):  # from PyTorch 2.5 on
    for _name in ("nearest_in_codes", "nearest_in_clusters", "nearest_in_segments"):
        _op = getattr(torch.ops.patchsvdd_fast, _name)
        torch.library.register_vmap(
            f"patchsvdd_fast::{_name}", functools.partial(_over_a_batch, _op)
        )


# --- public functions -----------------------------------------------------------------------------


def nearest(
    queries: Tensor | FloatArray,
    bank: Tensor | FloatArray,
    *,
    k: int | None = None,
    metric: str = "euclidean",
    exclude_same_group: tuple[Tensor | IntArray, Tensor | IntArray] | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact distance from each query to its nearest bank row, and that row's index.

    queries: [Q, D] float32, or other real numbers, which are rounded to it once.
    bank: [M, D] float32 or float16, or other real numbers, M >= 1, on the same device. Queries and
        bank are tensors, NumPy arrays, arrays of another library with DLPack (CuPy), or lists.
    k: how many neighbours to find, 1 to 32; None: one, and no axis for it in the results.
    metric: "euclidean", or "cosine" for the cosine distance 1 - cos of the angle, exact in this
        sense: half of the canonical squared distance of the vectors that `normalise` makes. A GPU's
        are normalised on the CPU, so that no CUDA graph can capture it.
    exclude_same_group: the groups of the queries [Q] and of the bank rows [M], integers; a query
        cannot match rows of its own group.
    progress: called now and then with the share done, 0 to 1 (only on the CPU).

    Returns distances [Q] float32 and indices [Q] int64, the lowest index on ties; infinity and -1
    where every row is excluded. With k, both are [Q, k]: neighbours by ascending distance, equally
    near ones by index, and infinity and -1 beyond the rows that a query may match. They are NumPy
    arrays if `queries` is one or a list, else tensors. The result is that of the canonical distance
    (see `reference.canonical_squared_distances`), bit for bit, on every backend. Not
    differentiable. Raises ValueError for wrong shapes and values, naming the first row that holds
    NaN or infinity; TypeError for what are no real numbers; KeyboardInterrupt within a fraction of
    a second of Ctrl-C (on the CPU).

    Can be captured in a CUDA graph. Values cannot be checked then: a query that holds NaN gets the
    distance NaN instead of an error, and a bank row that holds NaN is never the nearest.
    """
    cosine = is_cosine(metric)
    query_tensor = as_vectors("queries", queries)
    bank_tensor = as_vectors("bank", bank, halves=not cosine)
    groups = given_groups(exclude_same_group)
    options = _Options(*groups, k=as_neighbours(k), cosine=cosine)
    if cosine:
        options.checked_groups(query_tensor, bank_tensor)
        query_tensor = normalised("queries", query_tensor)
        bank_tensor = normalised("bank", bank_tensor)
    with reporting_to(progress):
        found = torch.ops.patchsvdd_fast.nearest(query_tensor, bank_tensor, *options)
    return like_input(queries, *found)


def normalise(vectors: Tensor | FloatArray) -> Tensor:
    """Divide each vector by its norm, as the cosine distance does.

    The norm is the canonical distance to the zero vector (`nearest` says what that is), and each
    value is divided by it in float32, rounded once. Before, a power of two brings the largest
    value of a vector to [1, 2): so that the squares of values like 1e30 or 1e-30 do not overflow
    or underflow. It changes no result else: multiplying by it is exact, but for values 2^126
    times smaller than the largest, which are rounded as subnormal numbers are.

    vectors: [N, D], D >= 1, finite; real numbers as `nearest` takes them.

    Returns [N, D] float32, a NumPy array if `vectors` is one or a list. The same bits for every
    instruction set and device; those on a GPU are computed on the CPU and copied back. Not
    differentiable. Raises ValueError for a wrong shape, for NaN or infinity, and for a vector of
    zeros, which has no direction, naming its row; TypeError for what are no real numbers.
    """
    result: Tensor
    (result,) = like_input(vectors, normalised("vectors", as_vectors("vectors", vectors)))
    return result


def as_neighbours(k: int | None) -> int | None:
    """A number of neighbours, checked: TypeError for what is no integer, ValueError if too many."""
    return None if k is None else check_int("k", k, 1, MOST_NEIGHBOURS)


def nearest_in_bank(
    queries: Tensor,
    bank: Tensor | CodedRows | ClusterArrays | SegmentArrays,
    stretch: float = 1.0,
    groups: Groups = NO_GROUPS,
    progress: Callable[[float], None] | None = None,
    *,
    k: int | None = None,
    appended: Tensor | None = None,
    cosine: bool = False,
    finished: bool = True,
    so_far: Found | None = None,
) -> tuple[Tensor, Tensor]:
    """As `nearest`, in a bank [M, D], plain, with codes, or clustered on the CPU or on a GPU.

    queries: [Q, D] float32. bank: finite, which is not checked. stretch: for a bank clustered on
    the CPU, an upper bound on the norm of its projection. appended: [T, D], more rows of the bank,
    whose numbers follow; also finite. cosine: queries and bank are normalised, and distances are to
    be cosine distances. finished: False: squared distances and rows as a `Found` has them.
    so_far: of other banks, to go on from, on the CPU; with numbers that no row here has.
    """
    op = torch.ops.patchsvdd_fast
    options = _Options(*groups, appended, k, cosine, finished, *(so_far or ()))
    with reporting_to(progress):
        if isinstance(bank, Tensor):
            return op.nearest(queries, bank, *options, bank_is_finite=True)
        if isinstance(bank, SegmentArrays):
            return op.nearest_in_segments(queries, list(bank), *options)
        if isinstance(bank, CodedRows):
            return op.nearest_in_codes(queries, bank.tensors(), *options)
        return op.nearest_in_clusters(queries, list(bank), stretch, *options)
