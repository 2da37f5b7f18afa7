"""Rounds of one process alone; `detector/test_shards.py` has several."""

import os
import threading
import time

import pytest
import torch

from patchsvdd_fast import NormalBank
from patchsvdd_fast.search.processes import Processes, ToldError, WorkerError
from patchsvdd_fast.search.rounds import Rounds, end_all_rounds


@pytest.fixture
def rounds():
    """Rounds that double what they are given."""
    made = Rounds({"": NormalBank(torch.eye(3))}, lambda _, given: 2 * given)
    yield made
    made.close(finished=False)
    made.wait()


def test_each_is_answered_until_all_are_finished(rounds):
    assert [rounds.do(number) for number in (1, 2, 3)] == [2, 4, 6]
    rounds.close(finished=True)
    rounds.wait()
    with pytest.raises(WorkerError):
        rounds.do(4)


def test_an_early_end_is_said(rounds):
    rounds.close(finished=False)
    rounds.wait()
    with pytest.raises(ToldError, match="has failed, or wanted no more results"):
        rounds.do(1)


def test_what_the_work_raises_is_raised_even_if_the_group_cannot_be_ended(monkeypatch, rounds):
    def refused(_):
        raise RuntimeError("no group")

    monkeypatch.setattr(Processes, "end", refused)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with pytest.raises(TypeError, match="unsupported operand"):
        rounds.do({})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_ends_although_a_thread_held_the_lock(rounds):
    held, done = threading.Event(), threading.Event()

    def hold():
        with rounds._changed:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        end_all_rounds()  # as at its exit
        os._exit(0)
    done.set()
    thread.join()
    until = time.monotonic() + 10
    while not (ended := os.waitpid(child, os.WNOHANG)[0]) and time.monotonic() < until:
        time.sleep(0.01)
    if not ended:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended
