"""Kept codes of a bank: the canonical answer to the bit, with leading axes and without."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsvdd_fast import ops
from patchsvdd_fast.ops import _native, reference
from patchsvdd_fast.ops.checks import Groups
from patchsvdd_fast.ops.cpu_codes import MOST_DIMS, CodedRows, LeadingAxes, encode_rows
from patchsvdd_fast.ops.search import nearest_in_bank


def same(found, expected):
    return all(map(torch.equal, found, expected))


@settings(max_examples=60, deadline=None)
@given(
    dim=st.integers(1, 70),
    rows=st.integers(1, 300),
    count=st.integers(0, 80),
    scale=st.sampled_from([1e-42, 1e-22, 1.0, 1e14, 1e30]),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
    half=st.booleans(),
    threads=st.integers(1, 3),
    method=st.sampled_from(["auto", "plain", "screened"]),
    seed=st.integers(0, 2**32),
)
def test_kept_codes_change_no_bit(dim, rows, count, scale, offset, half, threads, method, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 9, (count + rows, dim), generator=generator)
    values = (values.double() * scale + offset * scale).float()
    queries, bank = values[:count], values[count:]
    if half:
        bank = bank.clamp(-6e4, 6e4).half()
    groups = Groups(torch.arange(count) % 3, torch.arange(rows) % 4)
    expected = reference.nearest(queries, bank.float())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in ops.instruction_sets():
            with ops.use_instruction_set(name), ops.use_method(method):
                coded = encode_rows(bank)
                assert same(nearest_in_bank(queries, coded), expected)
                assert same(
                    nearest_in_bank(queries, coded, groups=groups),
                    nearest_in_bank(queries, bank, groups=groups),
                )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dim", [64, 2048])  # blocks of 4,096 and of 256 rows
def test_several_blocks_and_any_number_of_threads(dim):
    rows = 2 * _native.cpu.code_block_rows(dim) + 70
    # Blocks of unlike scales, one of them too large to be encoded.
    bank = torch.randn(rows, dim) * torch.linspace(0.5, 30, rows)[:, None]
    bank[-3] = 1e16
    queries = bank[torch.randint(rows, (300,))] + 0.01 * torch.randn(300, dim)
    coded = encode_rows(bank)
    assert (coded.codes.scales == 0).tolist() == [False, False, True]
    with ops.use_method("plain"):
        expected = ops.nearest(queries, bank)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert same(encode_rows(bank).codes, coded.codes)
            for count in (1, 7, 300):
                found = nearest_in_bank(queries[:count], coded)
                assert same(found, [values[:count] for values in expected])
    finally:
        torch.set_num_threads(before)


def test_several_neighbours_and_rows_behind_the_coded_ones():
    bank, queries = torch.randn(300, 20), torch.randn(50, 20)
    expected = ops.nearest(queries, bank, k=5)
    some = encode_rows(bank[:200].contiguous())
    for coded, behind in ((some, bank[200:]), (encode_rows(bank), None)):
        found = nearest_in_bank(queries, coded, k=5, appended=behind)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_codes_rule_rows_out():
    """Rows whose codes put them far away are not looked at."""
    bank = torch.randn(4000, 32)
    coded = encode_rows(bank)
    queries = bank[:40] + 0.01
    found = nearest_in_bank(queries, coded)[1]
    assert torch.equal(found, torch.arange(40))
    # Nearer, but the codes are those of other rows; behind those that a search starts from.
    coded.data[2100:] = queries[0]
    with ops.use_method("screened"):
        assert torch.equal(nearest_in_bank(queries, coded)[1], found)


def test_leading_codes_rule_rows_out():
    """Rows whose leading codes put them far away are not looked at, not even their other codes."""
    bank = torch.randn(4000, 4) @ torch.randn(4, 130)
    coded = encode_rows(bank, some_axes(bank))
    queries = bank[:40] + 0.001
    assert torch.equal(nearest_in_bank(queries, coded)[1], torch.arange(40))
    other = encode_rows(queries[:1].expand(4000, 130).contiguous(), coded.leading_axes)
    coded.data[2100:] = queries[0]
    coded.codes.codes[2100 // 16 :] = other.codes.codes[2100 // 16 :]
    coded.codes.bias[2100:] = other.codes.bias[2100:]
    with ops.use_method("screened"):
        assert torch.equal(nearest_in_bank(queries, coded)[1], torch.arange(40))


def some_axes(vectors, axes=63, seed=0):
    """Leading axes that are any, about a mean that is near."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(vectors.shape[1], axes, generator=generator, dtype=torch.float64)
    return LeadingAxes.along(vectors[:5].float().mean(dim=0), torch.linalg.qr(directions)[0])


