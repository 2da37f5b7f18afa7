"""Time to accuracy: what each way of training reaches, beside the encoder it starts from.

    python benchmarks/accuracy.py --data DIR --minutes 2.5 20 --seeds 3 --output benchmarks/results

For each category in DIR (MVTec layout), way and seed, an encoder is trained. At the start and at
the given times the test images are scored, and again with only the good ones made brighter: a
detector that light does not mislead reaches the same figures. Neither mode's learning rate depends
on the time left, so each point is what a run of that length would give. Labels never reach the
training. Published weights (`--published`, files named <category>_*) are scored beside them.

Patches of 32 pixels are scored at stride 8 instead of 4, which saves most of the evaluation's time
and moves AUROC by up to a point or two; one mean image is taken from all (mean="paper"). Times are
CPU time, summed over the threads of the process, so that runs on a busy machine are comparable; on
two idle cores a minute of it passes in half a minute. Runs that accuracy.json in the output folder
already holds are not repeated, so a long series can be done in parts; a longer run replaces a
shorter one. Writes accuracy.json, accuracy.md and accuracy.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import commit
from patchsvdd_fast import HierarchicalEncoder
from patchsvdd_fast.detector.encoder_file import load_encoder
from patchsvdd_fast.detector.evaluation import read_masks
from patchsvdd_fast.encoders.levels import PatchLevel
from patchsvdd_fast.files.categories import Category, find_categories
from patchsvdd_fast.files.whole import written_whole
from patchsvdd_fast.images.light import match_illumination, mean_colour, mean_image
from patchsvdd_fast.images.prepare import load_images
from patchsvdd_fast.ops.backends import describe
from patchsvdd_fast.score import metrics
from patchsvdd_fast.score.encoding import fill_banks, score_images
from patchsvdd_fast.score.maps import combinations_of
from patchsvdd_fast.training.defect_check import DefectCheck
from patchsvdd_fast.training.record import Quality, TrainingStep
from patchsvdd_fast.training.settings import training_settings
from patchsvdd_fast.training.trainer import Trainer

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
"""The ways of training that are compared: mode and illumination."""
PUBLISHED = {"published weights": "as_is", "published weights, matched light": "matched"}
"""Weights from the full schedule, and the illumination in which they are scored."""


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

    def check(self) -> DefectCheck:
        """The check on synthetic defects that training on these images uses."""
        return DefectCheck(self.train, self.mean, LEVELS, light=self.light)

    def good_but_brighter(self, share: float) -> Tensor:
        """The good test images, brighter by this share."""
        good = self.images[torch.from_numpy(~self.labels)]
        return (good * (1 + share)).round().clamp(0, 255).byte()


def evaluate(encoder: HierarchicalEncoder, tests: TestSet) -> dict[str, Any]:
    """AUROC in percent by combination: detection, segmentation, detection in other light."""
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
    """The last of the given times has passed."""


def train_and_evaluate(
    tests: TestSet, mode: str, seed: int, core_minutes: Sequence[float]
) -> list[dict[str, Any]]:
    """One run: a point at the start and at each of the given times (CPU time in minutes)."""
    settings = training_settings(mode, seed=seed, steps=10**9, check_every=0)
    torch.manual_seed(seed)
    encoder = HierarchicalEncoder(initialization=settings.initialization)
    check = tests.check()
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
            if level.accuracy is not None:
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


def evaluate_published(tests: TestSet, file: Path) -> list[dict[str, Any]]:
    """The one point of published weights."""
    encoder = load_encoder(file)
    quality = tests.check()(encoder)
    return [
        {
            "step": None,
            "core_minutes": None,
            "position_accuracy": None,
            "drawn_defects": [quality.detection, quality.segmentation],
            "percent": evaluate(encoder, tests),
        }
    ]


def by_time(runs: Sequence[dict[str, Any]]) -> dict[float, list[tuple[dict[str, Any], int]]]:
    """By time (0 and those asked for): the runs that reached it, each with the point's number."""
    reached: dict[float, list[tuple[dict[str, Any], int]]] = {}
    for run in runs:
        for index, minutes in enumerate((0, *run["minutes"])):
            reached.setdefault(minutes, []).append((run, index))
    return dict(sorted(reached.items()))


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, per category, way and time, as Markdown."""
    lines = [
        f"AUROC of the {SHOWN} map in percent; 5 % and 10 % brighter: detection with the good test "
        "images alone so much brighter. Mean ± standard deviation over seeds. Kept: detection / "
        "segmentation of the weights that a training which ends here keeps, those that find "
        "synthetic defects best so far, if plainly better than the untrained; it sees no labels. "
        "Best: of the same points the one with the best detection, picked with labels.",
        "",
        "| category | way | core minutes | seeds | detection | segmentation | 5 % brighter | "
        "10 % brighter | kept | best |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = sorted({(run["category"], run["way"]) for run in runs})
    for category, way in keys:
        mine = [run for run in runs if (run["category"], run["way"]) == (category, way)]
        for minutes, reached in by_time(mine).items():
            points = [_shown(run)[index] for run, index in reached]
            cells = [
                _spread([point[name] for point in points])
                for name in (DETECTION, SEGMENTATION, *IN_OTHER_LIGHT)
            ]
            ends = [_shown(run)[_kept(run, index)] for run, index in reached]
            best = [_shown(run)[_best(run, index, _detections)] for run, index in reached]
            when = (
                "full schedule" if way in PUBLISHED else f"{minutes:g}" if minutes else "untrained"
            )
            lines.append(
                f"| {category} | {way} | {when} | {len(reached)} | {' | '.join(cells)} "
                f"| {_both(ends)} | {_both(best)} |"
            )
    return "\n".join(lines) + "\n"


def table_of_seeds(runs: Sequence[dict[str, Any]]) -> str:
    """Untrained and trained detection / segmentation, per category, way and seed, as Markdown."""
    lines = [
        "| category | way | seed | untrained | core minutes | trained | kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in sorted(runs, key=_key):
        if run["way"] not in WAYS:
            continue
        points = _shown(run)
        kept = points[_kept(run, len(points) - 1)]
        lines.append(
            f"| {run['category']} | {run['way']} | {run['seed']} | {_both(points[:1])} "
            f"| {run['minutes'][-1]:g} | {_both(points[-1:])} | {_both([kept])} |"
        )
    return "\n".join(lines) + "\n"


def _shown(run: dict[str, Any]) -> list[dict[str, float | None]]:
    """The figures of a run's points that tables and plot show."""
    return [point["percent"][SHOWN] for point in run["points"]]


