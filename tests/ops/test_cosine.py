"""The cosine distance: as it is defined, to the bit, and near the true one at every scale."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awkward import KINDS, awkward
from patchsvdd_fast import NormalBank, ops
from patchsvdd_fast.ops import reference

SCALES = [1.0, 1e-45, 1e-38, 1e-30, 1e-20, 1e20, 1e30, 3e37]


def vectors_of(kind, rows, dim, scale, generator):
    """None of them zeros or beyond float32."""
    values = awkward(kind, rows, dim, generator)
    values = (values / values.abs().max().clamp(min=1e-42) * scale).float()
    values[values.abs().amax(dim=1) == 0] = scale
    return values


def true_cosine_distances(queries, bank):
    """1 - cos in float64, of vectors scaled to lengths near one first."""
    queries, bank = (v.double() / v.double().norm(dim=1, keepdim=True) for v in (queries, bank))
    return (queries[:, None] - bank).square().sum(dim=2) / 2


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    dim=st.sampled_from([1, 2, 7, 16, 33, 100]),
    rows=st.integers(1, 120),
    count=st.integers(0, 12),
    scales=st.tuples(st.sampled_from(SCALES), st.sampled_from(SCALES)),
    k=st.sampled_from([None, 1, 9]),
    seed=st.integers(0, 2**32),
)
def test_any_bank_gives_the_defined_distances(kind, dim, rows, count, scales, k, seed):
    generator = torch.Generator().manual_seed(seed)
    queries = vectors_of(kind, count, dim, scales[0], generator) if count else torch.empty(0, dim)
    bank = vectors_of(kind, rows, dim, scales[1], generator)
    queries[::2] = bank[torch.randint(rows, (len(queries[::2]),), generator=generator)]
    of_queries, of_bank = (torch.randint(3, (n,), generator=generator) for n in (count, rows))
    unit_queries, unit_bank = reference.normalise(queries), reference.normalise(bank)
    squared = reference.canonical_squared_distances(unit_queries, unit_bank)
    distances = (squared.double() / 2).float()
    torch.testing.assert_close(
        distances.double(), true_cosine_distances(queries, bank), rtol=1e-5, atol=1e-6
    )
    excluded = of_queries[:, None] == of_bank
    rank = squared.masked_fill(excluded, torch.inf)
    order = torch.argsort(rank, dim=1, stable=True)[:, : k or 1]
    at = torch.where(excluded.gather(1, order), -1, order)
    near = torch.where(at < 0, torch.inf, distances.gather(1, order))
    missing = (0, (k or 1) - order.shape[1])
    at = torch.nn.functional.pad(at, missing, value=-1)
    near = torch.nn.functional.pad(near, missing, value=torch.inf)
    if k is None:
        at, near = at[:, 0], near[:, 0]
    picked = torch.randint(rows, (count, 1), generator=generator)
    radii = distances.gather(1, picked)[:, 0]
    radii[::3] = torch.nextafter(radii[::3], torch.tensor(0.0))
    inside = reference.within(
        queries, bank, radii, exclude_same_group=(of_queries, of_bank), cosine=True
    )
    grown = NormalBank(bank[:1], groups=of_bank[:1], metric="cosine")
    if rows > 1:
        grown.add(bank[1:], of_bank[1:])
    banks = [NormalBank(bank, groups=of_bank, clusters=c, metric="cosine") for c in (0, 5)]
    for instruction_set in ops.instruction_sets():
        with ops.use_instruction_set(instruction_set):
            assert torch.equal(ops.normalise(bank), unit_bank)
            options = {"metric": "cosine", "exclude_same_group": (of_queries, of_bank)}
            found = [ops.nearest(queries, bank, k=k, **options)]
            found += [b.nearest(queries, k=k, exclude_same_group=of_queries) for b in banks]
            found.append(grown.nearest(queries, k=k, exclude_same_group=of_queries))
            for ours in found:
                assert torch.equal(ours[0], near)
                assert torch.equal(ours[1], at)
            found = [ops.within(queries, bank, radii, **options)]
            found += [b.within(queries, radii, exclude_same_group=of_queries) for b in banks]
            found.append(grown.within(queries, radii, exclude_same_group=of_queries))
            for ours in found:
                assert all(map(torch.equal, ours, inside))


def test_scaling_first_changes_nothing_else():
    """Of vectors whose squares are neither too large nor too small, the plain definition."""
    vectors = torch.randn(200, 37) * 10.0 ** torch.randint(-8, 9, (200, 1))
    zero = torch.zeros(1, 37)
    norms = reference.canonical_squared_distances(vectors, zero).double().sqrt().float()
    assert torch.equal(ops.normalise(vectors), vectors / norms)
    for exponent in (-90, -1, 70):
        assert torch.equal(ops.normalise(vectors * 2.0**exponent), ops.normalise(vectors))


@pytest.mark.parametrize("largest", [3.4e38, 1e30, 1.0, 1e-30, 1e-38])
def test_lengths_are_one(largest):
    vectors = torch.rand(50, 300) * 2 - 1
    normalised = ops.normalise(vectors * largest)
    lengths = normalised.double().norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=2e-7, atol=0)
    cosines = (normalised.double() * vectors.double()).sum(dim=1) / vectors.double().norm(dim=1)
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=1e-6, atol=0)


def test_the_smallest_and_the_largest_float_have_directions():
    smallest, largest = 2.0**-149, torch.finfo(torch.float32).max
    axes = ops.normalise([[smallest, 0.0], [0.0, -largest], [largest, smallest]])
    assert axes.tolist() == [[1, 0], [0, -1], [1, 0]]
    assert isinstance(axes, np.ndarray)
    both = ops.normalise(torch.tensor([[2.0**127, 2.0**127], [smallest, smallest]]))
    assert torch.equal(both[0], both[1])


def test_subnormals_are_kept_while_torch_flushes_them():
    queries, bank = torch.tensor([[1.0, 1e-22]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    expected = ops.nearest(queries, bank, metric="cosine", k=2)
    assert 0 < float(expected[0][0, 0]) < 1e-44
    tiny = torch.full((1, 3), 1e-40)
    direction = ops.normalise(tiny)
    torch.set_flush_denormal(True)
    try:
        found = ops.nearest(queries, bank, metric="cosine", k=2)
        assert all(map(torch.equal, found, expected))
        assert torch.equal(ops.normalise(tiny), direction)
    finally:
        torch.set_flush_denormal(False)


def test_opposite_and_equal_directions():
    distances, rows = ops.nearest(
        [[2.0, 0.0]], [[-5.0, 0.0], [0.0, 7.0], [9.0, 0.0], [1.0, 0.0]], k=4, metric="cosine"
    )
    assert distances.tolist() == [[0, 0, 1, 2]]
    assert rows.tolist() == [[2, 3, 1, 0]]


def test_a_vector_of_zeros_has_no_direction():
    values = torch.ones(6, 3)
    values[4] = 0
    for search, name in {
        lambda: ops.normalise(values): "vectors",
        lambda: ops.nearest(values, values[:2], metric="cosine"): "queries",
        lambda: ops.nearest(values[:2], values, metric="cosine"): "bank",
        lambda: ops.within(values[:2], values, 1, metric="cosine"): "bank",
        lambda: NormalBank(values, metric="cosine"): "embeddings",
        lambda: NormalBank(values[:2], metric="cosine").add(values): "embeddings",
        lambda: NormalBank(values[:2], metric="cosine").nearest(values): "queries",
        lambda: NormalBank(values[:2], metric="cosine").within(values, 1): "queries",
    }.items():
        with pytest.raises(ValueError, match=f"{name} must have a direction, .* in row 4"):
            search()
    values[4] = torch.inf
    with pytest.raises(ValueError, match=r"vectors must be finite, .* row 4"):
        ops.normalise(values)
    with pytest.raises(ValueError, match=r"queries must be finite, .* row 4"):
        ops.nearest(values, values[:2], metric="cosine")


@pytest.mark.parametrize("shape", [(3,), (3, 0), (1, 2, 3)])
def test_what_are_no_vectors_to_normalise(shape):
    with pytest.raises(ValueError, match="vectors must have"):
        ops.normalise(torch.ones(shape))
    assert ops.normalise(torch.ones(0, 3)).shape == (0, 3)


def test_normalise_is_a_torch_op():
    torch.library.opcheck(torch.ops.patchsvdd_fast.normalise, (torch.randn(5, 4),))
    queries, bank = torch.randn(7, 6), torch.randn(20, 6)
    compiled = torch.compile(
        lambda q: torch.ops.patchsvdd_fast.normalise(q) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(queries), ops.normalise(queries) * 2)
    half = ops.nearest(queries.half(), bank.half(), metric="cosine")
    wide = ops.nearest(queries.half().float(), bank.half().float(), metric="cosine")
    assert all(map(torch.equal, half, wide))


@pytest.mark.parametrize("clusters", [0, 12])
def test_a_bank_keeps_its_metric(tmp_path, clusters):
    rows = torch.randn(2000, 9)
    queries = torch.randn(40, 9)
    bank = NormalBank(rows[:1500], metric="cosine", clusters=clusters)
    assert bank.metric == "cosine"
    assert ", cosine, " in repr(bank)
    other = NormalBank(rows[1500:1900], metric="cosine")
    bank.merge(other, torch.arange(1500, 1900))
    bank.add(rows[1900:])
    assert torch.equal(bank.embeddings, ops.normalise(rows))
    bank.remove(torch.arange(100))
    bank.save(tmp_path / "bank.safetensors")
    opened = NormalBank.open(tmp_path / "bank.safetensors")
    assert opened.metric == "cosine"
    expected = ops.nearest(queries, rows[100:], metric="cosine")
    for searched in (bank, opened):
        assert all(map(torch.equal, searched.nearest(queries), expected))
    small = bank.coreset(50)
    assert small.metric == "cosine"
    euclidean = (2 * small.nearest(rows[100:])[0].double()).sqrt()
    assert float(euclidean.max()) == pytest.approx(small.covering_radius, rel=1e-6)


def test_metrics_are_not_mixed():
    rows = torch.randn(20, 4)
    bank = NormalBank(rows, metric="cosine")
    assert NormalBank(rows).metric == "euclidean"
    assert "metric" not in NormalBank(rows).state_dict()
    with pytest.raises(ValueError, match="metric 'euclidean' does not fit 'cosine'"):
        bank.merge(NormalBank(rows))
    with pytest.raises(ValueError, match=r"needs storage=torch\.float32"):
        NormalBank(rows, metric="cosine", storage=torch.float16)
    for search in (NormalBank, lambda values, metric: ops.nearest(values, values, metric=metric)):
        with pytest.raises(ValueError, match="metric must be 'euclidean' or 'cosine', got 'dot'"):
            search(rows, metric="dot")
    state = bank.state_dict()
    for metric, message in {
        torch.tensor([2]): "a bank's metric must be 1",
        torch.tensor([1, 1]): r"metric must be int64 \[1\]",
        torch.tensor([1.0]): r"metric must be int64 \[1\]",
    }.items():
        with pytest.raises(ValueError, match=message):
            NormalBank.from_state_dict(state | {"metric": metric})
    with pytest.raises(ValueError, match="a cosine bank's data must be float32"):
        NormalBank.from_state_dict(state | {"data": rows.half()})
