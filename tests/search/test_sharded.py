"""Banks in shards: several processes answer with the bits of one bank."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed

from conftest import script_environment
from patchsvdd_fast import NormalBank
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
    assert all(output.split() == names for output in outputs), outputs


def test_it_needs_processes():
    with pytest.raises(RuntimeError, match="such as torchrun starts"):
        ShardedBank(torch.rand(3, 2))


# --- in each of several processes -----------------------------------------------------------------


def shares(count, processes, generator):
    """Some numbers that add up to `count`, one a process; some may be 0."""
    cuts = torch.randint(count + 1, (processes - 1,), generator=generator).sort().values.tolist()
    return [b - a for a, b in zip([0, *cuts], [*cuts, count], strict=True)]


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def shards_of_random_banks(rank, processes):
    for seed in range(25):
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
        for k in (None, 1, 5, 32):
            assert_same(bank.nearest(queries, k=k), whole.nearest(queries, k=k))
            assert_same(
                bank.nearest(queries, k=k, exclude_same_group=asked),
                whole.nearest(queries, k=k, exclude_same_group=asked),
            )


def shards_that_are_empty(rank, processes):
    values = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    last = processes - 1
    bank = ShardedBank(values if rank == last else values[:0])
    assert (bank.own is None) == (rank != last)
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
    bank._counts = [2**32 for _ in bank._counts]  # as if there were
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
    assert repr(bank) == f"ShardedBank({shape}, here {bank.own!r})"
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
    for name, function in list(globals().items()):
        if name.startswith("shards_"):
            function(rank, processes)
            print(name, flush=True)
    distributed.destroy_process_group()
