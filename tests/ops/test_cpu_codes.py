"""Kept codes of a bank: the canonical answer to the bit, and forged codes are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsvdd_fast import ops
from patchsvdd_fast.ops import _native, reference
from patchsvdd_fast.ops.checks import Groups
from patchsvdd_fast.ops.cpu_codes import MOST_DIMS, CodedRows, encode_rows
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
                coded.check()
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
    assert (coded.scales == 0).tolist() == [False, False, True]
    with ops.use_method("plain"):
        expected = ops.nearest(queries, bank)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert same(encode_rows(bank)[1:], coded[1:])
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
    bank = torch.randn(1000, 32)
    coded = encode_rows(bank)
    queries = bank[:40] + 0.01
    found = nearest_in_bank(queries, coded)[1]
    assert torch.equal(found, torch.arange(40))
    coded.data[500:] = queries[0]  # nearer, but the codes are those of other rows
    with ops.use_method("screened"):
        assert torch.equal(nearest_in_bank(queries, coded)[1], found)


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
    assert (arrays.scales == 0).tolist() == [False, True]
    return arrays


def with_value(name, index, value):
    def change(arrays):
        changed = getattr(arrays, name).clone()
        changed.view(-1)[index] = value
        return {name: changed}

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda a: {"data": a.data[0]}, "data must have shape"),
        (lambda a: {"data": a.data[:0]}, "data must have shape"),
        (lambda a: {"data": a.data.repeat(1, 600)}, r"1 <= D <= 4096, got \[4106, 4200\]"),
        (lambda a: {"data": a.data.double()}, "data must be contiguous torch.float32"),
        (lambda a: {"data": a.data[:4000]}, r"codes must have shape \[252, 2, 16, 4\]"),
        (lambda a: {"data": a.data[:, :3].contiguous()}, "codes must have shape"),
        (lambda a: {"codes": a.codes.int()}, "codes must be contiguous torch.int8"),
        (lambda a: {"codes": a.codes[:-1]}, "codes must have shape"),
        (lambda a: {"codes": a.codes.transpose(1, 2)}, "codes must be contiguous"),
        (lambda a: {"bias": a.bias[:-64]}, "bias must have shape"),
        (lambda a: {"bias": a.bias.long()}, "bias must be contiguous torch.int32"),
        (lambda a: {"centres": a.centres[:1]}, "centres must have shape"),
        (lambda a: {"centres": a.centres.half()}, "centres must be contiguous torch.float32"),
        (lambda a: {"scales": a.scales[:, None]}, "scales must have shape"),
        (lambda a: {"slack": a.slack[:0]}, "slack must have shape"),
        (lambda a: {"slack": a.slack.to("meta")}, "slack must be on the CPU"),
        (with_value("centres", 0, torch.nan), "centres must be in"),
        (with_value("centres", 3, -torch.inf), "centres must be in"),
        (with_value("scales", 0, torch.nan), "scales must be in"),
        (with_value("scales", 0, -1.0), "scales must be in"),
        (with_value("scales", 0, 1e-38), "scales must be in"),
        (with_value("scales", 0, 0.0), "bias does not fit"),  # its rows have codes
        (with_value("scales", 1, 1.0), "bias does not fit"),  # its rows have none
        (with_value("slack", 0, torch.nan), "slack must be in"),
        (with_value("slack", 0, -1e-9), "slack must be in"),
        (with_value("bias", 0, 2**31 - 1), "bias does not fit"),
        (with_value("bias", 0, -(2**31)), "bias does not fit"),
        (with_value("bias", -1, 0), "bias does not fit"),
        (with_value("codes", -1, 1), "bias does not fit"),
    ],
)
def test_forged_codes_are_refused(coded, change, complaint):
    with pytest.raises(ValueError, match=complaint):
        coded._replace(**change(coded)).check()


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
    torch.library.opcheck(op, (queries, list(coded)))
    torch.library.opcheck(op, (queries, list(coded), *groups))
    compiled = torch.compile(
        lambda q: nearest_in_bank(q, coded), fullgraph=True, backend="aot_eager"
    )
    assert same(compiled(queries), nearest_in_bank(queries, coded))
