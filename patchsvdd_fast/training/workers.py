"""Processes that work together under torchrun: on each batch of a training, or on many images."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import islice, zip_longest
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed

# While the first process fills banks and evaluates, the others wait for the next run of training.
_LONGEST_WAIT = timedelta(hours=6)


_ROUND = 8  # results that a process hands over at once

Item = TypeVar("Item")


class WorkerError(RuntimeError):
    """Another process has failed, and says why itself; or has ended without a word."""


class _Round(NamedTuple):
    """What a process hands over to the first one, some results at a time."""

    results: list[Any]
    failed: bool
    """It has failed, and says why itself."""


class Workers:
    """The processes that work together, as one of them sees them; here, this process alone."""

    rank = 0
    count = 1

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
        return slice(batch * self.rank // self.count, batch * (self.rank + 1) // self.count)

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

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Within the context, which all enter, what fails in one process fails in all.

        An error is raised where it occurred, and is a WorkerError in the others; the same error of
        all in the first alone.
        """
        yield

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
        self.rank = distributed.get_rank()
        self.count = distributed.get_world_size()

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(together)
        parts = together.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

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
        told = self._told(facts)
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

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        own = None if failure is None else str(failure)
        told = self._told(own)
        if failure is not None and (self.is_first or own != told[0]):
            raise failure
        if any(one is not None for one in told):
            raise WorkerError("")

    def in_order(self, results: Iterable[Item]) -> Iterator[Item]:
        left, more = iter(results), True
        while more:
            given, failure = _Round([], False), None
            try:
                given = _Round(list(islice(left, _ROUND)), False)
            except BaseException as error:  # Ctrl-C, too: the others are waiting
                given, failure = _Round([], True), error
            rounds = self._gathered(given)
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

    def _told(self, value: Any) -> list[Any]:
        """What every process tells, by rank."""
        told: list[Any] = [None] * self.count
        with _others_there():
            distributed.all_gather_object(told, value)
        return told

    def _hear_first(self, values: list[Any]) -> None:
        """Replace values by those of the first process."""
        with _others_there():
            distributed.broadcast_object_list(values, src=0, device=self._numbers_on)

    def _gathered(self, given: _Round) -> list[_Round]:
        """What all processes hand over, in the first process; [] in others."""
        rounds: list[Any] = [None] * self.count if self.is_first else []
        with _others_there():
            distributed.gather_object(given, rounds if self.is_first else None, dst=0)
        return rounds


def with_failures(results: Iterable[Any], failures: list[Any]) -> Iterator[Any]:
    """Results of a stream, and in their places what its `on_error` appends to a list meanwhile."""
    for result in results:
        yield from failures
        failures.clear()
        yield result
    yield from failures


@contextlib.contextmanager
def _others_there() -> Iterator[None]:
    """Within the context, raise WorkerError if another process has ended meanwhile."""
    try:
        yield
    except RuntimeError as error:  # of torch.distributed: a connection was closed
        raise WorkerError("another process has ended, so this one does") from error


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
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_LONGEST_WAIT
    )
    try:
        yield _ManyWorkers(device)
    finally:
        distributed.destroy_process_group()
