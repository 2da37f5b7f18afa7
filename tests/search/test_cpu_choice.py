"""What a bank on the CPU is searched by is decided by trials; the answers are the same."""

import time

import pytest
import torch

from patchsvdd_fast import NormalBank, nearest
from patchsvdd_fast.search import cpu_choice

NO_GROUPS = cpu_choice.Groups()


def decaying(rows, dim, seed=0):
    """Embeddings whose variance falls along the axes, as that of pretrained features does."""
    generator = torch.Generator().manual_seed(seed)
    deviations = torch.arange(1, dim + 1) ** -1.0
    return torch.randn(rows, dim, generator=generator) * deviations


def axes_of(embeddings):
    generator = torch.Generator().manual_seed(0)
    leading = cpu_choice.leading_axes(cpu_choice.spectrum(embeddings, generator), generator)
    return None if leading is None else leading.axes


def test_leading_axes_are_few_and_hold_most_of_the_variance():
    assert axes_of(decaying(3000, 176)) == 64
    assert axes_of(decaying(3000, 600)) == 64
    assert axes_of(torch.randn(3000, 176)) is None  # no axis leads
    assert axes_of(torch.zeros(3000, 200)) in (None, 64)  # nothing to lead


def prefer_leading_axes(monkeypatch):
    """Trials find them faster."""

    def seconds(trial, codes, rival=None):
        return 1.0 if codes.leading is None else 0.5

    monkeypatch.setattr(cpu_choice._Trial, "seconds_of_codes", seconds)


@pytest.mark.parametrize(("slower", "leads"), [("leading", False), ("others", True)])
def test_leading_axes_are_kept_where_a_trial_is_faster(monkeypatch, slower, leads):
    rows = decaying(2000, 176)

    def seconds(trial, codes, rival=None):
        trial.codes(codes)
        return 1.0 if (codes.leading is not None) == (slower == "leading") else 0.5

    monkeypatch.setattr(cpu_choice._Trial, "seconds_of_codes", seconds)
    codes = cpu_choice.choose_codes(rows, 0, NO_GROUPS)
    assert (codes.leading is not None) == leads


@pytest.mark.parametrize("dim", [176, 700])
def test_a_bank_with_leading_axes_finds_the_canonical_answer(monkeypatch, dim):
    prefer_leading_axes(monkeypatch)
    rows, queries = decaying(3000, dim), decaying(400, dim, seed=1)
    queries[3] = 1e17  # beyond what codes are made for
    bank = NormalBank(rows[:2000], clusters=0)
    before = bank._index.codes.leading_axes
    assert before.axes == 64
    bank.add(rows[2000:])
    assert bank._index.codes.leading_axes is before  # merged, along the same axes
    for k in (None, 7):
        for ours, theirs in zip(
            bank.nearest(queries, k=k), nearest(queries, rows, k=k), strict=True
        ):
            assert torch.equal(ours, theirs)
    assert NormalBank.from_state_dict(bank.state_dict())._index.codes.leading_axes.axes == 64


@pytest.mark.parametrize("leads", [True, False])
def test_leading_axes_are_not_chosen_again_on_opening(monkeypatch, tmp_path, leads):
    rows, queries = decaying(3000, 176), decaying(300, 176, seed=1)
    if leads:
        prefer_leading_axes(monkeypatch)
    else:
        monkeypatch.setattr(cpu_choice, "leading_axes", lambda *_: None)
    bank = NormalBank(rows, clusters=0)
    bank.save(tmp_path / "bank.safetensors")
    monkeypatch.setattr(cpu_choice, "_Survey", None)  # any choice would fail
    opened = NormalBank.open(tmp_path / "bank.safetensors")
    assert (opened._index.codes.leading_axes is not None) == leads
    for ours, before in zip(
        opened._index.codes.tensors(), bank._index.codes.tensors(), strict=True
    ):
        assert torch.equal(ours, before)
    for ours, theirs in zip(opened.nearest(queries), nearest(queries, rows), strict=True):
        assert torch.equal(ours, theirs)


