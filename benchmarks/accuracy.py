"""Time to accuracy: what each way of training reaches, beside the encoder it starts from.

    python benchmarks/accuracy.py --data DIR --minutes 10 --seeds 3 --output benchmarks/results

For each category in DIR (MVTec layout), way and seed, an encoder is trained; at the start and at
given times the test images are scored, and again with the good ones alone made brighter: a detector
that sees past light scores the same. Neither mode's rate depends on how long is still to go, so
each point is what a run of that length would give. What labels say never reaches the training.

Patches of 32 pixels are scored at stride 8 instead of 4, which saves most of the evaluation's time
and moves AUROC by up to a point or two. Time is that of the process over its threads (CPU time), so
that runs on a busy machine compare; on two idle cores a minute of it passes in half a minute. Runs
that accuracy.json in the output folder holds already are not repeated, so a long series can be done
in parts. Writes accuracy.json, accuracy.md and accuracy.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import commit
from patchsvdd_fast import HierarchicalEncoder, metrics
from patchsvdd_fast.evaluation import read_masks
from patchsvdd_fast.files import written_whole
from patchsvdd_fast.images import (
    Category,
    find_categories,
    load_images,
    match_illumination,
    mean_colour,
    mean_image,
)
from patchsvdd_fast.levels import PatchLevel
from patchsvdd_fast.recipes import training_settings
from patchsvdd_fast.runtime import describe
from patchsvdd_fast.score import combinations_of, fill_banks, score_images
from patchsvdd_fast.selection import DefectCheck
from patchsvdd_fast.training import Trainer, TrainingStep

SIDE = (256, 256)
LEVELS = (PatchLevel(64, stride=16), PatchLevel(32, stride=8))
BRIGHTER = (0.05, 0.1)
SHOWN = "mult"
DETECTION, SEGMENTATION = "detection", "segmentation"
IN_OTHER_LIGHT = tuple(f"detection, good ones {share:.0%} brighter" for share in BRIGHTER)
WAYS = {
    "faithful": ("faithful", "as_is"),
    "faithful, matched light": ("faithful", "matched"),
    "dense": ("dense", "matched"),
}
"""What is compared: mode and illumination."""


class TestSet:
    """A category's images, read once."""

    def __init__(self, category: Category, illumination: str) -> None:
        tests = category.test_images()
        train = load_images(category.root, SIDE, 64)
        self.light = mean_colour(train) if illumination == "matched" else None
        self.train = match_illumination(train, self.light)
        self.mean = mean_image(self.train)
        self.images = load_images([str(image.path) for image in tests], SIDE, 64)
        self.labels = np.array([image.is_anomalous for image in tests])
        self.masks = read_masks(tests, SIDE)

    def good_but_brighter(self, share: float) -> Tensor:
        """The good test images, so much brighter."""
        good = self.images[torch.from_numpy(~self.labels)]
        return (good * (1 + share)).round().clamp(0, 255).byte()


def evaluate(encoder: HierarchicalEncoder, tests: TestSet) -> dict[str, Any]:
    """AUROC in percent by combination: detection, segmentation, detection in another light."""
    banks = fill_banks(encoder, tests.train, tests.mean, LEVELS)
    usual, *brighter = (
        score_images(encoder, banks, match_illumination(images, tests.light), tests.mean)
        for images in (tests.images, *map(tests.good_but_brighter, BRIGHTER))
    )
    figures: dict[str, dict[str, float | None]] = {}
    for combination in combinations_of(LEVELS):
        maps = usual.map(combination).numpy()
        scores = maps.max(axis=(1, 2))
        figures[combination] = mine = {
            DETECTION: 100 * metrics.detection_auroc(scores, tests.labels),
            SEGMENTATION: None
            if tests.masks is None
            else 100 * metrics.segmentation_auroc(maps, tests.masks),
        }
        for name, result in zip(IN_OTHER_LIGHT, brighter, strict=True):
            scores[~tests.labels] = result.map(combination).amax(dim=(1, 2)).numpy()
            mine[name] = 100 * metrics.detection_auroc(scores, tests.labels)
    return figures


class _EnoughError(Exception):
    """The last of the times has come."""


