"""Ctrl-C and SIGTERM that take effect between two training steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_on_arrival: ContextVar[Callable[[], None] | None] = ContextVar("on_arrival", default=None)


@contextlib.contextmanager
def telling_interrupts(tell: Callable[[], None]) -> Iterator[None]:
    """Within the context `tell` is called at once when a signal is noted that takes effect later.

    In a thread of its own: a signal may arrive while what `tell` wants to print to is in use.
    """
    token = _on_arrival.set(tell)
    try:
        yield
    finally:
        _on_arrival.reset(token)


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived; raised between two steps, so that the state can still be saved."""


class Interrupts:
    """The signals noted within `delayed_interrupts`."""

    def __init__(self) -> None:
        self.arrived = 0
        """The number of the last signal, 0 before any."""


def take_effect(signum: int) -> None:
    """Raise KeyboardInterrupt for Ctrl-C, Terminated for SIGTERM; nothing for 0."""
    if signum == signal.SIGTERM:
        raise Terminated
    if signum:
        raise KeyboardInterrupt


@contextlib.contextmanager
def delayed_interrupts() -> Iterator[Interrupts]:
    """Within the context a first Ctrl-C or SIGTERM is only noted; a second of its kind acts.

    Signals reach the main thread alone: in others the context does nothing.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():  # gets no signals
        yield interrupts
        return

    def note(signum: int, frame: object) -> None:
        interrupts.arrived = signum
        signal.signal(signum, before[signal.Signals(signum)])
        if tell is not None:
            threading.Thread(target=tell, daemon=True).start()

    tell = _on_arrival.get()

    # A background job of a shell ignores Ctrl-C; None: set by native code, and not to be put back.
    heeded = [
        n
        for n in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(n) not in (signal.SIG_IGN, None)
    ]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
