"""The search on a GPU against that on the CPU, bit for bit."""

import pytest
import torch

from equality import assert_same, to
from patchsvdd_fast import NormalBank, ops
from patchsvdd_fast.ops import reference

METHODS = ["plain", "screened", "auto"]


def check(device, queries, bank, method="auto", limit=None, groups=None, k=None):
    """The device's answer to CPU tensors is the CPU's."""
    expected = ops.nearest(queries, bank, exclude_same_group=groups, k=k)
    with ops.use_method(method), ops.use_workspace_limit(limit or 1 << 30):
        found = ops.nearest(
            *to(device, (queries, bank)),
            exclude_same_group=to(device, groups),
            k=k,
        )
    assert_same(found, expected, device)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [3, 24, 64])
def test_small_searches_give_the_reference(device, dim, method):
    queries, bank = torch.randn(40, dim), torch.randn(600, dim)
    bank[40] = bank[70] = bank[590] = queries[0]  # a tie within a segment and across two
    with ops.use_method(method):
        found = ops.nearest(*to(device, (queries, bank)))
    assert_same(found, reference.nearest(queries, bank), device)


@pytest.mark.parametrize("method", METHODS[:2])
def test_every_dimension(device, method):
    for dim in range(1, 1537):
        check(device, torch.randn(9, dim), torch.randn(270, dim), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [1, 5, 16, 33, 64, 65, 100, 128, 130, 384, 385, 768, 1536])
@pytest.mark.parametrize("count", [1, 300, 1000])
def test_dimensions_with_ties(device, count, dim, method):
    queries, bank = torch.randn(count, dim), torch.randn(3000, dim)
    bank[40] = bank[70] = bank[2900] = queries[0]
    bank[1000:1500] = bank[:500]
    check(device, queries, bank, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("count", "rows", "dim"),
    [
        (20_000, 50_000, 64),
        (3_249, 200_000, 64),
        (50_000, 20_000, 128),
        (2_000, 10_000, 1536),
        (300_000, 1_000, 8),  # more queries than one chunk takes
        (5, 300_000, 64),
        (70_001, 255, 4),
    ],
)
def test_larger_searches(device, count, rows, dim, method):
    queries, bank = torch.rand(count, dim), torch.rand(rows, dim)
    bank[rows // 2 :: 7] = bank[: len(bank[rows // 2 :: 7])]
    check(device, queries, bank, method)


@pytest.mark.parametrize("method", METHODS[:2])
def test_a_tiny_ball_far_from_the_origin(device, method):
    """As trained encoders leave their embeddings."""
    queries, bank = (3.58 / 8 + 0.00045 * torch.randn(rows, 64) for rows in (5_000, 100_000))
    check(device, queries, bank, method)


@pytest.mark.parametrize("limit", [1, 1 << 21, 1 << 24])
@pytest.mark.parametrize("dim", [20, 70])
def test_chunks(device, dim, limit):
    queries, bank = torch.randn(530, dim), torch.randn(8000, dim)
    bank[100] = bank[7500] = queries[300]
    check(device, queries, bank, "screened", limit)


def test_small_chunks(device):
    queries, bank = torch.randn(300, 20), torch.randn(600, 20)
    groups = torch.randint(3, (300,)), torch.randint(3, (600,))
    check(device, queries, bank, "screened", 1)
    check(device, queries, bank, "screened", 1, groups)


def outlier(queries, bank):
    bank[5] = 1e6
    queries[3] = -1e8
    return queries, bank


def too_large_to_screen(queries, bank):
    bank[7] = 3e38
    queries[0] = -3e38
    return queries, bank


CHANGES = {
    "tiny ball": lambda queries, bank: (0.4 + 1e-5 * queries, 0.4 + 1e-5 * bank),
    "outlier": outlier,
    "too large to screen": too_large_to_screen,
    "every distance overflows": lambda queries, bank: (queries * 0 + 3e38, bank * 0 - 3e38),
    "all equal": lambda queries, bank: (queries * 0 + 1, bank * 0 + 1),
    "subnormal": lambda queries, bank: (queries * 1e-40, bank * 1e-40),
    "squares underflow": lambda queries, bank: (queries * 1e-22, bank * 1e-22),
    "lattice": lambda queries, bank: (queries.round(), bank.round()),
    "two blobs": lambda queries, bank: (
        queries,
        bank + 1e4 * (torch.arange(len(bank))[:, None] % 2),
    ),
    "mixed scales": lambda queries, bank: (
        queries,
        bank * 10.0 ** torch.randint(-8, 8, (len(bank), 1)),
    ),
}


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("dim", [2, 20, 64])
def test_small_searches_of_difficult_values(device, dim, kind, method):
    queries, bank = CHANGES[kind](torch.randn(40, dim), torch.randn(600, dim))
    check(device, queries, bank, method)


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("dim", [6, 16, 64, 130])
def test_small_searches_of_float16_banks(device, dim, method):
    check(device, torch.randn(70, dim), torch.randn(900, dim).half(), method)


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [16, 24])
def test_small_searches_of_misaligned_memory(device, dim, stored, method):
    """Rows of a view that starts at an odd element are not aligned to 16 bytes."""
    queries, bank = torch.randn(30 * dim + 1), torch.randn(600 * dim + 3).to(stored)
    expected = ops.nearest(queries[1:].view(30, dim), bank[3:].view(600, dim))
    queries, bank = to(device, (queries, bank))
    with ops.use_method(method):
        found = ops.nearest(queries[1:].view(30, dim), bank[3:].view(600, dim))
    assert_same(found, expected, device)


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("count", [1, 40, 700])
@pytest.mark.parametrize("in_order", [True, False])
def test_small_searches_exclude_groups(device, count, method, in_order):
    queries, bank = torch.randn(count, 20), torch.randn(900, 20)
    rows = torch.randint(3, (900,))
    check(
        device,
        queries,
        bank,
        method,
        groups=(torch.randint(4, (count,)), rows.sort().values if in_order else rows),
    )
    nothing = torch.zeros(count, dtype=torch.int64), torch.zeros(900, dtype=torch.int64)
    check(device, queries, bank, method, groups=nothing)  # infinity and -1


