"""What `score` and `watch` write: a table, pictures and a report of a stream of images."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .. import __version__
from ..detector.categories import CategoryDetectors, by_category, score_stream, thresholds_of
from ..detector.patch_svdd import PatchSVDD
from ..detector.progress_bars import display
from ..files.claims import RunFolder, claimed_file
from ..files.folders import counted
from ..files.sources import Source
from ..images.drift import StreamDrift
from ..report.heat_maps import write_heat_map
from ..report.html import ReportEntry
from ..report.map_files import inner_path, write_map
from ..report.masks import CocoFile, anomalous_pixels, coco_image, write_mask
from ..report.summary import Alarms, verdict_in_words
from ..report.table import Table, require_parquet, row_of, write_parquet
from ..report.text import shown
from ..score.image_result import ImageResult, relative
from ..score.regions import Region
from ..training.workers import Workers, with_failures
from .reports import Reports
from .terminal import ScoringBar, console, print_error, print_line, print_warning

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
    console.print(shown(f"regions: {path}"), soft_wrap=True)


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
    workers: Workers | None = None,
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
    workers: processes that divide the images among them; each draws its own, the first writes all
        else. None: this process alone.
    """
    workers = workers or Workers()
    each = by_category(detectors)
    thresholds = thresholds_of(each, false_alarm_rate)
    outputs.require(thresholds)
    with ExitStack() as stack:
        pages = Reports(detectors, report, false_alarm_rate, overwrite, facts)
        collected = _Collected(outputs, run, each, thresholds, pages, line_each)
        done, began = workers.from_first(
            lambda: collected.begin(stack, category, resume, overwrite)
        )
        number = num_images(done)
        workers.require_same({"the number of images": number})
        if workers.is_first:
            collected.expect(stack, number)
        else:
            stack.enter_context(run.joined(workers.rank, began))
        failures: list[_Outcome] = []
        to_score = _without_outputs(sources(done), run.folder)
        stream = stack.enter_context(
            score_stream(
                detectors,
                workers.own(to_score),
                category,
                false_alarm_rate=false_alarm_rate,
                on_error=lambda source, error: failures.append(_failure(source, error)),
                keep_originals=outputs.heat_maps or report is not None,
            )
        )
        outcomes = (
            one
            if isinstance(one, _Outcome)
            else _outcome(one, each[one.category or ""], outputs, run, pages)
            for one in with_failures(stream, failures)
        )
        for outcome in workers.in_order(outcomes):
            collected.add(outcome)
        if workers.is_first:
            collected.end()
    if workers.is_first:
        collected.tell()
    return int(workers.agreed(collected.failed))


def _without_outputs(sources: Iterator[Source], folder: Path) -> Iterator[Source]:
    """Sources but those that runs into this folder have written."""
    written = [os.path.realpath(folder / name) for name in (_HEAT_MAPS, _MAPS, _MASKS)]
    for source in sources:
        place = Path(os.path.realpath(source.path))
        if not any(place.is_relative_to(one) for one in written):
            yield source


class _Outcome(NamedTuple):
    """What has become of an image, as the process that scored it tells the one that collects."""

    row: dict[str, Any]
    """Of the table."""
    line: str = ""
    """For the terminal."""
    error: str = ""
    """Why it could not be read; "" if it was."""
    category: str | None = None
    anomalous: bool | None = None
    unusual: Sequence[str] = ()
    statistics: Tensor | None = None
    entry: ReportEntry | None = None
    """Of the report; None: there is none."""
    coco: dict[str, Any] | None = None
    """Its regions for a COCO file; None: there is none."""


def _failure(source: Source, error: Exception) -> _Outcome:
    message = str(error) or type(error).__name__
    return _Outcome({"image": str(source.path), "error": message}, error=message)


def _outcome(
    result: ImageResult, detector: PatchSVDD, outputs: Outputs, run: RunFolder, pages: Reports
) -> _Outcome:
    """Write an image's pictures, and say what else is to be written."""
    regions = detector.explain(result)
    return _Outcome(
        row_of(result) | {"regions": [_region(one, result) for one in regions]},
        _line(result),
        "",
        result.category,
        result.anomalous,
        result.unusual,
        result.statistics,
        pages.entry(result, regions),
        _write_pictures(outputs, run, result, detector),
    )


