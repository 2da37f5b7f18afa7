"""What `score` and `watch` write: a table, pictures and a report of a stream of images."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..detector.patch_svdd import PatchSVDD
from ..files.sources import Source
from ..images.drift import StreamDrift
from ..report.entries import open_report, report_entry
from ..report.heat_maps import write_heat_map
from ..report.map_files import MAP_FORMATS, inner_path, write_map
from ..report.table import TABLE_FORMATS, Table, require_parquet, write_parquet
from ..report.text import shown
from ..score.image_result import ImageResult
from ..score.regions import Region
from .terminal import console, print_error, print_warning


@dataclass(frozen=True)
class Outputs:
    """What to write for each image. Raises ValueError for an unknown format or a file as folder."""

    folder: Path
    table_format: str
    heat_maps: bool
    maps: str | None

    def __post_init__(self) -> None:
        if self.table_format not in TABLE_FORMATS:
            raise ValueError(f"--format must be one of {TABLE_FORMATS}, got {self.table_format!r}")
        if self.maps not in (None, *MAP_FORMATS):
            raise ValueError(f"--maps must be one of {MAP_FORMATS}, got {self.maps!r}")
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; --output names a folder")
        if self.table_format == "parquet":
            require_parquet()

    @property
    def table(self) -> Path:
        """The table that grows row by row; for Parquet the JSON lines that it is made from."""
        return self.folder / ("scores.csv" if self.table_format == "csv" else "scores.jsonl")

    @property
    def pictures(self) -> tuple[Path, Path]:
        """Folders of the heat maps and of the anomaly maps."""
        return self.folder / "heat-maps", self.folder / "maps"


def score_all(
    detector: PatchSVDD,
    sources: Callable[[set[str]], Iterator[Source]],
    outputs: Outputs,
    *,
    false_alarm_rate: float | None,
    resume: bool,
    report: Path | None,
    line_each: str = "",
) -> int:
    """Score all sources and write the outputs; returns how many images could not be read.

    sources: called with the paths that have a row already; returns the images to score. Heat maps
        and maps of an earlier run are left out.
    false_alarm_rate: share of good images that may be called anomalous; None: as in training.
    resume: keep the rows that an earlier run wrote into the table.
    report: folder for an HTML report.
    line_each: a line to print at the start, if there is to be a line per image.
    """
    threshold = detector.threshold_or_none(false_alarm_rate)
    outputs.folder.mkdir(parents=True, exist_ok=True)
    started, counts = time.perf_counter(), _Counts()
    drift = None if detector.gallery_ is None else StreamDrift(detector.gallery_.statistics)
    with ExitStack() as stack:
        table = stack.enter_context(Table(outputs.table, threshold, resume))
        page = None
        if report is not None:
            page = stack.enter_context(open_report(report, detector, threshold))

        def to_score() -> Iterator[Source]:
            written = [os.path.realpath(folder) for folder in outputs.pictures]
            for source in sources(table.done):
                place = Path(os.path.realpath(source.path))
                if not any(place.is_relative_to(folder) for folder in written):
                    yield source

        def note_failure(source: Source, error: Exception) -> None:
            counts.failed += 1
            path = source.path
            message = str(error) or type(error).__name__
            table.add({"image": str(path), "error": message})
            if page is not None:
                page.add_failure(str(path), message)
            print_error(message if str(path) in message else f"{path}: {message}")

        stream = stack.enter_context(
            detector.score_stream(
                to_score(), false_alarm_rate=false_alarm_rate, on_error=note_failure
            )
        )
        status = stack.enter_context(console.status("scoring"))
        if line_each:
            console.print(shown(line_each), soft_wrap=True, markup=False)
        for result in stream:
            regions = detector.explain(result)
            _write_pictures(outputs, result, detector)
            if page is not None:
                page.add(report_entry(detector, result, regions))
            table.add(_row(detector, result, regions))
            counts.scored += 1
            counts.anomalous += bool(result.anomalous)
            if line_each:
                console.print(_line(result), soft_wrap=True, markup=False, highlight=False)
            for change in () if drift is None else drift.update(result.statistics):
                print_warning(change)
            rate = counts.scored / (time.perf_counter() - started)
            status.update(f"scored {counts.scored:,}, {rate:.1f} a second")
    if outputs.table_format == "parquet":
        write_parquet(outputs.table, outputs.table.with_suffix(".parquet"))
    lines = [counts.summary(time.perf_counter() - started, threshold, outputs.folder)]
    if page is not None:
        lines.append(f"report: {page.path}")
    for line in lines:
        console.print(shown(line), soft_wrap=True, markup=False)
    return counts.failed


@dataclass
class _Counts:
    scored: int = 0
    anomalous: int = 0
    failed: int = 0

    def summary(self, seconds: float, threshold: float | None, folder: Path) -> str:
        parts = [f"scored {self.scored:,} images in {seconds:.2f} s"]
        if threshold is not None:
            parts.append(f"{self.anomalous:,} anomalous")
        if self.failed:
            parts.append(f"{self.failed:,} could not be read")
        return ", ".join(parts) + f"; see {folder}"


def _write_pictures(outputs: Outputs, result: ImageResult, detector: PatchSVDD) -> None:
    anomaly_map, name = result.anomaly_map.numpy(), result.source.inner
    heat_maps, maps = outputs.pictures
    if outputs.heat_maps:
        path = heat_maps / inner_path(name, ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_heat_map(path, result.picture, anomaly_map, detector.calibration_)
    if outputs.maps is not None:
        path = maps / inner_path(name, f".{outputs.maps}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_map(path, anomaly_map, detector.calibration_)


def _row(detector: PatchSVDD, result: ImageResult, regions: list[Region]) -> dict[str, Any]:
    row: dict[str, Any] = {"image": result.name, "score": result.score}
    if result.anomalous is not None:
        row |= {
            "p_value": result.p_value,
            "threshold": result.threshold,
            "verdict": "anomalous" if result.anomalous else "normal",
        }
    most = regions[0] if regions else detector.highest_place(result)
    return row | {
        "level": most.level,
        "unusual": list(result.unusual),
        "regions": [asdict(region) for region in regions],
    }


def _line(result: ImageResult) -> str:
    verdict = {True: "anomalous", False: "normal", None: ""}[result.anomalous]
    notes = "".join(f"; {note}" for note in result.unusual)
    return shown(f"{result.name}  {result.score:.4g}  {verdict}{notes}")
