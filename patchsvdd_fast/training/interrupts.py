"""Ctrl-C and SIGTERM that take effect between two training steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


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
