"""Which encoder to pick: accuracy, time and size of each, on categories in MVTec layout.

    python benchmarks/encoders.py --data DIR --output benchmarks/results

For each category in DIR, encoder and seed (only Patch SVDD's has one), a detector is fitted as a
user would, and its test images are evaluated: detection and segmentation AUROC, and AUPRO. Measured
as well: the time from the folder to the detector, and from a file to its score, one image at a time
(median over the test images); the size of the bank.

`--peer CATEGORY` adds what the search is worth there: the same features of the same images are
searched by FAISS's flat index as patchcore-inspection does, in turn with ours in this process.
FAISS brings a BLAS of its own, which has to run the best kernels of this processor (blas.py).

Runs that encoders.json in the output folder already holds are not repeated (`--again` does), so a
long series can be done in parts. Writes encoders.json, encoders.md and encoders.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blas
import numpy as np
import torch

from common import commit
from patchsvdd_fast import PatchSVDD
from patchsvdd_fast.detector.evaluation import evaluate_category
from patchsvdd_fast.files.categories import Category, find_categories
from patchsvdd_fast.files.whole import written_whole
from patchsvdd_fast.ops.backends import describe

UNTRAINED, TRAINED = "patch-svdd, untrained", "patch-svdd, trained"
ENCODERS: dict[str, dict[str, Any]] = {
    UNTRAINED: {"mode": "dense"},
    TRAINED: {"mode": "dense"},
    f"{TRAINED} in bfloat16": {"mode": "dense", "precision": "bfloat16"},
    "efficientnet_lite0": {"encoder": "efficientnet_lite0"},
    "efficientnet_lite0, bfloat16": {
        "encoder": "efficientnet_lite0",
        "encoding_precision": "bfloat16",
    },
    "efficientnet_lite0, 64 axes": {"encoder": "efficientnet_lite0", "embedding_dim": 64},
    "efficientnet_lite0, whitened": {"encoder": "efficientnet_lite0", "projection": "whiten"},
    "efficientnet_lite0, coreset of 10 %": {"encoder": "efficientnet_lite0", "coreset": 0.1},
    "efficientnet_lite0, re-weighted": {"encoder": "efficientnet_lite0", "reweight": 9},
}
"""What is compared: parameters of `PatchSVDD`, all else at its defaults."""
METRICS = ("detection", "segmentation", "aupro")
SINGLE_IMAGES = 30  # timed one at a time
PEER_IMAGES, PEER_REPEATS = 8, 3


def fitted(parameters: dict[str, Any], category: Category, seed: int, trained: bool) -> PatchSVDD:
    """A detector for a category; trained: else Patch SVDD's encoder stays as it began."""
    detector = PatchSVDD(**parameters, seed=seed, device="cpu")
    if not trained and "encoder" not in parameters:
        return detector.fit(category.root, encoder=detector.untrained_encoder())
    return detector.fit(category.root)


