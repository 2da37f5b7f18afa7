"""A bank whose rows lie in several processes, searched as exactly as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from ..ops.checks import FloatArray, IntArray, as_vectors, check_finite_rows, like_input
from ..ops.search import as_neighbours
from ..ops.search_kernels import NO_ROW, Found
from .bank import NormalBank
from .index import asked

_MOST_PACKED = 2**32 - 1  # rows, whose numbers fit into 64 bits beside a squared distance


class _Part(NamedTuple):
    """What one process holds, as it tells the others."""

    error: str = ""
    shape: tuple[int, ...] = ()
    """Of its embeddings."""
    device: str = ""
    has_groups: bool = False

    @property
    def form(self) -> tuple[Any, ...]:
        """What must be the same in all processes."""
        return self.shape[1:], self.device, self.has_groups


class ShardedBank:
    """The rows of all processes of a group, each of which holds a part and searches it.

    Made, and searched, by all processes at once. Rows are numbered process by process, and within
    each in the order given: answers have the bits of one `NormalBank` of all rows. For each query
    the processes exchange eight bytes (16 with 2^32 rows or more, 12 k with `k`), however long
    embeddings are.

    embeddings: those of this process, as of `NormalBank`; or none, with a first axis of 0. Grid, D
        and kind of device are the same in all processes.
    groups: as of `NormalBank`, in all processes or in none. By default each image (or row) is its
        own group, numbered from 0 over all processes.
    process_group: of torch.distributed; None: the default one.
    options: as of `NormalBank`, the same in all processes; each clusters its own rows.

    Raises ValueError, in all processes, if one part is no bank, if parts do not fit together or all
    are empty; RuntimeError without processes of torch.distributed.
    """

    def __init__(
        self,
        embeddings: Tensor | FloatArray,
        *,
        groups: Tensor | IntArray | None = None,
        process_group: ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                "a ShardedBank needs processes of torch.distributed, such as torchrun starts"
            )
        self._process_group = process_group
        parts = self._told(_part_of(embeddings, groups is not None))
        _check_parts(parts)
        self._counts = [part.shape[0] for part in parts]  # of images, by process
        first = sum(self._counts[: distributed.get_rank(process_group)])
        own = as_vectors("embeddings", embeddings, halves=True)
        self._dim, grid = own.shape[-1], own.shape[1:-1]
        self._grid: tuple[int, int] = (grid[0], grid[1]) if grid else (1, 1)
        self._first_row = first * self._grid[0] * self._grid[1]
        self._device = own.device
        self._bank: NormalBank | None = None
        error = ""
        try:
            if len(own):
                numbered = torch.arange(first, first + len(own), device=own.device)
                given = numbered if groups is None else groups
                self._bank = NormalBank(own, groups=given, **options)
        except (ValueError, TypeError) as failed:
            error = str(failed)
        _raise_first([part.error for part in self._told(_Part(error))])
        self._metric = options.get("metric", "euclidean")

    def _told(self, part: _Part) -> list[_Part]:
        """What every process tells, by rank."""
        told: list[Any] = [None] * distributed.get_world_size(self._process_group)
        distributed.all_gather_object(told, part, group=self._process_group)
        return told

    def __len__(self) -> int:
        return sum(self._counts) * self._grid[0] * self._grid[1]

    def __repr__(self) -> str:
        own = "no rows" if self._bank is None else repr(self._bank)
        shape = f"{len(self):,} x {self._dim}"
        return f"ShardedBank({shape}, in {len(self._counts)} processes, here {own})"

    @property
    def dim(self) -> int:
        """D, the length of an embedding."""
        return self._dim

    @property
    def grid(self) -> tuple[int, int]:
        """Rows I and columns J of patches per image; (1, 1) for embeddings [M, D]."""
        return self._grid

    @property
    def device(self) -> torch.device:
        """Where the rows of this process lie and are searched."""
        return self._device

    @property
    def own(self) -> NormalBank | None:
        """The part that this process holds; its rows are numbered from 0. None: it holds none."""
        return self._bank

    def nearest(
        self,
        queries: Tensor | FloatArray,
        *,
        k: int | None = None,
        exclude_same_group: Tensor | IntArray | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `NormalBank.nearest`, over the rows of all processes.

        All processes pass the same queries, and get the same answer. Raises ValueError, in all
        processes, for queries that are not the same in all or do not fit, and what
        `NormalBank.nearest` raises.
        """
        k = as_neighbours(k)
        error, found, flat, shape = "", None, torch.empty(0), torch.Size()
        try:
            flat, shape, own_groups = self._asked(queries, exclude_same_group)
            found = self._found_here(flat, own_groups, k)
        except (ValueError, TypeError) as failed:
            error = str(failed)
        self._agree_on(error, flat)
        assert found is not None
        best = self._best_of_all(found) if k is None else self._best_k_of_all(found, k)
        distances, rows = best.finish(k, self._metric == "cosine")
        wanted = shape if k is None else (*shape, k)
        return like_input(queries, distances.view(wanted), rows.view(wanted))

    def _asked(
        self, queries: Any, exclude_same_group: Any
    ) -> tuple[Tensor, torch.Size, Tensor | None]:
        """As `Index.asked`, also without rows."""
        if self._bank is not None:
            return self._bank._index.asked(queries, exclude_same_group)
        return asked(queries, exclude_same_group, self._dim, self._metric)

    def _found_here(self, queries: Tensor, groups: Tensor | None, k: int | None) -> Found:
        """What this process finds for queries [Q, D], with the row numbers of all."""
        if self._bank is None:
            check_finite_rows("queries", queries)
            return Found.nothing(queries, k)
        squared, rows = self._bank._index.nearest(queries, groups, k, None, finished=False)
        rows = torch.where(rows < len(self._bank), rows + self._first_row, rows)
        return Found(squared.view(len(queries), -1), rows.view(len(queries), -1))

    def _agree_on(self, error: str, queries: Tensor) -> None:
        """Raise the error of any process in all; and one if queries [Q, D] are not the same."""
        bits = int(queries.contiguous().view(torch.int32).sum(dtype=torch.int64))
        own = torch.tensor([bool(error), len(queries), bits], device=self._device)
        told = [torch.empty_like(own) for _ in self._counts]
        distributed.all_gather(told, own, group=self._process_group)
        seen = torch.stack(told).cpu()
        if seen[:, 0].any():
            _raise_first([part.error for part in self._told(_Part(error))])
        if (seen != seen[0]).any():
            raise ValueError("all processes must search for the same queries, but theirs differ")

    def _best_of_all(self, found: Found) -> Found:
        """The nearest of all processes: least squared distance, then lowest row."""
        # Floats that are not negative have the order of their bits, read as an integer.
        bits = found.squared.contiguous().view(torch.int32).long()
        if len(self) < _MOST_PACKED:
            packed = (bits << 32) | found.rows.clamp(max=_MOST_PACKED)
            self._least(packed)
            bits, low = packed >> 32, packed & _MOST_PACKED
            rows = torch.where(low == _MOST_PACKED, torch.full_like(low, NO_ROW), low)
        else:
            least = bits.clone()
            self._least(least)
            rows = torch.where(bits == least, found.rows, torch.full_like(found.rows, NO_ROW))
            self._least(rows)
            bits = least
        return Found(bits.int().view(torch.float32), rows)

    def _least(self, values: Tensor) -> None:
        """Replace values by their minimum over all processes."""
        distributed.all_reduce(values, distributed.ReduceOp.MIN, group=self._process_group)

    def _best_k_of_all(self, found: Found, k: int) -> Found:
        """The k nearest of all processes, ascending by squared distance, then by row."""
        count = len(self._counts)
        squared = [torch.empty_like(found.squared) for _ in range(count)]
        rows = [torch.empty_like(found.rows) for _ in range(count)]
        distributed.all_gather(squared, found.squared.contiguous(), group=self._process_group)
        distributed.all_gather(rows, found.rows.contiguous(), group=self._process_group)
        all_squared, all_rows = torch.cat(squared, dim=1), torch.cat(rows, dim=1)
        order = all_rows.argsort(dim=1)
        by_distance = all_squared.gather(1, order).argsort(dim=1, stable=True)
        order = order.gather(1, by_distance)[:, :k]
        return Found(
            all_squared.gather(1, order).contiguous(), all_rows.gather(1, order).contiguous()
        )


