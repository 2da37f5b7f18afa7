"""Searches that each process makes for itself, in a bank whose rows all of them hold.

A search takes all processes at once, but each has images of its own, at times of its own. So they
search in rounds: in each, every process gives the queries that it has, maybe none.
"""

from __future__ import annotations

import atexit
import contextvars
import copy
import os
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from itertools import chain, repeat
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .bank import NormalBank
from .processes import Processes, ToldError, WorkerError
from .sharded import ShardedBank

AnyBank = NormalBank | ShardedBank
"""A bank with all its rows in this process, or with parts of them in many."""

Given = TypeVar("Given")
Found = TypeVar("Found")
Key = TypeVar("Key")

awaits_others: ContextVar[bool] = ContextVar("awaits_others", default=True)
"""Whether `Rounds.wait` does: not where the others wait for results of this process."""

_IDLE = 0.005  # seconds that a process without queries lets the others wait for it
_WORKING, _DONE, _GONE = 0, 1, 2  # whether a process may have more queries; has ended; has failed


def processes_of(banks: Mapping[Any, AnyBank]) -> Processes:
    """The processes that hold parts of banks; this one alone if it has all rows."""
    bank = next(iter(banks.values()))
    return bank._processes if isinstance(bank, ShardedBank) else Processes.alone()


def parts_of(bank: AnyBank) -> tuple[NormalBank, ...]:
    """What this process has of a bank: all of it, or its parts, maybe none."""
    return bank.parts if isinstance(bank, ShardedBank) else (bank,)


def nearest(bank: AnyBank, queries: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """As `NormalBank.nearest`; of a bank in several processes, which all call this at once with
    queries of their own, each gets the answers to its own. There may be none.
    """
    if isinstance(bank, NormalBank):
        return bank.nearest(queries, **options)
    found = bank.nearest_of_each(queries, **options)
    assert found is not None, "this process had queries, even if there were none of them"
    return found


def nearest_of_others(
    bank: AnyBank, batches: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The answers to each batch of queries, and their groups, whose own rows they cannot match.

    Of a bank in several processes all call this at once, with any number of batches.
    """
    if isinstance(bank, NormalBank):
        for queries, groups in batches:
            yield bank.nearest(queries, exclude_same_group=groups)
        return
    for batch in chain(batches, repeat(None)):
        given, own = (None, None) if batch is None else batch
        found = bank.nearest_of_each(given, exclude_same_group=own)
        if found is None:
            return
        if batch is not None:
            yield found


class Rounds(Generic[Given, Found]):
    """Work that all processes do at once, in one round after another, while any has some.

    Made by all processes of a bank at once. The rounds run in a thread of each, so that a process
    that has nothing to search now still searches its rows for the others.

    banks: whose rows lie in several processes.
    work: called in that thread, in all processes, with the banks and with what this process was
        given, None for nothing; makes what `do` returns.
    """

    def __init__(
        self,
        banks: Mapping[Key, AnyBank],
        work: Callable[[Mapping[Key, AnyBank], Given | None], Found],
    ) -> None:
        self._processes = processes_of(banks).apart()
        apart = {key: _asked_through(bank, self._processes) for key, bank in banks.items()}
        self._changed = threading.Condition()
        self._given: Given | None = None
        self._found: Found | None = None
        self._state = _WORKING
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run, apart, work), daemon=True
        )
        _running.add(self)
        self._thread.start()

    def do(self, given: Given) -> Found:
        """What the work makes of this. Raises what it raised, WorkerError if another failed."""
        with self._changed:
            self._given, self._found = given, None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._found is not None or not self._goes_on)
            if self._found is None:
                raise self._error or WorkerError("")
            return self._found

    def close(self, finished: bool) -> None:
        """Give nothing more; the thread goes on for the other processes until all are finished.

        finished: False: this process has failed, or wants no more results: all others then fail.
        """
        with self._changed:
            if self._state != _DONE:
                self._state = _DONE if finished else _GONE
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until no process has more, so that what they need of this one can go."""
        if awaits_others.get():
            self._thread.join()

    @property
    def _goes_on(self) -> bool:
        return self._error is None and self._thread.is_alive()

    def _run(self, banks: Mapping[Key, AnyBank], work: Callable[..., Found]) -> None:
        try:
            while self._round(banks, work):
                pass
            self._error = WorkerError("")  # for one who asks when all have ended
        except BaseException as error:
            self._error = error
            traceback.clear_frames(error.__traceback__)  # which hold the group
        finally:
            banks = {}  # likewise: without it, others learn that this process has ended
            try:
                self._processes.end()
            finally:
                with self._changed:
                    self._changed.notify_all()

    def _round(self, banks: Mapping[Key, AnyBank], work: Callable[..., Found]) -> bool:
        """Take part in a round; returns whether there may be another."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._given is not None or self._state != _WORKING, _IDLE
            )
            given, state = self._given, self._state
        told = torch.tensor([state, given is not None])
        states, asking = torch.stack(self._processes.gathered(told)).unbind(dim=1)
        if (states == _GONE).any():
            raise ToldError("another process has failed, or wanted no more results")
        if not asking.any():
            return bool((states == _WORKING).any())
        found = work(banks, given)
        if given is not None:
            with self._changed:
                self._given, self._found = None, found
                self._changed.notify_all()
        return True


_running: weakref.WeakSet[Rounds[Any, Any]] = weakref.WeakSet()

if hasattr(os, "register_at_fork"):  # a child has no threads, and locks that they may have held
    os.register_at_fork(after_in_child=_running.clear)


@atexit.register
def end_all_rounds() -> None:
    """Wait for the other processes in all rounds; those that are not finished fail."""
    for rounds in list(_running):
        rounds.close(finished=False)
        rounds._thread.join()


def _asked_through(bank: AnyBank, processes: Processes) -> AnyBank:
    """The same bank, whose processes speak to each other in another group."""
    if isinstance(bank, NormalBank):
        return bank
    twin = copy.copy(bank)
    twin._processes = processes
    return twin
