"""Nearest-neighbour search against its peers, in one process, on the same inputs.

    python benchmarks/search.py --data DIR --output benchmarks/results

Searches are timed in turn, several times, and the median is kept. Peers that would take minutes are
given only the first few thousand queries and compared by pairs per second. The answers are compared
with float64 arithmetic on differences. Peers that are not installed are left out. Writes
search.json, and search.md and search.png made from it.

DIR holds `data/magnetic_tile` (a category in MVTec layout) and
`reference/official_checkpoints/hazelnut_enchier.pkl`; without it, built-in images and an untrained
encoder are used.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blas
import torch
from torch import Tensor

from common import (
    Contender,
    Prepare,
    Search,
    Workload,
    cdist_min,
    faiss_flat,
    faiss_lists,
    measure,
    origin,
    plot,
    real_embeddings,
    write_results,
)
from patchsvdd_fast import NormalBank, nearest, ops

SLOW_QUERIES = 3_249  # queries given to peers that would take minutes


# --- searches -------------------------------------------------------------------------------------


def ours(bank: Tensor) -> Search:
    """The library's brute force."""
    return lambda queries: nearest(queries, bank)


def ours_plain(bank: Tensor) -> Search:
    """The library's brute force that computes every canonical distance, without a screen."""

    def search(queries: Tensor) -> tuple[Tensor, Tensor]:
        with ops.use_method("plain"):
            return nearest(queries, bank)

    return search


def ours_bank(bank: Tensor) -> Search:
    """The library's bank, which clusters itself if that pays."""
    return NormalBank(bank).nearest


def sklearn_argmin(bank: Tensor) -> Search:
    """scikit-learn's fused argmin."""
    from sklearn.metrics import pairwise_distances_argmin_min

    def search(queries: Tensor) -> tuple[Tensor, Tensor]:
        rows, distances = pairwise_distances_argmin_min(queries.numpy(), bank.numpy())
        return torch.from_numpy(distances), torch.from_numpy(rows)

    return search


def sklearn_kd_tree(bank: Tensor) -> Search:
    """scikit-learn's KDTree."""
    from sklearn.neighbors import KDTree

    tree = KDTree(bank.numpy())

    def search(queries: Tensor) -> tuple[Tensor, Tensor]:
        distances, rows = tree.query(queries.numpy(), 1)
        return torch.from_numpy(distances[:, 0]), torch.from_numpy(rows[:, 0])

    return search


def ngt_graph(bank: Tensor) -> Search:
    """NGT's graph index, default settings; approximate."""
    import ngtpy

    folder = tempfile.mkdtemp()
    ngtpy.create(folder.encode(), bank.shape[1], distance_type="L2")
    index = ngtpy.Index(folder.encode())
    index.batch_insert(bank.numpy(), num_threads=torch.get_num_threads())

    def search(queries: Tensor) -> tuple[Tensor, Tensor]:
        found = [index.search(query, size=1)[0] for query in queries.numpy()]
        rows, distances = zip(*found, strict=True)
        return torch.tensor(distances), torch.tensor(rows)

    return search


def with_instruction_set(name: str, prepare: Prepare) -> Prepare:
    """One of our searches, on the named instruction set."""

    def prepared(bank: Tensor) -> Search:
        search = prepare(bank)

        def forced(queries: Tensor) -> tuple[Tensor, Tensor]:
            with ops.use_instruction_set(name):
                return search(queries)

        return forced

    return prepared


FLAT = Contender("FAISS IndexFlatL2", faiss_flat, most_queries=SLOW_QUERIES)
CDIST = Contender("torch.cdist + min", cdist_min, most_queries=SLOW_QUERIES)
ARGMIN = Contender("scikit-learn argmin", sklearn_argmin, most_queries=SLOW_QUERIES)
KD_TREE = Contender("scikit-learn KDTree", sklearn_kd_tree, most_queries=SLOW_QUERIES)
IVF = Contender("FAISS IVF4096, nprobe 8", faiss_lists)
NGT = Contender("NGT", ngt_graph, most_queries=SLOW_QUERIES)


def lesser_instruction_sets(name: str, prepare: Prepare) -> list[Contender]:
    """A search of ours on all instruction sets but the best."""
    return [
        Contender(
            f"{name}, {other}", with_instruction_set(other, prepare), most_queries=SLOW_QUERIES
        )
        for other in ops.instruction_sets()[1:]
    ]


# --- workloads ------------------------------------------------------------------------------------


