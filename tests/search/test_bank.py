"""Banks, clustered and plain: exact for any embeddings, also after changes, saving and loading."""

import mmap
import os
import signal
import threading
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awkward import KINDS, awkward
from patchsvdd_fast import NormalBank, nearest, ops
from patchsvdd_fast.ops import reference
from patchsvdd_fast.ops import search as search_ops
from patchsvdd_fast.ops.checks import Groups
from patchsvdd_fast.search import cpu_choice
from patchsvdd_fast.search.centroids import default_clusters
from patchsvdd_fast.search.cpu_clusters import build_clusters


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    dim=st.sampled_from([1, 2, 7, 16, 33, 64, 100]),
    rows=st.integers(1, 300),
    count=st.integers(0, 24),
    clusters=st.integers(1, 40),
    half=st.booleans(),
    k=st.sampled_from([None, 1, 2, 9, 32]),
    seed=st.integers(0, 2**32),
)
def test_any_bank_gives_the_canonical_answer(kind, dim, rows, count, clusters, half, k, seed):
    check_bank(kind, dim, rows, count, clusters, half, k, seed)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    dim=st.integers(1, 300),
    rows=st.integers(1, 3000),
    count=st.integers(0, 40),
    clusters=st.integers(1, 300),
    half=st.booleans(),
    k=st.sampled_from([None, 1, 2, 9, 32]),
    seed=st.integers(0, 2**32),
)
def test_any_larger_bank_gives_the_canonical_answer(
    kind, dim, rows, count, clusters, half, k, seed
):
    check_bank(kind, dim, rows, count, clusters, half, k, seed)


