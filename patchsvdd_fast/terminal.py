"""What the command line shows in the terminal: progress of training, tables of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from .detector import PatchSVDD
from .encoder import HierarchicalEncoder
from .evaluation import METRICS, CategoryResult, mean_result
from .training import TrainingStep

console = Console()
errors = Console(stderr=True)


def fit_with_progress(
    detector: PatchSVDD,
    data: Path,
    encoder: HierarchicalEncoder | None = None,
    checkpoint: Path | None = None,
    checkpoint_minutes: float = 5.0,
) -> None:
    """Fit the detector under a progress bar with the figures that tell how training goes.

    Shown, smoothed over some 20 steps: the loss and, per level, the share of positions told right
    (chance is 12.5 %); and the embeddings' spread in the last step.
    """
    with _training_progress() as on_step:
        detector.fit(
            data,
            encoder=encoder,
            on_step=on_step,
            checkpoint=checkpoint,
            checkpoint_minutes=checkpoint_minutes,
        )


@contextmanager
def _training_progress() -> Iterator[Callable[[TrainingStep], None]]:
    columns = (
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.description}"),
    )
    means: dict[str, float] = {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=None)

        def smooth(name: str, value: float) -> float:
            means[name] = value if name not in means else 0.95 * means[name] + 0.05 * value
            return means[name]

        def on_step(step: TrainingStep) -> None:
            figures = [f"loss {smooth('loss', step.loss):.3f}"]
            for size, level in sorted(step.levels.items(), reverse=True):
                accuracy = smooth(f"accuracy {size}", level.position_accuracy)
                figures.append(f"K{size} right {accuracy:.0%} spread {level.spread:.0e}")
            progress.update(
                task,
                completed=step.step,
                total=step.total_steps,
                description="  ".join(figures),
            )

        yield on_step


def results_table(results: Sequence[CategoryResult], with_mean: bool = True) -> Table:
    """One row per category and one column per combination, as in the paper; a line per metric."""
    combinations = list(results[0].percent)
    table = Table(
        caption="detection and segmentation AUROC, AUPRO up to 30 % false positives; percent",
        show_lines=True,
    )
    table.add_column("category")
    table.add_column("good+bad")
    table.add_column("metric", no_wrap=True)  # its lines stand beside the figures'
    for combination in combinations:
        table.add_column(combination, justify="right", no_wrap=True)
    rows = list(results)
    if with_mean and len(rows) > 1:
        rows.append(mean_result(results))
    labels = "\n".join(METRICS.values())
    for result in rows:
        cells = []
        for combination in combinations:
            values = [result.percent[combination][metric] for metric in METRICS]
            cells.append("\n".join("-" if value is None else f"{value:.1f}" for value in values))
        table.add_row(result.category, f"{result.num_good}+{result.num_anomalous}", labels, *cells)
    return table
