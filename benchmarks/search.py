"""Nearest-neighbour search against its peers, in one process, on the same inputs.

    python benchmarks/search.py --output benchmarks/results

Each search is timed several times and the median is kept; the ratio is the peer's time over ours.
Beside the time stands how right the answers are, against float64 arithmetic on differences.
Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.metrics import pairwise_distances_argmin_min
from torch import Tensor

from patchsvdd_fast import nearest
from patchsvdd_fast.runtime import describe

Search = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
CHUNK = 10_000  # bank rows per distance matrix of torch.cdist


def cdist_min(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """torch.cdist in chunks of the bank, then the minimum over them."""
    found = [torch.cdist(queries, part).min(dim=1) for part in bank.split(CHUNK)]
    distances = torch.stack([part.values for part in found])
    rows = torch.stack([part.indices + i * CHUNK for i, part in enumerate(found)])
    best = distances.argmin(dim=0, keepdim=True)
    return distances.gather(0, best)[0], rows.gather(0, best)[0]


def sklearn_argmin(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """scikit-learn's fused argmin."""
    rows, distances = pairwise_distances_argmin_min(queries.numpy(), bank.numpy())
    return torch.from_numpy(distances), torch.from_numpy(rows)


def searches() -> dict[str, Search]:
    """Ours first, then every peer that can be imported."""
    found: dict[str, Search] = {
        "patchsvdd_fast": nearest,
        "torch.cdist + min": cdist_min,
        "scikit-learn argmin": sklearn_argmin,
    }
    try:
        import faiss
    except ImportError:
        return found

    def faiss_flat(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        index = faiss.IndexFlatL2(bank.shape[1])
        index.add(bank.numpy())
        squared, rows = index.search(queries.numpy(), 1)
        return torch.from_numpy(squared[:, 0]).clamp(min=0).sqrt(), torch.from_numpy(rows[:, 0])

    return found | {"FAISS IndexFlatL2": faiss_flat}


def workloads(quick: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Queries and bank by name."""
    generator = torch.Generator().manual_seed(0)
    queries, rows = (500, 5_000) if quick else (3_249, 100_000)

    def normal(count: int, dim: int) -> Tensor:
        return torch.randn(count, dim, generator=generator)

    centre = 3.58 / 8  # mean norm of trained embeddings, over sqrt(64) coordinates
    return {
        "one image, bank 100,000 x 64, normal": (normal(queries, 64), normal(rows, 64)),
        "the same as a tiny ball far from the origin": (
            centre + 0.00045 * normal(queries, 64),
            centre + 0.00045 * normal(rows, 64),
        ),
        "bank 10,000 x 512, normal": (normal(queries, 512), normal(rows // 10, 512)),
    }


def exact_distances(queries: Tensor, bank: Tensor, rows: Tensor | None = None) -> Tensor:
    """Float64 distances to the given rows, or to the nearest: from differences, not products."""
    queries, bank = queries.double(), bank.double()
    if rows is not None:
        return (queries - bank[rows]).norm(dim=1)
    mode = "donot_use_mm_for_euclid_dist"
    parts = [torch.cdist(queries, part, compute_mode=mode).amin(1) for part in bank.split(CHUNK)]
    return torch.stack(parts).amin(dim=0)


def measure(repeats: int, quick: bool) -> list[dict[str, object]]:
    """One record per workload and search."""
    records: list[dict[str, object]] = []
    for workload, (queries, bank) in workloads(quick).items():
        exact = exact_distances(queries, bank)
        seconds: dict[str, list[float]] = {name: [] for name in searches()}
        answers = {}
        for _ in range(repeats):  # in turn, so that a slow spell of the machine hits all alike
            for name, search in searches().items():
                started = time.perf_counter()
                answers[name] = search(queries, bank)
                seconds[name].append(time.perf_counter() - started)
        ours = statistics.median(seconds["patchsvdd_fast"])
        for name, (distances, rows) in answers.items():
            median = statistics.median(seconds[name])
            # A neighbour is right if no other is nearer by more than float32 can tell.
            right = exact_distances(queries, bank, rows) <= exact * (1 + 1e-6)
            error = ((distances.double() - exact).abs() / exact).max()
            records.append(
                {
                    "workload": workload,
                    "search": name,
                    "seconds": median,
                    "all_seconds": seconds[name],
                    "giga_pairs_per_second": len(queries) * len(bank) / median / 1e9,
                    "time_over_ours": median / ours,
                    "right_neighbours": float(right.double().mean()),
                    "zero_distances": float((distances == 0).double().mean()),
                    "worst_relative_error": float(error),
                }
            )
    return records


def commit() -> str:
    """The commit measured, as far as git tells."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for search.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small inputs, to try the script")
    options = parser.parse_args()
    records = measure(options.repeats, options.quick)
    print("| workload | search | ms | time / ours | right | zeros | worst relative error |")
    print("|---|---|---|---|---|---|---|")
    for r in records:
        print(
            f"| {r['workload']} | {r['search']} | {1e3 * float(str(r['seconds'])):.0f} "
            f"| {r['time_over_ours']:.2f} | {r['right_neighbours']:.1%} "
            f"| {r['zero_distances']:.1%} | {r['worst_relative_error']:.1e} |"
        )
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        result = {"commit": commit(), "machine": describe(), "records": records}
        (options.output / "search.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
