"""What the command line shows in the terminal: progress of training, tables of results."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from ..files.folders import counted
from ..report.text import shown

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ..detector.evaluation import CategoryResult
    from ..detector.patch_svdd import PatchSVDD
    from ..detector.progress_bars import Display
    from ..files.categories import Category
    from ..files.layouts import LabelledImage, LabelledSet
    from ..score.image_result import ImageResult
    from ..training.record import TrainingStep
    from ..training.workers import Workers

# Once a process has ended, torchrun ends the others: so one that merely noticed that another has
# failed waits until that has said why.
_LAST_WORDS = 1.0  # seconds

# Names of files are no markup: what is to be in bold says markup=True.
console = Console(markup=False, emoji=False)
errors = Console(stderr=True, markup=False, emoji=False)


def print_error(message: str) -> None:
    """One line on standard error, whatever the message holds."""
    errors.print("[bold red]error:[/] ", end="", markup=True)
    line = shown(" ".join(message.split()))
    errors.print(line, highlight=False, soft_wrap=True)


def print_line(message: str) -> None:
    """Print one line, whatever names in it hold."""
    console.print(shown(message), soft_wrap=True, highlight=False)


def print_warning(message: str) -> None:
    """As `print_error`, for what does not end the run."""
    errors.print("[bold yellow]warning:[/] ", end="", markup=True)
    errors.print(shown(message), highlight=False, soft_wrap=True)


@contextmanager
def joined(device: torch.device) -> Iterator[Workers]:
    """Join the other processes of torchrun, of which the first alone prints; see `joined_workers`.

    One that fails says so itself; the others then end with status 1.
    """
    from ..search.processes import ToldError, WorkerError
    from ..training.workers import joined_workers

    with joined_workers(device) as workers:
        if not workers.is_first:
            console.quiet = True
            warnings.simplefilter("ignore")  # the first one says the same
        try:
            yield workers
        except WorkerError as error:
            if str(error) and not isinstance(error, ToldError):
                time.sleep(_LAST_WORDS)
                print_error(str(error))
            raise typer.Exit(1) from error


def require_same(workers: Workers, model: Path | None, **facts: Any) -> None:
    """Raise ValueError unless all processes have this version, the model file and other facts."""
    from .. import __version__
    from ..files.shards import fingerprint

    if workers.count == 1:
        return
    with workers.together():
        if model is not None and not model.is_dir():
            facts[f"file {model}"] = fingerprint(model) if model.exists() else "missing"
    facts["version"] = __version__
    workers.require_same({f"the {name}": fact for name, fact in facts.items()})


Fitted = TypeVar("Fitted")


def fit_with_progress(
    fit: Callable[..., Fitted],
    *images: Any,
    logs: Sequence[Callable[[TrainingStep], None]] = (),
    **fit_options: Any,
) -> Fitted:
    """What `fit` returns, with a bar for each phase; see `progress_bars.FitDisplay`.

    fit: such as `PatchSVDD.fit` of a detector; images, fit_options: what it is called with.
    logs: called after each training step.
    """
    from ..detector.progress_bars import FitDisplay, display

    with display(console) as shown:
        fit_display = FitDisplay(shown)

        def on_step(step: TrainingStep) -> None:
            for log in logs:
                log(step)
            fit_display.on_step(step)

        return fit(*images, on_step=on_step, on_progress=fit_display.on_progress, **fit_options)


class ScoringBar:
    """The bar of images that are scored, out of `total`; None: nobody knows how many there are.

    bars: None: nothing is shown.
    """

    def __init__(self, bars: Display | None, total: int | None) -> None:
        from ..detector.progress_bars import Pace

        self._bars, self._total, self._done = bars, total, 0
        self._began, self._pace = time.perf_counter(), Pace()
        self._pace.left(0.0)

    def advance(self) -> None:
        """Count one more image that was scored, or could not be read."""
        self._done += 1
        if self._bars is None:
            return
        rate = self._done / (time.perf_counter() - self._began)
        share = min(1.0, self._done / self._total) if self._total else None
        left = None if share is None else self._pace.left(share)
        number = (
            f"{self._done:,} of {counted(self._total, 'image')}"
            if self._total
            else counted(self._done, "image")
        )
        note = f"{number}, {rate:.1f} a second"
        self._bars.phase("scoring", share, left, note)

    @property
    def is_full(self) -> bool:
        """Whether all were counted."""
        return self._done == self._total


def evaluate_with_progress(
    bars: Display,
    detector: PatchSVDD,
    category: Category,
    on_result: Callable[[LabelledImage, ImageResult], None] | None = None,
    tests: LabelledSet | None = None,
    skip_unreadable: bool = False,
    keep_originals: bool = False,
    workers: Workers | None = None,
) -> CategoryResult:
    """As `evaluate_category`, with a bar for scoring the test images and one for the metrics."""
    from ..detector.evaluation import evaluate_category

    tests = category.test_set() if tests is None else tests
    scoring = ScoringBar(bars, len(tests.images))

    def count(image: LabelledImage, result: ImageResult) -> None:
        if on_result is not None:
            on_result(image, result)
        scoring.advance()
        if scoring.is_full:
            bars.phase("measuring", None, None)

    result = evaluate_category(
        detector, category, count, tests, skip_unreadable, keep_originals, workers
    )
    bars.phase("measuring", 1.0, None)
    return result


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
            cells.append(result.validation_alarms or "-")
        table.add_row(
            shown(result.category), f"{result.num_good}+{result.num_anomalous}", labels, *cells
        )
    return table