@settings(max_examples=40, deadline=None)
@given(
    dim=st.integers(63, 200),
    rows=st.integers(1, 300),
    count=st.integers(0, 80),
    scale=st.sampled_from([1e-42, 1e-22, 1.0, 1e13, 1e14, 1e18, 1e30]),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
    half=st.booleans(),
    method=st.sampled_from(["auto", "screened"]),
    k=st.sampled_from([None, 3, 20]),
    seed=st.integers(0, 2**32),
)
def test_leading_axes_change_no_bit(dim, rows, count, scale, offset, half, method, k, seed):
    generator = torch.Generator().manual_seed(seed)
    few = torch.randint(-8, 9, (5, dim), generator=generator)
    along = torch.randint(-3, 4, (count + rows, 5), generator=generator)
    values = ((along @ few).double() * scale + offset * scale).float()
    values += scale * torch.randint(-1, 2, values.shape, generator=generator)
    queries, bank = values[:count], values[count:]
    if half:
        bank = bank.clamp(-6e4, 6e4).half()
    groups = Groups(torch.arange(count) % 3, torch.arange(rows) % 4)
    for name in ops.instruction_sets():
        with ops.use_instruction_set(name), ops.use_method(method):
            coded = encode_rows(bank, some_axes(bank, seed=seed))
            assert coded.tensors()[-1] is coded.leading.error
            for own in (Groups(), groups):
                found = nearest_in_bank(queries, coded, groups=own, k=k)
                with ops.use_method("plain"):
                    assert same(found, nearest_in_bank(queries, bank, groups=own, k=k))


@pytest.mark.parametrize("dim", [64, 176, 1000])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e12])
def test_images_are_never_farther_apart_than_vectors(dim, scale):
    generator = torch.Generator().manual_seed(dim)
    few = torch.randn(1000, 3, generator=generator) @ torch.randn(3, dim, generator=generator)
    vectors = scale * (few + 0.001 * torch.randn(1000, dim, generator=generator) + 5)
    for name in ops.instruction_sets():
        with ops.use_instruction_set(name):
            images, errors = some_axes(vectors).images(vectors)
        apart = torch.cdist(images.double() / scale, images.double() / scale)
        most = torch.cdist(vectors.double() / scale, vectors.double() / scale) * (1 + 1e-5)
        most += (errors[:, None].double() + errors.double()) / scale
        assert bool((apart <= most).all())  # a million pairs
        assert float(errors.max()) < 0.02 * float(vectors.norm(dim=1).max())
        # The axes are any, so what they leave out is most of a vector; its length is kept.
        lengths = (vectors - some_axes(vectors).mean).double().norm(dim=1)
        torch.testing.assert_close(images.double().norm(dim=1), lengths, rtol=1e-4, atol=0)


def test_what_are_no_leading_axes():
    with pytest.raises(ValueError, match="must be orthonormal, their products are off by"):
        LeadingAxes.along(torch.zeros(70), torch.randn(70, 63))
    with pytest.raises(ValueError, match="must be 64 n - 1 axes, got 62"):
        LeadingAxes.along(torch.zeros(70), torch.eye(70)[:, :62])


def test_memory_is_about_a_quarter_of_the_bank():
    bank = torch.randn(20_000, 176)
    coded = encode_rows(bank)
    assert coded.data.data_ptr() == bank.data_ptr()
    assert 20_000 * (176 + 4) <= coded.code_bytes <= 1.02 * 20_000 * (176 + 4)


@pytest.fixture(scope="module")
def coded():
    generator = torch.Generator().manual_seed(1)
    bank = torch.randn(4096 + 10, 7, generator=generator)
    bank[-1] = 1e16
    arrays = encode_rows(bank)
    assert (arrays.codes.scales == 0).tolist() == [False, True]
    return arrays


def test_what_cannot_be_encoded():
    for embeddings in (torch.rand(3), torch.rand(0, 4), torch.rand(2, MOST_DIMS + 1)):
        with pytest.raises(ValueError, match="to encode must have shape"):
            encode_rows(embeddings)
    with pytest.raises(ValueError, match="on the CPU, got torch"):
        encode_rows(torch.rand(3, 4).double())
    assert isinstance(encode_rows(torch.rand(1, MOST_DIMS)), CodedRows)


def test_bad_queries_are_named(coded):
    with pytest.raises(ValueError, match=r"queries must have shape \[Q, 7\]"):
        nearest_in_bank(torch.rand(2, 8), coded)
    with pytest.raises(ValueError, match="queries must be finite, got NaN or infinity in row 1"):
        nearest_in_bank(torch.tensor([[0.0] * 7, [torch.inf] * 7]), coded)
    assert nearest_in_bank(torch.empty(0, 7), coded)[0].shape == (0,)


def test_opcheck_and_compilation(coded):
    op = torch.ops.patchsvdd_fast.nearest_in_codes
    queries, groups = torch.rand(9, 7), (torch.arange(9), torch.arange(4106), 1)
    torch.library.opcheck(op, (queries, coded.tensors()))
    torch.library.opcheck(op, (queries, coded.tensors(), *groups))
    compiled = torch.compile(
        lambda q: nearest_in_bank(q, coded), fullgraph=True, backend="aot_eager"
    )
    assert same(compiled(queries), nearest_in_bank(queries, coded))
