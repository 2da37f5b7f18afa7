"""Brute force for few queries and short vectors, where codes pay or do not, against FAISS.

    python benchmarks/few_queries.py --output benchmarks/results

Each search of a workload is timed in turn, by the CPU time of one thread, so that a busy machine
disturbs all of them alike; medians are given. *plain* computes every distance, *encoding* makes
8-bit codes of the bank first, *nearest* is what the library chooses, *kept codes* are made before.
Rows lie along at most 24 axes, with noise. Writes few_queries.json and few_queries.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blas
import torch
from torch import Tensor

from common import faiss_flat, origin, write_results
from patchsvdd_fast import nearest
from patchsvdd_fast.ops import use_method
from patchsvdd_fast.ops.cpu_codes import encode_rows
from patchsvdd_fast.ops.search import nearest_in_bank

SIZES = [(200_000, dim) for dim in (1, 3, 8, 16, 64, 176)] + [(100_000, 64), (20_000, 1536)]
QUERIES = (1, 8, 16, 128)
SEARCHES = ("FAISS IndexFlatL2", "plain", "encoding", "nearest", "kept codes")
AXES = 24


def embeddings(rows: int, dim: int) -> Tensor:
    """Rows [rows, dim] float32 along at most AXES axes, with noise."""
    generator = torch.Generator().manual_seed(dim)
    axes = torch.randn(min(dim, AXES), dim, generator=generator)
    places = torch.randn(rows, len(axes), generator=generator)
    return places @ axes + 0.1 * torch.randn(rows, dim, generator=generator)


def searches(bank: Tensor) -> dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """The searches by name; FAISS is left out where it is not installed."""
    coded = encode_rows(bank)

    def by(method: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def search(queries: Tensor) -> tuple[Tensor, Tensor]:
            with use_method(method):
                return nearest(queries, bank)

        return search

    found = {
        "plain": by("plain"),
        "encoding": by("screened"),
        "nearest": by("auto"),
        "kept codes": lambda queries: nearest_in_bank(queries, coded),
    }
    try:
        return {"FAISS IndexFlatL2": faiss_flat(bank), **found}
    except ImportError:
        return found


def measure(rows: int, dim: int, counts: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """One record per number of queries: the milliseconds of each search."""
    values = embeddings(rows + max(counts), dim)
    bank = values[:rows].contiguous()
    ours_and_peers = searches(bank)
    records = []
    for count in counts:
        queries = values[rows : rows + count].contiguous()
        times: dict[str, list[float]] = {name: [] for name in ours_and_peers}
        expected = nearest(queries, bank)
        for repeat in range(repeats + 1):  # the first is not counted
            for name, search in ours_and_peers.items():
                started = time.process_time()
                found = search(queries)
                if repeat > 0:
                    times[name].append((time.process_time() - started) * 1e3)
                elif not name.startswith("FAISS"):
                    assert all(map(torch.equal, found, expected)), name
        medians = {name: statistics.median(taken) for name, taken in times.items()}
        records.append({"rows": rows, "dim": dim, "queries": count, "milliseconds": medians})
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line per record, the ratio to FAISS last."""
    names = [name for name in SEARCHES if name in records[0]["milliseconds"]]
    lines = [
        f"| bank | queries | {' | '.join(names)} | nearest / FAISS |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    for record in records:
        taken = record["milliseconds"]
        faiss = taken.get("FAISS IndexFlatL2")
        ratio = "" if faiss is None else f"{taken['nearest'] / faiss:.2f}"
        cells = " | ".join(f"{taken[name]:.3g}" for name in names)
        lines.append(
            f"| {record['rows']:,} x {record['dim']} | {record['queries']} | {cells} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print a table, and write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for few_queries.json and .md")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="small inputs, to try the script")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        import faiss

        faiss.omp_set_num_threads(1)
    except ImportError:
        pass
    records: list[dict[str, Any]] = []
    for rows, dim in [(1000, 3), (1000, 64)] if options.quick else SIZES:
        records += measure(rows, dim, QUERIES, options.repeats)
    result = {**origin(), "records": records}
    print(table(records))
    if options.output:
        write_results(options.output, "few_queries", result, table(records))


if __name__ == "__main__":
    blas.restart_with_best_kernels()
    main()
