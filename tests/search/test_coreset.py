"""Coresets: the greedy choice to the bit, whatever finds it."""

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awkward import KINDS, awkward
from patchsvdd_fast import NormalBank, nearest, ops
from patchsvdd_fast.ops import reference
from patchsvdd_fast.ops.cpu_bank import project
from patchsvdd_fast.search import coreset
from patchsvdd_fast.search.coreset import select_coreset

METHODS = ["plain", "auto", "screened"]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def select(embeddings, count, method="auto", seed=0):
    with ops.use_method(method):
        return select_coreset(embeddings, count, seed)


def assert_same_coreset(found, expected):
    rows, distances, radius = expected
    assert torch.equal(found.rows, rows)
    assert torch.equal(found.distances, distances)
    assert found.radius == radius


def like_features(rows, dim):
    """Images' patches about objects of many sizes, their variance on few axes, some copied."""
    axes = min(dim, 12)
    spread = torch.logspace(0, -1.5, axes)
    objects = torch.randn(rows // 40 + 1, axes) * spread * 4
    points = objects[torch.randint(len(objects), (rows,))] + torch.randn(rows, axes) * spread
    values = points @ torch.randn(axes, dim) + 0.05 * torch.randn(rows, dim) + 3
    values[rows // 2 : rows // 2 + rows // 20] = values[: rows // 20]
    return values


@pytest.mark.parametrize("instruction_set", ops.instruction_sets())
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("rows", "dim", "count"),
    [(1, 1, 1), (2, 1, 2), (17, 3, 17), (150, 16, 70), (131, 17, 131), (300, 70, 90)],
)
def test_the_choice_is_that_of_the_reference(instruction_set, method, rows, dim, count):
    embeddings = torch.randn(rows, dim)
    embeddings[rows // 2 :: 7] = embeddings[rows // 3].clone()
    with ops.use_instruction_set(instruction_set):
        found = select(embeddings, count, method)
    expected = reference.coreset(embeddings, int(found.rows[0]), count)
    assert_same_coreset(found, expected)


def test_wide_embeddings():
    for dim in (4096, 4097):  # the latter too wide for a screen
        embeddings = like_features(90, dim)
        expected = select(embeddings, 75, "plain")
        for method in ("auto", "screened"):
            assert_same_coreset(select(embeddings, 75, method), expected)
        few = select(embeddings, 3)
        assert_same_coreset(few, reference.coreset(embeddings, int(few.rows[0]), 3))


@pytest.mark.parametrize("instruction_set", ops.instruction_sets())
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("storage", [torch.float32, torch.float16])
def test_many_rows_in_batches(threads, instruction_set, num_threads, storage):
    """So many choices that rows wait for hundreds of centres, which are screened in groups."""
    embeddings = like_features(6000, 40).to(storage)
    expected = select(embeddings, 2000, "plain")
    threads(num_threads)
    with ops.use_instruction_set(instruction_set):
        for method in ("auto", "screened"):
            assert_same_coreset(select(embeddings, 2000, method), expected)


@pytest.mark.parametrize("method", ["auto", "screened"])
def test_rows_without_structure(method):
    embeddings = torch.rand(5000, 24)
    assert_same_coreset(select(embeddings, 1500, method), select(embeddings, 1500, "plain"))


def test_a_far_outlier_among_many():
    """It does not spoil the codes of the others, which have their scale."""
    embeddings = like_features(5000, 20)
    embeddings[77] = 1e6
    found = select(embeddings, 800, "screened")
    assert_same_coreset(found, select(embeddings, 800, "plain"))
    assert 77 in found.rows[:2]


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    dim=st.sampled_from([1, 2, 7, 16, 33, 64, 100]),
    rows=st.integers(1, 400),
    share=st.floats(0, 1),
    half=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_rows_give_the_same_choice(kind, dim, rows, share, half, seed):
    check_choice(kind, dim, rows, share, half, seed)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    dim=st.integers(1, 300),
    rows=st.integers(1, 3000),
    share=st.floats(0, 1),
    half=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_rows_give_the_same_choice_long(kind, dim, rows, share, half, seed):
    check_choice(kind, dim, rows, share, half, seed)


def check_choice(kind, dim, rows, share, half, seed):
    """Every instruction set and method chooses what the plain selection does."""
    embeddings = awkward(kind, rows, dim, torch.Generator().manual_seed(seed))
    if half and kind not in ("outlier", "mixed scales"):
        embeddings = embeddings.half()
    count = max(1, round(share * rows))
    expected = select(embeddings, count, "plain", seed)
    assert len(expected.rows.unique()) == count
    for instruction_set in ops.instruction_sets():
        with ops.use_instruction_set(instruction_set):
            for method in METHODS:
                assert_same_coreset(select(embeddings, count, method, seed), expected)


@pytest.mark.parametrize(
    "scale", [1e-44, 1e-41, 1e-30, 1e-22, 1.0, 0.9e15, 1.1e15, 1e18, 1e20, 3e38]
)
def test_every_scale(scale):
    """Also where squares underflow or overflow, and on both sides of what is screened."""
    embeddings = (torch.rand(260, 18) * 2 - 1) * scale
    first = int(select(embeddings, 1).rows[0])
    expected = reference.coreset(embeddings, first, 100)
    for method in METHODS:
        assert_same_coreset(select(embeddings, 100, method), expected)


def test_ties_go_to_the_lowest_row():
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    embeddings = corners.repeat(3, 1)
    for method in METHODS:
        for seed in range(8):
            found = select(embeddings, 12, method, seed)
            first = int(found.rows[0])
            opposite = 3 - first % 4
            beside = sorted({0, 1, 2, 3} - {first % 4, opposite})
            others = sorted(set(range(12)) - {first, opposite, *beside})
            assert found.rows.tolist() == [first, opposite, *beside, *others]
            assert found.distances.tolist()[1:4] == [float(np.sqrt(np.float32(2))), 1, 1]
            assert (found.distances[4:] == 0).all()


@pytest.mark.parametrize("count", [1, 7, 250])
@pytest.mark.parametrize("storage", [torch.float32, torch.float16])
def test_the_radius_is_true(count, storage):
    embeddings = like_features(1200, 33).to(storage)
    found = select_coreset(embeddings, count)
    distances, _ = nearest(embeddings.float(), embeddings[found.rows])
    assert float(distances.max()) == found.radius
    # Each distance is to those chosen before, and none that comes later is larger.
    for i in range(1, count, 60):
        row = embeddings[found.rows[i]].float()[None]
        assert nearest(row, embeddings[found.rows[:i]])[0] == found.distances[i]
    assert torch.isinf(found.distances[0])
    assert (found.distances.diff()[1:] <= 0).all()
    assert count == 1 or found.radius <= found.distances[-1]


def test_a_coreset_of_everything_leaves_nothing_uncovered():
    embeddings = torch.randn(70, 5)
    for method in METHODS:
        found = select(embeddings, 70, method)
        assert sorted(found.rows.tolist()) == list(range(70))
        assert found.radius == 0


def test_a_smaller_coreset_begins_a_larger_one():
    embeddings = like_features(5000, 30)
    whole = select(embeddings, 900, "screened", seed=3)
    for count in (1, 2, 64, 65, 700):
        part = select(embeddings, count, "screened", seed=3)
        assert torch.equal(part.rows, whole.rows[:count])
        assert part.radius == whole.distances[count]


def test_a_screen_is_used_where_it_pays(monkeypatch):
    embeddings = like_features(5000, 30)
    expected = select(embeddings, 100)
    made = []
    monkeypatch.setattr(coreset, "_SMALLEST", embeddings.numel() * 100)
    monkeypatch.setattr(coreset, "project", lambda *given: made.append(1) or project(*given))
    assert_same_coreset(select_coreset(embeddings, 99), select(embeddings, 99, "plain"))
    assert not made
    assert_same_coreset(select_coreset(embeddings, 100), expected)
    assert made


def test_the_seed_draws_the_first_row():
    embeddings = torch.randn(1000, 4)
    firsts = [int(select_coreset(embeddings, 1, seed).rows[0]) for seed in range(20)]
    assert firsts == [int(select_coreset(embeddings, 3, seed).rows[0]) for seed in range(20)]
    assert len(set(firsts)) > 10


def test_other_arrays_and_torch_defaults():
    embeddings = torch.randn(40, 22).T[:, ::2]
    expected = select_coreset(embeddings.contiguous(), 9)
    assert_same_coreset(select_coreset(embeddings, 9), expected)
    assert_same_coreset(select_coreset(embeddings.numpy(), 9), expected)
    assert_same_coreset(select_coreset(embeddings.clone().requires_grad_(), 9), expected)
    torch.set_default_dtype(torch.float64)
    torch.set_flush_denormal(True)
    try:
        for method in METHODS:
            assert_same_coreset(select(embeddings, 9, method), expected)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_flush_denormal(False)


def test_subnormal_differences_count_while_torch_flushes_them():
    embeddings = torch.tensor([[0.0], [1e-23], [3e-23], [2e-23]])
    expected = reference.coreset(embeddings, int(select(embeddings, 1).rows[0]), 4)
    torch.set_flush_denormal(True)
    try:
        for method in METHODS:
            assert_same_coreset(select(embeddings, 4, method), expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("embeddings", "count", "error", "message"),
    [
        (torch.randn(5, 3), 6, ValueError, r"count must be in \[1, 5\], got 6"),
        (torch.randn(5, 3), 0, ValueError, r"count must be in \[1, 5\], got 0"),
        (torch.randn(5, 3), 2.0, TypeError, "count must be an integer, got 2.0"),
        (torch.randn(0, 3), 1, ValueError, r"got shape \[0, 3\]"),
        (torch.randn(3, 0), 1, ValueError, r"got shape \[3, 0\]"),
        (torch.randn(3), 1, ValueError, r"embeddings must have shape \[M, D\], got \[3\]"),
        (torch.randn(3, 3) > 0, 1, TypeError, "embeddings must be real numbers, got bool"),
        ([["1.0"]], 1, TypeError, "embeddings must be real numbers, got <U3"),
        (
            torch.tensor([[0.0], [torch.nan]]),
            1,
            ValueError,
            "embeddings must be finite, got NaN or infinity in row 1",
        ),
    ],
)
def test_bad_input_is_named(embeddings, count, error, message):
    with pytest.raises(error, match=message):
        select_coreset(embeddings, count)
    with pytest.raises(ValueError, match="seed must be in"):
        select_coreset(torch.randn(3, 3), 1, seed=-1)


@pytest.mark.parametrize(
    ("method", "rows", "count"), [("plain", 20_000, 2500), ("auto", 40_000, 9000)]
)
def test_progress_is_reported(method, rows, count):
    shares = []
    with ops.use_method(method):  # long enough: it is reported ten times a second
        select_coreset(torch.rand(rows, 96), count, progress=shares.append)
    assert shares
    assert shares == sorted(shares)
    assert 0 < shares[0] <= shares[-1] <= 1


@pytest.mark.parametrize("method", ["plain", "auto"])
def test_it_can_be_interrupted(method):
    embeddings = torch.rand(60_000, 128)
    sent = []

    def interrupt():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(1.5, interrupt)
    timer.start()
    with ops.use_method(method), pytest.raises(KeyboardInterrupt):
        select_coreset(embeddings, 60_000)
    assert time.monotonic() - sent[0] < 2


@pytest.mark.parametrize(
    ("of_whole", "of_coreset", "kept"),
    [(False, True, True), (True, None, True), (False, None, False), (True, False, False)],
)
def test_a_coreset_keeps_codes_as_asked(of_whole, of_coreset, kept):
    whole = NormalBank(torch.randn(3000, 8), clusters=0, keep_codes=of_whole)
    bank = whole.coreset(2000, clusters=0, keep_codes=of_coreset)
    assert (bank._index.codes is not None) == kept
