"""What the command line shows in the terminal: progress of training, tables of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..report.text import shown

if TYPE_CHECKING:
    from ..detector.evaluation import CategoryResult
    from ..detector.patch_svdd import PatchSVDD
    from ..training.record import TrainingStep

console = Console()
errors = Console(stderr=True)


def print_error(message: str) -> None:
    """One line on standard error, whatever the message holds."""
    errors.print("[bold red]error:[/] ", end="")
    line = shown(" ".join(message.split()))
    errors.print(line, markup=False, highlight=False, soft_wrap=True)


def print_warning(message: str) -> None:
    """As `print_error`, for what does not end the run."""
    errors.print("[bold yellow]warning:[/] ", end="")
    errors.print(shown(message), markup=False, highlight=False, soft_wrap=True)


_TIMED_STEPS = 12  # steps shown before the line that says how long it will take


def fit_with_progress(
    detector: PatchSVDD,
    data: Path,
    logs: Sequence[Callable[[TrainingStep], None]] = (),
    **fit_options: Any,
) -> None:
    """Fit the detector under a progress bar, with figures that show how training goes.

    These are the loss; per level the share of positions that the classifier tells right (12.5 % is
    chance; not in mode dense) and the spread of the embeddings; and how well the last check found
    synthetic defects. Loss and shares are smoothed over some 20 steps.

    Each phase has a bar of its own; beside it stands how long the whole will still take.

    logs: called after each training step. fit_options: passed on to `PatchSVDD.fit`.
    """
    with _fit_progress() as (show_step, show_phase):

        def on_step(step: TrainingStep) -> None:
            for log in logs:
                log(step)
            show_step(step)

        detector.fit(data, on_step=on_step, on_progress=show_phase, **fit_options)


@contextmanager
def _fit_progress() -> Iterator[
    tuple[Callable[[TrainingStep], None], Callable[[str, float, float | None], None]]
]:
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        BarColumn(bar_width=8),
        TextColumn("{task.fields[done]}"),
        TextColumn("{task.fields[left]}", style="progress.remaining"),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        phases: dict[str, Any] = {}
        means: dict[str, float] = {}
        steps_shown = 0
        checked = ""
        to_go: float | None = None

        def smooth(name: str, value: float) -> float:
            means[name] = value if name not in means else 0.95 * means[name] + 0.05 * value
            return means[name]

        def show(step: TrainingStep) -> None:
            nonlocal steps_shown, checked
            steps_shown += 1
            if steps_shown == _TIMED_STEPS and to_go is not None:
                console.print(f"{step.total_steps:,} steps, about {_duration(to_go)} to go in all")
            if step.quality is not None:
                checked = f"  defects {step.quality.criterion:.1f}"
            figures = [f"loss {smooth('loss', step.loss):.3g}"]
            for size, level in sorted(step.levels.items(), reverse=True):
                figures.append(f"K{size}")
                if level.accuracy is not None:
                    figures[-1] += f" right {smooth(f'accuracy {size}', level.accuracy):.0%}"
                figures[-1] += f" spread {level.spread:.0e}"
            progress.update(
                phases["training"],
                done=f"{step.step}/{'?' if step.total_steps is None else step.total_steps}",
                description="  ".join(figures) + checked,
            )

        def show_phase(name: str, share: float, seconds_left: float | None) -> None:
            nonlocal to_go
            to_go = seconds_left
            if name not in phases:
                for task in progress.tasks:  # the time to go stands beside the newest bar alone
                    progress.update(task.id, left="")
                phases[name] = progress.add_task(name, total=1.0, done="", left="")
            left = "" if to_go is None or share == 1 else f"{_clock(to_go)} to go"
            progress.update(phases[name], completed=share, done=f"{share:.0%}", left=left)

        yield show, show_phase


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def results_table(results: Sequence[CategoryResult], with_mean: bool = True) -> Table:
    """One row per category and one column per combination, as in the paper; a line per metric.

    Where there are images for validation, one more column has the false alarms among them.
    """
    from ..detector.evaluation import mean_result
    from ..score.metrics import METRICS

    combinations = list(results[0].percent)
    table = Table(
        caption="detection and segmentation AUROC, AUPRO up to 30 % false positives; percent",
        show_lines=True,
    )
    table.add_column("category", overflow="fold")  # cut short, two names may be the same
    table.add_column("good+bad")
    table.add_column("metric", no_wrap=True)  # its lines stand beside the figures'
    for combination in combinations:
        table.add_column(combination, justify="right", no_wrap=True)
    has_validation = any(result.num_validation for result in results)
    if has_validation:  # good images that were set apart, and how many are called anomalous
        table.add_column("false alarms", justify="right")
    rows = list(results)
    if with_mean and len(rows) > 1:
        rows.append(mean_result(results))
    labels = "\n".join(METRICS.values())
    for result in rows:
        cells = []
        for combination in combinations:
            values = [result.percent[combination][metric] for metric in METRICS]
            cells.append("\n".join("-" if value is None else f"{value:.1f}" for value in values))
        if has_validation:
            cells.append(_false_alarms(result))
        table.add_row(result.category, f"{result.num_good}+{result.num_anomalous}", labels, *cells)
    return table


def _false_alarms(result: CategoryResult) -> str:
    if result.num_false_alarms is None:
        return "-"
    return f"{result.num_false_alarms:,} of {result.num_validation:,}"
