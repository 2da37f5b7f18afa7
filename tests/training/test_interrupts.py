"""Signals that wait for the end of a step."""

import os
import signal
import threading

import pytest

from patchsvdd_fast.training.interrupts import (
    Terminated,
    delayed_interrupts,
    take_effect,
    telling_interrupts,
)


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_is_noted_and_takes_effect_later(handlers, number, error):
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with delayed_interrupts() as interrupts:
        assert interrupts.arrived == 0
        os.kill(os.getpid(), number)
        assert interrupts.arrived == number
        with pytest.raises(KeyboardInterrupt):  # the second acts at once
            os.kill(os.getpid(), number)
    with pytest.raises(error):
        take_effect(interrupts.arrived)


def test_a_signal_that_is_ignored_stays_so(handlers):
    """As in a background job of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with delayed_interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.arrived == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_signal_that_waits_is_told_at_once(handlers):
    told = threading.Event()
    with telling_interrupts(told.set), delayed_interrupts():
        assert not told.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert told.wait(5)
    told.clear()
    with delayed_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        assert not told.wait(0.1)  # nobody is to be told any more
