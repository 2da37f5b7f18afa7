"""Showing progress: bars in a terminal, lines in a notebook, a line a minute anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from ..files.folders import counted
from ..training.interrupts import telling_interrupts
from ..training.record import TrainingStep

if TYPE_CHECKING:
    from rich.console import Console

HEARD = "stopping at the end of this step; Ctrl-C again stops at once"
"""What is said of a signal that takes effect between two steps of training."""

_LINE_EVERY = 60.0  # seconds between two lines where there is no terminal
_LINE_EVERY_IN_NOTEBOOKS = 0.5
_TIMED_STEPS = 12  # steps of training before the line that says how long it will take

OnProgress = Callable[[str, float, float | None], None] | None
"""Called with the name of a phase of `PHASES`, the share of it that is done, 0 to 1, and the
seconds that the whole fit will still take (None as long as that is unknown)."""

READING, TRAINING, CHECKING, ESTIMATING = "reading", "training", "checking", "estimating"
ENCODING, FILLING = "encoding", "filling banks"
CALIBRATING, THRESHOLDS = "calibrating", "setting thresholds"
AFTER_TRAINING = (ESTIMATING, ENCODING, FILLING, CALIBRATING, THRESHOLDS)
"""Those of its phases that follow training."""
PHASES = (READING, TRAINING, CHECKING, *AFTER_TRAINING)
"""What a fit does, in this order; training pauses for each of its checks on synthetic defects, and
how long the rest will take is estimated before and after it."""

OnStep = Callable[[TrainingStep], None] | None
"""See `PatchSVDD.fit`."""


class Display(Protocol):
    """What shows phases of work."""

    def phase(self, name: str, share: float | None, left: float | None, note: str = "") -> None:
        """Show how much of a phase is done; one that begins anew starts again.

        share: 0 to 1; None: unknown. left: seconds that all will still take; None: unknown.
        note: what else there is to say.
        """

    def say(self, line: str) -> None:
        """Show a line that stays."""


@contextmanager
def display(console: Console | None = None) -> Iterator[Display]:
    """A display that fits where it is shown, while the context lasts.

    Bars that move in a terminal. In a notebook a line for each phase, rewritten in place.
    Elsewhere, such as in a log, a line a minute.

    console: what to print to; None: standard output. An interrupt that has to wait (see
    `training.interrupts`) is answered at once.
    """
    if console is None:
        from rich.console import Console

        console = Console()
    with ExitStack() as stack:
        shown: Display
        if console.is_jupyter:
            shown = stack.enter_context(_lines_in_notebook(console))
        elif console.is_terminal:
            shown = stack.enter_context(_bars(console))
        else:
            shown = _Lines(console)
        stack.enter_context(telling_interrupts(lambda: shown.say(HEARD)))
        yield shown


class FitDisplay:
    """Shows a fit: pass `on_step` and `on_progress` to `PatchSVDD.fit`.

    Beside the bar of training stand figures that show how it goes: the loss; per level the share of
    positions that the classifier tells right (12.5 % is chance; not in mode dense) and the spread
    of the embeddings; and how well the last check found synthetic defects. Loss and shares are
    smoothed over some 20 steps.
    """

    def __init__(self, shown: Display) -> None:
        self._shown = shown
        self._means: dict[str, float] = {}
        self._note, self._checked = "", ""
        self._steps_shown = 0
        self._reported: tuple[float, float | None] = 0.0, None

    def on_progress(self, name: str, share: float, left: float | None) -> None:
        """Show how much of a phase is done, and how long the whole fit will still take."""
        if name == TRAINING:  # shown with the figures of the step, which follow
            self._reported = share, left
        else:
            self._shown.phase(name, share, left)

    def on_step(self, step: TrainingStep) -> None:
        """Show a step of training, after `on_progress` has told its share."""
        share, left = self._reported
        self._steps_shown += 1
        if self._steps_shown == _TIMED_STEPS and left is not None and step.total_steps:
            self._shown.say(
                f"{counted(step.total_steps, 'step')}, about {_duration(left)} to go in all"
            )
        if step.quality is not None:
            self._checked = f"  defects {step.quality.criterion:.1f}"
        figures = [f"loss {self._smooth('loss', step.loss):.3g}"]
        for size, level in sorted(step.levels.items(), reverse=True):
            figures.append(f"K{size}")
            if level.accuracy is not None:
                figures[-1] += f" right {self._smooth(f'accuracy {size}', level.accuracy):.0%}"
            figures[-1] += f" spread {level.spread:.0e}"
        steps = f"{step.step}/{'?' if step.total_steps is None else step.total_steps}"
        self._shown.phase(TRAINING, share, left, f"{steps}  {'  '.join(figures)}{self._checked}")

    def _smooth(self, name: str, value: float) -> float:
        before = self._means.get(name, value)
        self._means[name] = 0.95 * before + 0.05 * value
        return self._means[name]


@contextmanager
def fit_shown(
    wanted: bool, on_step: OnStep, on_progress: OnProgress
) -> Iterator[tuple[OnStep, OnProgress]]:
    """The callbacks to fit with: those given, and, if it is wanted, a display's before them.

    Under torchrun only the first process shows anything.
    """
    if not wanted or os.environ.get("RANK", "0") != "0":
        yield on_step, on_progress
        return
    with display() as shown:
        own = FitDisplay(shown)

        def step(step: TrainingStep) -> None:
            own.on_step(step)
            if on_step is not None:
                on_step(step)

        def progress(name: str, share: float, left: float | None) -> None:
            own.on_progress(name, share, left)
            if on_progress is not None:
                on_progress(name, share, left)

        yield step, progress


@contextmanager
def phases_shown(
    wanted: bool, names: Sequence[str]
) -> Iterator[Sequence[Callable[[float], None] | None]]:
    """A callback for each phase of some work, which shows the share of it that is done.

    wanted: False: None instead of each callback.
    """
    if not wanted:
        yield [None] * len(names)
        return
    with display() as shown:

        def callback(name: str) -> Callable[[float], None]:
            pace = Pace()
            return lambda share: shown.phase(name, share, pace.left(share))

        yield [callback(name) for name in names]


class Pace:
    """Tells by its pace so far how long work will still take."""

    def __init__(self) -> None:
        self._began: float | None = None

    def left(self, share: float) -> float | None:
        """Seconds until all is done, of which this share is; the first call is the beginning."""
        now = time.perf_counter()
        if self._began is None:
            self._began, self._first = now, share
        done = share - self._first
        return (now - self._began) * (1 - share) / done if done > 0 else None


@contextmanager
def _bars(console: Console) -> Iterator[Display]:
    from rich.progress import BarColumn, Progress, TaskID, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[done]}"),
        TextColumn("{task.fields[left]}", style="progress.remaining"),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:

        class Bars:
            def __init__(self) -> None:
                self._tasks: dict[str, TaskID] = {}
                self._newest = ""

            def phase(
                self, name: str, share: float | None, left: float | None, note: str = ""
            ) -> None:
                if name not in self._tasks:
                    self._tasks[name] = progress.add_task(
                        name, total=None, done="", left="", note=""
                    )
                if name != self._newest and self._newest:
                    # The time to go stands beside the bar that moves, alone.
                    progress.update(self._tasks[self._newest], left="")
                self._newest = name
                values: dict[str, Any] = {"note": note, "left": _to_go(left, share)}
                if share is not None:
                    values |= {"total": 1.0, "completed": share, "done": f"{share:.0%}"}
                progress.update(self._tasks[name], **values)

            def say(self, line: str) -> None:
                console.print(line, soft_wrap=True, markup=False)

        yield Bars()


class _Lines:
    """A line now and then, each at least `_LINE_EVERY` seconds after the one before."""

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, time.perf_counter()

    def phase(self, name: str, share: float | None, left: float | None, note: str = "") -> None:
        now = time.perf_counter()
        if now - self._last >= _LINE_EVERY:
            self._last = now
            self._print(_as_line(name, share, left, note))

    def say(self, line: str) -> None:
        self._last = time.perf_counter()
        self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def _lines_in_notebook(console: Console) -> Iterator[Display]:
    """A line for each phase; a carriage return lets a notebook write over it."""
    write: Callable[[str], object] = (console.file if console.file else sys.stdout).write

    class Lines:
        def __init__(self) -> None:
            self._name, self._last, self._width = "", 0.0, 0

        def phase(self, name: str, share: float | None, left: float | None, note: str = "") -> None:
            now = time.perf_counter()
            is_new = name != self._name
            if not (is_new or share == 1) and now - self._last < _LINE_EVERY_IN_NOTEBOOKS:
                return
            if is_new and self._name:
                self.end()
            line = _as_line(name, share, left, note)
            write("\r" + line.ljust(self._width))
            self._name, self._last, self._width = name, now, len(line)

        def say(self, line: str) -> None:
            self.end()
            write(line + "\n")

        def end(self) -> None:
            if self._width:
                write("\n")
            self._width = 0

    lines = Lines()
    try:
        yield lines
    finally:
        lines.end()


def _as_line(name: str, share: float | None, left: float | None, note: str) -> str:
    parts = (name, "" if share is None else f"{share:.0%}", _to_go(left, share), note)
    return "  ".join(part for part in parts if part)


def _to_go(left: float | None, share: float | None) -> str:
    return "" if left is None or (share == 1 and left == 0) else f"{_clock(left)} to go"


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