def train_and_evaluate(
    tests: TestSet, mode: str, seed: int, core_minutes: Sequence[float]
) -> list[dict[str, Any]]:
    """One run: a point at the start and at each time (CPU time of the process, in minutes)."""
    settings = training_settings(mode, seed=seed, steps=10**9, check_every=0)
    torch.manual_seed(seed)
    encoder = HierarchicalEncoder(initialization=settings.initialization)
    check = DefectCheck(tests.train, tests.mean, LEVELS, light=tests.light)
    trainer = Trainer(encoder, tests.train, tests.mean, settings)
    spent, started = 0.0, time.process_time()
    points: list[dict[str, Any]] = []
    due = list(core_minutes)

    def point(step: int, shown: dict[str, float] | None) -> None:
        encoder.eval()
        quality = check(encoder)
        points.append(
            {
                "step": step,
                "core_minutes": spent / 60,
                "position_accuracy": shown,
                "drawn_defects": [quality.detection, quality.segmentation],
                "percent": evaluate(encoder, tests),
            }
        )
        encoder.train()

    accuracy: dict[int, float] = {}

    def on_step(step: TrainingStep) -> None:
        nonlocal spent, started
        spent += time.process_time() - started
        for size, level in step.levels.items():
            accuracy[size] = 0.98 * accuracy.get(size, 0.125) + 0.02 * level.accuracy
        if spent >= 60 * due[0]:
            due.pop(0)
            point(step.step, {f"K{size}": value for size, value in accuracy.items()})
            if not due:
                raise _EnoughError
        started = time.process_time()

    point(0, None)
    started = time.process_time()
    with contextlib.suppress(_EnoughError):
        trainer.run(on_step)
    return points


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Per category and way: mean and standard deviation over seeds at each time, as Markdown."""
    lines = [
        f"AUROC of the {SHOWN} map in percent; 5 % and 10 % brighter: detection with the good test "
        "images alone so much brighter. Mean ± standard deviation over seeds; kept: with how many "
        "of them the check on drawn defects, which sees no labels, would end with this point.",
        "",
        "| category | way | core minutes | detection | segmentation | 5 % brighter | 10 % brighter "
        "| kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    keys = sorted({(run["category"], run["way"]) for run in runs})
    for category, way in keys:
        mine = [run for run in runs if (run["category"], run["way"]) == (category, way)]
        for index in range(min(len(run["points"]) for run in mine)):
            points = [run["points"][index] for run in mine]
            minutes = statistics.mean(point["core_minutes"] for point in points)
            cells = [
                _spread([point["percent"][SHOWN][name] for point in points])
                for name in (DETECTION, SEGMENTATION, *IN_OTHER_LIGHT)
            ]
            when = f"{minutes:.2g}" if minutes else "untrained"
            kept = sum(_kept(run) == index for run in mine)
            lines.append(
                f"| {category} | {way} | {when} | {' | '.join(cells)} | {kept} of {len(mine)} |"
            )
    return "\n".join(lines) + "\n"


def _kept(run: dict[str, Any]) -> int:
    """The point that `selection.Quality.criterion` chooses."""
    criteria = [sum(point["drawn_defects"]) for point in run["points"]]
    return criteria.index(max(criteria))


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    deviation = statistics.stdev(known) if len(known) > 1 else math.nan
    return f"{statistics.mean(known):.1f}" + (
        "" if math.isnan(deviation) else f" ± {deviation:.1f}"
    )


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel per category and metric: mean over seeds against time, with bars of deviation."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    categories = sorted({run["category"] for run in runs})
    figure, axes = pyplot.subplots(
        2, len(categories), figsize=(3.2 * len(categories), 5), squeeze=False, sharex=True
    )
    for column, category in enumerate(categories):
        for row, metric in enumerate((DETECTION, SEGMENTATION)):
            panel = axes[row][column]
            for colour, way in enumerate(WAYS):
                mine = [r for r in runs if (r["category"], r["way"]) == (category, way)]
                if not mine or mine[0]["points"][0]["percent"][SHOWN][metric] is None:
                    continue
                count = min(len(run["points"]) for run in mine)
                values = np.array(
                    [
                        [run["points"][i]["percent"][SHOWN][metric] for run in mine]
                        for i in range(count)
                    ]
                )
                minutes = [
                    statistics.mean(run["points"][i]["core_minutes"] for run in mine)
                    for i in range(count)
                ]
                panel.errorbar(
                    minutes,
                    values.mean(axis=1),
                    values.std(axis=1),
                    label=way,
                    color=f"C{colour}",
                    capsize=3,
                )
            panel.set_title(f"{category}: {metric}", fontsize=9)
            panel.set_ylabel("AUROC, %")
            if row:
                panel.set_xlabel("core minutes of training")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run what is missing, write JSON, table and plot after every run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named = os.environ.get("PATCHSVDD_TEST_DATA")
    parser.add_argument("--data", type=Path, default=Path(named) / "data" if named else None)
    parser.add_argument("--categories", nargs="*", help="names; default: all in DIR")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument(
        "--minutes", type=float, nargs="+", default=[2.5, 10.0], help="core minutes"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.data is None:
        parser.error("--data names a folder of categories")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "accuracy.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    minutes = sorted(options.minutes)
    if any(run["way"] in options.ways and run["minutes"] != minutes for run in runs):
        parser.error(f"{path} holds runs of these ways with other --minutes")
    done = {(run["category"], run["way"], run["seed"]) for run in runs}
    for seed in range(options.seeds):
        for category in find_categories(options.data):
            if options.categories and category.name not in options.categories:
                continue
            todo = [way for way in options.ways if (category.name, way, seed) not in done]
            for way in todo:
                mode, illumination = WAYS[way]
                tests = TestSet(category, illumination)
                points = train_and_evaluate(tests, mode, seed, minutes)
                runs.append(
                    {
                        "category": category.name,
                        "way": way,
                        "seed": seed,
                        "minutes": minutes,
                        "threads": torch.get_num_threads(),
                        "commit": commit(),
                        "points": points,
                    }
                )
                with written_whole(path) as partial:
                    result = {"machine": describe(), "runs": runs}
                    partial.write_text(json.dumps(result, indent=1) + "\n")
                print(f"{category.name} {way} seed {seed} done", flush=True)
    (options.output / "accuracy.md").write_text(table(runs))
    print(table(runs))
    plot(runs, options.output / "accuracy.png")


if __name__ == "__main__":
    main()
