"""What `score` and `watch` write: a table, pictures and a report of a stream of images."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..detector.categories import CategoryDetectors, by_category, score_stream, thresholds_of
from ..detector.patch_svdd import PatchSVDD
from ..detector.progress_bars import display
from ..files.claims import RunFolder, claimed_file
from ..files.folders import counted
from ..files.sources import Source
from ..images.drift import StreamDrift
from ..report.heat_maps import write_heat_map
from ..report.map_files import inner_path, write_map
from ..report.masks import CocoFile, anomalous_pixels, write_mask
from ..report.summary import Alarms, verdict_in_words
from ..report.table import Table, require_parquet, row_of, write_parquet
from ..report.text import shown
from ..score.image_result import ImageResult, relative
from ..score.regions import Region
from .reports import Reports
from .terminal import ScoringBar, console, print_error, print_warning

_TABLES = ("scores.csv", "scores.jsonl", "scores.parquet")
_HEAT_MAPS, _MAPS, _MASKS = "heat-maps", "maps", "masks"


@dataclass(frozen=True)
class Outputs:
    """What to write for each image, and where. Raises ImportError without what Parquet needs."""

    folder: Path
    table_format: str
    heat_maps: bool
    maps: str | None
    masks: bool = False
    coco: Path | None = None
    """File for the anomalous regions of all images, in COCO's format."""

    def __post_init__(self) -> None:
        if self.table_format == "parquet":
            require_parquet()

    def require(self, thresholds: Mapping[str, float | None]) -> None:
        """Raise ValueError if something is asked for that needs thresholds above 0."""
        lacking = ", ".join(name for name, threshold in thresholds.items() if not threshold)
        if (self.masks or self.coco is not None) and not all(thresholds.values()):
            which = f"{lacking} of this model" if lacking else "this model"
            raise ValueError(f"--masks and --coco need a threshold, which {which} has not")

    @property
    def table(self) -> str:
        """The table that grows row by row; for Parquet the JSON lines that it is made from."""
        return "scores.csv" if self.table_format == "csv" else "scores.jsonl"

    def claim(self, resume: bool, overwrite: bool) -> RunFolder:
        """The folder to write to. Raises ValueError for outputs that may not be replaced."""
        remedy = "--resume goes on with them, --overwrite replaces them"
        own = (*_TABLES, _HEAT_MAPS, _MAPS, _MASKS)
        run = RunFolder(self.folder, own, resume=resume, overwrite=overwrite, remedy=remedy)
        run.check()
        other = next((name for name in _TABLES[:2] if (self.folder / name).exists()), self.table)
        if resume and other != self.table and not (self.folder / self.table).exists():
            raise ValueError(f"{self.folder / other} is there: go on with its --format")
        return run


@contextmanager
def _coco_file(path: Path | None, overwrite: bool, table: Table) -> Iterator[CocoFile | None]:
    """What collects regions within the context, to be written to the path; None without one.

    It goes on with those of images that have a row already.
    """
    if path is None:
        yield None
        return
    with claimed_file(path, overwrite or bool(table.done)):
        coco = CocoFile(path, table.done)
        try:
            yield coco
        except BaseException:
            coco.close()
            raise
        coco.write(__version__)
    console.print(shown(f"regions: {path}"), soft_wrap=True, markup=False)


def score_all(
    detectors: PatchSVDD | CategoryDetectors,
    sources: Callable[[set[str]], Iterator[Source]],
    outputs: Outputs,
    run: RunFolder,
    *,
    category: str | None = None,
    false_alarm_rate: float | None,
    resume: bool,
    report: Path | None,
    overwrite: bool = False,
    facts: Mapping[str, str] | None = None,
    line_each: str = "",
    num_images: Callable[[set[str]], int | None] = lambda done: None,
) -> int:
    """Score all sources and write the outputs; returns how many images could not be read.

    sources: called with the paths that have a row already; returns the images to score. Heat maps
        and maps of an earlier run are left out.
    run: what `outputs.claim` gave, not entered yet.
    category: of several, the one of all images, or "nearest"; None: each image's folder names it,
        else it is the nearest.
    false_alarm_rate: share of good images that may be called anomalous; None: as in training.
    resume: keep the rows that an earlier run wrote into the table.
    report: folder for an HTML report; overwrite: whether it may hold one.
    facts: what the report says of the run, values by name.
    line_each: a line to print at the start, if there is to be a line per image.
    num_images: called with the paths that have a row; how many there are to score, None: unknown.
    """
    each = by_category(detectors)
    thresholds = thresholds_of(each, false_alarm_rate)
    outputs.require(thresholds)
    judged = any(threshold is not None for threshold in thresholds.values())
    started, counts = time.perf_counter(), _Counts(judged=judged)
    drifts = {
        name: StreamDrift(one.gallery_.statistics) for name, one in each.items() if one.gallery_
    }
    with ExitStack() as stack:
        stack.enter_context(run)
        here = "\0".join([str(Path.cwd()), *([] if category is None else [category])])
        began = run.made_from(outputs.table) or here
        path = run.note(Path(outputs.table), began)
        table = stack.enter_context(Table(path, thresholds, resume))
        _require_same_run(table, began, category)
        coco = stack.enter_context(_coco_file(outputs.coco, overwrite, table))
        pages = stack.enter_context(Reports(detectors, report, false_alarm_rate, overwrite, facts))

        # A line for each image tells enough where bars cannot move.
        bars = (
            stack.enter_context(display(console)) if console.is_terminal or not line_each else None
        )
        bar = ScoringBar(bars, num_images(table.done))

        def to_score() -> Iterator[Source]:
            written = [os.path.realpath(run.folder / name) for name in (_HEAT_MAPS, _MAPS, _MASKS)]
            for source in sources(table.done):
                place = Path(os.path.realpath(source.path))
                if not any(place.is_relative_to(folder) for folder in written):
                    yield source

        def note_failure(source: Source, error: Exception) -> None:
            counts.failed += 1
            path, message = source.path, str(error) or type(error).__name__
            table.add({"image": str(path), "error": message})
            pages.add_failure(str(path), message)
            bar.advance()
            print_error(message if str(path) in message else f"{path}: {message}")

        stream = stack.enter_context(
            score_stream(
                detectors,
                to_score(),
                category,
                false_alarm_rate=false_alarm_rate,
                on_error=note_failure,
                keep_originals=outputs.heat_maps or report is not None,
            )
        )
        if line_each:
            console.print(shown(line_each), soft_wrap=True, markup=False)
        for result in stream:
            detector = each[result.category or ""]
            regions = detector.explain(result)
            _write_pictures(outputs, run, result, detector, coco)
            pages.add(result, regions)
            table.add(row_of(result) | {"regions": [_region(one, result) for one in regions]})
            counts.add(result)
            if line_each:
                console.print(shown(_line(result)), soft_wrap=True, markup=False, highlight=False)
            drift = drifts.get(result.category or "")
            for change in () if drift is None else drift.update(result.statistics):
                print_warning(f"{result.category}: {change}" if result.category else change)
            bar.advance()
        if outputs.table_format == "parquet":
            write_parquet(path, run.note(Path("scores.parquet"), began), table.columns)
    counts.tell(time.perf_counter() - started, outputs.folder, with_one=not line_each)
    pages.tell()
    return counts.failed


