"""Banks in shards: several processes answer with the bits of one bank."""

import subprocess
import sys
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import distributed

from conftest import script_environment
from patchsvdd_fast import NormalBank
from patchsvdd_fast.search import sharded
from patchsvdd_fast.search.sharded import ShardedBank


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_answers_are_those_of_one_bank(processes, tmp_path):
    """Runs each function below, whose name begins with `shards_`, in so many processes at once."""
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(processes), str(tmp_path / "meeting")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=script_environment(Path(__file__).parent, OMP_NUM_THREADS="1"),
        )
        for rank in range(processes)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)
    names = [name for name in globals() if name.startswith("shards_")]
    assert all(output.split() == 2 * names for output in outputs), outputs


def test_processes_that_are_no_group_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RuntimeError, match="this is one of 3 processes: call"):
        ShardedBank(torch.rand(3, 2))


def test_parts_of_one_process_need_no_group():
    values = torch.randint(3, (60, 2, 2, 3), generator=torch.Generator().manual_seed(4)).float()
    parts = [
        NormalBank(values[a:b], groups=torch.arange(a, b), clusters=c)
        for a, b, c in [(0, 20, 0), (20, 21, 0), (21, 60, 3)]
    ]
    bank, whole = ShardedBank.of(parts), NormalBank(values)
    queries = values[::7] + 0.25
    for k in (None, 3):
        found = bank.nearest(queries, k=k)
        assert_same(found, whole.nearest(queries, k=k))
        assert torch.equal(bank.source(found[1]), whole.source(found[1]))
        assert torch.equal(bank.embeddings_of(found[1]), whole.embeddings_of(found[1]))
    groups = torch.arange(60)[::7]
    assert_same(
        bank.nearest(values[::7], exclude_same_group=groups),
        whole.nearest(values[::7], exclude_same_group=groups),
    )
    assert torch.equal(bank.groups, whole.groups)
    bank.add(values[:4] + 0.5)
    whole.add(values[:4] + 0.5)
    assert_same(bank.nearest(queries), whole.nearest(queries))
    assert torch.equal(bank.groups, whole.groups)
    assert len(parts[-1]) == 39 * 4  # the bank that was given has not changed
    with pytest.raises(NotImplementedError, match="cannot do `remove`: remove from each part"):
        bank.remove([1])


@pytest.mark.parametrize("seed", range(24))
def test_a_part_goes_on_from_what_those_before_have_found(seed):
    """Whatever their layouts; many ties, also across parts."""
    generator = torch.Generator().manual_seed(seed)
    images, grid, dim = 600, (1 + seed % 2, 2), (3, 20, 64)[seed % 3]
    values = torch.randn(images, *grid, dim, generator=generator)
    if seed % 4 < 2:
        values = values.sign()
        values[..., 3:] = 1
    options = [{}, {"storage": torch.float16}, {"metric": "cosine"}][seed // 2 % 3]
    groups = torch.randint(9, (images,), generator=generator)
    whole = NormalBank(values, groups=groups, **options)
    parts = []
    for number, (a, b) in enumerate(pairwise([0, 250, 252, 500, images])):
        clusters = 0 if b - a < 9 else (None, 0, 5)[(seed + number) % 3]
        part = NormalBank(values[a : b - 1], groups=groups[a : b - 1], clusters=clusters, **options)
        part.add(values[b - 1 : b], groups[b - 1 : b])  # a row that lies beside the others
        parts.append(part)
    bank = ShardedBank.of(parts)
    queries = values[::37].flatten(0, 2) + (seed % 2) / 4
    asked = torch.randint(9, (len(queries),), generator=generator)
    for k in (None, 1, 7):
        for own in (None, asked):
            expected = whole.nearest(queries, k=k, exclude_same_group=own)
            assert_same(bank.nearest(queries, k=k, exclude_same_group=own), expected)


def test_coresets_can_be_parts():
    values = torch.randn(30, 2, 2, 3, generator=torch.Generator().manual_seed(5))
    first = NormalBank(values[:10]).coreset(11)
    second = NormalBank(values[10:], groups=torch.arange(10, 30)).coreset(13)
    bank = ShardedBank.of([first, second])
    where = bank.source(torch.tensor([[0, 10], [11, -1]]))
    assert where[0].tolist() == first.source([0, 10]).tolist()
    assert where[1, 0].tolist() == (second.source(0) + torch.tensor([10, 0, 0])).tolist()
    assert where[1, 1].tolist() == [-1, -1, -1]


# --- in each of several processes -----------------------------------------------------------------


def shares(count, processes, generator):
    """Some numbers that add up to `count`, one a process; some may be 0."""
    cuts = torch.randint(count + 1, (processes - 1,), generator=generator).sort().values.tolist()
    return [b - a for a, b in zip([0, *cuts], [*cuts, count], strict=True)]


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def shards_of_random_banks(rank, processes):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)

        def draw(low, high):
            return int(torch.randint(low, high, (), generator=generator))  # noqa: B023

        dim, grid = draw(1, 80), (draw(1, 4), draw(1, 4))
        images = draw(1, 400)
        scale = 10.0 ** draw(-21, 9)
        values = torch.randn(images, *grid, dim, generator=generator)
        if seed % 3 == 0:  # many ties
            values = values.sign() * torch.randint(2, values.shape, generator=generator)
        values *= scale
        queries = torch.cat(
            [values.flatten(0, 2)[:7], scale * torch.randn(30, dim, generator=generator)]
        )
        groups = torch.randint(0, 5, (images,), generator=generator) if seed % 2 else None
        own = [images] if processes == 1 else shares(images, processes, generator)
        start = sum(own[:rank])
        mine = slice(start, start + own[rank])
        clusters = draw(0, 4) if seed % 4 == 1 and min(own) >= 4 else None
        options = {"clusters": clusters, "metric": "cosine" if seed % 5 == 4 else "euclidean"}
        if options["metric"] == "cosine":
            values = values + scale / 3  # no zeros
            queries = queries + scale / 3
        whole = NormalBank(values, groups=groups, **options)
        bank = ShardedBank(values[mine], groups=None if groups is None else groups[mine], **options)
        assert (len(bank), bank.dim, bank.grid) == (len(whole), dim, grid)
        asked = torch.randint(-1, 5, (len(queries),), generator=generator)
        assert torch.equal(bank.groups, whole.groups)
        cuts = [0, *shares(len(queries), processes, generator)] if processes > 1 else [0, 37]
        first = sum(cuts[: rank + 1])
        mine_too = slice(first, first + cuts[rank + 1])
        for k in (None, 1, 5, 32):
            assert_same(bank.nearest(queries, k=k), whole.nearest(queries, k=k))
            assert_same(
                bank.nearest(queries, k=k, exclude_same_group=asked),
                whole.nearest(queries, k=k, exclude_same_group=asked),
            )
            for groups_of in (None, asked) if k in (None, 5) else ():
                expected = whole.nearest(queries, k=k, exclude_same_group=groups_of)
                found = bank.nearest_of_each(
                    queries[mine_too],
                    k=k,
                    exclude_same_group=None if groups_of is None else asked[mine_too],
                )
                assert_same(found, [each[mine_too] for each in expected])
        rows = whole.nearest(queries)[1][mine_too]
        assert torch.equal(bank.embeddings_of(rows), whole.embeddings_of(rows))
        assert torch.equal(bank.source(rows), whole.source(rows))


