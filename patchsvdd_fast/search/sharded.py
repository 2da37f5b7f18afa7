"""A bank whose rows lie in several parts, in one process or many, searched as exactly as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..ops.checks import (
    FloatArray,
    IntArray,
    as_embeddings,
    as_numbers,
    check_finite_rows,
    like_input,
)
from ..ops.search import as_neighbours
from ..ops.search_kernels import Found
from .bank import NormalBank
from .index import as_queries
from .processes import Processes, nearest_of

_NO_MORE = -1  # queries
_LEAST_IN_TURNS = 64  # of each process: fewer take longer to pass on than they spare
_INSTEAD = {  # of what a NormalBank can do, and parts cannot together
    "coreset": "take one of each part, before `ShardedBank.of`",
    "merge": "make another of all parts, with `ShardedBank.of`",
    "remove": "remove from each part, then make another with `ShardedBank.of`",
    "to": "move each part, then make another with `ShardedBank.of`",
    "within": "ask each part",
}


class _Form(NamedTuple):
    """What must be the same in all parts of a bank."""

    grid: tuple[int, int]
    dim: int
    device: str  # its kind
    metric: str
    storage: torch.dtype


class ShardedBank:
    """The rows of all processes of a group, each of which holds parts and searches them.

    Made, searched and changed by all processes at once; or by one, without torch.distributed. Rows
    are numbered process by process, and within each in the order given: answers have the bits of
    one `NormalBank` of all rows. For each query the processes exchange eight bytes (16 with 2^32
    rows or more, 12 k with `k`), however long embeddings are.

    embeddings: those of this process, as of `NormalBank`; or none, with a first axis of 0. Grid, D
        and kind of device are the same in all processes.
    groups: as of `NormalBank`, in all processes or in none. By default each image (or row) is its
        own group, numbered from 0 over all processes.
    process_group: of torch.distributed; None: the default one.
    options: as of `NormalBank`, the same in all processes; each clusters its own rows.

    Raises ValueError, in all processes, if one part is no bank, if parts do not fit together or all
    are empty; RuntimeError if torchrun has started processes that are not a group yet.
    """

    def __init__(
        self,
        embeddings: Tensor | FloatArray,
        *,
        groups: Tensor | IntArray | None = None,
        process_group: ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        self._processes = Processes(process_group)
        self._options = options
        own, grid, error = torch.empty(0), (1, 1), ""
        try:
            own, grid = as_embeddings(embeddings)
        except (ValueError, TypeError) as failed:
            error = str(failed)
        self._check_shapes(error, own, groups is not None)
        metric = options.get("metric", "euclidean")
        storage = options.get("storage", torch.float32)
        self._form = _Form(grid, own.shape[-1], own.device.type, metric, storage)
        self._device = own.device
        self._parts: list[NormalBank] = []
        self._take_over(*self._with(own, groups, 0))

    @classmethod
    def of(
        cls, parts: Sequence[NormalBank], *, process_group: ProcessGroup | None = None
    ) -> ShardedBank:
        """The rows of banks, which each process may hold several of, or none.

        parts: of this process, such as shards that it has opened; in the order of their numbers.
            Groups are those of the banks, so one number is one group wherever it occurs.

        Raises ValueError, in all processes, if parts do not fit together or there are none.
        """
        bank = cls.__new__(cls)
        bank._processes = Processes(process_group)
        own, error = [], ""
        for part in parts:
            if not isinstance(part, NormalBank):
                error = f"parts must be NormalBanks, got {type(part).__name__}"
                break
            storage = part._index.data.dtype
            own.append(_Form(part.grid, part.dim, part.device.type, part.metric, storage))
        told = bank._processes.told((error, own))
        bank._processes.raise_first([theirs for theirs, _ in told])
        forms = {form for _, theirs in told for form in theirs}
        if not forms:
            raise ValueError("no process has a bank, so there is no row to search")
        if len(forms) > 1:
            theirs = "; ".join(sorted(map(str, forms)))
            raise ValueError(f"parts must have one form, got {theirs}")
        (bank._form,) = forms
        bank._options = {"metric": bank._form.metric, "storage": bank._form.storage}
        bank._device = parts[0].device if parts else torch.device(bank._form.device)
        bank._take_over(list(parts), "")
        return bank

    def _check_shapes(self, error: str, own: Tensor, has_groups: bool) -> None:
        """Raise ValueError unless the embeddings of all processes are parts of one bank."""
        told = self._processes.told((error, tuple(own.shape), own.device.type, has_groups))
        self._processes.raise_first([theirs[0] for theirs in told])
        if len({(shape[1:], device, groups) for _, shape, device, groups in told}) > 1:
            theirs = "; ".join(
                f"process {rank} has {list(shape)} on {device}{' with groups' if groups else ''}"
                for rank, (_, shape, device, groups) in enumerate(told)
            )
            raise ValueError(
                "embeddings must have one shape, but for the first axis, on one kind of device, "
                f"and groups be given by all processes or by none: {theirs}"
            )
        if not any(shape[0] for _, shape, _, _ in told):
            raise ValueError("all processes have empty embeddings, so there is no row to search")

    def _with(self, own: Tensor, groups: Any, first_group: int) -> tuple[list[NormalBank], str]:
        """The parts with the embeddings of this process behind; else the error.

        first_group: of all processes' new images, where no groups are given.
        """
        counts = self._processes.told(len(own))
        if not len(own):
            return self._parts, ""
        first = first_group + sum(counts[: self._processes.rank])
        numbered = torch.arange(first, first + len(own), device=own.device)
        given = numbered if groups is None else groups
        try:
            if not self._parts:
                return [NormalBank(own, groups=given, **self._options)], ""
            last = NormalBank._over(self._parts[-1]._index)
            last.add(own, given)
        except (ValueError, TypeError) as failed:
            return self._parts, str(failed)
        return [*self._parts[:-1], last], ""

    def _take_over(self, parts: list[NormalBank], error: str) -> None:
        """Hold these parts from now on, unless any process has an error: then ValueError in all."""
        groups = [part.groups.cpu() for part in parts]
        own = torch.cat(groups) if groups else torch.empty(0, dtype=torch.int64)
        told = self._processes.told((error, sum(map(len, parts)), own))
        self._processes.raise_first([theirs[0] for theirs in told])
        rank = self._processes.rank
        self._parts = parts
        self._rows = [theirs[1] for theirs in told]  # by process
        self._first_row = sum(self._rows[:rank])
        self._first_image = sum(len(theirs[2]) for theirs in told[:rank])
        self._groups = torch.cat([theirs[2] for theirs in told]).to(self._device)

    def __len__(self) -> int:
        return sum(self._rows)

    def __repr__(self) -> str:
        own = ", ".join(map(repr, self._parts)) or "no rows"
        count = self._processes.count
        return f"ShardedBank({len(self):,} x {self.dim}, in {count} processes, here {own})"

    @property
    def dim(self) -> int:
        """D, the length of an embedding."""
        return self._form.dim

    @property
    def metric(self) -> str:
        """Of its distances: "euclidean" or "cosine"."""
        return self._form.metric

    @property
    def grid(self) -> tuple[int, int]:
        """Rows I and columns J of patches per image; (1, 1) for embeddings [M, D]."""
        return self._form.grid

    @property
    def device(self) -> torch.device:
        """Where the rows of this process lie and are searched."""
        return self._device

    @property
    def groups(self) -> Tensor:
        """As of `NormalBank`, of all processes."""
        return self._groups

    @property
    def parts(self) -> tuple[NormalBank, ...]:
        """What this process holds, each numbered from 0; maybe none."""
        return tuple(self._parts)

    # --- searching --------------------------------------------------------------------------------

    def nearest(
        self,
        queries: Tensor | FloatArray,
        *,
        k: int | None = None,
        exclude_same_group: Tensor | IntArray | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `NormalBank.nearest`, over the rows of all processes.

        All processes pass the same queries, and get the same answer; `nearest_of_each` takes those
        of each. Raises ValueError, in all processes, for queries that are not the same in all or do
        not fit, and what `NormalBank.nearest` raises.
        """
        k = as_neighbours(k)
        flat, shape, groups, error = self._asked(queries, exclude_same_group)
        bits = int(flat.contiguous().view(torch.int32).sum(dtype=torch.int64))
        seen = self._processes.agreed(self._device, error, len(flat), bits)
        if (seen != seen[0]).any():
            raise ValueError("all processes must search for the same queries, but theirs differ")
        distances, rows = self._found(flat, groups, k).finish(k, self.metric == "cosine")
        wanted = shape if k is None else (*shape, k)
        return like_input(queries, distances.view(wanted), rows.view(wanted))

    def nearest_of_each(
        self,
        queries: Tensor | FloatArray | None,
        *,
        k: int | None = None,
        exclude_same_group: Tensor | IntArray | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """As `NormalBank.nearest`, over the rows of all processes, for each one's own queries.

        queries: [..., D], any number of them; None from a process that has no more, which still has
            to take part while others have some.
        exclude_same_group: given by all that pass queries, or by none.

        Returns the answers to the queries of this process, for None those to no query; and None, in
        all processes, once all of them pass None. So a process with batches of its own does::

            while (found := bank.nearest_of_each(next(batches, None))) is not None: ...

        Raises ValueError, in all processes, if queries of one do not fit or k differs.
        """
        k = as_neighbours(k)
        given = torch.empty(0, self.dim, device=self._device) if queries is None else queries
        flat, shape, groups, error = self._asked(given, exclude_same_group)
        count = _NO_MORE if queries is None else len(flat)
        seen = self._processes.agreed(self._device, error, count, k or 0, groups is not None)
        if (seen[:, 0] == _NO_MORE).all():
            return None
        asking = seen[seen[:, 0] > 0, 1:]
        if len(asking) and (asking != asking[0]).any():
            raise ValueError("all processes must give the same k, and groups in all or in none")
        counts = seen[:, 0].clamp(min=0).tolist()
        everything = torch.cat(self._processes.gathered_rows(flat, counts))
        if len(asking) and asking[0, 1]:
            given_groups = everything.new_empty(0).long() if groups is None else groups
            groups = torch.cat(self._processes.gathered_rows(given_groups, counts))
        else:
            groups = None
        k_of_all = int(asking[0, 0]) or None if len(asking) else k
        found = self._found(everything, groups, k_of_all)
        first = sum(counts[: self._processes.rank])
        own = Found(*(each[first:][: len(flat)].contiguous() for each in found))
        distances, rows = own.finish(k_of_all, self.metric == "cosine")
        wanted = shape if k_of_all is None else (*shape, k_of_all)
        return like_input(given, distances.view(wanted), rows.view(wanted))

    def _asked(
        self, queries: Any, exclude_same_group: Any
    ) -> tuple[Tensor, torch.Size, Tensor | None, str]:
        """As `as_queries`, with what is wrong with them, if anything is."""
        try:
            asked = as_queries(queries, exclude_same_group, self.dim, self.metric)
            check_finite_rows("queries", asked[0])
            for part in self._parts:
                part._index.check_file()
        except (ValueError, TypeError, OSError) as failed:
            return torch.empty(0, self.dim), torch.Size(), None, str(failed)
        return *asked, ""

    def _found(self, queries: Tensor, groups: Tensor | None, k: int | None) -> Found:
        """The nearest of all processes to queries [Q, D], the same in all."""

        def search(some: slice, found: Found) -> Found:
            own = None if groups is None else groups[some]
            return self._found_here(queries[some], own, k, found)

        nothing, group = Found.nothing(queries, k), self._processes
        if queries.device.type == "cpu" and len(queries) >= _LEAST_IN_TURNS * group.count:
            return group.nearest_in_turns(search, nothing, len(self))
        return group.nearest_of_all(search(slice(None), nothing), k, len(self))

    def _found_here(self, queries: Tensor, groups: Tensor | None, k: Any, found: Found) -> Found:
        """What was found so far, and in the rows of this process; on a CPU the former bounds it."""
        first = self._first_row
        for part in self._parts:
            before = found.shifted(-first) if queries.device.type == "cpu" else None
            answer = part._index.nearest(queries, groups, k, None, finished=False, so_far=before)
            squared, rows = (each.view(len(queries), -1) for each in answer)
            here = Found(squared, rows).shifted(first)
            found = nearest_of([found, here]) if before is None else here
            first += len(part)
        return found

    def source(self, rows: Tensor | IntArray) -> Tensor:
        """As `NormalBank.source`, images numbered over all; each process asks for its own rows.

        Raises ValueError, in all processes, for a row that is not there.
        """

        def source_of(part: NormalBank, numbers: Tensor, first_image: int) -> Tensor:
            where = part.source(numbers)
            where[:, 0] += first_image
            return where

        numbers, found = self._of_rows(rows, -1, 3, torch.int64, source_of)
        return found.where(numbers[..., None] >= 0, -1)

    def embeddings_of(self, rows: Tensor | IntArray) -> Tensor:
        """As `NormalBank.embeddings_of`, whoever holds the rows; each asks for rows of its own."""

        def bits_of(part: NormalBank, numbers: Tensor, _: int) -> Tensor:
            return part.embeddings_of(numbers).float().view(torch.int32)

        _, bits = self._of_rows(rows, 0, self.dim, torch.int32, bits_of)
        return bits.view(torch.float32).to(self._form.storage)

    def _of_rows(
        self,
        rows: Any,
        lowest: int,
        width: int,
        dtype: torch.dtype,
        look_up: Callable[[NormalBank, Tensor, int], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Row numbers [...] and what the part that holds each has of it, [..., width] integers."""
        numbers, error = torch.empty(0, dtype=torch.int64), ""
        try:
            numbers = as_numbers("rows", rows)
            low, high = (numbers.min(), numbers.max()) if numbers.numel() else (0, 0)
            if not lowest <= low <= high < len(self):
                error = f"rows must be in [{lowest}, {len(self)}), got {rows}"
        except (ValueError, TypeError) as failed:
            error = str(failed)
        counts = self._processes.agreed(self._device, error, numbers.numel())[:, 0].tolist()
        asked = torch.cat(self._processes.gathered_rows(numbers.flatten().to(self._device), counts))
        values = torch.zeros(len(asked), width, dtype=dtype, device=self._device)
        first_row, first_image = self._first_row, self._first_image
        for part in self._parts:
            here = (asked >= first_row) & (asked < first_row + len(part))
            values[here] = look_up(part, asked[here] - first_row, first_image).to(self._device)
            first_row, first_image = first_row + len(part), first_image + len(part.groups)
        self._processes.add_up(values)  # only one process has other than 0
        first = sum(counts[: self._processes.rank])
        own = values[first : first + numbers.numel()].contiguous()
        return numbers.to(self._device), own.view(*numbers.shape, width)

    # --- changing ---------------------------------------------------------------------------------

    def add(self, embeddings: Tensor | FloatArray, groups: Tensor | IntArray | None = None) -> None:
        """Append rows of this process, maybe none, to its last part; all processes call it at once.

        Rows are numbered process by process, as ever: those of later processes get higher numbers.

        groups: as of `NormalBank.add`, in all processes or in none; by default numbered on from the
            largest of all, process by process.

        Raises ValueError in all processes, none of which has changed, if one cannot add its rows.
        """
        own, error = torch.empty(0), ""
        try:
            own, grid = as_embeddings(embeddings)
            if (own.shape[-1], grid) != (self.dim, self.grid):
                error = (
                    f"embeddings must match the bank's grid {list(self.grid)} and D = {self.dim}, "
                    f"got {list(own.shape)}"
                )
        except (ValueError, TypeError) as failed:
            error = str(failed)
        if self._processes.agreed(self._device, error, groups is None).unique().numel() > 1:
            raise ValueError("groups must be given by all processes or by none")
        self._take_over(*self._with(own, groups, int(self._groups.max()) + 1))

    def __getattr__(self, name: str) -> NoReturn:
        if name in _INSTEAD:
            raise NotImplementedError(f"a ShardedBank cannot do `{name}`: {_INSTEAD[name]}")
        raise AttributeError(f"a ShardedBank has no {name!r}")
