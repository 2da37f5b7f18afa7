"""A bank that is searched chunk by chunk: the answer is that of one search."""

import numpy as np
import pytest
import torch

from patchsvdd_fast import ops
from patchsvdd_fast.ops import reference
from patchsvdd_fast.search.larger_than_card import nearest_streamed


@pytest.mark.parametrize("k", [None, 1, 9])
@pytest.mark.parametrize("rows_at_once", [1, 7, 100, 1000])
def test_the_answer_does_not_depend_on_chunks(rows_at_once, k):
    queries, bank = torch.randn(20, 9), torch.randn(300, 9)
    bank[250] = bank[40] = queries[3]  # a tie across chunks
    found = nearest_streamed(queries, bank, rows_at_once=rows_at_once, k=k)
    expected = ops.nearest(queries, bank, k=k)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[1][3].flatten()[0] == 40


def test_chunks_are_compared_by_squared_distances():
    """Of two rows at the same distance after rounding, the later one may be the nearer."""
    rows = 0.6 + 1e-4 * torch.rand(4000, 2)
    squared = reference.canonical_squared_distances(torch.zeros(1, 2), rows)[0]
    order = squared.argsort(descending=True)
    roots = squared[order].double().sqrt().float()
    pairs = ((roots[1:] == roots[:-1]) & (squared[order][1:] < squared[order][:-1])).nonzero()
    assert len(pairs) > 10
    for pair in pairs[:10, 0].tolist():
        bank = rows[order[pair : pair + 2]]
        distances, found = nearest_streamed(torch.zeros(1, 2), bank, rows_at_once=1)
        assert distances[0] == roots[pair]
        assert found[0] == 1


def test_groups_are_excluded_and_progress_is_reported():
    queries, bank = torch.randn(20, 9), torch.randn(300, 9)
    groups = torch.randint(3, (20,)), torch.randint(3, (300,))
    shares = []
    found = nearest_streamed(
        queries, bank.numpy(), rows_at_once=70, exclude_same_group=groups, progress=shares.append
    )
    expected = ops.nearest(queries, bank, exclude_same_group=groups)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert shares == sorted(shares)
    assert len(shares) == 5
    assert shares[-1] == 1
    nothing = torch.zeros(20, dtype=torch.int64), torch.zeros(300, dtype=torch.int64)
    none = nearest_streamed(queries, bank, rows_at_once=70, exclude_same_group=nothing)
    assert torch.isinf(none[0]).all()
    assert (none[1] == -1).all()


def test_overflowing_distances_still_have_a_nearest_row():
    queries = torch.full((1, 2), 3e38)
    found = nearest_streamed(queries, -queries.repeat(5, 1), rows_at_once=2)
    assert torch.isinf(found[0]).all()
    assert found[1].tolist() == [0]


def test_a_float16_bank_streams():
    queries, bank = torch.randn(5, 8), torch.randn(40, 8).half()
    found = nearest_streamed(queries, bank, rows_at_once=16)
    assert torch.equal(found[1], ops.nearest(queries, bank.float())[1])


def test_bad_input_is_named():
    queries, bank = torch.randn(5, 8), torch.randn(40, 8)
    bank[30, 2] = torch.nan
    with pytest.raises(ValueError, match=r"in bank rows from 20 on: bank must be finite.* row 10"):
        nearest_streamed(queries, bank, rows_at_once=20)
    with pytest.raises(ValueError, match="rows_at_once must be at least 1, got 0"):
        nearest_streamed(queries, bank, rows_at_once=0)
    with pytest.raises(ValueError, match="at least one embedding"):
        nearest_streamed(queries, bank[:0])
    with pytest.raises(ValueError, match=r"queries must have shape \[Q, 8\]"):
        nearest_streamed(queries[:, :7], bank[:20])
    with pytest.raises(TypeError, match="bank must be real numbers, got complex128"):
        nearest_streamed(queries, np.zeros((3, 8), complex))
    with pytest.raises(ValueError, match=r"bank_groups must have shape \[40\], got \[2\]"):
        groups = torch.zeros(5, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        nearest_streamed(queries, bank, exclude_same_group=groups)
