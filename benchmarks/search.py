"""Nearest-neighbour search against its peers, in one process, on the same inputs.

    python benchmarks/search.py --data DIR --output benchmarks/results

Searches are timed in turn, several times, and the median is kept. Peers that would take minutes are
given the first few thousand of the queries and compared by pairs per second. Beside the time stands
how right the answers are, against float64 arithmetic on differences. Peers that are not installed
are left out. Writes search.json, and search.md and search.png made from it.

DIR holds `data/magnetic_tile` (a category in MVTec layout) and
`reference/official_checkpoints/hazelnut_enchier.pkl`; without it, built-in images and an untrained
encoder are used.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchsvdd_fast import HierarchicalEncoder, NormalBank, PatchLevel, nearest, ops
from patchsvdd_fast.detector import load_encoder
from patchsvdd_fast.images import Category, find_images, load_images, mean_image
from patchsvdd_fast.runtime import describe
from patchsvdd_fast.samples import write_sample_category
from patchsvdd_fast.score import encode_images

Search = Callable[[Tensor], tuple[Tensor, Tensor]]
Prepare = Callable[[Tensor], Search]

CHUNK = 10_000  # bank rows per distance matrix of torch.cdist
CHECKED = 1_000  # queries whose answers are compared with float64
SLOW_QUERIES = 3_249  # queries given to peers that would take minutes
SIDE, LEVEL = 256, PatchLevel(32, 4)
TEST_IMAGES = 40


# --- searches -------------------------------------------------------------------------------------


def ours(bank: Tensor) -> Search:
    """The library's brute force."""
    return lambda queries: nearest(queries, bank)


def ours_plain(bank: Tensor) -> Search:
    """Every canonical distance, without a screen."""

    def search(queries: Tensor) -> tuple[Tensor, Tensor]:
        with ops.use_method("plain"):
            return nearest(queries, bank)

    return search


def ours_bank(bank: Tensor) -> Search:
    """The library's bank, clustered if it thinks fit."""
    return NormalBank(bank).nearest


def cdist_min(bank: Tensor) -> Search:
    """torch.cdist in chunks of the bank, then the minimum over them."""

    def search(queries: Tensor) -> tuple[Tensor, Tensor]:
        found = [torch.cdist(queries, part).min(dim=1) for part in bank.split(CHUNK)]
        distances = torch.stack([part.values for part in found])
        rows = torch.stack([part.indices + i * CHUNK for i, part in enumerate(found)])
        best = distances.argmin(dim=0, keepdim=True)
        return distances.gather(0, best)[0], rows.gather(0, best)[0]

    return search


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


def faiss_flat(bank: Tensor) -> Search:
    """FAISS's exact index."""
    import faiss

    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank.numpy())
    return _faiss_search(index)


def faiss_ivf(bank: Tensor) -> Search:
    """FAISS's inverted file: 4,096 lists, of which 8 are looked at; approximate."""
    import faiss

    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(bank.shape[1]), bank.shape[1], 4096)
    index.train(bank.numpy())
    index.add(bank.numpy())
    index.nprobe = 8
    return _faiss_search(index)


def _faiss_search(index: Any) -> Search:
    def search(queries: Tensor) -> tuple[Tensor, Tensor]:
        squared, rows = index.search(queries.numpy(), 1)
        return torch.from_numpy(squared[:, 0]).clamp(min=0).sqrt(), torch.from_numpy(rows[:, 0])

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
    """One of our searches on another instruction set."""

    def prepared(bank: Tensor) -> Search:
        search = prepare(bank)

        def forced(queries: Tensor) -> tuple[Tensor, Tensor]:
            with ops.use_instruction_set(name):
                return search(queries)

        return forced

    return prepared


@dataclass(frozen=True)
class Contender:
    """A search to time. Slow ones are given a part of the queries, once."""

    name: str
    prepare: Prepare
    slow: bool = False


FLAT = Contender("FAISS IndexFlatL2", faiss_flat, slow=True)
CDIST = Contender("torch.cdist + min", cdist_min, slow=True)
ARGMIN = Contender("scikit-learn argmin", sklearn_argmin, slow=True)
KD_TREE = Contender("scikit-learn KDTree", sklearn_kd_tree, slow=True)
IVF = Contender("FAISS IVF4096, nprobe 8", faiss_ivf)
NGT = Contender("NGT", ngt_graph, slow=True)


def lesser_instruction_sets(name: str, prepare: Prepare) -> list[Contender]:
    """A search of ours on all instruction sets but the best."""
    return [
        Contender(f"{name}, {other}", with_instruction_set(other, prepare), slow=True)
        for other in ops.instruction_sets()[1:]
    ]


# --- workloads ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """Queries, a bank, who searches it (ours first) and whom the ratio is taken to."""

    name: str
    queries: Tensor
    bank: Tensor
    contenders: list[Contender]