def shards_whose_processes_have_queries_of_their_own(rank, processes):
    values = torch.randint(3, (50, 3), generator=torch.Generator().manual_seed(7)).float()
    bank, whole = ShardedBank(values), NormalBank(values.repeat(processes, 1))
    batches = iter([values[i : i + 2 + rank] for i in range(2 * rank)])  # process 0 has none
    rounds, answered = 0, 0
    while True:
        batch = next(batches, None)
        found = bank.nearest_of_each(batch)
        if found is None:
            break
        rounds += 1
        if batch is None:
            assert [len(each) for each in found] == [0, 0]
        else:
            answered += 1
            assert_same(found, whole.nearest(batch))
    assert (rounds, answered) == (2 * (processes - 1), 2 * rank)
    last = processes - 1
    broken = torch.full((2, 3), torch.nan) if rank == last else values
    refused(f"process {last}: .*row 0", lambda: bank.nearest_of_each(broken))
    if processes > 1:
        refused("the same k, and", lambda: bank.nearest_of_each(values, k=rank + 1))
        groups = torch.zeros(50, dtype=torch.int64) if rank == 0 else None
        refused("gro", lambda: bank.nearest_of_each(values, exclude_same_group=groups))


def shards_that_grow(rank, processes):
    generator = torch.Generator().manual_seed(8)
    values = torch.randint(3, (processes, 9, 2, 1, 3), generator=generator).float()
    more = torch.randint(3, (processes, 3, 2, 1, 3), generator=generator).float() + 0.5
    own = 0 if rank == 1 else 9  # process 1 starts with none
    bank = ShardedBank(values[rank, :own])
    new = more[rank, : 1 + rank]
    bank.add(new)
    started = [values[r, : 0 if r == 1 else 9] for r in range(processes)]
    whole = NormalBank(
        torch.cat([torch.cat([started[r], more[r, : 1 + r]]) for r in range(processes)]),
        groups=bank.groups,
    )
    count = sum(map(len, started)) + sum(1 + r for r in range(processes))
    assert sorted(bank.groups.tolist()) == list(range(count))
    assert len(bank) == 2 * count
    queries = torch.cat([values.flatten(0, 1), more.flatten(0, 1)])
    for k in (None, 4):
        assert_same(bank.nearest(queries, k=k), whole.nearest(queries, k=k))
    last = processes - 1
    broken = torch.full((1, 2, 1, 3), torch.nan)
    refused(f"process {last}: .*NaN", lambda: bank.add(broken if rank == last else new))
    refused("process 0: embeddings must match", lambda: bank.add(torch.rand(3, 5)))
    assert len(bank) == 2 * count  # in no process has it changed
    assert_same(bank.nearest(queries), whole.nearest(queries))


