"""The search on features of a pretrained encoder, raw and whitened, against FAISS's flat index.

    python benchmarks/features.py --data DIR --output benchmarks/results

For each category in DIR (MVTec layout), the bank is that of a detector with EfficientNet-Lite0, and
the queries are all patches of some test images. Timed in turn, median of several: the bank as it
chooses to be, with clusters and without, for 9 neighbours; FAISS's exact index. Answers are
compared with float64 arithmetic on differences. Without DIR, built-in images are used. Writes
features.json and features.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blas
import torch
from torch import Tensor

from common import Contender, Search, Workload, faiss_flat, measure, origin, write_results
from patchsvdd_fast import NormalBank, PatchSVDD
from patchsvdd_fast.files.categories import find_categories
from patchsvdd_fast.images.sample_cloth import write_sample_category
from patchsvdd_fast.search.centroids import default_clusters

IMAGES = 8  # test images whose patches are searched
CHOSEN, CLUSTERED, UNCLUSTERED = "NormalBank", "with clusters", "without clusters"
NINE, FAISS = "9 neighbours", "FAISS IndexFlatL2"
VARIANTS: dict[str, dict[str, Any]] = {"raw": {}, "whitened": {"projection": "whiten"}}


def features(root: Path, parameters: dict[str, Any], images: int) -> tuple[Tensor, Tensor]:
    """Features of all training images [N, I, J, D] and of some test images [Q, D]."""
    detector = PatchSVDD(encoder="efficientnet_lite0", seed=0, device="cpu", **parameters)
    detector.fit(root)
    ((_, bank),) = detector.banks_.items()
    paths = sorted((root / "test").rglob("*.*"))
    paths = paths[:: max(1, len(paths) // images)][:images]
    found = [detector.encode(detector.load_images([path]).pixels)[0] for path in paths]
    rows = bank.embeddings.view(-1, *bank.grid, bank.dim)
    return rows, torch.cat(found).flatten(0, 2)


def contenders(images: Tensor) -> list[Contender]:
    """The searches; images: the bank's rows [N, I, J, D], for its groups."""

    def bank(**options: Any) -> NormalBank:
        return NormalBank(images, **options)

    def nine(_: Tensor) -> Search:
        searched = bank()

        def search(queries: Tensor) -> tuple[Tensor, Tensor]:
            distances, rows = searched.nearest(queries, k=9)
            return distances[:, 0], rows[:, 0]

        return search

    clusters = default_clusters(images[..., 0].numel())
    return [
        Contender(CHOSEN, lambda _: bank().nearest),
        Contender(CLUSTERED, lambda _: bank(clusters=clusters).nearest),
        Contender(UNCLUSTERED, lambda _: bank(clusters=0).nearest),
        Contender(NINE, nine),
        Contender(FAISS, faiss_flat),
    ]


def workloads(data: Path | None, quick: bool) -> Iterator[tuple[Workload, int]]:
    """A workload per category and variant, and how many queries an image has."""
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            roots = [write_sample_category(Path(folder), train=6).root]
        else:
            roots = [category.root for category in find_categories(data)]
        for root in roots:
            for variant, parameters in VARIANTS.items():
                bank, queries = features(root, parameters, 1 if quick else IMAGES)
                yield (
                    Workload(
                        f"{root.name}, {variant}", queries, bank.flatten(0, 2), contenders(bank)
                    ),
                    bank.shape[1] * bank.shape[2],
                )


def summary(records: list[dict[str, Any]], rows: int, dim: int, patches: int) -> dict[str, Any]:
    """Of one workload: milliseconds an image of each search, and ratios."""
    images = {r["search"]: 1e3 * r["seconds"] * patches / r["queries"] for r in records}
    better = min(images[CLUSTERED], images[UNCLUSTERED])
    return {
        "workload": records[0]["workload"],
        "bank": [rows, dim],
        "milliseconds": images,
        "faiss": images[FAISS] / images[CHOSEN] if FAISS in images else None,
        "better": better / images[CHOSEN],
        "nine": images[NINE] / images[CHOSEN],
        "build_seconds": records[0]["build_seconds"],
        "right": records[0]["right_neighbours"],
    }


def table(summaries: list[dict[str, Any]]) -> str:
    """Markdown: a line per workload."""
    names = (CHOSEN, CLUSTERED, UNCLUSTERED, FAISS)
    lines = [
        "Milliseconds an image of 900 patches, and how many times as fast NormalBank is.",
        "",
        f"| features | bank | {' | '.join(names)} | than FAISS | than the better of both "
        "| 9 neighbours take | build, s |",
        "|---|---|" + "---|" * (len(names) + 4),
    ]
    for line in summaries:
        cells = [
            f"{line['milliseconds'][name]:.1f}" if name in line["milliseconds"] else "-"
            for name in names
        ]
        faiss = f"{line['faiss']:.1f}" if line["faiss"] else "-"
        rows, dim = line["bank"]
        lines.append(
            f"| {line['workload']} | {rows:,} x {dim} | {' | '.join(cells)} | {faiss} "
            f"| {line['better']:.2f} | {line['nine']:.2f} times | {line['build_seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print a table, and write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of categories in MVTec layout")
    parser.add_argument("--output", type=Path, help="folder for features.json and features.md")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small inputs, to try the script")
    options = parser.parse_args()
    records: list[dict[str, Any]] = []
    summaries = []
    for workload, patches in workloads(options.data, options.quick):
        measured = measure(workload, options.repeats, warm_up=True)
        measured = [record for record in measured if "reason" not in record]
        records += measured
        summaries.append(summary(measured, *workload.bank.shape, patches))
        print(table(summaries[-1:]).splitlines()[-1], flush=True)
    result = {**origin(), "summaries": summaries, "records": records}
    print(table(summaries))
    if options.output:
        write_results(options.output, "features", result, table(summaries))


if __name__ == "__main__":
    blas.restart_with_best_kernels()
    main()