def real_embeddings(data: Path | None, quick: bool) -> tuple[str, Tensor, Tensor]:
    """Name, queries and bank: every K=32 patch of real images, embedded by a trained encoder."""
    checkpoint = Path("reference/official_checkpoints/hazelnut_enchier.pkl")
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            name = "built-in cloth, untrained encoder"
            encoder = HierarchicalEncoder(initialization="kaiming").eval()
            category = write_sample_category(Path(folder), train=10 if quick else 200)
        else:
            name = "magnetic tile images, hazelnut encoder"
            encoder = load_encoder(data / checkpoint)
            category = Category(data / "data/magnetic_tile")
        train = find_images(category.root / "train")[: 10 if quick else None]
        tests = find_images(category.root / "test")
        tests = tests[:: max(1, len(tests) // TEST_IMAGES)][: 4 if quick else TEST_IMAGES]
        images = load_images(train, (SIDE, SIDE), LEVEL.size)
        mean = mean_image(images)
        (bank,) = encode_images(encoder, images, mean, [LEVEL])
        images = load_images(tests, (SIDE, SIDE), LEVEL.size)
        (queries,) = encode_images(encoder, images, mean, [LEVEL])
    return name, queries.flatten(0, 2), bank.flatten(0, 2)


def hard_banks(generator: torch.Generator, quick: bool) -> dict[str, Tensor]:
    """Banks [M, 64] on which screens and clusters have nothing to hold on to."""
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
    """One after the other, so that only one bank is in memory."""
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
            Contender("nearest (brute force)", ours, slow=True),
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
    # As trained encoders of an object class leave it: mean norm 3.58, deviation 0.00045 (K=64).
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
        # At one distance from every row: the middle of the sphere they lie on.
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


def exact_distances(queries: Tensor, bank: Tensor, rows: Tensor | None = None) -> Tensor:
    """Float64 distances to the given rows, or to the nearest: from differences, not products."""
    queries = queries.double()
    if rows is not None:
        return (queries - bank[rows].double()).norm(dim=1)
    mode = "donot_use_mm_for_euclid_dist"
    parts = [
        torch.cdist(queries, part.double(), compute_mode=mode).amin(1) for part in bank.split(CHUNK)
    ]
    return torch.stack(parts).amin(dim=0)


def prepared(workload: Workload) -> Iterator[tuple[Contender, Search, float]]:
    """The contenders that can be run, with the seconds that preparing the bank took."""
    for contender in workload.contenders:
        try:
            started = time.perf_counter()
            search = contender.prepare(workload.bank)
            yield contender, search, time.perf_counter() - started
        except ImportError as error:
            print(f"left out: {contender.name} ({error})", file=sys.stderr)


def measure(workload: Workload, repeats: int) -> list[dict[str, Any]]:
    """One record per contender: times, pairs per second, how right the answers are."""
    searches = list(prepared(workload))
    seconds: dict[str, list[float]] = {contender.name: [] for contender, _, _ in searches}
    answers = {}
    counts = {
        contender.name: min(len(workload.queries), SLOW_QUERIES if contender.slow else 10**9)
        for contender, _, _ in searches
    }
    for _ in range(repeats):  # in turn, so that a slow spell of the machine hits all alike
        for contender, search, _ in searches:
            name = contender.name
            if contender.slow and seconds[name] and seconds[name][0] > 20:
                continue
            started = time.perf_counter()
            answers[name] = search(workload.queries[: counts[name]])
            seconds[name].append(time.perf_counter() - started)
    checked = torch.linspace(0, min(counts.values()) - 1, CHECKED).long()
    exact = exact_distances(workload.queries[checked], workload.bank)
    records = []
    for contender, _, build_seconds in searches:
        name = contender.name
        distances, rows = (values[checked] for values in answers[name])
        median = statistics.median(seconds[name])
        # A neighbour is right if no other is nearer by more than float32 can tell.
        found = exact_distances(workload.queries[checked], workload.bank, rows)
        right = found <= exact * (1 + 1e-6)
        error = (distances.double() - exact).abs() / exact.clamp(min=1e-300)
        records.append(
            {
                "workload": workload.name,
                "search": name,
                "seconds": median,
                "all_seconds": seconds[name],
                "build_seconds": build_seconds,
                "queries": counts[name],
                "giga_pairs_per_second": counts[name] * len(workload.bank) / median / 1e9,
                "right_neighbours": float(right.double().mean()),
                "zero_distances": float(((distances == 0) & (exact > 0)).double().mean()),
                "worst_relative_error": float(error[exact > 0].max()) if (exact > 0).any() else 0.0,
            }
        )
    for record in records:
        record["ours_faster"] = (
            records[0]["giga_pairs_per_second"] / record["giga_pairs_per_second"]
        )
    return records


def memory_of_a_bank(rows: int, dim: int) -> dict[str, float]:
    """Bytes beyond the embeddings given, over their bytes: after building and at the most."""
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


def commit() -> str:
    """The commit measured, as far as git tells."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


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
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Pairs per second of every search, a panel per workload."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    names = list(dict.fromkeys(record["workload"] for record in result["records"]))
    rows = [[r for r in result["records"] if r["workload"] == name] for name in names]
    figure, axes = plt.subplots(
        len(names),
        1,
        figsize=(9, 0.45 * sum(len(r) + 2 for r in rows)),
        layout="constrained",
        height_ratios=[len(r) + 2 for r in rows],
    )
    for axis, name, records in zip(axes, names, rows, strict=True):
        labels = [f"{r['search']} ({r['right_neighbours']:.0%} right)" for r in records]
        colours = ["tab:blue", *["tab:gray"] * (len(records) - 1)]
        axis.barh(labels, [r["giga_pairs_per_second"] for r in records], color=colours)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_title(name, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    axes[-1].set_xlabel("billion pairs of query and bank row per second")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print a table, write JSON, table and plot."""
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
        records += measure(workload, options.repeats)
    memory = memory_of_a_bank(100_000 if options.quick else 1_000_000, 64)
    result = {"commit": commit(), "machine": describe(), "records": records, "memory": memory}
    print(table(result))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "search.json").write_text(json.dumps(result, indent=2) + "\n")
        (options.output / "search.md").write_text(table(result))
        plot(result, options.output / "search.png")


if __name__ == "__main__":
    main()