def check_bank(kind, dim, rows, count, clusters, half, k, seed):
    generator = torch.Generator().manual_seed(seed)
    values = awkward(kind, rows + count, dim, generator)
    bank, queries = values[count:].contiguous(), values[:count].contiguous()
    storage = torch.float16 if half and kind not in ("outlier", "mixed scales") else torch.float32
    stored = bank.to(storage)
    expected = reference.nearest(queries, stored.float(), k=k)
    banks = [NormalBank(bank, clusters=c, storage=storage) for c in (0, clusters)]
    grown = NormalBank(bank[: (rows + 1) // 2], clusters=clusters, storage=storage)
    if rows > 1:
        grown.add(bank[(rows + 1) // 2 :])
    for instruction_set in ops.instruction_sets():
        with ops.use_instruction_set(instruction_set):
            for searched in (stored, *banks, grown):
                find = searched.nearest if isinstance(searched, NormalBank) else None
                found = nearest(queries, searched, k=k) if find is None else find(queries, k=k)
                assert torch.equal(found[0], expected[0]), (instruction_set, searched)
                assert torch.equal(found[1], expected[1]), (instruction_set, searched)


@pytest.fixture(scope="module")
def patches():
    """Embeddings like those of patches: smooth over the grid, little spread, far from zero."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.randn(6, 40, generator=generator)
    field = torch.randn(12, 6, 9, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(field, size=(25, 25), mode="bilinear")
    noise = 0.05 * torch.randn(12, 25, 25, 40, generator=generator)
    return 0.4 + 0.01 * (torch.einsum("nkij,kd->nijd", smooth, basis) + noise)


@pytest.fixture(scope="module")
def queries(patches):
    generator = torch.Generator().manual_seed(4)
    return patches[:2] + 0.0005 * torch.randn(2, 25, 25, 40, generator=generator)


def test_default_clusters_grow_with_the_bank():
    assert default_clusters(100) == 0
    assert default_clusters(10_000) == 80
    assert default_clusters(1_000_000) == 800
    assert default_clusters(10**9) == 4096


def test_rows_along_few_axes_are_clustered_and_noise_is_not():
    few_axes = torch.randn(40_000, 3) @ torch.randn(3, 64)
    assert NormalBank(few_axes).num_clusters > 50
    assert "clusters" in repr(NormalBank(few_axes))
    assert NormalBank(torch.rand(8000, 64)).num_clusters == 0


@pytest.mark.parametrize(("slower", "clustered"), [("clusters", False), ("brute force", True)])
def test_what_a_trial_finds_slower_is_not_done(monkeypatch, patches, slower, clustered):
    name = "search_clusters" if slower == "clusters" else "search_codes"
    search = getattr(cpu_choice, name)

    def slow(*arguments, **named):
        time.sleep(0.2)
        return search(*arguments, **named)

    monkeypatch.setattr(cpu_choice, name, slow)
    assert (NormalBank(patches).num_clusters > 0) == clustered


def test_a_trial_leaves_out_the_groups_of_its_queries():
    picked = torch.tensor([0, 7, 11])
    groups = Groups(of_bank=torch.tensor([5, 6, 7, 5]), rows_per_group=3)
    own = cpu_choice.own_groups(picked, 12, groups)
    assert own.of_queries.tolist() == [5, 7, 5]
    assert own.rows_per_group == 3
    # A group that is most of the bank would leave too little.
    groups = Groups(of_bank=torch.tensor([5, 5, 7, 5]), rows_per_group=3)
    alone = cpu_choice.own_groups(picked, 12, groups)
    assert alone.of_queries.tolist() == [0, 7, 11]
    assert alone.of_bank.tolist() == list(range(12))
    # Rows without images: those about a query, which may be of its image.
    about = cpu_choice.own_groups(picked, 48, Groups(of_bank=torch.arange(48)))
    assert about.of_queries.tolist() == [0, 1, 1]
    assert about.of_bank.tolist() == [row // 6 for row in range(48)]


def test_answers_do_not_depend_on_clusters_threads_batches_or_order(patches, queries):
    flat = queries.flatten(0, 2)
    expected = nearest(flat, patches.flatten(0, 2))
    threads = torch.get_num_threads()
    order = torch.randperm(len(flat))
    try:
        for clusters in (None, 0, 1, 3, 500):
            bank = NormalBank(patches, clusters=clusters, seed=clusters or 0)
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                for batch in (1000, 2000):
                    found = [bank.nearest(part) for part in flat[order].split(batch)]
                    distances, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
                    assert torch.equal(distances, expected[0][order])
                    assert torch.equal(rows, expected[1][order])
    finally:
        torch.set_num_threads(threads)


def test_clustering_is_reproducible(patches):
    rows = patches.flatten(0, 2)
    (first, _), (again, _) = build_clusters(rows, 64, seed=5), build_clusters(rows, 64, seed=5)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    other, _ = build_clusters(rows, 64, seed=6)
    assert not torch.equal(first.ids, other.ids)


def test_ties_go_to_the_lowest_row_across_clusters():
    """A query half way between two blobs is as near to a row of each."""
    bank = torch.zeros(600, 3)
    bank[:, 0] = torch.arange(600) % 2 * 2.0 - 1
    bank[:, 1] = torch.arange(600) // 2 % 5
    queries = torch.zeros(5, 3)
    queries[:, 1] = torch.arange(5)
    found = NormalBank(bank, clusters=200)  # so that each distinct row is one
    assert found.num_clusters == 10
    distances, rows = found.nearest(queries)
    assert torch.equal(rows, torch.arange(5) * 2)
    assert torch.equal(distances, torch.ones(5))


@pytest.mark.parametrize("clusters", [0, 50])
def test_grouped_exclusion(patches, clusters):
    """Each image against all others, as if its own rows were not there."""
    bank = NormalBank(patches, clusters=clusters)
    own = torch.arange(12)[:, None, None].expand(12, 25, 25)
    distances, rows = bank.nearest(patches, exclude_same_group=own)
    for image in range(12):
        others = torch.cat([patches[:image], patches[image + 1 :]]).flatten(0, 2)
        expected, at = nearest(patches[image].flatten(0, 1), others)
        assert torch.equal(distances[image].flatten(), expected)
        at = at + (at >= image * 625) * 625
        assert torch.equal(rows[image].flatten(), at)


@pytest.mark.parametrize("instruction_set", ops.instruction_sets())
def test_exclusion_by_rows(instruction_set):
    queries, bank = torch.randn(40, 9), torch.randn(200, 9)
    query_groups, bank_groups = torch.randint(3, (40,)), torch.randint(3, (200,))
    squared = reference.canonical_squared_distances(queries, bank)
    squared[query_groups[:, None] == bank_groups] = torch.inf
    with ops.use_instruction_set(instruction_set):
        found = nearest(queries, bank, exclude_same_group=(query_groups, bank_groups))
        banked = NormalBank(bank, groups=bank_groups, clusters=7).nearest(
            queries, exclude_same_group=query_groups
        )
    for distances, rows in (found, banked):
        assert torch.equal(rows, squared.argmin(dim=1))
        assert torch.equal(distances, squared.amin(dim=1).double().sqrt().float())
    nothing = nearest(queries, bank, exclude_same_group=(query_groups * 0, bank_groups * 0))
    assert torch.isinf(nothing[0]).all()
    assert (nothing[1] == -1).all()


def test_source_names_image_and_position(patches, queries):
    bank = NormalBank(patches, clusters=20)
    _, rows = bank.nearest(queries)
    where = bank.source(rows)
    assert where.shape == (2, 25, 25, 3)
    image, i, j = where.unbind(-1)
    assert torch.equal(patches[image, i, j], bank.embeddings[rows])
    assert bank.source(torch.tensor([625 * 3 + 25 * 4 + 5])).tolist() == [[3, 4, 5]]
    assert bank.source(torch.tensor([-1])).tolist() == [[-1, -1, -1]]
    with pytest.raises(ValueError, match=r"rows must be in \[-1, 7500\)"):
        bank.source(torch.tensor([7500]))


@pytest.mark.parametrize("clusters", [0, 20])
@pytest.mark.parametrize("storage", [torch.float32, torch.float16])
def test_rows_are_read_by_number(patches, clusters, storage):
    """Those that were appended and lie beside the others included."""
    bank = NormalBank(patches[:10], clusters=clusters, storage=storage)
    numbers = torch.randint(6250, (40, 3), generator=torch.Generator().manual_seed(0))
    assert bank.embeddings_of(numbers[:0]).shape == (0, 3, 40)
    assert torch.equal(bank.embeddings_of(numbers), bank.embeddings[numbers])
    bank.add(patches[10:11])
    assert bank._index.appended is not None
    numbers = torch.tensor([6874, 0, 6250, 6249])
    assert torch.equal(bank.embeddings_of(numbers), bank.embeddings[numbers])
    expected = patches[:11].flatten(0, 2)[numbers].to(storage)
    assert torch.equal(bank.embeddings_of(numbers.tolist()), expected)
    bank.remove([0])
    assert torch.equal(bank.embeddings_of(numbers[1::2]), bank.embeddings[numbers[1::2]])
    for number in (-1, 6250):
        with pytest.raises(ValueError, match=r"rows must be in \[0, 6250\)"):
            bank.embeddings_of([number])


@pytest.mark.parametrize("clusters", [0, 30])
def test_add_remove_merge(patches, queries, clusters):
    bank = NormalBank(patches[:4], clusters=clusters)
    bank.add(patches[4:8])
    bank.add(patches[8:10], groups=torch.tensor([70, 71]))
    bank.remove(torch.tensor([1, 70]))
    other = NormalBank(patches[10:], groups=torch.tensor([80, 81]))
    bank.merge(other)
    kept = [0, 2, 3, 4, 5, 6, 7, 9, 10, 11]
    fresh = NormalBank(patches[kept])
    assert torch.equal(bank.embeddings, fresh.embeddings)
    assert bank.groups.tolist() == [0, 2, 3, 4, 5, 6, 7, 71, 80, 81]
    for ours, theirs in zip(bank.nearest(queries), fresh.nearest(queries), strict=True):
        assert torch.equal(ours, theirs)
    _, rows = bank.nearest(queries, exclude_same_group=torch.full((2, 25, 25), 80))
    assert not (bank.source(rows)[..., 0] == 8).any()
    with pytest.raises(ValueError, match="group 70 is not in the bank"):
        bank.remove(torch.tensor([70]))
    with pytest.raises(ValueError, match="leave the bank empty"):
        bank.remove(bank.groups)
    with pytest.raises(ValueError, match=r"grid \[25, 25\] and D = 40.*grid \[1, 1\]"):
        bank.add(torch.rand(3, 40))
    assert len(bank) == 6250


@pytest.mark.parametrize("clusters", [0, 30])
def test_merged_rows_may_get_other_groups(patches, queries, clusters):
    """As where both banks count their groups from 0; the other bank stays as it is."""
    bank, other = (NormalBank(part, clusters=clusters) for part in (patches[:3], patches[3:5]))
    bank.merge(other, torch.tensor([3, 4]))
    fresh = NormalBank(patches[:5], clusters=0)
    assert torch.equal(bank.groups, fresh.groups)
    own = torch.full(queries.shape[:-1], 4)
    for some, others in zip(
        bank.nearest(queries, exclude_same_group=own),
        fresh.nearest(queries, exclude_same_group=own),
        strict=True,
    ):
        assert torch.equal(some, others)
    assert other.groups.tolist() == [0, 1]
    bank.merge(bank, torch.arange(5) + 5)
    assert torch.equal(bank.embeddings, torch.cat([fresh.embeddings] * 2))
    before = bank.embeddings
    with pytest.raises(ValueError, match=r"groups must have shape \[2\], got \[3\]"):
        bank.merge(other, torch.arange(3))
    with pytest.raises(TypeError, match="groups must be int64"):
        bank.merge(other, torch.rand(2))
    assert torch.equal(bank.embeddings, before)
    assert bank.groups.tolist() == list(range(10))


def test_a_bank_that_grew_is_clustered_anew(patches):
    bank = NormalBank(patches[:4], clusters=10)
    before = bank._index.clusters.centroids
    bank.add(patches[4:6])
    assert torch.equal(bank._index.clusters.centroids, before)
    bank.add(patches[6:])
    assert not torch.equal(bank._index.clusters.centroids, before)


def test_state_that_is_written_over_makes_no_search_read_elsewhere():
    """As a file is that somebody copies another over, while it is mapped and searched."""
    state = NormalBank(torch.randn(2000, 16), clusters=20).state_dict()
    bank = NormalBank.from_state_dict(state)
    queries = torch.randn(50, 16)
    found = bank.nearest(queries)
    for name in ("starts", "blocks"):
        state[name].fill_(2**40)
    again = bank.nearest(queries)
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])


@pytest.mark.parametrize("clusters", [0, 30])
@pytest.mark.parametrize("storage", [torch.float32, torch.float16])
def test_state_is_opened_from_a_mapped_file(patches, queries, tmp_path, clusters, storage):
    bank = NormalBank(patches, clusters=clusters, storage=storage)
    path = tmp_path / "bank.safetensors"
    safetensors.torch.save_file(bank.state_dict(), path)
    state = safetensors.torch.load_file(path)
    opened = NormalBank.from_state_dict(state)
    assert (
        opened._index.data.data_ptr() == state["data"].data_ptr()
    )  # the file's memory, not a copy
    assert opened.num_clusters == bank.num_clusters
    for ours, theirs in zip(opened.nearest(queries), bank.nearest(queries), strict=True):
        assert torch.equal(ours, theirs)
    opened.add(patches[:1])
    assert len(opened) == len(bank) + 625


def test_states_that_do_not_fit_are_refused(patches):
    state = NormalBank(patches, clusters=30).state_dict()
    for name, value, message in [
        ("ids", state["ids"] + 1, "do not cover"),
        ("starts", state["starts"] + 1, "do not cover"),
        ("blocks", state["blocks"].flip(0), "do not cover"),
        ("codes", state["codes"][:-1], "codes must have shape"),
        ("scales", state["scales"].double(), "scales must be contiguous"),
        ("groups", state["groups"][:-1], "11 groups"),
        ("ids", state["ids"] * 0, "do not cover"),
        ("centroids", state["centroids"] * torch.nan, "do not cover"),
        ("centroids", state["centroids"][:, :0], "must have shape"),
        ("codes", state["codes"].flatten(), "dimensions"),
        ("stretch", state["stretch"] * 0, "stretch"),
    ]:
        with pytest.raises(ValueError, match=message):
            NormalBank.from_state_dict(state | {name: value})
    with pytest.raises(ValueError, match="not a bank: 'centroids'"):
        NormalBank.from_state_dict({k: v for k, v in state.items() if k != "centroids"})
    plain = NormalBank(patches, clusters=0).state_dict()
    plain["data"] = plain["data"].clone()
    plain["data"][7, 1] = torch.nan
    with pytest.raises(ValueError, match="data must be finite, got NaN or infinity in row 7"):
        NormalBank.from_state_dict(plain)
    with pytest.raises(ValueError, match=r"data must have shape \[M, D\]"):
        NormalBank.from_state_dict(plain | {"data": plain["data"][:, 0]})


def test_a_bank_is_checked_when_made_and_not_at_each_search(patches, queries, monkeypatch):
    bank = NormalBank(patches, clusters=0)
    checked = []
    monkeypatch.setattr(search_ops, "check_finite_rows", lambda name, _: checked.append(name))
    bank.nearest(queries)
    assert checked == ["queries"]
    nearest(queries.flatten(0, 2), bank.embeddings)  # sees by the distances that all is finite
    assert checked == ["queries", "queries"]
    nearest(queries.flatten(0, 2), torch.full_like(bank.embeddings, torch.inf))
    assert checked == ["queries", "queries", "queries", "bank"]


def test_half_storage_rounds_once(patches, queries):
    bank = NormalBank(patches, storage=torch.float16, clusters=60)
    assert bank.embeddings.dtype == torch.float16
    expected = nearest(queries.flatten(0, 2), patches.flatten(0, 2).half().float())
    found = bank.nearest(queries.flatten(0, 2))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    with pytest.raises(ValueError, match="too large for float16"):
        NormalBank(torch.full((3, 2), 1e6), storage=torch.float16)


def test_numpy_in_numpy_out(patches, queries):
    bank = NormalBank(patches.numpy(), clusters=20)
    expected = bank.nearest(queries)
    for found in (
        bank.nearest(queries.numpy()),
        nearest(queries.flatten(0, 2).numpy(), patches.flatten(0, 2).numpy()),
    ):
        assert all(isinstance(values, np.ndarray) for values in found)
        assert np.array_equal(found[0].ravel(), expected[0].numpy().ravel())
        assert np.array_equal(found[1].ravel(), expected[1].numpy().ravel())


def test_compiles_to_a_full_graph_and_passes_opcheck(patches, queries):
    bank = NormalBank(patches, clusters=20)
    compiled = torch.compile(bank.nearest, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(queries), bank.nearest(queries), strict=True):
        assert torch.equal(ours, theirs)
    torch.library.opcheck(
        torch.ops.patchsvdd_fast.nearest_in_clusters,
        (queries.flatten(0, 2)[:20], list(bank._index.clusters), bank._index.stretch),
    )


def test_strided_queries_and_banks(patches, queries):
    bank = NormalBank(patches.permute(0, 2, 1, 3), clusters=20)
    found = bank.nearest(queries.permute(1, 0, 2, 3))
    expected = NormalBank(patches.permute(0, 2, 1, 3).contiguous()).nearest(
        queries.permute(1, 0, 2, 3).contiguous()
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert bank.nearest(torch.empty(0, 7, 40))[0].shape == (0, 7)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: NormalBank(p[0]), ValueError, r"\[M, D\] or \[N, I, J, D\]"),
        (lambda p: NormalBank(p > 0), TypeError, "embeddings must be real numbers, got bool"),
        (lambda p: NormalBank([["1.0"]]), TypeError, "embeddings must be real numbers, got <U3"),
        (lambda p: NormalBank([[1.0], [2.0, 3.0]]), ValueError, "rows of equal length"),
        (lambda p: NormalBank([[1e39]]), ValueError, r"must fit float32, got .* 1e\+39"),
        (lambda p: NormalBank(7), TypeError, "embeddings must be a torch tensor"),
        (lambda p: NormalBank(p, groups=torch.arange(3)), ValueError, r"groups must have shape"),
        (lambda p: NormalBank(p, clusters=-1), ValueError, "clusters"),
        (lambda p: NormalBank(p, storage=torch.int8), ValueError, "storage"),
        (
            lambda p: NormalBank(torch.tensor([[0.0], [torch.nan]]).expand(2, 50)),
            ValueError,
            "embeddings must be finite, got NaN or infinity in row 1",
        ),
        (
            lambda p: NormalBank(p, clusters=9).nearest(torch.full((3, 40), torch.inf)),
            ValueError,
            "queries must be finite, got NaN or infinity in row 0",
        ),
        (
            lambda p: NormalBank(p).nearest(p[:, 0, 0], exclude_same_group=torch.arange(3)),
            ValueError,
            r"shape \[12\] to match the queries, got \[3\]",
        ),
        (
            lambda p: nearest(p[0, 0], p[0, 1], exclude_same_group=(torch.arange(25), [1])),
            ValueError,
            r"bank_groups must have shape \[25\], got \[1\]",
        ),
        (
            lambda p: nearest(p[0, 0], p[0, 1], exclude_same_group=(torch.ones(25), p[0, 0])),
            TypeError,
            "query_groups must be int64",
        ),
    ],
)
def test_bad_input_is_named(patches, call, error, message):
    with pytest.raises(error, match=message):
        call(patches)


@pytest.mark.parametrize("clusters", [0, 40])
def test_progress_is_reported(clusters):
    rows = torch.rand(60_000, 64)
    bank = NormalBank(rows, clusters=clusters)
    shares = []
    bank.nearest(torch.rand(60_000, 64), progress=shares.append)
    assert shares
    assert shares == sorted(shares)
    assert 0 < shares[0] <= shares[-1] <= 1

    def give_up(share):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        bank.nearest(torch.rand(60_000, 64), progress=give_up)


@pytest.mark.parametrize("clusters", [0, 40])
def test_interrupted_by_ctrl_c(clusters):
    bank = NormalBank(torch.rand(200_000, 64), clusters=clusters)
    queries = torch.rand(300_000, 64)
    sent = []

    def interrupt():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.3, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        bank.nearest(queries)
    # The whole search would take ten seconds or more; what is promised is one.
    assert time.monotonic() - sent[0] < 2


def test_squares_that_underflow_rule_nothing_out():
    """Coordinates whose squares are subnormal: residuals of codes vanish when squared."""
    s = 4e-23
    bank = torch.full((128, 16), 127 * s)
    bank[1::2] *= -1
    bank[0], bank[126], bank[127] = 6.75 * s, 0.45 * s, -0.45 * s
    queries = torch.full((8, 16), 3.55 * s)
    expected = reference.nearest(queries, bank)
    assert expected[1].tolist() == [126] * 8
    for found in (nearest(queries, bank), NormalBank(bank, clusters=8).nearest(queries)):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_torch_defaults_do_not_matter(patches, queries):
    rows, flat = patches.flatten(0, 2), queries.flatten(0, 2)
    expected = nearest(flat, rows)
    torch.set_default_dtype(torch.bfloat16)
    try:
        bank = NormalBank(rows, clusters=60)
        assert NormalBank(rows).dim == 40  # with a trial
        opened = NormalBank.from_state_dict(bank.state_dict())
        found = [searched.nearest(flat) for searched in (bank, opened)]
    finally:
        torch.set_default_dtype(torch.float32)
    for distances, indices in found:
        assert torch.equal(distances, expected[0])
        assert torch.equal(indices, expected[1])


@pytest.mark.parametrize(("rows", "clusters"), [(1, 20), (1500, 0)])
def test_huge_rows_are_added_and_searched(patches, queries, rows, clusters):
    bank = NormalBank(patches.flatten(0, 2), clusters=20)
    bank.add(torch.full((rows, 40), 3e38))
    assert bank.num_clusters == clusters
    flat = torch.cat([queries.flatten(0, 2)[:9], torch.full((1, 40), 2e38)])
    for ours, theirs in zip(bank.nearest(flat), nearest(flat, bank.embeddings), strict=True):
        assert torch.equal(ours, theirs)


def test_more_than_two_to_the_31_elements():
    """Rows of zeros that take up no memory, and one far down that is not zero."""
    rows, dim = (2**31 + 2**16) // 256, 256
    size = rows * dim * 4
    zeros = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    bank = torch.frombuffer(zeros, dtype=torch.float32).view(rows, dim)
    bank[rows - 3] = 1.0
    query = torch.full((1, dim), 0.9)
    distances, indices = nearest(query, bank)
    assert indices.tolist() == [rows - 3]
    torch.testing.assert_close(distances, torch.tensor([1.6]))
    bank[rows - 1, 5] = torch.nan
    with pytest.raises(ValueError, match=f"row {rows - 1}"):
        nearest(query, bank)


@pytest.mark.parametrize("dim", [513, 1200])
def test_wide_embeddings_along_few_axes_are_projected(dim):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5000, 20, generator=generator) @ torch.randn(20, dim, generator=generator)
    rows += 0.01 * torch.randn(5000, dim, generator=generator) + 3
    arrays, stretch = build_clusters(rows, 40)
    assert arrays.basis.shape == (dim, 32)
    assert 1 <= stretch < 1.0001
    left_out = (rows - arrays.mean).square().sum() - (
        (rows - arrays.mean) @ arrays.basis
    ).square().sum()
    assert float(left_out) < 0.015 * float((rows - arrays.mean).square().sum())
    queries = rows[:50] + 0.1
    for ours, theirs in zip(
        NormalBank(rows, clusters=40).nearest(queries), nearest(queries, rows), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_wide_noise_is_not_projected():
    arrays, stretch = build_clusters(torch.rand(4200, 600), 8)
    assert arrays.basis.shape == (0, 608)
    assert stretch == 1


@pytest.mark.parametrize("dim", [64, 1024])
def test_the_largest_values_are_saved_and_opened(dim):
    """All along one axis, which makes projected coordinates larger than those of the rows."""
    rows = torch.linspace(-1, 1, 300)[:, None] * 1e15 * torch.ones(dim)
    bank = NormalBank(rows, clusters=20)
    assert bank.num_clusters == 20
    opened = NormalBank.from_state_dict(bank.state_dict())
    for ours, theirs in zip(opened.nearest(rows * 0.9), nearest(rows * 0.9, rows), strict=True):
        assert torch.equal(ours, theirs)


def test_a_distance_claims_no_gradient():
    queries = torch.rand(5, 4, requires_grad=True)
    bank = torch.rand(9, 4, requires_grad=True)
    for distances, _ in (nearest(queries, bank), NormalBank(bank).nearest(queries)):
        assert not distances.requires_grad


@pytest.mark.skipif(not hasattr(torch.library, "register_vmap"), reason="needs PyTorch 2.5")
@pytest.mark.parametrize("clusters", [0, 20])
def test_a_search_is_mapped_over_queries(patches, queries, clusters):
    bank = NormalBank(patches, clusters=clusters)
    for axis in (0, 1):
        found = torch.vmap(bank.nearest, in_dims=axis)(queries)
        expected = bank.nearest(queries.movedim(axis, 0))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_the_byte_order_of_an_array_does_not_matter():
    queries, bank = (np.random.default_rng(0).random((n, 4), dtype=np.float32) for n in (5, 9))
    expected = nearest(queries, bank)
    found = nearest(queries.astype(">f4"), bank.astype(">f4"))
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


FULL = 2**63 - 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: NormalBank(p, clusters=True), TypeError, "clusters must be an integer"),
        (lambda p: NormalBank(p, clusters=1.5), TypeError, "clusters must be an integer, got 1.5"),
        (lambda p: NormalBank(p, seed=2**63), ValueError, "seed must be in"),
        (lambda p: NormalBank(p).source(torch.tensor([0.5])), TypeError, "rows must be int64"),
        (lambda p: NormalBank(p).source([True]), TypeError, "rows must be int64 .* got bool"),
        (
            lambda p: NormalBank(p).merge(p),
            TypeError,
            "only a NormalBank can be merged, got Tensor",
        ),
        (
            lambda p: NormalBank(p, groups=torch.arange(12) + FULL - 11).add(p),
            ValueError,
            "groups must be given",
        ),
        (lambda p: NormalBank(p.to("meta")), TypeError, "dense tensor with values, got meta"),
        (lambda p: NormalBank(p[0, 0].to_sparse()), TypeError, "dense tensor with values"),
        (
            lambda p: NormalBank(np.ma.masked_less(p[0, 0].numpy(), 0.4)),
            TypeError,
            "embeddings must have no masked values",
        ),
        (
            lambda p: nearest(p[0, 0], p[0, 1], exclude_same_group=(torch.arange(25),) * 3),
            ValueError,
            "got 3 items",
        ),
    ],
)
def test_junk_is_refused_in_a_line(patches, call, error, message):
    with pytest.raises(error, match=message):
        call(patches)


def test_one_row_number_without_axes_is_taken():
    bank = NormalBank(np.random.default_rng(0).normal(size=(4, 3, 2, 8)).astype(np.float32))
    for row in (7, np.int64(7), np.array(7), torch.tensor(7)):
        assert bank.source(row).tolist() == [1, 0, 1]
        assert torch.equal(bank.embeddings_of(row), bank.embeddings[7])
    with pytest.raises(TypeError, match="rows"):
        bank.source(True)