def _require_same_run(table: Table, began: str, category: str | None) -> None:
    """Raise ValueError if rows name images by paths that mean others in this working folder.

    And if they were compared with another choice of category. began: the folder and, after a NUL,
    the choice of the run that began the table.
    """
    began_in, _, chosen = began.partition("\0")
    if table.done and chosen != (category or ""):
        raise ValueError(
            f"{table.path} was begun with{f' --category {chosen}' if chosen else 'out --category'}"
            ": go on so, or use another --output"
        )
    relative = next((name for name in table.done if not Path(name).is_absolute()), None)
    if relative is not None and began_in != str(Path.cwd()):
        raise ValueError(
            f"{table.path} names images by paths such as {relative}, seen from {began_in}: go on "
            "there, or use another --output"
        )


@dataclass
class _Counts:
    scored: int = 0
    failed: int = 0
    alarms: Alarms = field(default_factory=Alarms)
    only: ImageResult | None = None
    """The result, while there is only one."""

    judged: bool = False
    """Whether there is a threshold to judge any by."""
    by_category: Counter[str] = field(default_factory=Counter)

    def add(self, result: ImageResult) -> None:
        self.only = result if self.scored == 0 else None
        self.scored += 1
        self.alarms.add(result.anomalous, result.unusual)
        if result.category is not None:
            self.by_category[result.category] += 1

    def tell(self, seconds: float, folder: Path, with_one: bool) -> None:
        """Print what was done; with_one: also the result, if there is only one."""
        lines = [] if self.only is None or not with_one else [_line(self.only)]
        parts = [f"scored {counted(self.scored, 'image')} in {seconds:.2f} s"]
        if self.by_category:
            numbers = (f"{name} {count:,}" for name, count in sorted(self.by_category.items()))
            parts[0] += f" ({', '.join(numbers)})"
        if self.judged:
            parts.append(f"{self.alarms.number:,} anomalous")
        if self.failed:
            parts.append(f"{self.failed:,} could not be read")
        lines += [", ".join(parts) + f"; see {folder}", *filter(None, [self.alarms.in_words()])]
        for line in lines:
            console.print(shown(line), soft_wrap=True, markup=False, highlight=False)


def _write_pictures(
    outputs: Outputs,
    run: RunFolder,
    result: ImageResult,
    detector: PatchSVDD,
    coco: CocoFile | None,
) -> None:
    anomaly_map, name = result.anomaly_map.numpy(), result.source.inner
    image = os.path.abspath(result.source.path)  # noqa: PTH100 (follows no links)
    if outputs.heat_maps:
        path = run.place(_HEAT_MAPS / inner_path(name, ".png"), image)
        write_heat_map(path, result)
    if outputs.maps is not None:
        path = run.place(_MAPS / inner_path(name, f".{outputs.maps}"), image)
        write_map(path, anomaly_map, detector.calibration_, result.map_threshold)
    if outputs.masks or coco is not None:
        mask = anomalous_pixels(result)
        if outputs.masks:
            write_mask(run.place(_MASKS / inner_path(name, ".png"), image), mask)
        if coco is not None:
            coco.add(result, mask)


def _region(region: Region, result: ImageResult) -> dict[str, Any]:
    """A region for JSON, its peak also as a multiple of the threshold."""
    return asdict(region) | {"relative_peak": relative(region.peak, result.map_threshold)}


def _line(result: ImageResult) -> str:
    notes = "".join(f"; {note}" for note in result.unusual)
    return f"{result.name}  {verdict_in_words(result)}{notes}"
