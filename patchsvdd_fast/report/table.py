"""What scoring writes: a table of the images row by row, and maps, under names that stay inside."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..files.folders import SUFFIXES
from ..files.whole import written_whole
from ..score.calibration import Calibration

TABLE_FORMATS = ("csv", "jsonl", "parquet")
MAP_FORMATS = ("png", "tiff", "npy")

COLUMNS = ("image", "score", "p_value", "threshold", "verdict", "level", "unusual", "error")
"""Of the table; JSON lines have the anomalous regions as well."""

MAP_UNIT = "patchsvdd.map_unit"
"""Name of the text in a PNG map that says what one step of its 16 bits stands for."""

_FULL_SCALE = 16  # times the highest good score: 65,535 in a PNG map
_LONGEST_NAME = 140  # bytes, of a part of a path: there is to be room for what is added to it
_LONGEST_FOLDER = 1_000  # bytes
_ROOT = "root"
_AS_PATHS = sys.getfilesystemencodeerrors()  # how bytes that are no UTF-8 stand in a path
_ROWS_AT_ONCE = 10_000  # of a Parquet file


class Table:
    """A table of scored images in a file that is complete after each row.

    path: NAME.csv or NAME.jsonl. resume: keep the rows that are there, but for those with an error
    and an incomplete last one. threshold: of this run; rows of another are no basis to go on from.

    Raises ValueError if there is something else in the file, OSError if it cannot be written.
    """

    def __init__(self, path: Path, threshold: float | None, resume: bool = False) -> None:
        self.path, self._threshold = path, _cell(threshold)
        self._is_csv = path.suffix == ".csv"
        self.done: set[str] = set()
        """Images that have a row."""
        with written_whole(path) as partial, partial.open("wb") as file:
            if self._is_csv:
                file.write(self._line(dict(zip(COLUMNS, COLUMNS, strict=True))))
            if resume and path.exists():
                for row in self._kept_rows():
                    file.write(self._line(row))
        self._file = path.open("ab", buffering=0)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; what it lacks of the columns stays empty."""
        size, rest = self._file.seek(0, os.SEEK_END), memoryview(self._line(row))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(size)  # half a row on a full disk
            raise self._cannot_write(error) from error

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Make the rows last. Raises OSError."""
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
        cells = {column: _cell(row.get(column)) for column in COLUMNS}
        for column in ("image", "error"):
            cells[column] = _no_formula(cells[column])
        csv.writer(text).writerow(cells.values())
        return text.getvalue().encode("utf-8", _AS_PATHS)

    def _kept_rows(self) -> Iterator[dict[str, Any]]:
        """The rows of an earlier run, without those that are to be done again."""
        for row in self._earlier_rows():
            if row.get("error"):
                continue
            threshold = _cell(row.get("threshold"))
            if threshold != self._threshold:
                raise ValueError(
                    f"{self.path} was written with threshold {threshold or 'none'}, this run has "
                    f"{self._threshold or 'none'}: another model or rate; use another --output"
                )
            self.done.add(str(Path(row["image"])))
            yield row

    def _earlier_rows(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            # A killed run may have left half a line.
            lines = (line.decode("utf-8", _AS_PATHS) for line in file if line.endswith(b"\n"))
            try:
                for row in _csv_rows(lines) if self._is_csv else map(json.loads, lines):
                    if not isinstance(row.get("image"), str):
                        raise ValueError("a row names no image")
                    yield row
            except (ValueError, AttributeError, csv.Error) as error:
                raise ValueError(f"{self.path} is not a table to go on with: {error}") from error


def _csv_rows(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(lines)
    if tuple(reader.fieldnames or COLUMNS) != COLUMNS:
        raise ValueError("it has other columns")
    # Half a row with a line break inside looks whole, but is too short.
    return (row for row in reader if None not in row.values())


def _cell(value: Any) -> str:
    """A value as CSV has it: numbers to the last digit, lists joined."""
    if value is None:
        return ""
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return value
    return "; ".join(map(str, value))


def _no_formula(text: str) -> str:
    """What begins with a path, so that no spreadsheet takes it for a formula; the same path."""
    return f"./{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def write_parquet(source: Path, path: Path) -> None:
    """Turn a .jsonl table into a Parquet file, some rows at a time.

    Raises ImportError without pyarrow (`pip install patchsvdd-fast[parquet]`), OSError.
    """
    pyarrow, parquet = _pyarrow()
    numbers = {"score": pyarrow.float64(), "p_value": pyarrow.float64()}
    numbers["threshold"] = pyarrow.float64()
    schema = pyarrow.schema([(name, numbers.get(name, pyarrow.string())) for name in COLUMNS])
    with (
        written_whole(path) as partial,
        source.open(encoding="utf-8") as lines,
        parquet.ParquetWriter(partial, schema) as writer,
    ):
        rows: list[dict[str, Any]] = []

        def flush() -> None:
            if rows:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
                rows.clear()

        for line in lines:
            row = json.loads(line)
            texts = (name for name in COLUMNS if name not in numbers)
            rows.append(
                {name: row.get(name) for name in numbers}
                | {name: _printable(_cell(row.get(name))) for name in texts}
            )
            if len(rows) == _ROWS_AT_ONCE:
                flush()
        flush()


def require_parquet() -> None:
    """Raise ImportError now, rather than when all is scored, without pyarrow."""
    _pyarrow()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install patchsvdd-fast[parquet]") from error
    return pyarrow, parquet


def _printable(text: str) -> str | None:
    """Valid Unicode, as Parquet wants it; None for nothing."""
    return text.encode("utf-8", _AS_PATHS).decode("utf-8", "replace") or None


def map_unit(calibration: Calibration | None, anomaly_map: npt.NDArray[np.float32]) -> float:
    """What one step of a 16-bit map stands for: 65,535 are 16 times the highest good score.

    So maps of one detector are comparable; higher values are cut off there. Without a calibration
    each map has its own unit, its maximum being 65,535.
    """
    top = float(anomaly_map.max()) if calibration is None else _FULL_SCALE * calibration.highest
    return (top or 1.0) / 65535


def write_map(
    path: Path, anomaly_map: npt.NDArray[np.float32], calibration: Calibration | None
) -> None:
    """Write a map [H, W] as the path's suffix says.

    .tiff and .npy: float32, as it is. .png: 16 bits in units that the file names as text
    (`MAP_UNIT`), see `map_unit`. Raises OSError.
    """
    with written_whole(path) as partial:
        if path.suffix == ".npy":
            with partial.open("wb") as file:
                np.save(file, anomaly_map)
        elif path.suffix == ".tiff":
            Image.fromarray(anomaly_map).save(partial, format="TIFF", compression="tiff_deflate")
        else:
            unit = map_unit(calibration, anomaly_map)
            steps = np.clip(np.round(anomaly_map.astype(np.float64) / unit), 0, 65535)
            text = PngInfo()
            text.add_text(MAP_UNIT, repr(unit))
            Image.fromarray(steps.astype(np.uint16)).save(partial, format="PNG", pnginfo=text)


def inner_path(name: PurePath, suffix: str) -> Path:
    """A relative path for what is made of an image, never outside of where it is put.

    The image's own path with the suffix instead of ".png", or after any other; an absolute one
    begins with "root". Where something had to be left out or changed, or another image's might be
    the same, a hash keeps it apart.
    """
    *folders, file = [_ROOT if part == name.anchor else part for part in name.parts] or [""]
    stem = file.removesuffix(".png")
    kept = [_plain_folder(part) for part in folders if part != ".."]
    plain = _plain(stem)
    if sum(len(os.fsencode(part)) + 1 for part in kept) > _LONGEST_FOLDER:
        kept = []
    is_own = (
        (kept, plain) == (folders, stem)
        and name.anchor in ("", "/")
        and name.parts[:1] != (_ROOT,)
        # So x.png, which becomes x, and x without a suffix are told apart.
        and PurePath(file).suffix.lower() in SUFFIXES
        and (stem == file or PurePath(stem).suffix.lower() not in SUFFIXES)
    )
    if not is_own:
        plain += f"-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return Path(*kept, plain + suffix)


def _plain(part: str) -> str:
    """The part of a path without what file systems or users of theirs stumble over."""
    plain = "".join(c if c.isprintable() and c not in '\\:*?"<>|' else "_" for c in part)
    return plain.encode()[:_LONGEST_NAME].decode(errors="ignore")


def _plain_folder(part: str) -> str:
    """Likewise, and told apart from the files that are written."""
    plain = _plain(part)
    return f"{plain}_" if plain.lower().endswith((*SUFFIXES, ".npy")) else plain