def hard_banks(generator: torch.Generator, quick: bool) -> dict[str, Tensor]:
    """Banks [M, 64] of which screens and clusters can rule out little or nothing."""
    rows = 4_000 if quick else 50_000
    normal = torch.randn(rows, 64, generator=generator)
    blobs = normal + 1e4 * (torch.arange(rows)[:, None] % 2)
    outlier = normal.clone()
    outlier[rows // 2] = 1e6
    return {
        "all vectors equal": normal[:1].expand(rows, 64).contiguous(),
        "all at one distance": torch.nn.functional.normalize(normal),
        "two far blobs": blobs,
        "one outlier of 1e6": outlier,
    }


def workloads(data: Path | None, quick: bool) -> Iterator[Workload]:
    """The workloads, made one after the other so that only one bank is in memory."""
    generator = torch.Generator().manual_seed(0)
    name, queries, bank = real_embeddings(data, quick)
    size = f"bank {len(bank):,} x 64 ({name})"
    clustered = [Contender("NormalBank", ours_bank)]
    yield Workload(
        f"{len(queries):,} queries, {size}",
        queries,
        bank,
        [
            *clustered,
            FLAT,
            IVF,
            CDIST,
            ARGMIN,
            KD_TREE,
            NGT,
            *lesser_instruction_sets("NormalBank", ours_bank),
            Contender("nearest (brute force)", ours, most_queries=SLOW_QUERIES),
        ],
    )
    one = len(queries) // 2 // 3249 * 3249
    one_image = queries[one : one + 3249]
    yield Workload(f"one image, {size}", one_image, bank, [*clustered, FLAT, IVF])
    del bank, queries

    brute = [Contender("nearest (brute force)", ours)]
    peers = [FLAT, CDIST, ARGMIN, *lesser_instruction_sets("nearest", ours)]
    count = 500 if quick else 3_249
    for dim, full in ((64, 200_000), (1536, 20_000)):
        rows = full // 20 if quick else full
        yield Workload(
            f"{count:,} queries, bank {rows:,} x {dim}, uniform random",
            torch.rand(count, dim, generator=generator),
            torch.rand(rows, dim, generator=generator),
            [*brute, *peers, Contender("plain fp32 kernel", ours_plain)],
        )
    # Like the K=64 embeddings of an encoder trained on objects: mean norm 3.58, deviation 0.00045.
    rows = 5_000 if quick else 100_000
    yield Workload(
        f"{count:,} queries, bank {rows:,} x 64, a tiny ball far from the origin",
        3.58 / 8 + 0.00045 * torch.randn(count, 64, generator=generator),
        3.58 / 8 + 0.00045 * torch.randn(rows, 64, generator=generator),
        [*brute, *peers[:3]],
    )
    for hard, bank in hard_banks(generator, quick).items():
        picked = torch.randint(len(bank), (count,), generator=generator)
        near = bank[picked] + 0.01 * torch.randn(count, 64, generator=generator)
        # The centre of the sphere that all rows lie on is equally far from each.
        hard_queries = torch.zeros(count, 64) if hard == "all at one distance" else near
        yield Workload(
            f"{hard}, {count:,} queries, bank {len(bank):,} x 64",
            hard_queries,
            bank,
            [
                Contender("NormalBank", ours_bank),
                Contender(
                    "NormalBank, 500 clusters", lambda b: NormalBank(b, clusters=500).nearest
                ),
                Contender("nearest (brute force)", ours),
                Contender("plain fp32 kernel", ours_plain),
            ],
        )


# --- measuring ------------------------------------------------------------------------------------


def memory_of_a_bank(rows: int, dim: int) -> dict[str, float]:
    """Memory that a bank takes beside the given embeddings, over their size: kept, and at most."""
    code = f"""
import resource, torch
from patchsvdd_fast import NormalBank
generator = torch.Generator().manual_seed(0)
low = torch.randn({rows}, 8, generator=generator) @ torch.randn(8, {dim}, generator=generator)
NormalBank(low[:20000]).nearest(low[:5000])
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
bank = NormalBank(low)
bank.nearest(low[:5000])
after = resident()
status = open("/proc/self/status").read()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(bank.num_clusters, (after - before) / low.nbytes, (peak - before) / low.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    clusters, kept, peak = (float(word) for word in done.stdout.split())
    return {"rows": rows, "dim": dim, "clusters": clusters, "kept": kept, "peak": peak}


# --- showing --------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = []
    for workload in dict.fromkeys(record["workload"] for record in result["records"]):
        lines += [
            f"**{workload}**",
            "",
            "| search | G pairs/s | ours is faster by | build, s | right | zeros | worst error |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['search']} | {r['giga_pairs_per_second']:.3g} | {r['ours_faster']:.2f} "
            f"| {r['build_seconds']:.1f} | {r['right_neighbours']:.1%} "
            f"| {r['zero_distances']:.1%} | {r['worst_relative_error']:.0e} |"
            for r in result["records"]
            if r["workload"] == workload
        ]
        lines.append("")
    memory = result["memory"]
    lines.append(
        f"A bank of {memory['rows']:,} x {memory['dim']} keeps {memory['kept']:.2f} times its "
        f"embeddings' memory, the embeddings included; building takes {memory['peak']:.2f} at most."
    )
    kernels = [f"{b['of']} {b['name']} {b['version']} {b['architecture']}" for b in result["blas"]]
    lines += ["", f"BLAS libraries: {'; '.join(kernels)}."]
    return "\n".join(lines) + "\n"


def panels(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """What to plot: pairs per second of every search, one panel per workload."""
    for workload in dict.fromkeys(record["workload"] for record in result["records"]):
        yield (
            workload,
            {
                f"{r['search']} ({r['right_neighbours']:.0%} right)": r["giga_pairs_per_second"]
                for r in result["records"]
                if r["workload"] == workload
            },
        )


def main() -> None:
    """Measure, print a table, and write JSON, table and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named = os.environ.get("PATCHSVDD_TEST_DATA")
    parser.add_argument("--data", type=Path, default=named and Path(named))
    parser.add_argument("--output", type=Path, help="folder for search.json, .md and .png")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small inputs, to try the script")
    options = parser.parse_args()
    records = []
    for workload in workloads(options.data, options.quick):
        print(workload.name, file=sys.stderr)
        measured = measure(workload, options.repeats)
        records += [record for record in measured if "reason" not in record]
    memory = memory_of_a_bank(100_000 if options.quick else 1_000_000, 64)
    result = {**origin(), "records": records, "memory": memory}
    print(table(result))
    if options.output:
        write_results(options.output, "search", result, table(result))
        plot(
            panels(result),
            "billion pairs of query and bank row per second",
            options.output / "search.png",
        )


if __name__ == "__main__":
    blas.restart_with_best_kernels()
    main()