def _criteria(run: dict[str, Any]) -> list[float]:
    """`Quality.criterion` of each point, by which training chooses its weights."""
    return [Quality(*point["drawn_defects"]).criterion for point in run["points"]]


def _detections(run: dict[str, Any]) -> list[float]:
    return [point["percent"][SHOWN][DETECTION] for point in run["points"]]


def _best(run: dict[str, Any], last: int, judge: Callable[[dict[str, Any]], list[float]]) -> int:
    """The number of the best of the points up to `last`; the first of equals."""
    values = judge(run)[: last + 1]
    return values.index(max(values))


def _kept(run: dict[str, Any], last: int) -> int:
    """The number of the point, of those up to `last`, whose weights training keeps."""
    criteria = _criteria(run)
    best = _best(run, last, _criteria)
    least_gain = run["least_gain"] if run["way"] == "dense" else 0
    return best if criteria[best] >= criteria[0] + least_gain else 0


def _both(figures: Sequence[dict[str, float | None]]) -> str:
    """Mean detection / segmentation."""
    return " / ".join(
        _spread([point[name] for point in figures]).split(" ")[0]
        for name in (DETECTION, SEGMENTATION)
    )


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    deviation = statistics.stdev(known) if len(known) > 1 else math.nan
    return f"{statistics.mean(known):.1f}" + (
        "" if math.isnan(deviation) else f" ± {deviation:.1f}"
    )


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the mean over seeds against time, one panel per category and metric."""
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
            for colour, way in enumerate((*WAYS, *PUBLISHED)):
                mine = [r for r in runs if (r["category"], r["way"]) == (category, way)]
                if not mine or _shown(mine[0])[0][metric] is None:
                    continue
                reached = by_time(mine)
                values = [[_shown(run)[i][metric] for run, i in some] for some in reached.values()]
                style = {"label": way, "color": f"C{colour}"}
                if way in PUBLISHED:
                    panel.axhline(values[0][0], linestyle="--", **style)
                    continue
                panel.errorbar(
                    list(reached),
                    [statistics.mean(some) for some in values],
                    [statistics.pstdev(some) for some in values],
                    capsize=3,
                    **style,
                )
            panel.set_title(f"{category}: {metric}", fontsize=9)
            panel.set_ylabel("AUROC, %")
            if row:
                panel.set_xlabel("core minutes of training")
    entries = {
        label: handle
        for panel in axes.flat
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="lower center", ncols=len(entries))
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run what is missing; write JSON after every run, and tables and plot at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named = os.environ.get("PATCHSVDD_TEST_DATA")
    parser.add_argument("--data", type=Path, default=Path(named) / "data" if named else None)
    parser.add_argument("--categories", nargs="*", help="names; default: all in DIR")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument(
        "--minutes", type=float, nargs="+", default=[2.5, 10.0], help="core minutes"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--published", type=Path, help="folder of weights to score as well")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if min(options.minutes) <= 0:
        parser.error("--minutes must be positive")
    if options.data is None:
        parser.error("--data names a folder of categories")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "accuracy.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    categories = [
        category
        for category in find_categories(options.data)
        if not options.categories or category.name in options.categories
    ]

    def keep(
        tests: TestSet, category: Category, way: str, seed: int, minutes: list[float], points: Any
    ) -> None:
        key = (category.name, way, seed)
        runs[:] = [run for run in runs if _key(run) != key]
        runs.append(
            {
                "category": category.name,
                "way": way,
                "seed": seed,
                "minutes": minutes,
                "least_gain": tests.check().least_gain,
                "threads": torch.get_num_threads(),
                "commit": commit(),
                "points": points,
            }
        )
        runs.sort(key=_key)
        with written_whole(path) as partial:
            partial.write_text(json.dumps({"machine": describe(), "runs": runs}, indent=1) + "\n")
        print(f"{category.name} {way} seed {seed} done", flush=True)

    for category in categories:
        files = sorted(options.published.glob(f"{category.name}_*")) if options.published else []
        for way, illumination in PUBLISHED.items() if files else ():
            if any(_key(run) == (category.name, way, 0) for run in runs):
                continue
            tests = TestSet(category, illumination)
            keep(tests, category, way, 0, [], evaluate_published(tests, files[0]))
    for seed in range(options.seeds):
        for category in categories:
            for way in options.ways:
                key = (category.name, way, seed)
                had = {time for run in runs if _key(run) == key for time in run["minutes"]}
                if had.issuperset(options.minutes):
                    continue
                minutes = sorted(had.union(options.minutes))
                mode, illumination = WAYS[way]
                tests = TestSet(category, illumination)
                points = train_and_evaluate(tests, mode, seed, minutes)
                keep(tests, category, way, seed, minutes, points)
    tables = f"{table(runs)}\nEach seed:\n\n{table_of_seeds(runs)}"
    (options.output / "accuracy.md").write_text(tables)
    print(tables)
    plot(runs, options.output / "accuracy.png")


def _key(run: dict[str, Any]) -> tuple[str, str, int]:
    return run["category"], run["way"], run["seed"]


if __name__ == "__main__":
    main()
