"""Banks with ids of the user's own: which rows they stand for, whatever has happened to a bank."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsvdd_fast import NormalBank, ops
from patchsvdd_fast.search.identified import IdentifiedBank


def check(bank, rows_of, queries):
    """The bank answers as a loop over a dictionary from ids to rows, in the order of adding."""
    ids = torch.tensor(list(rows_of))
    rows = torch.stack(list(rows_of.values()))
    assert torch.equal(bank.ids, ids)
    assert torch.equal(bank.bank.embeddings, rows)
    distances, found = bank.nearest(queries, k=3)
    expected, at = ops.nearest(queries, rows, k=3)
    assert torch.equal(distances, expected)
    assert torch.equal(found, torch.where(at < 0, -1, ids[at]))
    inside = bank.within(queries, distances[:, 1].nan_to_num(posinf=0))
    plain = bank.bank.within(queries, distances[:, 1].nan_to_num(posinf=0))
    assert torch.equal(inside.indices, ids[plain.indices])
    assert torch.equal(inside.starts, plain.starts)
    assert torch.equal(inside.distances, plain.distances)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    clusters=st.sampled_from([0, 1, 5]),
    steps=st.lists(st.sampled_from(["add", "remove", "merge", "reopen"]), max_size=8),
)
def test_ids_follow_their_rows(seed, clusters, steps):
    generator = torch.Generator().manual_seed(seed)
    free = iter(torch.randperm(10**6, generator=generator).tolist())

    def new(count):
        rows = torch.randint(-2, 3, (count, 4), generator=generator).float()
        return {next(free) << 40: row for row in rows}

    def bank_of(rows_of):
        bank = NormalBank(torch.stack(list(rows_of.values())), clusters=clusters)
        return IdentifiedBank(bank, list(rows_of))

    rows_of = new(20)
    bank = bank_of(rows_of)
    queries = torch.randn(7, 4, generator=generator)
    check(bank, rows_of, queries)
    for step in steps:
        more = new(5)
        if step == "add":
            bank.add(torch.stack(list(more.values())), list(more))
            rows_of |= more
        elif step == "merge":
            bank.merge(bank_of(more))
            rows_of |= more
        elif step == "remove":
            picked = torch.randperm(len(rows_of), generator=generator)[:4]
            gone = [list(rows_of)[i] for i in picked]
            bank.remove(gone)
            for number in gone:
                del rows_of[number]
        else:
            bank = IdentifiedBank.from_state_dict(bank.state_dict())
        check(bank, rows_of, queries)
        if len(rows_of) < 6:
            break


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_ids_are_saved_and_opened(tmp_path, metric):
    rows = torch.randn(1500, 8)
    ids = torch.randperm(1500) + 2**62
    bank = IdentifiedBank(NormalBank(rows, metric=metric, clusters=9), ids)
    bank.add(rows[:3] * 2 + 1, [7, 5, 6])
    path = tmp_path / "bank.safetensors"
    bank.save(path)
    opened = IdentifiedBank.open(path)
    assert opened.bank.metric == metric
    assert torch.equal(opened.ids, torch.cat([ids, torch.tensor([7, 5, 6])]))
    for ours, theirs in zip(opened.nearest(rows), bank.nearest(rows), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(opened.nearest(rows)[1], ids)
    opened.remove(ids[5:6])
    assert len(opened) == len(bank) - 1
    assert len(NormalBank.open(path)) == 1503
    NormalBank(rows).save(path)
    with pytest.raises(ValueError, match="holds a bank without ids"):
        IdentifiedBank.open(path)


def test_ids_in_a_file_are_checked():
    state = IdentifiedBank(NormalBank(torch.randn(4, 3)), torch.arange(4)).state_dict()
    for ids, message in {
        (0, 1, 2): r"ids must have shape \[4\]",
        (0, 1, 2, 2): "got 2 more than once",
        (0, 1, 2, -1): "at least 0, got -1",
    }.items():
        with pytest.raises(ValueError, match=message):
            IdentifiedBank.from_state_dict(state | {"own_ids": torch.tensor(ids)})


def test_a_coreset_keeps_ids_and_may_change():
    rows = torch.randn(300, 5)
    bank = IdentifiedBank(NormalBank(rows), torch.arange(300) * 10)
    small = bank.coreset(60, seed=3).coreset(40, clusters=0)
    assert len(small) == 40
    assert torch.equal(small.bank.embeddings, rows[small.ids // 10])
    small.remove(small.ids[[0, 20]])
    kept = dict(zip(small.ids.tolist(), rows[small.ids // 10], strict=True))
    assert len(kept) == 38
    check(small, kept, torch.randn(9, 5))
    small.add(rows[:1] + 1, [4])
    small = IdentifiedBank.from_state_dict(small.state_dict())
    check(small, kept | {4: rows[0] + 1}, torch.randn(9, 5))


def test_groups_are_excluded_and_nothing_is_minus_one():
    bank = IdentifiedBank(NormalBank(torch.eye(3), groups=[4, 4, 5]), [10, 11, 12])
    _, ids = bank.nearest(torch.eye(3), exclude_same_group=[4, 5, 5], k=2)
    assert ids.tolist() == [[12, -1], [11, 10], [10, 11]]
    found = bank.within(torch.eye(3), 2.0, exclude_same_group=[4, 5, 5])
    assert found.indices.tolist() == [12, 11, 10, 10, 11]
    bank.add(torch.zeros(1, 3), [3], groups=[5])
    assert bank.nearest(torch.zeros(1, 3), exclude_same_group=[5])[1].tolist() == [10]


def test_numpy_gives_numpy():
    bank = IdentifiedBank(NormalBank(np.eye(3)), np.array([5, 6, 7]))
    for values in (*bank.nearest(np.eye(3)), *bank.within(np.eye(3), 0.5)):
        assert isinstance(values, np.ndarray)
    assert bank.nearest(np.eye(3))[1].tolist() == [5, 6, 7]


def test_a_bank_and_its_copies_change_alone():
    plain = NormalBank(torch.eye(3))
    ids = torch.tensor([5, 6, 7])
    bank = IdentifiedBank(plain, ids)
    ids[0] = 9
    plain.remove([0])
    bank.bank.add(torch.ones(1, 3))
    assert len(bank) == len(bank.bank) == 3
    assert bank.ids.tolist() == [5, 6, 7]
    assert bank.to("cpu") is bank
    assert repr(bank) == "IdentifiedBank(3 x 3, 60 bytes, cpu)"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda bank: bank.add(torch.zeros(2, 3), [8, 6]), ValueError, "id 6 is already in the"),
        (lambda bank: bank.add(torch.zeros(2, 3), [8, 8]), ValueError, "got 8 more than once"),
        (lambda bank: bank.add(torch.zeros(2, 3), [8]), ValueError, r"shape \[2\], .*, got \[1\]"),
        (lambda bank: bank.add(torch.zeros(1, 3), [0.5]), TypeError, "ids must be int64"),
        (lambda bank: bank.add(torch.zeros(1, 4), [8]), ValueError, "D = 3, got"),
        (lambda bank: bank.merge(bank), ValueError, "id 5 is already in the bank"),
        (lambda bank: bank.merge(bank.bank), TypeError, "only an IdentifiedBank"),
        (lambda bank: bank.remove([5, 9]), ValueError, "id 9 is not in the bank"),
        (lambda bank: bank.remove([5, 6, 7, 5]), ValueError, "leave the bank empty"),
    ],
)
def test_what_is_refused_changes_nothing(change, error, message):
    bank = IdentifiedBank(NormalBank(torch.eye(3)), [5, 6, 7])
    with pytest.raises(error, match=message):
        change(bank)
    check(bank, dict(zip([5, 6, 7], torch.eye(3), strict=True)), torch.eye(3))
    bank.remove(torch.empty(0, dtype=torch.int64))
    bank.remove([6, 6])
    assert bank.ids.tolist() == [5, 7]


def test_what_cannot_have_ids():
    with pytest.raises(ValueError, match=r"made from embeddings \[M, D\], got one of grids \[2, 3"):
        IdentifiedBank(NormalBank(torch.zeros(1, 2, 3, 4)), torch.arange(6))
    with pytest.raises(TypeError, match="bank must be a NormalBank, got Tensor"):
        IdentifiedBank(torch.eye(3), torch.arange(3))
    with pytest.raises(ValueError, match="at least 0, got -3"):
        IdentifiedBank(NormalBank(torch.eye(2)), [-3, 4])
