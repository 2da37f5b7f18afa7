"""What the processes of a torch.distributed group tell each other; also one process without any."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from ..ops.search_kernels import NO_ROW, Found

_MOST_PACKED = 2**32 - 1  # rows, whose numbers fit into 64 bits beside a squared distance

# While one process does what cannot be divided, the others wait for what all do next.
LONGEST_WAIT = timedelta(hours=6)


def share_of(total: int, number: int, count: int) -> slice:
    """Of so many things, cut into `count` shares that differ by one at most, those of `number`."""
    return slice(total * number // count, total * (number + 1) // count)


class WorkerError(RuntimeError):
    """Another process has failed, and says why itself; or has ended without a word."""


class ToldError(WorkerError):
    """Another process has failed, says why itself, and has told this one."""


@contextlib.contextmanager
def others_there() -> Iterator[None]:
    """Within the context, raise WorkerError if another process has ended meanwhile."""
    try:
        yield
    except RuntimeError as error:  # of torch.distributed: a connection was closed
        raise WorkerError("another process has ended, so this one does") from error


class Processes:
    """The processes of a group, all of which must call each method at once, but for `raise_first`.

    group: None: the default one; or this process alone where torch.distributed has none.

    Raises RuntimeError if torchrun has started several processes that are not yet a group. Methods
    raise WorkerError if another process has ended.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.count = 0, 1
        if distributed.is_available() and distributed.is_initialized():
            self.rank = distributed.get_rank(group)
            self.count = distributed.get_world_size(group)
        elif os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
            raise RuntimeError(
                f"this is one of {os.environ['WORLD_SIZE']} processes: call "
                "torch.distributed.init_process_group before a ShardedBank is made"
            )

    @classmethod
    def alone(cls) -> Processes:
        """This process alone, whatever groups it belongs to."""
        one = cls.__new__(cls)
        one.group, one.rank, one.count = None, 0, 1
        return one

    def apart(self) -> Processes:
        """The same processes in a group of its own, for a thread of its own; `end` ends it."""
        if self.count == 1:
            return self
        with others_there():
            ranks = list(range(self.count))
            if self.group is not None:
                ranks = distributed.get_process_group_ranks(self.group)
            return Processes(
                distributed.new_group(
                    ranks, LONGEST_WAIT, use_local_synchronization=self.group is not None
                )
            )

    def end(self) -> None:
        """End the group that `apart` made: others that still wait for this process hear of it."""
        group, self.group = self.group, None
        if group is not None:
            with contextlib.suppress(ValueError):  # the caller has ended all groups meanwhile
                distributed.destroy_process_group(group)

    def told(self, value: Any) -> list[Any]:
        """What every process tells, by rank."""
        if self.count == 1:
            return [value]
        told: list[Any] = [None] * self.count
        with others_there():
            distributed.all_gather_object(told, value, group=self.group)
        return told

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Within the context, which all enter, what fails in one process fails in all.

        An error is raised where it occurred, and is a ToldError in the others; the same error of
        all in the first alone.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        own = None if failure is None else str(failure) or type(failure).__name__
        told = self.told(own)
        if failure is not None and (self.rank == 0 or own != told[0]):
            raise failure
        for rank, theirs in enumerate(told):
            if theirs is not None:
                raise ToldError(f"process {rank}: {theirs}")

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor, by rank; all are of one shape and dtype."""
        if self.count == 1:
            return [tensor]
        tensors = [torch.empty_like(tensor) for _ in range(self.count)]
        with others_there():
            distributed.all_gather(tensors, tensor.contiguous(), group=self.group)
        return tensors

    def joined(self, rows: Tensor) -> Tensor:
        """The rows of every process, one after another; each may have another number of them."""
        counts = self.gathered(torch.tensor([len(rows)], device=rows.device))
        return torch.cat(self.gathered_rows(rows, [int(count) for count in counts]))

    def gathered_rows(self, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Every process's rows, of which it has so many, by rank; all else of the shape is one."""
        missing = max(counts) - len(rows)
        padded = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        gathered = self.gathered(padded)
        return [theirs[:count] for theirs, count in zip(gathered, counts, strict=True)]

    def least(self, values: Tensor) -> None:
        """Replace values by their minimum over all processes."""
        if self.count > 1:
            with others_there():
                distributed.all_reduce(values, distributed.ReduceOp.MIN, group=self.group)

    def add_up(self, values: Tensor) -> None:
        """Replace values by their sum over all processes."""
        if self.count > 1:
            with others_there():
                distributed.all_reduce(values, distributed.ReduceOp.SUM, group=self.group)

    def raise_first(self, errors: Sequence[str]) -> None:
        """Raise ValueError for the first error of a process, by rank, that is not empty."""
        for rank, error in enumerate(errors):
            if error:
                raise ValueError(f"process {rank}: {error}")

    def agreed(self, device: torch.device, error: str, *numbers: int) -> Tensor:
        """[P, ...] what every process gives; ValueError in all if there is an error in any."""
        seen = torch.stack(
            self.gathered(torch.tensor([bool(error), *numbers], device=device))
        ).cpu()
        if seen[:, 0].any():
            self.raise_first(self.told(error))
        return seen[:, 1:]

    def nearest_of_all(self, found: Found, k: int | None, rows: int) -> Found:
        """The nearest of all processes to the same queries; rows: how many rows they hold."""
        if k is None:
            return self._least_of_all(found, rows)
        squared, numbers = map(self.gathered, found)
        return nearest_of([Found(*theirs) for theirs in zip(squared, numbers, strict=True)])

    def nearest_in_turns(
        self, search: Callable[[slice, Found], Found], nothing: Found, rows: int
    ) -> Found:
        """As `nearest_of_all`, where what one process has found spares the others work.

        Each begins with another part of the queries, and passes on what it has found to the next
        one, which goes on from that, until all have searched all.

        search: makes of some queries, and what was found so far, what this process's rows add.
        nothing: for all queries. rows: how many rows all processes hold.
        """
        total = len(nothing.rows)
        parts = [share_of(total, number, self.count) for number in range(self.count)]
        found = Found(*(each[parts[self.rank]] for each in nothing))
        for turn in range(self.count):
            part = parts[(self.rank - turn) % self.count]
            if turn:
                found = self._passed_on(found, part.stop - part.start, rows)
            found = search(part, found)
        # The process of each rank has found the part of the next one.
        last = [parts[(rank + 1) % self.count] for rank in range(self.count)]
        counts = [part.stop - part.start for part in last]
        gathered = self.gathered_rows(_packed(found, rows), counts)
        return _unpacked(torch.cat([gathered[-1], *gathered[:-1]]), rows)

    def _passed_on(self, found: Found, count: int, rows: int) -> Found:
        """Gives what was found to the next process; returns what the one before gives.

        count: of how many queries that is.
        """
        given = _packed(found, rows)
        taken = given.new_empty(count, *given.shape[1:])
        following, before = ((self.rank + step) % self.count for step in (1, -1))
        if self.group is not None:
            following = distributed.get_global_rank(self.group, following)
            before = distributed.get_global_rank(self.group, before)
        with others_there():
            sending = distributed.isend(given, following, group=self.group)
            distributed.recv(taken, before, group=self.group)
            if sending is not None:
                sending.wait()
        return _unpacked(taken, rows)

    def _least_of_all(self, found: Found, rows_of_all: int) -> Found:
        """The nearest of all processes: least squared distance, then lowest row."""
        packed = _packed(found, rows_of_all)
        if packed.ndim == 2:
            self.least(packed)
            return _unpacked(packed, rows_of_all)
        bits = packed[..., 0].contiguous()
        least = bits.clone()
        self.least(least)
        rows = torch.where(bits == least, found.rows, torch.full_like(found.rows, NO_ROW))
        self.least(rows)
        return Found(least.int().view(torch.float32), rows)