def test_states_with_axes_that_do_not_fit_are_refused(monkeypatch):
    prefer_leading_axes(monkeypatch)
    state = NormalBank(decaying(3000, 176), clusters=0).state_dict()
    axes, mean = state["leading_axes"], state["leading_mean"]
    assert axes.shape == (176, 63)
    for changed, message in [
        ({"leading_axes": axes * 1.1}, "orthonormal"),
        ({"leading_axes": axes * torch.nan}, "orthonormal"),
        ({"leading_axes": axes[:, :-1]}, "64 n - 1 axes"),
        ({"leading_axes": axes[:-1]}, r"shape \[176, A\]"),
        ({"leading_axes": axes[0]}, r"shape \[176, A\]"),
        ({"leading_axes": axes.double()}, "float32"),
        ({"leading_mean": mean[1:]}, r"shape \[176, A\]"),
        ({"leading_mean": mean * torch.nan}, "moderate"),
        ({"leading_mean": mean + 1e30}, "moderate"),
        ({"data": state["data"][:100], "groups": state["groups"][:100]}, "one that has codes"),
    ]:
        with pytest.raises(ValueError, match=message):
            NormalBank.from_state_dict(state | changed)
    del state["leading_mean"]
    with pytest.raises(ValueError, match="'leading_mean' is missing"):
        NormalBank.from_state_dict(state)


