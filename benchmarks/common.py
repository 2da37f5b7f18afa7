"""What the benchmarks have in common: peers, workloads, timing, correctness of answers, plots."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blas
import torch
from torch import Tensor

from patchsvdd_fast import HierarchicalEncoder, PatchLevel
from patchsvdd_fast.detector.encoder_file import load_encoder
from patchsvdd_fast.files.categories import Category
from patchsvdd_fast.files.folders import find_images
from patchsvdd_fast.images.light import mean_image
from patchsvdd_fast.images.prepare import load_images
from patchsvdd_fast.images.sample_cloth import write_sample_category
from patchsvdd_fast.ops.backends import describe
from patchsvdd_fast.score.encoding import encode_images

Search = Callable[[Tensor], tuple[Tensor, Tensor]]
Prepare = Callable[[Tensor], Search]

CHUNK = 10_000  # bank rows per distance matrix of torch.cdist
CHECKED = 1_000  # queries whose answers are compared with float64
SIDE, LEVEL = 256, PatchLevel(32, 4)
TEST_IMAGES = 40


# --- peers ----------------------------------------------------------------------------------------


def cdist_min(bank: Tensor) -> Search:
    """torch.cdist in chunks of the bank, then the minimum over them."""

    def search(queries: Tensor) -> tuple[Tensor, Tensor]:
        found = [torch.cdist(queries, part).min(dim=1) for part in bank.split(CHUNK)]
        distances = torch.stack([part.values for part in found])
        rows = torch.stack([part.indices + i * CHUNK for i, part in enumerate(found)])
        best = distances.argmin(dim=0, keepdim=True)
        return distances.gather(0, best)[0], rows.gather(0, best)[0]

    return search


def faiss_flat(bank: Tensor) -> Search:
    """FAISS's exact index, on the CPU."""
    import faiss

    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank.cpu().numpy())
    return faiss_search(index)


def faiss_search(index: Any) -> Search:
    """The search of a FAISS index on the CPU, whose squared distances may come out negative."""

    def search(queries: Tensor) -> tuple[Tensor, Tensor]:
        squared, rows = index.search(queries.cpu().numpy(), 1)
        return torch.from_numpy(squared[:, 0]).clamp(min=0).sqrt(), torch.from_numpy(rows[:, 0])

    return search


def faiss_lists(bank: Tensor, most_per_centroid: int | None = None) -> Search:
    """FAISS's inverted file of 4,096 lists, 8 of which are searched; approximate.

    most_per_centroid: rows to train on, for each list; None: as FAISS does.
    """
    import faiss

    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(bank.shape[1]), bank.shape[1], 4096)
    if most_per_centroid is not None:
        index.cp.max_points_per_centroid = most_per_centroid
    index.train(bank.numpy())
    index.add(bank.numpy())
    index.nprobe = 8
    return faiss_search(index)


# --- workloads ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """A search to time; one that would take minutes is given only the first `most_queries`."""

    name: str
    prepare: Prepare
    most_queries: int | None = None


@dataclass(frozen=True)
class Workload:
    """Queries [Q, D], a bank [M, D], and the searches to time on them, ours first."""

    name: str
    queries: Tensor
    bank: Tensor
    contenders: list[Contender]