def shards_opened_by_other_numbers_of_processes(rank, processes):
    values = torch.randint(3, (40, 3), generator=torch.Generator().manual_seed(9)).float()
    cuts = [0, 7, 8, 20, 40]  # four shards
    shards = [NormalBank(values[a:b], groups=torch.arange(a, b)) for a, b in pairwise(cuts)]
    mine = shards[4 * rank // processes : 4 * (rank + 1) // processes]
    bank, whole = ShardedBank.of(mine), NormalBank(values)
    assert (len(bank), len(bank.parts)) == (40, len(mine))
    for k in (None, 3):
        assert_same(bank.nearest(values, k=k), whole.nearest(values, k=k))
    refused("no process has a bank", lambda: ShardedBank.of([]))
    alone = ShardedBank.of([whole] if rank == processes - 1 else [])
    assert_same(alone.nearest(values), whole.nearest(values))
    refused("process 0: parts must be Nor", lambda: ShardedBank.of([values]))
    other = NormalBank(values, metric="euclidean", storage=torch.float16)
    refused("must have one form", lambda: ShardedBank.of([whole, other]))


def shards_that_are_empty(rank, processes):
    values = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    last = processes - 1
    bank = ShardedBank(values if rank == last else values[:0])
    assert len(bank.parts) == (rank == last)
    assert_same(bank.nearest(values[:5] + 0.1), NormalBank(values).nearest(values[:5] + 0.1))
    numpy_distances, numpy_rows = bank.nearest((values[:5] + 0.1).numpy())
    assert numpy_rows.tolist() == bank.nearest(values[:5] + 0.1)[1].tolist()
    assert numpy_distances.shape == (5,)
    everything = torch.zeros(5, dtype=torch.int64)
    own = values if rank == last else values[:0]
    alone = ShardedBank(own, groups=everything[:1].expand(len(own)))
    for k in (None, 3):
        distances, rows = alone.nearest(values[:5], k=k, exclude_same_group=everything)
        assert distances.isinf().all() and (rows == -1).all()


def shards_of_more_rows_than_fit_beside_a_distance(rank, processes):
    values = torch.randint(3, (50, 2), generator=torch.Generator().manual_seed(2)).float()
    own = 50 // processes if rank < processes - 1 else 50 - (processes - 1) * (50 // processes)
    start = rank * (50 // processes)
    bank = ShardedBank(values[start : start + own])
    expected = bank.nearest(values)
    bank._rows = [2**32 for _ in bank._rows]  # as if there were
    assert_same(bank.nearest(values), expected)


def refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def shards_that_do_not_fit(rank, processes):
    values = torch.randn(12, 4, generator=torch.Generator().manual_seed(3))
    refused("have empty embeddings", lambda: ShardedBank(values[:0]))
    last = processes - 1
    broken = values.clone()
    if rank == last:
        broken[3, 1] = torch.nan
    refused(f"process {last}: .*NaN or infinity in row 3", lambda: ShardedBank(broken))
    refused("process 0: embeddings must have shape", lambda: ShardedBank(torch.rand(3, 3, 4)))
    bank = ShardedBank(values)
    refused(r"process 0: queries must have shape \[..., 4\]", lambda: bank.nearest(values[:, :3]))
    queries = values.clone()
    if rank == last:
        queries[2, 2] = torch.inf
    refused(f"process {last}: ", lambda: bank.nearest(queries))
    assert_same(bank.nearest(values), bank.nearest(values))  # it goes on
    if processes == 1:
        return
    refused("one shape, but for the first axis", lambda: ShardedBank(values[:, : 3 + rank]))
    with_groups = torch.arange(12) if rank == 0 else None
    refused("process 0 has .* with groups; pro", lambda: ShardedBank(values, groups=with_groups))
    refused("the same queries", lambda: bank.nearest(values[: 5 + rank]))
    refused("the same queries", lambda: bank.nearest(values + rank))


def shards_in_words(rank, processes):
    bank = ShardedBank(torch.rand(12, 4))
    shape = f"{12 * processes} x 4, in {processes} processes"
    assert repr(bank) == f"ShardedBank({shape}, here {bank.parts[0]!r})"
    assert bank.device == torch.device("cpu")


if __name__ == "__main__":
    rank, processes = map(int, sys.argv[1:3])
    torch.set_num_threads(1)
    distributed.init_process_group(
        *("gloo", f"file://{sys.argv[3]}"),
        timeout=timedelta(seconds=120),
        rank=rank,
        world_size=processes,
    )
    for sharded._LEAST_IN_TURNS in (64, 1):  # all processes at once, and in turns
        for name, function in list(globals().items()):
            if name.startswith("shards_"):
                function(rank, processes)
                print(name, flush=True)
    distributed.destroy_process_group()