def _packed(found: Found, rows: int) -> Tensor:
    """Integers that are ordered as what was found is, [Q, k]; with too many rows, pairs [Q, k, 2].

    rows: how many there are.
    """
    # Floats that are not negative have the order of their bits, read as an integer.
    bits = found.squared.contiguous().view(torch.int32).long()
    if rows < _MOST_PACKED:
        return (bits << 32) | found.rows.clamp(max=_MOST_PACKED)
    return torch.stack([bits, found.rows], dim=-1)


def _unpacked(packed: Tensor, rows: int) -> Found:
    """What `_packed` was given."""
    if rows < _MOST_PACKED:
        bits, low = packed >> 32, packed & _MOST_PACKED
        numbers = torch.where(low == _MOST_PACKED, torch.full_like(low, NO_ROW), low)
    else:
        bits, numbers = packed[..., 0], packed[..., 1].contiguous()
    return Found(bits.int().view(torch.float32), numbers)


def nearest_of(found: Sequence[Found]) -> Found:
    """The k nearest of several [Q, k], ascending by squared distance, then by row."""
    neighbours = found[0].rows.shape[1]
    squared = torch.cat([each.squared for each in found], dim=1)
    rows = torch.cat([each.rows for each in found], dim=1)
    order = rows.argsort(dim=1)
    by_distance = squared.gather(1, order).argsort(dim=1, stable=True)
    order = order.gather(1, by_distance)[:, :neighbours]
    return Found(squared.gather(1, order).contiguous(), rows.gather(1, order).contiguous())