def measure(name: str, category: Category, seed: int) -> dict[str, Any]:
    """One run: accuracy, times and sizes."""
    started = time.perf_counter()
    detector = fitted(ENCODERS[name], category, seed, name.startswith(TRAINED))
    seconds = time.perf_counter() - started
    paths = [image.path for image in category.test_images()]
    some = paths[:: max(1, len(paths) // SINGLE_IMAGES)][:SINGLE_IMAGES]
    detector.score(some[:1])
    singles = []
    for path in some:
        started = time.perf_counter()
        detector.score([path])
        singles.append(time.perf_counter() - started)
    percent = evaluate_category(detector, category).percent
    combination = list(percent)[-1]  # "mult", or the only level
    return {
        "category": category.name,
        "encoder": name,
        "seed": seed,
        "images": detector.num_images,
        "percent": {metric: percent[combination][metric] for metric in METRICS},
        "fit_seconds": seconds,
        "image_seconds": statistics.median(singles),
        "bank": {str(level): [len(bank), bank.dim] for level, bank in detector.banks_.items()},
        "commit": commit(),
    }


# --- the search's peer ----------------------------------------------------------------------------


def compare_with_faiss(category: Category) -> dict[str, Any]:
    """Milliseconds an image of ours and of FAISS's flat index over the same features."""
    import faiss

    detector = fitted(ENCODERS["efficientnet_lite0"], category, 0, False)
    ((level, bank),) = detector.banks_.items()
    index = faiss.IndexFlatL2(bank.dim)
    index.add(np.ascontiguousarray(bank.embeddings.numpy()))
    faiss.omp_set_num_threads(torch.get_num_threads())
    paths = [image.path for image in category.test_images()]
    paths = paths[:: max(1, len(paths) // PEER_IMAGES)][:PEER_IMAGES]
    features = [detector.encode(detector.load_images([path]).pixels)[0] for path in paths]
    ours: list[float] = []
    theirs: list[float] = []
    worst = 0.0
    for repeat in range(PEER_REPEATS + 1):
        for values in features:
            queries = values.flatten(0, 2)
            started = time.perf_counter()
            distances, _ = bank.nearest(queries)
            between = time.perf_counter()
            squared, _ = index.search(queries.numpy(), 1)
            ended = time.perf_counter()
            if repeat:  # the first round warms up
                ours.append(between - started)
                theirs.append(ended - between)
            found = torch.from_numpy(squared[:, 0]).clamp(min=0).sqrt()
            largest = float(distances.max())
            worst = max(worst, abs(float(found.max()) - largest) / largest)
    loaded = blas.libraries()
    blas.require_best_kernels(loaded)
    return {
        "category": category.name,
        "bank": [len(bank), bank.dim],
        "queries_per_image": level.grid_shape(*detector.image_shape()),
        "ours_seconds": statistics.median(ours),
        "faiss_seconds": statistics.median(theirs),
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "worst_score_difference": worst,
        "blas": loaded,
        "commit": commit(),
    }


# --- tables ---------------------------------------------------------------------------------------


def table(runs: Sequence[dict[str, Any]], peers: Sequence[dict[str, Any]]) -> str:
    """Markdown: detection / segmentation by category and encoder, then times and sizes."""
    categories = list(dict.fromkeys(run["category"] for run in runs))
    names = [name for name in ENCODERS if any(run["encoder"] == name for run in runs)]
    lines = [
        "Detection / segmentation AUROC in percent; means over seeds.",
        "",
        f"| encoder | {' | '.join(categories)} | mean | AUPRO |",
        f"|---|{'---|' * (len(categories) + 2)}",
    ]
    for name in names:
        cells = [_both(_of(runs, name, category)) for category in categories]
        mine = [_of(runs, name, category) for category in categories]
        whole = _both([run for some in mine for run in some]) if all(mine) else "-"
        aupro = [m["percent"]["aupro"] for some in mine for m in some]
        shown = f"{statistics.mean(aupro):.1f}" if all(mine) and None not in aupro else "-"
        seeds = max(len(some) for some in mine)
        label = f"{name} ({seeds} seeds)" if seeds > 1 else name
        lines.append(f"| {label} | {' | '.join(cells)} | {whole} | {shown} |")
    lines += [
        "",
        "Seconds from the folder to a detector, and ms from a file to its score (one at a time).",
        "",
        f"| encoder | {' | '.join(categories)} |",
        f"|---|{'---|' * len(categories)}",
    ]
    for name in names:
        cells = []
        for category in categories:
            some = _of(runs, name, category)
            fit = statistics.median(run["fit_seconds"] for run in some) if some else 0
            single = statistics.median(run["image_seconds"] for run in some) if some else 0
            cells.append(f"{fit:.1f} s, {1000 * single:.0f} ms" if some else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sizes = {run["category"]: run["images"] for run in runs}
    lines += ["", "Training images: " + ", ".join(f"{k} {v}" for k, v in sizes.items()) + "."]
    for peer in peers:
        rows, dim = peer["bank"]
        lines += [
            "",
            f"The same features of {peer['category']} ({rows:,} x {dim}): ours "
            f"{1000 * peer['ours_seconds']:.0f} ms an image, FAISS flat "
            f"{1000 * peer['faiss_seconds']:.0f} ms, {peer['ratio']:.1f} times as fast; image "
            f"scores differ by at most {peer['worst_score_difference']:.1e}.",
        ]
    return "\n".join(lines) + "\n"


def _of(runs: Sequence[dict[str, Any]], name: str, category: str) -> list[dict[str, Any]]:
    return [run for run in runs if (run["encoder"], run["category"]) == (name, category)]


def _both(some: Sequence[dict[str, Any]]) -> str:
    if not some:
        return "-"
    means = []
    for metric in ("detection", "segmentation"):
        values = [run["percent"][metric] for run in some]
        means.append("-" if None in values else f"{statistics.mean(values):.1f}")
    return " / ".join(means)


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of detection and segmentation AUROC, a panel for each."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    categories = list(dict.fromkeys(run["category"] for run in runs))
    names = [name for name in ENCODERS if any(run["encoder"] == name for run in runs)]
    figure, panels = pyplot.subplots(2, 1, figsize=(9, 6), sharex=True)
    for panel, metric in zip(panels, ("detection", "segmentation"), strict=True):
        for number, name in enumerate(names):
            values = [
                [run["percent"][metric] for run in _of(runs, name, category)]
                for category in categories
            ]
            places = np.arange(len(categories)) + 0.8 * (number / len(names) - 0.5)
            means = [statistics.mean(some) if some and None not in some else 0 for some in values]
            panel.bar(places, means, 0.8 / len(names), align="edge", label=name)
        panel.set_ylim(50, 100)
        panel.set_ylabel(f"{metric} AUROC, %")
    panels[1].set_xticks(np.arange(len(categories)), categories)
    panels[0].legend(fontsize=8, ncols=2, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run what is missing; write JSON after every run, and table and plot at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named = os.environ.get("PATCHSVDD_TEST_DATA")
    parser.add_argument("--data", type=Path, default=Path(named) / "data" if named else None)
    parser.add_argument("--categories", nargs="*", help="names; default: all in DIR")
    parser.add_argument("--encoders", nargs="*", default=list(ENCODERS), choices=list(ENCODERS))
    parser.add_argument("--seeds", type=int, default=1, help="of Patch SVDD's encoder")
    parser.add_argument("--peer", nargs="*", default=[], help="categories to compare FAISS on")
    parser.add_argument("--again", action="store_true", help="repeat runs that are there")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.data is None:
        parser.error("--data names a folder of categories")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "encoders.json"
    stored = json.loads(path.read_text()) if path.exists() else {"runs": [], "peers": []}
    runs, peers = stored["runs"], stored["peers"]

    def keep() -> None:
        with written_whole(path) as partial:
            text = json.dumps({"machine": describe(), "runs": runs, "peers": peers}, indent=1)
            partial.write_text(text + "\n")

    categories = find_categories(options.data)
    for category in categories:
        if category.name in options.peer:
            peers[:] = [peer for peer in peers if peer["category"] != category.name]
            peers.append(compare_with_faiss(category))
            keep()
            print(peers[-1], flush=True)
    for category in categories:
        if options.categories is not None and category.name not in options.categories:
            continue
        for name in options.encoders:
            for seed in range(options.seeds if "encoder" not in ENCODERS[name] else 1):
                key = (category.name, name, seed)
                if any(_key(run) == key for run in runs) and not options.again:
                    continue
                runs[:] = [run for run in runs if _key(run) != key]
                runs.append(measure(name, category, seed))
                runs.sort(key=_key)
                keep()
                print(category.name, name, seed, "done", flush=True)
    text = table(runs, peers)
    (options.output / "encoders.md").write_text(text)
    print(text)
    plot(runs, options.output / "encoders.png")


def _key(run: dict[str, Any]) -> tuple[str, str, int]:
    return run["category"], run["encoder"], run["seed"]


if __name__ == "__main__":
    blas.restart_with_best_kernels()
    main()