def real_embeddings(
    data: Path | None, quick: bool, device: str = "cpu"
) -> tuple[str, Tensor, Tensor]:
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
        encoder.to(device)
        train = find_images(category.root / "train")[: 10 if quick else None]
        tests = find_images(category.root / "test")
        tests = tests[:: max(1, len(tests) // TEST_IMAGES)][: 4 if quick else TEST_IMAGES]
        images = load_images(train, (SIDE, SIDE), LEVEL.size)
        mean = mean_image(images)
        (bank,) = encode_images(encoder, images, mean, [LEVEL])
        images = load_images(tests, (SIDE, SIDE), LEVEL.size)
        (queries,) = encode_images(encoder, images, mean, [LEVEL])
    return name, queries.flatten(0, 2), bank.flatten(0, 2)


# --- measuring ------------------------------------------------------------------------------------

Clock = Callable[[Callable[[], Any]], tuple[Any, float]]


def wall_clock(function: Callable[[], Any]) -> tuple[Any, float]:
    """What the function returns, and the seconds it took."""
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def exact_distances(queries: Tensor, bank: Tensor, rows: Tensor | None = None) -> Tensor:
    """Float64 distances to the given rows [Q], or to the nearest: from differences, not products.

    A row that is not in the bank (-1, as some searches mark a failure) is infinitely far.
    """
    queries = queries.double()
    if rows is not None:
        there = (rows >= 0) & (rows < len(bank))
        distances = (queries - bank[rows.where(there, 0)].double()).norm(dim=1)
        return distances.where(there, torch.inf)
    mode = "donot_use_mm_for_euclid_dist"
    parts = [
        torch.cdist(queries, part.double(), compute_mode=mode).amin(1) for part in bank.split(CHUNK)
    ]
    return torch.stack(parts).amin(dim=0)


def correctness(
    queries: Tensor, bank: Tensor, exact: Tensor, distances: Tensor, rows: Tensor
) -> dict[str, float]:
    """How correct the found distances and rows are.

    exact: the true nearest distances [Q] float64.

    Returns the share of queries with a right neighbour, the share with a distance wrongly reported
    as 0, and the largest relative error of a distance.
    """
    distances, rows = distances.to(exact.device), rows.to(exact.device)
    # A neighbour is right unless another is nearer by more than float32 can resolve.
    right = exact_distances(queries, bank, rows) <= exact * (1 + 1e-6)
    error = (distances.double() - exact).abs() / exact.clamp(min=1e-300)
    return {
        "right_neighbours": float(right.double().mean()),
        "zero_distances": float(((distances == 0) & (exact > 0)).double().mean()),
        "worst_relative_error": float(error[exact > 0].max()) if (exact > 0).any() else 0.0,
    }


def prepared(
    workload: Workload, failures: tuple[type[Exception], ...]
) -> Iterator[tuple[Contender, Search | Exception, float]]:
    """Each contender with its prepared search (or the error), and the seconds that took."""
    for contender in workload.contenders:
        started = time.perf_counter()
        search: Search | Exception
        try:
            search = contender.prepare(workload.bank)
        except (ImportError, *failures) as error:
            print(f"left out: {contender.name} ({error})", file=sys.stderr)
            search = error
        yield contender, search, time.perf_counter() - started


def measure(
    workload: Workload,
    repeats: int,
    clock: Clock = wall_clock,
    *,
    warm_up: bool = False,
    patience: float = 20.0,
    failures: tuple[type[Exception], ...] = (),
) -> list[dict[str, Any]]:
    """One record per contender: times, pairs per second, correctness of the answers.

    The record of a contender that is not installed, or fails with one of `failures`, has the reason
    instead. warm_up: search once before, untimed. patience: a search with `most_queries` that takes
    more seconds than this is not repeated.
    """
    missing: dict[str, Exception] = {}
    searches: list[tuple[Contender, Search, float]] = []
    for contender, search, build_seconds in prepared(workload, failures):
        if isinstance(search, Exception):
            missing[contender.name] = search
        else:
            searches.append((contender, search, build_seconds))
    seconds: dict[str, list[float]] = {contender.name: [] for contender, _, _ in searches}
    answers: dict[str, tuple[Tensor, Tensor]] = {}
    counts = {
        contender.name: min(len(workload.queries), contender.most_queries or 10**9)
        for contender, _, _ in searches
    }
    for repeat in range(-1 if warm_up else 0, repeats):
        # In turn, so that a slow spell of the machine affects all alike.
        for contender, search, _ in searches:
            name = contender.name
            slow = contender.most_queries and seconds[name] and seconds[name][0] > patience
            if name in missing or slow:
                continue
            given = workload.queries[: counts[name]]
            try:
                answers[name], taken = clock(lambda search=search, given=given: search(given))
            except failures as error:
                missing[name] = error
                continue
            if repeat >= 0:
                seconds[name].append(taken)
    searches = [entry for entry in searches if entry[0].name not in missing]
    records = []
    if searches:
        fewest = min(counts[contender.name] for contender, _, _ in searches)
        checked = torch.linspace(0, fewest - 1, CHECKED).long()
        queries = workload.queries[checked.to(workload.queries.device)]
        exact = exact_distances(queries, workload.bank)
    for contender, _, build_seconds in searches:
        name = contender.name
        found = (values[checked.to(values.device)] for values in answers[name])
        median = statistics.median(seconds[name])
        records.append(
            {
                "workload": workload.name,
                "search": name,
                "seconds": median,
                "all_seconds": seconds[name],
                "build_seconds": build_seconds,
                "queries": counts[name],
                "giga_pairs_per_second": counts[name] * len(workload.bank) / median / 1e9,
                **correctness(queries, workload.bank, exact, *found),
            }
        )
    ours = next((r for r in records if r["search"] == workload.contenders[0].name), None)
    for record in records:
        record["ours_faster"] = (
            ours and ours["giga_pairs_per_second"] / record["giga_pairs_per_second"]
        )
    return records + [
        {"workload": workload.name, "search": name, "reason": f"{type(why).__name__}: {why}"}
        for name, why in missing.items()
    ]


def commit() -> str:
    """The commit that is measured, as git describes it; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


# --- showing --------------------------------------------------------------------------------------


def origin() -> dict[str, Any]:
    """Where figures come from: commit, machine and BLAS. Raises RuntimeError as `blas` does."""
    loaded = blas.libraries()
    blas.require_best_kernels(loaded)
    return {"commit": commit(), "machine": describe(), "blas": loaded}


def write_results(folder: Path, name: str, result: dict[str, Any], table: str) -> None:
    """Write NAME.json and the table NAME.md, made from it, to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / f"{name}.md").write_text(table)


def plot(panels: Iterable[tuple[str, dict[str, float]]], unit: str, path: Path) -> None:
    """Plot bars for each panel on a logarithmic axis, the first (ours) in another colour."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    drawn = [(title, values) for title, values in panels if values]
    figure, axes = plt.subplots(
        len(drawn),
        1,
        figsize=(9, 0.45 * sum(len(values) + 2 for _, values in drawn)),
        layout="constrained",
        height_ratios=[len(values) + 2 for _, values in drawn],
        squeeze=False,
    )
    for axis, (title, values) in zip(axes[:, 0], drawn, strict=True):
        colours = ["tab:blue", *["tab:gray"] * (len(values) - 1)]
        axis.barh(list(values), list(values.values()), color=colours)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel(unit)
    figure.savefig(path, dpi=110)


@dataclass(frozen=True)
class Figure:
    """A number that a workload is meant to reach, and the one measured."""

    workload: str
    what: str
    target: float
    measured: float | None
    at_most: bool = False

    @property
    def reached(self) -> bool | None:
        """Whether the target was reached; None if nothing was measured."""
        if self.measured is None:
            return None
        return self.measured <= self.target if self.at_most else self.measured >= self.target
