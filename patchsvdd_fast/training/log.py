"""Logs of training, a row of figures per step: JSON lines, CSV, TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import json
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..files.whole import written_whole
from .record import TrainingStep

SUFFIXES = (".jsonl", ".csv")
"""Of a `FileLog`."""


class Log(Protocol):
    """Where steps are written; called after each step that a progress callback receives."""

    def __call__(self, step: TrainingStep) -> None:
        """Write one step."""

    def close(self) -> None:
        """Finish the file."""


def figures_of(step: TrainingStep) -> dict[str, float | int | None]:
    """A step as one row: names, such as "K64_accuracy", to values; None: not measured."""
    figures: dict[str, float | int | None] = {
        "step": step.step,
        "seconds": round(step.seconds, 3),
        "loss": step.loss,
        "learning_rate": step.learning_rate,
    }
    for size, level in sorted(step.levels.items()):
        for name, value in vars(level).items():
            figures[f"K{size}_{name}"] = value
    for name in ("detection", "segmentation"):
        figures[f"check_{name}"] = None if step.quality is None else getattr(step.quality, name)
    return figures


class FileLog:
    """One row per step in a .jsonl or .csv file, written out after each step.

    An existing file is continued. Its rows from the first new step on, which a killed run may have
    written after its last checkpoint, are dropped. Raises ValueError for another suffix, and at the
    first step if the file is no log, or one with other figures.
    """

    def __init__(self, path: Path) -> None:
        check_log_path(path)
        self.path = path
        self._file: Any = None
        self._csv: csv.DictWriter[str] | None = None

    def __call__(self, step: TrainingStep) -> None:
        """Write one step."""
        figures = figures_of(step)
        if self._file is None:
            self._open(list(figures), step.step)
        if self._csv is not None:
            self._csv.writerow(figures)
        else:
            self._file.write(json.dumps(figures) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _open(self, names: Sequence[str], first_step: int) -> None:
        kept = [row for row in self._rows() if int(row["step"]) < first_step]
        if any(set(row) != set(names) for row in kept):
            raise ValueError(f"{self.path} is a log of other figures than {', '.join(names)}")
        with written_whole(self.path) as unfinished, unfinished.open("w", newline="") as file:
            if self.path.suffix == ".csv":
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(kept)
            else:
                file.writelines(json.dumps(row) + "\n" for row in kept)
        self._file = self.path.open("a", newline="")
        if self.path.suffix == ".csv":
            self._csv = csv.DictWriter(self._file, names)

    def _rows(self) -> list[dict[str, Any]]:
        """The rows of an existing file, without a last line that a killed run left unfinished."""
        if not self.path.exists():
            return []
        *lines, unfinished = self.path.read_text().split("\n")
        del unfinished  # what follows the last newline: "", or an unfinished line
        try:
            if self.path.suffix == ".csv":
                rows = list(csv.DictReader(lines))
            else:
                rows = [json.loads(line) for line in lines]
            return [row for row in rows if int(row["step"]) > 0]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is not a training log: {error}") from error


class TensorBoardLog:
    """Writes scalars for TensorBoard to a folder.

    Steps that a killed run wrote after its last checkpoint are purged when it is resumed. Raises
    ValueError if TensorBoard is not installed or the folder is a file.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("TensorBoard is not installed: pip install tensorboard") from error
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; TensorBoard writes to a folder")
        self._open = partial(SummaryWriter, str(folder))
        self._writer: SummaryWriter | None = None

    def __call__(self, step: TrainingStep) -> None:
        """Write one step."""
        if self._writer is None:
            self._writer = self._open(purge_step=step.step if step.step > 1 else None)
        for name, value in figures_of(step).items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name.replace("_", "/", 1), value, step.step)

    def close(self) -> None:
        """Finish the files."""
        if self._writer is not None:
            self._writer.close()


class LogOrWarning:
    """Wraps a log so that training goes on if it can no longer be written, as on a full disk.

    Then it warns once and drops all further steps. An error at the first step is raised.
    """

    def __init__(self, log: Log) -> None:
        self._log: Log | None = log
        self._last_step: int | None = None

    def __call__(self, step: TrainingStep) -> None:
        """Write one step."""
        if self._log is None:
            return
        try:
            self._log(step)
            self._last_step = step.step
        except OSError as error:
            if self._last_step is None:
                raise
            self._give_up(error)

    def close(self) -> None:
        """Finish the file."""
        if self._log is not None:
            try:
                self._log.close()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        warnings.warn(f"the log ends at step {self._last_step}: {error}", stacklevel=3)
        log, self._log = self._log, None
        with contextlib.suppress(OSError):  # closing may fail to write what is buffered
            if log is not None:
                log.close()


def check_log_path(path: Path) -> None:
    """Raise ValueError unless the folder of a log exists and its suffix is in `SUFFIXES`."""
    if not path.parent.is_dir():
        raise ValueError(f"the folder of the log does not exist: {path.parent}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a log must end in {' or '.join(SUFFIXES)}, got {path}")
