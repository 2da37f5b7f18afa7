"""Processes that work together under torchrun: on each batch of a training, or on many images."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed

from ..search.processes import LONGEST_WAIT, Processes, WorkerError, others_there, share_of
from ..search.rounds import awaits_others, end_all_rounds

_ROUND = 8  # results that a process hands over at once

Item = TypeVar("Item")


class _Round(NamedTuple):
    """What a process hands over to the first one, some results at a time."""

    results: list[Any]
    failed: bool
    """It has failed, and says why itself."""


class Workers:
    """The processes that work together, as one of them sees them; here, this process alone."""

    rank = 0
    count = 1
    processes = Processes.alone()
    """As a bank in several processes knows them."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that reports and writes."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """The items of a batch that this process computes; shares differ by one item at most.

        Raises ValueError if there are more processes than items.
        """
        if batch < self.count:
            raise ValueError(
                f"a batch of {batch} cannot be divided over {self.count} processes: "
                "use a larger batch_size"
            )
        return share_of(batch, self.rank, self.count)

    def share_of_images(self, count: int) -> slice:
        """Those of so many training images that this process embeds, one after another.

        Raises ValueError if there are more processes than images.
        """
        if count < self.count:
            raise ValueError(f"{count} images cannot be divided over {self.count} processes")
        return share_of(count, self.rank, self.count)

    def summed(self, total: Tensor) -> Tensor:
        """The sum of the tensors of all processes, int64 of one shape on the CPU."""
        return total

    def rows_in_first(self, rows: Tensor) -> Tensor:
        """In the first process the rows of all, by rank; in others nothing of use."""
        return rows

    def in_first(self, value: Item) -> list[Item]:
        """In the first process what all tell, by rank; in others nothing of use."""
        return [value]

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace the gradient of each parameter by its sum over the processes."""

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes pass."""
        return number

    def agreed(self, number: float) -> float:
        """The number that the first process passes, for all; integers up to 2^53 stay exact."""
        return number

    def from_first(self, make: Callable[[], Item]) -> Item:
        """What `make` returns in the first process, which alone calls it, for all.

        What it raises there is a WorkerError in the others.
        """
        return make()

    def require_same(self, facts: dict[str, Any]) -> None:
        """Raise ValueError unless each process passes the same facts, values by name.

        In the first process, and a WorkerError in the others.
        """

    def together(self) -> contextlib.AbstractContextManager[None]:
        """See `Processes.together`."""
        return self.processes.together()

    def own(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items that this process handles: each `count`-th, from the one of its rank on."""
        return islice(items, self.rank, None, self.count)

    def in_order(self, results: Iterable[Item]) -> Iterator[Item]:
        """In the first process the results of all, in the order of the items; in others nothing.

        results: one for each of this process's `own` items, made as they are asked for.

        What making them raises in one process, or using them in the first, ends all: it is raised
        there, and a WorkerError in the others.
        """
        yield from results


class _ManyWorkers(Workers):
    """A process of torch.distributed's default group."""

    def __init__(self, device: torch.device) -> None:
        # Single numbers are exchanged between CPUs where the group can do that: reading one from a
        # GPU would wait for all work queued there.
        config = distributed.get_backend_config()
        self._numbers_on = torch.device("cpu") if "cpu:" in config else device
        self.processes = Processes()
        self.rank, self.count = self.processes.rank, self.processes.count

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(together)
        parts = together.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def summed(self, total: Tensor) -> Tensor:
        added = total.to(self._numbers_on)
        self.processes.add_up(added)
        return added.to(total.device)

    def rows_in_first(self, rows: Tensor) -> Tensor:
        # One after another, into their places: the first process needs no memory beside the whole.
        counts = self.processes.told(len(rows))
        with others_there():
            if not self.is_first:
                distributed.send(rows.contiguous(), dst=0)
                return rows
            whole = rows.new_empty(sum(counts), *rows.shape[1:])
            parts = whole.split(counts)
            parts[0].copy_(rows)
            for rank in range(1, self.count):
                distributed.recv(parts[rank], src=rank)
            return whole

    def in_first(self, value: Item) -> list[Item]:
        told: list[Any] = [None] * self.count if self.is_first else []
        with others_there():
            distributed.gather_object(value, told if self.is_first else None, dst=0)
        return told or [value]

    def largest(self, number: int) -> int:
        found = torch.tensor(number, device=self._numbers_on)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def agreed(self, number: float) -> float:
        value = torch.tensor(number, dtype=torch.float64, device=self._numbers_on)
        distributed.broadcast(value, src=0)
        return float(value)

    def from_first(self, make: Callable[[], Item]) -> Item:
        told: list[Any] = [None, True]
        try:
            if self.is_first:
                told = [make(), False]
        finally:
            self._hear_first(told)
        if told[1]:
            raise WorkerError("")
        made: Item = told[0]
        return made

    def require_same(self, facts: dict[str, Any]) -> None:
        told = self.processes.told(facts)
        ours = told[0]
        for rank, theirs in enumerate(told):
            differing = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
            if differing and not self.is_first:
                raise WorkerError("")
            if differing:
                raise ValueError(
                    f"process {rank} differs from process 0 in {', '.join(differing)}: "
                    + "; ".join(f"{theirs.get(name)}, not {ours.get(name)}" for name in differing)
                )

    def in_order(self, results: Iterable[Item]) -> Iterator[Item]:
        left, more = iter(results), True
        while more:
            given, failure = _Round([], False), None
            waits = awaits_others.set(False)  # they do, for these
            try:
                given = _Round(list(islice(left, _ROUND)), False)
            except BaseException as error:  # Ctrl-C, too: the others are waiting
                given, failure = _Round([], True), error
            finally:
                awaits_others.reset(waits)
            rounds = self.in_first(given)
            # Unless the first process says otherwise at the end, it has failed.
            told: list[Any] = [True, False]  # whether one has failed, whether there is more
            try:
                if self.is_first and not any(one.failed for one in rounds):
                    for of_each in zip_longest(*(one.results for one in rounds)):
                        yield from (one for one in of_each if one is not None)
                    told = [False, len(rounds[0].results) == _ROUND]
            finally:
                self._hear_first(told)
            if failure is not None:
                raise failure
            if told[0]:
                raise WorkerError("")
            more = told[1]

    def _hear_first(self, values: list[Any]) -> None:
        """Replace values by those of the first process."""
        with others_there():
            distributed.broadcast_object_list(values, src=0, device=self._numbers_on)


def with_failures(results: Iterable[Any], failures: list[Any]) -> Iterator[Any]:
    """Results of a stream, and in their places what its `on_error` appends to a list meanwhile."""
    for result in results:
        yield from failures
        failures.clear()
        yield result
    yield from failures


def under_torchrun() -> bool:
    """Whether torchrun started this process, as one of several or alone."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def local_device(device: torch.device) -> torch.device:
    """The device; for "cuda" without a number under torchrun, this process's own GPU."""
    if device.type == "cuda" and device.index is None and under_torchrun():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


@contextlib.contextmanager
def joined_workers(device: torch.device) -> Iterator[Workers]:
    """Join the other processes of torchrun, by NCCL on GPUs and gloo on CPUs; else work alone.

    An existing process group is used, and kept at the end.
    """
    if distributed.is_available() and distributed.is_initialized():
        yield _ManyWorkers(device)
        return
    if not under_torchrun():
        yield Workers()
        return
    # Adam imports this module, whose functions hold the group that exists then as a default
    # argument. Imported before there is one, it cannot keep the group alive: gloo's threads would
    # abort the interpreter at exit.
    importlib.import_module("torch.distributed.nn")

    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT
    )
    try:
        yield _ManyWorkers(device)
    finally:
        end_all_rounds()
        distributed.destroy_process_group()