class _Collected:
    """What the first process writes of all outcomes: table, report, COCO file, and what it prints.

    In others it stays unused.
    """

    def __init__(
        self,
        outputs: Outputs,
        run: RunFolder,
        each: Mapping[str, PatchSVDD],
        thresholds: Mapping[str, float | None],
        pages: Reports,
        line_each: str,
    ) -> None:
        self._outputs, self._run, self._pages, self._line_each = outputs, run, pages, line_each
        self._thresholds, self._started = thresholds, time.perf_counter()
        self._counts = _Counts(judged=any(one is not None for one in thresholds.values()))
        self._drifts = {
            name: StreamDrift(one.gallery_.statistics) for name, one in each.items() if one.gallery_
        }

    def begin(
        self, stack: ExitStack, category: str | None, resume: bool, overwrite: bool
    ) -> tuple[set[str], int]:
        """Claim all outputs; returns the paths that have a row, and when the run began."""
        run = stack.enter_context(self._run)
        here = "\0".join([str(Path.cwd()), *([] if category is None else [category])])
        self._began = run.made_from(self._outputs.table) or here
        path = run.note(Path(self._outputs.table), self._began)
        self._table = stack.enter_context(Table(path, self._thresholds, resume))
        _require_same_run(self._table, self._began, category)
        self._coco = stack.enter_context(_coco_file(self._outputs.coco, overwrite, self._table))
        stack.enter_context(self._pages)
        return self._table.done, run.began

    def expect(self, stack: ExitStack, num_images: int | None) -> None:
        """Show that so many images are to come; None: nobody knows how many."""
        # A line for each image tells enough where bars cannot move.
        with_bars = console.is_terminal or not self._line_each
        bars = stack.enter_context(display(console)) if with_bars else None
        self._bar = ScoringBar(bars, num_images)
        if self._line_each:
            console.print(shown(self._line_each), soft_wrap=True)

    def add(self, outcome: _Outcome) -> None:
        """Write what there is of an image, its row last."""
        if outcome.error:
            self._counts.failed += 1
            path, message = outcome.row["image"], outcome.error
            self._pages.add_failure(path, message)
            print_error(message if path in message else f"{path}: {message}")
        else:
            self._pages.add(outcome.entry, outcome.category)
            if self._coco is not None and outcome.coco is not None:
                self._coco.add(outcome.coco)
            self._counts.add(outcome)
        self._table.add(outcome.row)
        if self._line_each and outcome.line:
            print_line(outcome.line)
        drift = self._drifts.get(outcome.category or "")
        if drift is not None and outcome.statistics is not None:
            for change in drift.update(outcome.statistics):
                print_warning(f"{outcome.category}: {change}" if outcome.category else change)
        self._bar.advance()

    def end(self) -> None:
        """Write what is written when all images are there."""
        if self._outputs.table_format == "parquet":
            parquet = self._run.note(Path("scores.parquet"), self._began)
            write_parquet(self._table.path, parquet, self._table.columns)

    def tell(self) -> None:
        """Print what was done."""
        seconds = time.perf_counter() - self._started
        self._counts.tell(seconds, self._outputs.folder, with_one=not self._line_each)
        self._pages.tell()

    @property
    def failed(self) -> int:
        """How many images could not be read."""
        return self._counts.failed


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
    only: str = ""
    """The line of the result, while there is only one."""

    judged: bool = False
    """Whether there is a threshold to judge any by."""
    by_category: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: _Outcome) -> None:
        self.only = outcome.line if self.scored == 0 else ""
        self.scored += 1
        self.alarms.add(outcome.anomalous, outcome.unusual)
        if outcome.category is not None:
            self.by_category[outcome.category] += 1

    def tell(self, seconds: float, folder: Path, with_one: bool) -> None:
        """Print what was done; with_one: also the result, if there is only one."""
        lines = [self.only] if self.only and with_one else []
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
            print_line(line)


def _write_pictures(
    outputs: Outputs, run: RunFolder, result: ImageResult, detector: PatchSVDD
) -> dict[str, Any] | None:
    """Write an image's heat map, map and mask; returns its regions for a COCO file, if one is."""
    anomaly_map, name = result.anomaly_map.numpy(), result.source.inner
    image = os.path.abspath(result.source.path)  # noqa: PTH100 (follows no links)
    if outputs.heat_maps:
        path = run.place(_HEAT_MAPS / inner_path(name, ".png"), image)
        write_heat_map(path, result)
    if outputs.maps is not None:
        path = run.place(_MAPS / inner_path(name, f".{outputs.maps}"), image)
        write_map(path, anomaly_map, detector.calibration_, result.map_threshold)
    if not outputs.masks and outputs.coco is None:
        return None
    mask = anomalous_pixels(result)
    if outputs.masks:
        write_mask(run.place(_MASKS / inner_path(name, ".png"), image), mask)
    return None if outputs.coco is None else coco_image(result, mask)


def _region(region: Region, result: ImageResult) -> dict[str, Any]:
    """A region for JSON, its peak also as a multiple of the threshold."""
    return asdict(region) | {"relative_peak": relative(region.peak, result.map_threshold)}


def _line(result: ImageResult) -> str:
    notes = "".join(f"; {note}" for note in result.unusual)
    return f"{result.name}  {verdict_in_words(result)}{notes}"