@pytest.mark.parametrize(("spread", "kept"), [(0.02, True), (1.0, False)])
def test_clusters_are_made_only_where_they_may_pay(monkeypatch, spread, kept):
    """What they would cost is foreseen by a sample; a trial is for what is not clear."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(100, 32, generator=generator)
    rows = centres.repeat(200, 1) + spread * torch.randn(20000, 32, generator=generator)
    made = []
    build = cpu_choice.build_clusters

    def counting(*arguments):
        made.append(arguments)
        return build(*arguments)

    monkeypatch.setattr(cpu_choice, "build_clusters", counting)
    bank = NormalBank(rows)
    assert (len(made) == 1) == kept
    if not kept:
        assert bank.num_clusters == 0


@pytest.mark.parametrize(("share", "kept"), [(0.95, True), (0.3, False)])
def test_clusters_have_to_beat_leading_axes_and_no_search_is_timed_twice(monkeypatch, share, kept):
    """The faster codes are, the fewer clusters are worth a trial."""
    rows = decaying(6000, 176)
    timed, made = [], []

    def seconds(trial, codes, rival=None):
        timed.append(codes.leading is not None)
        return share if codes.leading is not None else 1.0

    monkeypatch.setattr(cpu_choice._Trial, "seconds_of_codes", seconds)
    monkeypatch.setattr(cpu_choice._Survey, "cost_in_clusters", lambda *_: 0.5)
    build = cpu_choice.build_clusters
    monkeypatch.setattr(
        cpu_choice, "build_clusters", lambda *given: made.append(1) or build(*given)
    )
    monkeypatch.setattr(cpu_choice._Trial, "clusters", lambda *_: time.sleep(1.1))  # they lose
    cpu_choice.lay_out(rows, None, 0, NO_GROUPS, keeps_codes=True)
    assert timed == [False, True]
    assert (len(made) == 1) == kept


def test_codes_that_clusters_seem_to_beat_are_timed_again(monkeypatch):
    """A machine that was busy while codes were timed must not bring a bank slow clusters."""
    times = iter([10.0, 10.0, 1e-9])
    monkeypatch.setattr(cpu_choice._Trial, "seconds_of_codes", lambda *_, **__: next(times))
    monkeypatch.setattr(cpu_choice._Survey, "cost_in_clusters", lambda *_: 0.5)
    found = cpu_choice.lay_out(decaying(6000, 176), None, 0, NO_GROUPS, keeps_codes=True)
    assert isinstance(found, cpu_choice.CodedRows)
    assert next(times, None) is None


def test_a_search_is_timed_as_often_as_it_helps(monkeypatch):
    trial = cpu_choice._Trial(torch.randn(600, 8), NO_GROUPS, torch.Generator().manual_seed(0))
    clock = iter([0.0, 5e-3, 1.0, 1.001, 2.0, 2.002, 3.0, 3.004, 4.0, 4.2, 5.0, 5.005])
    monkeypatch.setattr(cpu_choice.time, "perf_counter", lambda: next(clock))
    runs = []
    assert trial.seconds(lambda: runs.append(0)) == pytest.approx(1e-3)
    assert len(runs) == 3
    trial.seconds(lambda: runs.append(0), rival=3e-3)  # 4 ms are not hopeless, but then 200
    assert len(runs) == 5
    assert trial.seconds(lambda: runs.append(0), rival=1e-3) == pytest.approx(5e-3)
    assert len(runs) == 6


def test_queries_of_a_trial_lie_farther_from_the_bank_than_its_own_rows():
    rows = torch.randn(4000, 20)
    groups = cpu_choice.Groups(of_bank=torch.arange(40), rows_per_group=100)
    trial = cpu_choice._Trial(rows, groups, torch.Generator().manual_seed(0))
    own = cpu_choice._Trial(rows, groups, torch.Generator().manual_seed(0))
    assert torch.equal(trial.queries, own.queries)  # the same for a seed
    found, _ = nearest(
        trial.queries,
        rows,
        exclude_same_group=(trial.excluded.of_queries, groups.of_bank.repeat_interleave(100)),
    )
    nearest_own, _ = nearest(
        rows[:512],
        rows,
        exclude_same_group=(torch.arange(512) // 100, groups.of_bank.repeat_interleave(100)),
    )
    assert 1.2 < float(found.median() / nearest_own.median()) < 1.5


@pytest.mark.parametrize("count", [1, 30, 700])
@pytest.mark.parametrize("k", [None, 5])
def test_queries_far_from_a_clustered_bank_are_left_to_brute_force(count, k):
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(4, 64, generator=generator)
    rows = torch.randn(8000, 4, generator=generator) @ axes
    bank = NormalBank(rows.view(80, 100, 1, 64), clusters=50)
    queries = rows[:count] + 0.01
    queries[::2] = 30 * torch.randn(len(queries[::2]), 64, generator=generator)
    own = torch.arange(count) // 100
    every_row = torch.arange(80).repeat_interleave(100)
    shares = []
    found = bank.nearest(
        queries.view(count, 1, 1, 64), exclude_same_group=own, k=k, progress=shares.append
    )
    expected = nearest(queries, rows, exclude_same_group=(own, every_row), k=k)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.flatten(), theirs.flatten())
    assert shares == sorted(shares)
    assert all(0 <= share <= 1 for share in shares)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_values_of_any_size_make_a_bank(scale, dtype):
    rows = scale * decaying(1500, 600)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        bank = NormalBank(rows)
        opened = NormalBank.from_state_dict(bank.state_dict())
    finally:
        torch.set_default_dtype(before)
    for ours, theirs in zip(
        opened.nearest(rows[:9] * 0.9), nearest(rows[:9] * 0.9, rows), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("turned", "kept"), [(False, True), (True, False)])
def test_leading_axes_that_do_not_suit_what_is_added_are_chosen_anew(monkeypatch, turned, kept):
    prefer_leading_axes(monkeypatch)
    bank = NormalBank(decaying(2000, 176), clusters=0)
    before = bank._index.codes.leading_axes
    added = decaying(1500, 176, seed=1)
    bank.add(added.flip(1) if turned else added)
    assert bank._index.appended is None
    assert (bank._index.codes.leading_axes is before) == kept


def test_queries_that_leading_axes_rule_nothing_out_for_find_the_canonical_answer(monkeypatch):
    """Those that lie off the axes are compared by whole codes from the second block on."""
    prefer_leading_axes(monkeypatch)
    rows = decaying(9000, 176)
    bank = NormalBank(rows, clusters=0)
    queries = torch.cat([decaying(500, 176, seed=1).flip(1), decaying(300, 176, seed=2)])
    for ours, theirs in zip(bank.nearest(queries), nearest(queries, rows), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("leads", [True, False])
@pytest.mark.parametrize("kept", [70, 1030])
def test_a_bank_that_has_become_small_is_saved_and_opened(monkeypatch, tmp_path, kept, leads):
    """Few rows have no codes, whatever the bank had before."""
    if leads:
        prefer_leading_axes(monkeypatch)
    else:
        monkeypatch.setattr(cpu_choice, "leading_axes", lambda *_: None)
    rows, queries = decaying(1100, 200), decaying(50, 200, seed=1)
    bank = NormalBank(rows, clusters=0)
    assert (bank._index.codes.leading_axes is not None) == leads
    bank.remove(torch.arange(kept, 1100))
    assert (bank._index.codes is not None) == (kept == 1030)
    bank.save(tmp_path / "bank.safetensors")
    opened = NormalBank.open(tmp_path / "bank.safetensors")
    for ours, theirs in zip(opened.nearest(queries), nearest(queries, rows[:kept]), strict=True):
        assert torch.equal(ours, theirs)