@pytest.mark.parametrize("k", [2, 9, 32])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize(("count", "rows", "dim"), [(1, 20, 5), (40, 900, 24), (70, 3000, 130)])
def test_small_searches_for_k_neighbours(device, count, rows, dim, stored, k):
    queries, bank = torch.randn(count, dim), torch.randn(rows, dim).to(stored)
    bank[rows // 2 :] = bank[: rows - rows // 2].clone()  # ties within a share and across two
    groups = torch.randint(3, (count,)), torch.randint(3, (rows,))
    for exclude in (None, groups):
        check(device, queries, bank, groups=exclude, k=k)
        check(device, queries, bank, limit=1, groups=exclude, k=k)


@pytest.mark.parametrize(
    ("count", "rows", "dim", "k"),
    [
        (1, 300_000, 64, 9),  # many shares
        (3_249, 50_000, 176, 9),
        (20_000, 9_000, 64, 32),  # a single one
        (100, 20_000, 1536, 2),
    ],
)
def test_larger_searches_for_k_neighbours(device, count, rows, dim, k):
    queries, bank = torch.rand(count, dim), torch.rand(rows, dim)
    bank[rows // 2 :: 7] = bank[: len(bank[rows // 2 :: 7])]
    check(device, queries, bank, k=k)


@pytest.mark.parametrize("kind", CHANGES)
def test_small_searches_for_k_difficult_neighbours(device, kind):
    queries, bank = CHANGES[kind](torch.randn(40, 20), torch.randn(600, 20))
    check(device, queries, bank, k=9)


@pytest.mark.parametrize("method", METHODS[:2])
def test_inputs_that_are_not_contiguous(device, method):
    queries, bank = torch.randn(48, 500), torch.randn(700, 96)
    expected = ops.nearest(queries.t(), bank[:, ::2])
    queries, bank = to(device, (queries, bank))
    with ops.use_method(method):
        found = ops.nearest(queries.t(), bank[:, ::2])
        expanded = ops.nearest(queries.t()[:1].expand(300, 48), bank[:, ::2])
    assert_same(found, expected, device)
    assert torch.equal(expanded[0], found[0][:1].expand(300))


@pytest.mark.parametrize("method", METHODS[:2])
def test_answers_do_not_depend_on_batches_or_runs(device, method):
    queries, bank = to(device, (torch.rand(5_000, 64), torch.rand(20_000, 64)))
    with ops.use_method(method):
        whole = ops.nearest(queries, bank)
        for batch in (1, 257, 1000, 5_000):
            parts = [ops.nearest(part, bank) for part in queries[:2000].split(batch)]
            for ours, expected in zip(zip(*parts, strict=True), whole, strict=True):
                assert torch.equal(torch.cat(ours), expected[:2000])


@pytest.mark.parametrize("k", [None, 1, 13])
@pytest.mark.parametrize("clusters", [0, 20])
def test_cosine_distances(device, clusters, k):
    queries, bank = torch.randn(60, 24), torch.randn(5000, 24) * 1e25
    bank[2500:3000] = bank[:500]
    expected = ops.nearest(queries, bank, k=k, metric="cosine")
    on_device = to(device, (queries, bank))
    assert_same(ops.nearest(*on_device, k=k, metric="cosine"), expected, device)
    assert_same(ops.normalise(on_device[1]), ops.normalise(bank), device)
    searched = NormalBank(on_device[1], clusters=clusters, metric="cosine")
    assert_same(searched.nearest(on_device[0], k=k), expected, device)
    none_left = torch.zeros(60, dtype=torch.int64), torch.zeros(5000, dtype=torch.int64)
    found = ops.nearest(*on_device, k=k, metric="cosine", exclude_same_group=to(device, none_left))
    assert torch.isinf(found[0]).all()
    assert (found[1] == -1).all()


def test_within_is_for_the_cpu(device):
    if device.type == "cpu":
        pytest.skip("is about a GPU")
    rows = torch.randn(20, 4)
    bank = NormalBank(rows.to(device))
    with pytest.raises(NotImplementedError, match="CPU only"):
        bank.within(rows.to(device), 1.0)
    with pytest.raises(NotImplementedError, match="CPU only"):
        ops.within(bank.embeddings, bank.embeddings, 1.0)
    assert_same(bank.to("cpu").within(rows, 1.0), ops.within(rows, rows, 1.0), torch.device("cpu"))


@pytest.mark.parametrize("method", METHODS)
def test_no_queries(device, method):
    with ops.use_method(method):
        distances, indices = ops.nearest(*to(device, (torch.empty(0, 4), torch.rand(3, 4))))
    assert distances.shape == indices.shape == (0,)
    assert distances.device == indices.device == device


@pytest.mark.needs_card
@pytest.mark.parametrize("method", METHODS)
def test_more_than_two_to_the_31_elements(device, method):
    rows, dim = (2**31 + 2**16) // 256, 256
    needed = 4 * rows * dim * 4  # with what finding the row that holds NaN takes
    free, _ = torch.cuda.mem_get_info(device)
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} are free")
    bank = torch.zeros(rows, dim, device=device)
    bank[rows - 3] = 1.0
    query = torch.full((20, dim), 0.9, device=device)
    with ops.use_method(method):
        distances, indices = ops.nearest(query, bank)
    assert indices.tolist() == [rows - 3] * 20
    torch.testing.assert_close(distances, torch.full((20,), 1.6, device=device))
    bank[rows - 1, 5] = torch.nan
    with pytest.raises(ValueError, match=f"row {rows - 1}"):
        ops.nearest(query, bank)