def _part_of(embeddings: Any, has_groups: bool) -> _Part:
    try:
        given = as_vectors("embeddings", embeddings, halves=True)
        if given.ndim not in (2, 4):
            raise ValueError(
                f"embeddings must have shape [M, D] or [N, I, J, D], got {list(given.shape)}"
            )
    except (ValueError, TypeError) as failed:
        return _Part(str(failed))
    return _Part("", tuple(given.shape), given.device.type, has_groups)


def _check_parts(parts: Sequence[_Part]) -> None:
    """Raise ValueError unless the parts of all processes make up one bank."""
    _raise_first([part.error for part in parts])
    if len({part.form for part in parts}) > 1:
        theirs = "; ".join(
            f"process {rank} has {list(part.shape)} on {part.device}"
            f"{' with groups' if part.has_groups else ''}"
            for rank, part in enumerate(parts)
        )
        raise ValueError(
            "embeddings must have one shape, but for the first axis, on one kind of device, and "
            f"groups be given by all processes or by none: {theirs}"
        )
    if not any(part.shape[0] for part in parts):
        raise ValueError("all processes have empty embeddings, so there is no row to search")


def _raise_first(errors: Sequence[str]) -> None:
    """Raise ValueError for the first error of a process, by rank, that is not empty."""
    for rank, error in enumerate(errors):
        if error:
            raise ValueError(f"process {rank}: {error}")
