"""The table of scored images, written row by row: CSV, JSON lines, Parquet."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files.whole import written_whole
from ..score.image_result import ImageResult

TABLE_FORMATS = ("csv", "jsonl", "parquet")
"""Of the command line; a `Table` is one of the first two, `write_parquet` makes the third."""

COLUMNS = (
    *("image", "score", "relative_score", "p_value", "threshold"),
    *("verdict", "level", "unusual", "error"),
)
"""Columns of the table; JSON lines also have the anomalous regions."""
CATEGORY = "category"
"""A last column, where images are of several categories."""


def row_of(result: ImageResult) -> dict[str, Any]:
    """What the table says of a scored image, by column; columns that stay empty are left out."""
    row: dict[str, Any] = {"image": result.name, "score": result.score}
    if result.anomalous is not None:
        row |= {
            "relative_score": result.relative_score,
            "p_value": result.p_value,
            "threshold": result.threshold,
            "verdict": "anomalous" if result.anomalous else "normal",
        }
    row |= {"level": result.level, "unusual": list(result.unusual)}
    return row if result.category is None else row | {CATEGORY: result.category}


_AS_PATHS = sys.getfilesystemencodeerrors()  # error handler for names of files that are not UTF-8
_ROWS_AT_ONCE = 10_000  # that are written to a Parquet file


class Table:
    """A table of scored images in a file that is complete after each row.

    path: NAME.csv or NAME.jsonl.
    threshold: of this run, or that of each category; a table with others is not continued.
    resume: keep the rows that are there, except those with an error and an incomplete last one;
        else the file is written anew.

    Raises ValueError if a file to continue is no such table, OSError if it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        threshold: float | Mapping[str, float | None] | None,
        resume: bool = False,
    ) -> None:
        of_each = threshold if isinstance(threshold, Mapping) else {"": threshold}
        self.path = path
        self._thresholds = {category: _cell(value) for category, value in of_each.items()}
        self.columns = COLUMNS if "" in of_each else (*COLUMNS, CATEGORY)
        """Names of its columns, in their order."""
        self._is_csv = path.suffix == ".csv"
        self.done: set[str] = set()
        """Paths of the images that have a row already."""
        with written_whole(path) as partial, partial.open("wb") as file:
            if self._is_csv:
                file.write(self._line(dict(zip(self.columns, self.columns, strict=True))))
            if resume and path.exists():
                for row in self._kept_rows():
                    file.write(self._line(row))
        self._file = path.open("ab", buffering=0)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; columns that it lacks stay empty. Raises OSError."""
        size, rest = self._file.seek(0, os.SEEK_END), memoryview(self._line(row))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(size)  # drops half a row, as of a full disk
            raise self._cannot_write(error) from error

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Have all rows written to disk, and close the file. Raises OSError."""
        try:
            with self._file:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> OSError:
        return OSError(f"cannot write {self.path}: {error.strerror or error}")

    def _line(self, row: Mapping[str, Any]) -> bytes:
        if not self._is_csv:
            return json.dumps(row).encode() + b"\n"
        text = io.StringIO(newline="")
        cells = {column: _cell(row.get(column)) for column in self.columns}
        for column in cells.keys() & {"image", "error", CATEGORY}:
            cells[column] = _no_formula(cells[column])
        csv.writer(text).writerow(cells.values())
        return text.getvalue().encode("utf-8", _AS_PATHS)

    def _kept_rows(self) -> Iterator[dict[str, Any]]:
        """The rows of an earlier run, without those of images that are to be tried again."""
        for row in self._earlier_rows():
            if row.get("error"):
                continue
            threshold = _cell(row.get("threshold"))
            category = (row.get(CATEGORY) or "").removeprefix("./")  # of `_no_formula`
            ours = self._thresholds.get(category, "none for its category")
            if threshold != ours:
                raise ValueError(
                    f"{self.path} was written with threshold {threshold or 'none'}, this run has "
                    f"{ours or 'none'}: another model or rate; use another --output"
                )
            self.done.add(str(Path(row["image"])))
            yield row

    def _csv_rows(self, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
        reader = csv.DictReader(lines)
        if tuple(reader.fieldnames or self.columns) != self.columns:
            raise ValueError("it has other columns")
        # Half a row with a line break inside looks whole, but is too short.
        return (row for row in reader if None not in row.values())

    def _earlier_rows(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            # A killed run may have left half a line.
            lines = (line.decode("utf-8", _AS_PATHS) for line in file if line.endswith(b"\n"))
            try:
                for row in self._csv_rows(lines) if self._is_csv else map(json.loads, lines):
                    if not isinstance(row.get("image"), str):
                        raise ValueError("a row names no image")
                    yield row
            except (ValueError, AttributeError, csv.Error) as error:
                raise ValueError(f"{self.path} is not a table to go on with: {error}") from error


def _cell(value: Any) -> str:
    """A value as text: numbers to the last digit, lists joined by "; "."""
    if value is None:
        return ""
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return value
    return "; ".join(map(str, value))


def _no_formula(text: str) -> str:
    """The text, after "./" if a spreadsheet would take it for a formula: still the same path."""
    return f"./{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def write_parquet(source: Path, path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Turn a .jsonl table with these columns into a Parquet file, some rows at a time.

    Raises ImportError without pyarrow (`pip install pyarrow`), OSError.
    """
    _, parquet = _pyarrow()
    with (
        written_whole(path) as partial,
        source.open(encoding="utf-8") as lines,
        parquet.ParquetWriter(partial, arrow_table([], columns).schema) as writer,
    ):
        rows: list[dict[str, Any]] = []

        def flush() -> None:
            if rows:
                writer.write_table(arrow_table(rows, columns))
                rows.clear()

        for line in lines:
            rows.append(json.loads(line))
            if len(rows) == _ROWS_AT_ONCE:
                flush()
        flush()


def arrow_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> Any:
    """Rows, as of `row_of`, as a `pyarrow.Table`: numbers are float64, all others text, or null.

    What makes images unusual is joined by "; ". Raises ImportError without pyarrow.
    """
    pyarrow, _ = _pyarrow()
    figures = ("score", "relative_score", "p_value", "threshold")
    numbers = dict.fromkeys(figures, pyarrow.float64())
    schema = pyarrow.schema([(name, numbers.get(name, pyarrow.string())) for name in columns])
    texts = [name for name in columns if name not in numbers]
    values = [
        {name: row.get(name) for name in numbers}
        | {name: _printable(_cell(row.get(name))) for name in texts}
        for row in rows
    ]
    return pyarrow.Table.from_pylist(values, schema=schema)


def require_parquet() -> None:
    """Raise ImportError if pyarrow is missing: at the start, not when all has been scored."""
    _pyarrow()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install pyarrow") from error
    return pyarrow, parquet


def _printable(text: str) -> str | None:
    """The text as valid Unicode, which Parquet needs; None for an empty one."""
    return text.encode("utf-8", _AS_PATHS).decode("utf-8", "replace") or None
