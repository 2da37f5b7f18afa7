"""All rows within a radius: those of the definition, to the bit, whatever runs the search."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awkward import KINDS, awkward
from patchsvdd_fast import NormalBank, ops
from patchsvdd_fast.ops import reference
from patchsvdd_fast.ops.cpu_codes import encode_rows
from patchsvdd_fast.ops.radius import within_in_bank


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def some_radii(distances, generator):
    """A radius per query: at, just below or above one of its distances [Q, M]; or 0, infinity."""
    count, rows = distances.shape
    picked = torch.randint(rows, (count, 1), generator=generator)
    at = distances.gather(1, picked)[:, 0]
    at = torch.where(torch.arange(count) % 3 == 0, distances.amin(dim=1), at)
    choices = torch.stack(
        [
            at,
            torch.nextafter(at, torch.tensor(torch.inf)),
            torch.nextafter(at, torch.tensor(0.0)),
            torch.zeros(count),
            torch.full((count,), torch.inf),
        ]
    )
    choice = torch.randint(len(choices), (1, count), generator=generator)
    return choices.gather(0, choice)[0]


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    dim=st.sampled_from([1, 2, 7, 16, 33, 64, 100]),
    rows=st.integers(1, 300),
    count=st.integers(0, 24),
    clusters=st.integers(1, 40),
    half=st.booleans(),
    has_groups=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_bank_gives_the_rows_of_the_definition(
    kind, dim, rows, count, clusters, half, has_groups, seed
):
    generator = torch.Generator().manual_seed(seed)
    values = awkward(kind, rows + count, dim, generator)
    bank, queries = values[count:].contiguous(), values[:count].contiguous()
    queries[::2] = bank[torch.randint(rows, (len(queries[::2]),), generator=generator)]
    storage = torch.float16 if half and kind not in ("outlier", "mixed scales") else torch.float32
    stored = bank.to(storage)
    squared = reference.canonical_squared_distances(queries, stored.float())
    radii = some_radii(squared.double().sqrt().float(), generator)
    of_queries = torch.randint(3, (count,), generator=generator) if has_groups else None
    of_bank = torch.randint(3, (rows,), generator=generator)
    both = None if of_queries is None else (of_queries, of_bank)
    expected = reference.within(queries, stored.float(), radii, exclude_same_group=both)
    options = {"groups": of_bank, "storage": storage}
    first = (rows + 1) // 2
    grown = NormalBank(bank[:first], **options | {"groups": of_bank[:first]}, clusters=clusters)
    if rows > 1:
        grown.add(bank[first:], of_bank[first:])
    banks = [NormalBank(bank, **options, clusters=c) for c in (0, clusters)]
    for instruction_set in ops.instruction_sets():
        with ops.use_instruction_set(instruction_set):
            for method in ("plain", "screened"):
                with ops.use_method(method):
                    found = ops.within(queries, stored, radii, exclude_same_group=both)
                    assert_same(found, expected)
                    if both is None:
                        assert_same(within_in_bank(queries, encode_rows(stored), radii), expected)
            for searched in (*banks, grown):
                found = searched.within(queries, radii, exclude_same_group=of_queries)
                assert_same(found, expected)


@pytest.fixture(scope="module")
def much():
    """Rows for several blocks, each there four times; queries for several batches; the answer."""
    generator = torch.Generator().manual_seed(1)
    axes = torch.randn(3, 24, generator=generator)
    distinct = torch.randn(1250, 3, generator=generator) @ axes
    distinct += 0.05 * torch.randn(1250, 24, generator=generator)
    rows, queries = distinct.repeat(4, 1), distinct[:300].clone()
    queries[100:] += 0.01 * torch.randn(200, 24, generator=generator)
    radii = ops.nearest(queries, rows)[0] + 1.5 * (torch.arange(300) % 2)
    return rows, queries, radii, reference.within(queries, rows, radii)


@pytest.mark.parametrize("instruction_set", ops.instruction_sets())
def test_the_answer_depends_on_nothing_but_the_rows(instruction_set, much):
    rows, queries, radii, expected = much
    assert bool((expected[0].diff() >= 4).all())
    assert int(expected[0][-1]) > 3000
    plain, clustered = NormalBank(rows, clusters=0), NormalBank(rows, clusters=90)
    assert plain._index.codes is not None
    assert clustered.num_clusters > 50
    threads = torch.get_num_threads()
    try:
        with ops.use_instruction_set(instruction_set):
            for count, bank in itertools.product((1, 2, 5), (plain, clustered)):
                torch.set_num_threads(count)
                assert_same(bank.within(queries, radii), expected)
                for q in (0, 1, 299):
                    found = bank.within(queries[q : q + 1], radii[q : q + 1])
                    own = slice(int(expected[0][q]), int(expected[0][q + 1]))
                    assert_same(found[1:], (expected[1][own], expected[2][own]))
    finally:
        torch.set_num_threads(threads)


def test_the_first_are_the_nearest_in_their_order():
    """Also where unequal squared distances have equal roots."""
    queries, bank = torch.randn(50, 3), torch.randn(4000, 3)
    bank[2000:] = torch.nextafter(bank[:2000], torch.tensor(9.0))
    distances, rows = ops.nearest(queries, bank, k=32)
    found = ops.within(queries, bank, distances[:, -1])
    for q, start in enumerate(found.starts[:-1].tolist()):
        assert torch.equal(found.indices[start : start + 32], rows[q])
        assert torch.equal(found.distances[start : start + 32], distances[q])


def test_queries_are_numbered_on_beyond_those_searched_at_once():
    queries = (torch.arange(140_000) % 3).float()[:, None]
    found = ops.within(queries, torch.tensor([[0.0], [1.0], [2.0]]), 0.5)
    assert torch.equal(found.starts, torch.arange(140_001))
    assert torch.equal(found.indices, torch.arange(140_000) % 3)


def test_a_radius_that_is_a_number_is_rounded_to_float32():
    tenth = float(np.float32(0.1))  # larger than 0.1
    found = ops.within([[0.0]], [[tenth], [np.nextafter(np.float32(0.1), np.float32(1))]], 0.1)
    assert [type(values) for values in found] == [np.ndarray] * 3
    assert found.indices.tolist() == [0]


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 3.7e-23, 1.0, 1e15, 1.7e19])
def test_each_radius_has_its_largest_square(scale):
    """Every float32 near a distance, as a radius."""
    bank = torch.tensor([[i * scale] for i in range(1, 7)])
    distances = ops.nearest(bank, torch.zeros(1, 1))[0]
    above = torch.nextafter(distances, torch.tensor(torch.inf))
    below = torch.nextafter(distances, torch.tensor(0.0))
    for radius in torch.cat([above, distances, below]).tolist():
        found = ops.within(torch.zeros(1, 1), bank, radius)
        assert sorted(found.indices.tolist()) == (distances <= radius).nonzero()[:, 0].tolist()


def test_infinity_is_within_infinity_only():
    far = torch.full((3, 2), 3e38)
    assert ops.within(far[:1], -far, torch.inf).indices.tolist() == [0, 1, 2]
    assert ops.within(far[:1], -far, 3.4e38).indices.tolist() == []
    groups = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 0, 1])
    found = ops.within(far[:1], -far, torch.inf, exclude_same_group=groups)
    assert found.indices.tolist() == [2]


def test_subnormals_are_kept_while_torch_flushes_them():
    queries, bank = torch.full((1, 4), 3e-23), torch.zeros(2, 4)
    expected = ops.within(queries, bank, 1.0)
    assert float(expected.distances[0]) > 0
    torch.set_flush_denormal(True)
    try:
        assert_same(ops.within(queries, bank, 1.0), expected)
        assert ops.within(queries, bank, 1e-23).indices.tolist() == []
    finally:
        torch.set_flush_denormal(False)


def test_queries_of_any_shape_and_radii_of_theirs():
    images = torch.randn(6, 4, 5, 8)
    bank = NormalBank(images)
    radii = torch.rand(2, 4, 5) * 6
    own = torch.tensor([0, 1])
    found = bank.within(images[:2], radii, exclude_same_group=own)
    groups = own.repeat_interleave(20), torch.arange(6).repeat_interleave(20)
    expected = ops.within(
        images[:2].flatten(0, 2), images.flatten(0, 2), radii.flatten(), exclude_same_group=groups
    )
    assert_same(found, expected)
    assert not (bank.source(found.indices[: found.starts[20]])[:, 0] == 0).any()
    for queries in (torch.empty(0, 8), torch.empty(2, 0, 8)):
        assert_same(bank.within(queries, 1.0)[1:], (torch.empty(0), torch.empty(0).long()))
        assert bank.within(queries, 1.0).starts.tolist() == [0]


def test_a_bank_that_changes_and_a_coreset():
    rows = torch.randn(3000, 8)
    bank = NormalBank(rows[:2000])
    bank.add(rows[2000:2300])
    bank.remove(torch.arange(50, 90))
    stored = torch.cat([rows[:50], rows[90:2300]])
    queries = torch.randn(30, 8)
    assert_same(
        bank.within(queries, 1.5), reference.within(queries, stored, torch.full((30,), 1.5))
    )
    small = bank.coreset(200)
    chosen = small.embeddings
    assert_same(
        small.within(queries, 1.5), reference.within(queries, chosen, torch.full((30,), 1.5))
    )


@pytest.mark.parametrize("clusters", [0, 20])
def test_more_than_most_is_an_error_and_no_answer(clusters):
    bank = NormalBank(torch.randn(2000, 6), clusters=clusters)
    queries = torch.randn(20, 6)
    total = int(bank.within(queries, 3.0).starts[-1])
    assert int(bank.within(queries, 3.0, most=total).starts[-1]) == total
    assert int(bank.within(queries, 3.0, most=None).starts[-1]) == total
    for most in (total - 1, 5000, 0):
        message = f"more rows are within the radius than most = {most}: narrow it"
        with pytest.raises(ValueError, match=message):
            bank.within(queries, 3.0, most=most)
    assert bank.within(queries + 100, 3.0, most=0).starts.tolist() == [0] * 21


def test_a_search_that_finds_too_much_stops_early():
    """Its millions of rows are not collected first."""
    shares = []
    queries, bank = torch.randn(400, 4), torch.randn(20_000, 4)
    with pytest.raises(ValueError, match="most = 10000"):
        ops.within(queries, bank, 100.0, most=10_000, progress=shares.append)
    assert all(share < 0.5 for share in shares)


@pytest.mark.parametrize(
    ("radius", "error", "message"),
    [
        (-1e-9, ValueError, r"radius must be at least 0, got -\S+ for query 0"),
        (torch.nan, ValueError, "radius must be at least 0, got nan for query 0"),
        (torch.tensor([1, 2, -3.0]), ValueError, r"at least 0, got -3\.0 for query 2"),
        (torch.ones(2), ValueError, r"one number or have shape \[3\] .*, got \[2\]"),
        (True, TypeError, "radius must be"),
        ("1", TypeError, "radius must be"),
        (1e39, ValueError, "radius must fit float32"),
    ],
)
def test_a_radius_that_cannot_be(radius, error, message):
    queries, bank = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(error, match=message):
        ops.within(queries, bank, radius)
    with pytest.raises(error, match=message):
        NormalBank(bank).within(queries, radius)


@pytest.mark.parametrize(("method", "bad"), [("plain", 0), ("screened", 3)])
def test_other_bad_input(method, bad):
    queries, bank = torch.randn(3, 4), torch.randn(90, 4)
    with ops.use_method(method):
        with pytest.raises(ValueError, match="must hold the groups of the queries and"):
            ops.within(queries, bank, 1.0, exclude_same_group=(torch.arange(3),))
        with pytest.raises(ValueError, match=r"most must be in \[0, "):
            ops.within(queries, bank, 1.0, most=-1)
        with pytest.raises(ValueError, match="metric must be 'euclidean' or 'cosine', got 'dot'"):
            ops.within(queries, bank, 1.0, metric="dot")
        bank[70, bad] = torch.nan
        with pytest.raises(ValueError, match=r"bank must be finite, .* row 70"):
            ops.within(queries, bank, 1.0)
        with pytest.raises(ValueError, match=r"bank must be finite, .* row 70"):
            ops.within(queries[:0], bank, 1.0)
        with pytest.raises(ValueError, match=r"queries must be finite, .* row 70"):
            ops.within(bank, queries, 1.0)


def test_a_gpu_is_told_where_to_go():
    elsewhere = torch.empty(3, 4, device="meta")
    with pytest.raises(NotImplementedError, match=r'CPU only, got meta.*bank\.to\("cpu"\)'):
        within_in_bank(elsewhere, elsewhere, torch.ones(3))
