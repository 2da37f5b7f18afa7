"""Brute-force search: the canonical answer to the bit, whatever runs it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsvdd_fast import NormalBank, ops
from patchsvdd_fast.ops import reference


def assert_equal(found, expected):
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("instruction_set", ops.instruction_sets())
@pytest.mark.parametrize("dim", [1, 2, 15, 16, 17, 31, 64, 100, 300])
def test_nearest_is_the_canonical_answer_to_the_bit(instruction_set, dim):
    queries, bank = torch.randn(70, dim), torch.randn(133, dim)
    bank[40] = bank[90] = queries[7]  # an exact match, twice
    expected = reference.nearest(queries, bank)
    with ops.use_instruction_set(instruction_set):
        distances, indices = ops.nearest(queries, bank)
    assert torch.equal(distances, expected[0])
    assert torch.equal(indices, expected[1])
    assert (distances[7], indices[7]) == (0, 40)


@pytest.mark.parametrize("instruction_set", ops.instruction_sets())
def test_nearest_does_not_depend_on_threads_or_batches(instruction_set):
    bank = torch.randn(300, 24) * 0.005 + 0.4
    bank[100:200] = bank[:100]
    queries = torch.cat([torch.randn(300, 24) * 0.005 + 0.4, bank[50:150]])
    expected = reference.nearest(queries, bank)
    threads = torch.get_num_threads()
    try:
        with ops.use_instruction_set(instruction_set):
            for count in (1, 2, 7):
                torch.set_num_threads(count)
                for batch in (3, 37, 400):
                    parts = [ops.nearest(part, bank) for part in queries.split(batch)]
                    distances, indices = (torch.cat(values) for values in zip(*parts, strict=True))
                    assert torch.equal(distances, expected[0])
                    assert torch.equal(indices, expected[1])
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60, deadline=None)
@given(
    dim=st.integers(1, 70),
    bank_rows=st.integers(1, 80),
    count=st.integers(0, 20),
    scale=st.sampled_from([1e-42, 1e-30, 1e-20, 1.0, 1e18, 1e30]),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
    seed=st.integers(0, 2**32),
)
def test_nearest_at_every_scale(dim, bank_rows, count, scale, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 9, (count + bank_rows, dim), generator=generator).float()
    values = (values * scale + offset * scale).float()
    queries, bank = values[:count], values[count:]
    expected = reference.nearest(queries, bank)
    for instruction_set in ops.instruction_sets():
        with ops.use_instruction_set(instruction_set):
            distances, indices = ops.nearest(queries, bank)
        assert torch.equal(distances, expected[0])
        assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("instruction_set", ops.instruction_sets())
@pytest.mark.parametrize("method", ["plain", "screened"])
@pytest.mark.parametrize("half", [False, True])
def test_both_methods_in_every_short_dimension(instruction_set, method, half):
    with ops.use_instruction_set(instruction_set), ops.use_method(method):
        for dim in [*range(1, 34), 100]:
            for rows in (1, 7, 64, 131):
                bank = torch.randn(rows, dim)
                bank = bank.half() if half else bank
                queries = torch.randn(41, dim)
                found = ops.nearest(queries, bank)
                expected = reference.nearest(queries, bank.float())
                assert torch.equal(found[0], expected[0]), (dim, rows)
                assert torch.equal(found[1], expected[1]), (dim, rows)


@pytest.mark.parametrize("instruction_set", ops.instruction_sets())
@pytest.mark.parametrize("method", ["plain", "screened"])
@pytest.mark.parametrize("dim", [1, 3, 8, 16, 20, 64, 4100])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_is_named_wherever_it_lies(instruction_set, method, dim, bad):
    rows, count = 200, 3
    # The bad row is in the group of all queries, so that it is no candidate.
    groups = (torch.zeros(count, dtype=torch.int64), (torch.arange(rows) != 150).long())
    for half in (False, True):
        bank = torch.randn(rows, dim)
        bank[150, dim // 2] = bank[170, dim - 1] = bad
        bank = bank.half() if half else bank
        with ops.use_instruction_set(instruction_set), ops.use_method(method):
            for excluded in (None, groups):
                with pytest.raises(ValueError, match=r"bank must be finite, .* in row 150"):
                    ops.nearest(torch.randn(count, dim), bank, exclude_same_group=excluded)
            with pytest.raises(ValueError, match=r"bank must be finite, .* in row 150"):
                ops.nearest(torch.empty(0, dim), bank)


@pytest.mark.parametrize("method", ["plain", "screened"])
@pytest.mark.parametrize("dim", [2, 40])
def test_squares_that_overflow_are_no_error(method, dim):
    bank = torch.full((70, dim), 3e38)
    bank[40:] = 1e16
    with ops.use_method(method):
        distances, indices = ops.nearest(torch.zeros(9, dim), bank)
        assert torch.equal(indices, torch.full((9,), 40))
        assert torch.isfinite(distances).all()
        assert torch.isinf(ops.nearest(torch.zeros(9, dim), bank[:40])[0]).all()


def test_nearest_where_expanded_distances_cancel():
    """A tiny ball far from the origin, as trained embeddings form it."""
    bank = (torch.randn(3000, 64) * 0.0005 + 0.45).float()
    queries = (torch.randn(3000, 64) * 0.0005 + 0.45).float()
    distances, indices = ops.nearest(queries, bank)
    exact = torch.cdist(
        queries.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert torch.equal(indices, exact.argmin(dim=1))
    torch.testing.assert_close(distances.double(), exact.amin(dim=1), rtol=1e-6, atol=0)


def test_nearest_keeps_subnormals_while_torch_flushes_them():
    queries, bank = torch.full((1, 4), 3e-23), torch.zeros(1, 4)
    expected = ops.nearest(queries, bank)[0]
    assert expected > 0
    torch.set_flush_denormal(True)
    try:
        assert torch.equal(ops.nearest(queries, bank)[0], expected)
    finally:
        torch.set_flush_denormal(False)


def test_nearest_edge_cases():
    bank = torch.rand(9, 5)
    distances, indices = ops.nearest(torch.empty(0, 5), bank)
    assert distances.shape == indices.shape == (0,)
    strided = torch.rand(5, 11).t()
    assert torch.equal(ops.nearest(strided, bank)[0], ops.nearest(strided.contiguous(), bank)[0])
    huge = torch.full((2, 3), 3e38)
    distances, indices = ops.nearest(huge, -huge)  # every squared distance overflows
    assert torch.isinf(distances).all()
    assert torch.equal(indices, torch.zeros(2, dtype=torch.int64))


def test_native_square_root_is_correctly_rounded():
    values = torch.linspace(0.1, 3, 5000)[:, None]
    distances, _ = ops.nearest(values, torch.zeros(1, 1))
    squared = reference.canonical_squared_distances(values, torch.zeros(1, 1))[:, 0]
    assert np.array_equal(distances.numpy(), np.sqrt(squared.numpy()))


@pytest.mark.parametrize("instruction_set", ops.instruction_sets())
@pytest.mark.parametrize("k", [1, 2, 9, 32])
@pytest.mark.parametrize(("count", "rows", "dim"), [(1, 5, 3), (7, 40, 17), (70, 700, 24)])
def test_k_neighbours_are_the_canonical_ones_in_order(instruction_set, k, count, rows, dim):
    queries, bank = torch.randn(count, dim), torch.randn(rows, dim)
    bank[rows // 2 :] = bank[: rows - rows // 2].clone()  # everything twice
    groups = torch.randint(3, (count,)), torch.randint(3, (rows,))
    for exclude in (None, groups):
        expected = reference.nearest(queries, bank, exclude_same_group=exclude, k=k)
        with ops.use_instruction_set(instruction_set):
            found = ops.nearest(queries, bank, exclude_same_group=exclude, k=k)
        assert_equal(found, expected)
        assert found[0].shape == found[1].shape == (count, k)
        one = ops.nearest(queries, bank, exclude_same_group=exclude)
        assert_equal(one, (found[0][:, 0], found[1][:, 0]))


def test_beyond_the_rows_of_a_bank_there_are_no_neighbours():
    distances, rows = ops.nearest(torch.zeros(2, 3), torch.ones(2, 3), k=4)
    assert rows.tolist() == [[0, 1, -1, -1]] * 2
    assert torch.isinf(distances[:, 2:]).all()
    groups = torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1])
    _, rows = ops.nearest(torch.zeros(2, 3), torch.ones(2, 3), k=2, exclude_same_group=groups)
    assert rows.tolist() == [[1, -1]] * 2


def test_k_neighbours_of_vectors_whose_squares_overflow():
    far = torch.full((3, 2), 3e38)
    distances, rows = ops.nearest(far[:1], -far, k=5)
    assert torch.isinf(distances).all()
    assert rows.tolist() == [[0, 1, 2, -1, -1]]


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, r"k must be in \[1, 32\], got 0"),
        (33, ValueError, r"k must be in \[1, 32\], got 33"),
        (True, TypeError, "k must be an integer, got True"),
        (2.0, TypeError, r"k must be an integer, got 2\.0"),
    ],
)
def test_a_number_of_neighbours_that_cannot_be(k, error, message):
    with pytest.raises(error, match=message):
        ops.nearest(torch.zeros(2, 3), torch.ones(2, 3), k=k)


@pytest.mark.parametrize(
    "dtype", ["f2", "f4", "f8", "g", ">f4", ">f8", "i1", "u1", "<i2", ">i4", "u2", "u4", "i8", "u8"]
)
def test_any_real_numbers_are_rounded_to_float32_once(dtype):
    generator = np.random.default_rng(0)
    values = generator.normal(size=(40, 6)) * 40
    if np.dtype(dtype).kind == "u":
        values = np.abs(values)
    if np.dtype(dtype).itemsize >= 4:
        values *= 2**20  # beyond what float32 holds exactly
    values = values.astype(dtype)
    queries, bank = values[:10], values[10:]
    exact = [[np.float32(value) for value in row] for row in values]
    expected = ops.nearest(np.array(exact[:10]), np.array(exact[10:]))
    found = ops.nearest(queries, bank)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])
    in_bank = NormalBank(bank).nearest(queries)
    assert np.array_equal(in_bank[0], expected[0])
    as_lists = ops.nearest(queries.tolist(), bank.tolist())
    assert isinstance(as_lists[0], np.ndarray)
    assert np.array_equal(as_lists[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_tensors_of_any_real_dtype_are_searched(dtype):
    values = (torch.randn(40, 6) * 40).to(dtype)
    found = ops.nearest(values[:10], values[10:])
    assert_equal(found, ops.nearest(values[:10].float(), values[10:].float()))
