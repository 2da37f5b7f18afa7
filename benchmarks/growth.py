"""How the cost of a search grows with the bank, against FAISS's flat index and its inverted file.

    python benchmarks/growth.py --output benchmarks/results

Nanoseconds a query, for banks of 10,000 to 10 million rows of 64 dimensions and to 1 million of
176, as a median of several runs of all searches in turn; and the seconds it takes to build each.
Rows of 64 dimensions lie along 10 axes with a little noise, as trained Patch SVDD embeddings do;
the deviation of those of 176 falls along the axes, as that of pretrained features does. FAISS's
inverted file is approximate: 4,096 lists, 8 of which are searched. Writes growth.json, .md and
.png.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import blas
import torch
from torch import Tensor

from common import (
    Contender,
    Workload,
    faiss_flat,
    faiss_lists,
    measure,
    origin,
    write_results,
)
from patchsvdd_fast import NormalBank

SIZES = {64: (10_000, 100_000, 1_000_000, 10_000_000), 176: (10_000, 100_000, 1_000_000)}
QUERIES = 3_000  # few would not bring FAISS to its best
MANY_ROWS = 3_000_000  # of more, the flat index is asked a tenth of them: the rest takes as long
LIST_SAMPLES = 64  # rows for each list to train on
FEWEST_FOR_LISTS = 100_000  # rows; of fewer, 4,096 lists would be nearly empty


def embeddings(rows: int, dim: int, seed: int) -> Tensor:
    """Rows [rows, dim] float32, of the kind that the dimension stands for."""
    generator = torch.Generator().manual_seed(seed)
    if dim > 64:
        deviations = torch.arange(1, dim + 1) ** -0.7
        return torch.randn(rows, dim, generator=generator) * deviations
    axes = torch.randn(10, dim, generator=torch.Generator().manual_seed(0))
    found = torch.randn(rows, 10, generator=generator) @ axes
    return found.add_(torch.randn(rows, dim, generator=generator), alpha=0.02)


def flat_queries(rows: int) -> int:
    """How many queries FAISS's flat index is asked, in a bank of so many rows."""
    return QUERIES // 10 if rows > MANY_ROWS else QUERIES


def workload(rows: int, dim: int) -> Workload:
    """Queries and a bank of so many rows, and the searches."""
    searches = [
        Contender("NormalBank", lambda bank: NormalBank(bank).nearest),
        Contender("FAISS IndexFlatL2", faiss_flat, most_queries=flat_queries(rows)),
    ]
    if rows >= FEWEST_FOR_LISTS:
        searches.append(
            Contender("FAISS IVF4096, nprobe 8", lambda bank: faiss_lists(bank, LIST_SAMPLES))
        )
    queries = embeddings(QUERIES, dim, 1)
    return Workload(f"{rows:,} x {dim}", queries, embeddings(rows, dim, 2), searches)


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line per bank, the searches in columns."""
    names = list(dict.fromkeys(record["search"] for record in records))
    lines = [
        "Microseconds a query (seconds to build); right neighbours of the inverted file.",
        "",
        f"| bank | {' | '.join(names)} | times FAISS flat | right |",
        "|---|" + "---|" * (len(names) + 2),
    ]
    for bank in dict.fromkeys(record["workload"] for record in records):
        of_bank = {r["search"]: r for r in records if r["workload"] == bank}
        cells = []
        for name in names:
            found = of_bank.get(name)
            micros = 1e6 * found["seconds"] / found["queries"] if found else math.nan
            digits = ",.0f" if micros >= 100 else ".3g"
            cells.append(f"{micros:{digits}} ({found['build_seconds']:.1f})" if found else "-")
        flat = of_bank.get("FAISS IndexFlatL2")
        ratio = f"{flat['ours_faster']:.1f}" if flat else "-"
        lists = of_bank.get("FAISS IVF4096, nprobe 8")
        right = f"{lists['right_neighbours']:.1%}" if lists else "-"
        lines.append(f"| {bank} | {' | '.join(cells)} | {ratio} | {right} |")
    return "\n".join(lines) + "\n"


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Nanoseconds a query against rows, both logarithmic, a panel per dimension."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    dims = list(dict.fromkeys(record["dim"] for record in records))
    figure, panels = plt.subplots(1, len(dims), figsize=(5 * len(dims), 4), squeeze=False)
    for panel, dim in zip(panels[0], dims, strict=True):
        for name in dict.fromkeys(record["search"] for record in records):
            found = [r for r in records if r["dim"] == dim and r["search"] == name]
            times = [1e9 * r["seconds"] / r["queries"] for r in found]
            panel.loglog([r["rows"] for r in found], times, marker="o", label=name)
        panel.set(title=f"{dim} dimensions", xlabel="rows of the bank", ylabel="ns a query")
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Measure, print a table, and write JSON, table and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for growth.json, .md and .png")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small inputs, to try the script")
    options = parser.parse_args()
    records: list[dict[str, Any]] = []
    for dim, sizes in SIZES.items():
        for rows in sizes[:1] if options.quick else sizes:
            measured = measure(workload(rows, dim), options.repeats, warm_up=True)
            records += [
                {"rows": rows, "dim": dim, **record}
                for record in measured
                if "reason" not in record
            ]
            print(table(records).splitlines()[-1], flush=True)
    result = {**origin(), "records": records}
    print(table(records))
    if options.output:
        write_results(options.output, "growth", result, table(records))
        plot(records, options.output / "growth.png")


if __name__ == "__main__":
    blas.restart_with_best_kernels()
    main()
