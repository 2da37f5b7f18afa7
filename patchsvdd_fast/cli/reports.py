"""HTML reports of commands: a page, or one for each category and a page that leads to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from ..detector.categories import CategoryDetectors, by_category
from ..detector.evaluation import CategoryResult, mask_of, share_evaluation
from ..detector.patch_svdd import PatchSVDD
from ..files.claims import claimed_file, require_new
from ..report.entries import open_report, report_entry
from ..report.html import ReportEntry, ReportWriter, is_report
from ..report.start_page import linked_folders, write_scores_page, write_start_page
from ..report.text import shown
from ..score.image_result import ImageResult
from ..score.regions import Region
from ..training.workers import Workers
from .terminal import console, evaluate_with_progress

if TYPE_CHECKING:
    from ..detector.progress_bars import Display
    from ..files.categories import Category
    from ..files.layouts import LabelledImage, LabelledSet


@contextmanager
def claimed_report(folder: Path, overwrite: bool) -> Iterator[None]:
    """Within the context this process alone writes the report in a folder, which is made.

    Afterwards the reports of categories are gone that an earlier start page led to, and this one
    does not. Raises ValueError if there is one that may not be replaced, or a page of somebody
    else's.
    """
    require_report(folder, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with claimed_file(folder / "index.html", overwrite):
        earlier = linked_folders(folder / "index.html")
        yield
        for stale in earlier - linked_folders(folder / "index.html"):
            report = stale / "index.html"
            if report.exists() and is_report(report):
                report.unlink()
                with suppress(OSError):  # there is something else in it
                    stale.rmdir()


def require_report(
    folder: Path,
    overwrite: bool,
    detectors: PatchSVDD | CategoryDetectors | None = None,
) -> None:
    """Raise ValueError unless a report may be written to this folder; of several, to each."""
    if isinstance(detectors, CategoryDetectors):
        for category in detectors:
            require_report(folder / category, overwrite)
    page = folder / "index.html"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a report needs a folder")
    if not overwrite:
        require_new(page)
    elif page.exists() and not is_report(page):
        raise ValueError(f"{page} is no report of this program: use another folder")


class Reports:
    """The reports of images that are scored, a context.

    detectors: of several categories each that has an image gets a page in a folder of its name.
    folder: None: nothing is written. false_alarm_rate: None: as in training.
    overwrite: whether there may be reports already. facts: what pages say of the run.
    """

    def __init__(
        self,
        detectors: PatchSVDD | CategoryDetectors,
        folder: Path | None,
        false_alarm_rate: float | None,
        overwrite: bool,
        facts: Mapping[str, str] | None,
    ) -> None:
        self._detectors, self._folder, self._overwrite = by_category(detectors), folder, overwrite
        self._several = "" not in self._detectors
        self._rate, self._facts = false_alarm_rate, facts
        self._pages: dict[str | None, ReportWriter] = {}
        self._counts: dict[str, tuple[int, int]] = {}
        self._failures: list[tuple[str, str]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Reports:
        if self._folder is not None:
            self._stack.enter_context(claimed_report(self._folder, self._overwrite))
            if not self._several:
                self._page(None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ended = kind is None or issubclass(kind, KeyboardInterrupt)
        if ended and self._folder is not None and self._several:
            write_scores_page(self._folder, self._counts, self._failures, self._facts or {})
        self._stack.__exit__(kind, error, trace)

    def entry(self, result: ImageResult, regions: Sequence[Region]) -> ReportEntry | None:
        """What to show of a scored image; regions: those of `explain`. None without a report."""
        if self._folder is None:
            return None
        return report_entry(self._detectors[result.category or ""], result, regions)

    def add(self, entry: ReportEntry | None, category: str | None) -> None:
        """Show a scored image, in the page of its category."""
        if entry is None:
            return
        self._page(category).add(entry)
        if category is not None:
            images, anomalous = self._counts.get(category, (0, 0))
            self._counts[category] = images + 1, anomalous + bool(entry.anomalous)

    def add_failure(self, name: str, reason: str) -> None:
        """Show an image that could not be read."""
        if self._folder is None:
            return
        if not self._several:
            self._page(None).add_failure(name, reason)
        else:
            self._failures.append((name, reason))

    def tell(self) -> None:
        """Say where the page, or that which leads to the others, is."""
        if self._folder is not None:
            path = self._folder / "index.html"
            console.print(shown(f"report: {path}"), soft_wrap=True)

    def _page(self, category: str | None) -> ReportWriter:
        if category not in self._pages:
            assert self._folder is not None
            folder, title = self._folder, "Anomaly scores"
            if category is not None:
                folder, title = folder / category, category
                self._stack.enter_context(claimed_report(folder, self._overwrite))
            detector = self._detectors[category or ""]
            threshold = detector.threshold_or_none(self._rate)
            page = open_report(folder, detector, threshold, title, self._rate, self._facts)
            self._pages[category] = self._stack.enter_context(page)
        return self._pages[category]


_VALIDATION = "false alarms in validation"  # a figure of a report


class Evaluation(NamedTuple):
    """How a category is evaluated."""

    detector: PatchSVDD
    category: Category
    tests: LabelledSet
    skip_unreadable: bool
    report: Path | None
    """Folder for its report; None: there is none."""
    facts: dict[str, str]
    """What the report says of the run, values by name."""
    workers: Workers
    """Among which the images are divided."""

    def run(
        self, bars: Display, on_result: Callable[[LabelledImage, ImageResult], None]
    ) -> CategoryResult:
        """Evaluate, and write the report; on_result: called with each test image and its result."""
        how = self.tests, self.skip_unreadable
        if self.report is None:
            return evaluate_with_progress(
                bars, self.detector, self.category, on_result, *how, workers=self.workers
            )
        threshold = self.detector.threshold_or_none()
        facts = self.facts | {"data": str(self.category.root)}
        page = open_report(self.report, self.detector, threshold, self.category.name, facts=facts)

        def add(image: LabelledImage, result: ImageResult) -> None:
            on_result(image, result)
            page.add(self._entry(image, result))

        with page:
            evaluated = evaluate_with_progress(
                *(bars, self.detector, self.category, add, *how),
                keep_originals=True,
                workers=self.workers,
            )
            alarms = evaluated.validation_alarms
            page.close(evaluated.percent, {_VALIDATION: alarms} if alarms else None)
        console.print(f"report: {page.path}", soft_wrap=True)
        return evaluated

    def share(self) -> None:
        """Take part in what the first process runs."""
        how = self.tests, self.skip_unreadable, self.report is not None
        share_evaluation(self.detector, self.category, self.workers, *how)

    def _entry(self, image: LabelledImage, result: ImageResult) -> ReportEntry:
        width, height = result.original_picture.size
        try:
            mask = mask_of(image, (height, width))
        except (ValueError, OSError):  # said at the end, with the category's figures
            mask = None
        regions = self.detector.explain(result)
        return report_entry(self.detector, result, regions, image.defect, mask)


def write_evaluation_page(folder: Path, overwrite: bool, *of_page: Any) -> None:
    """Write the page of several categories; of_page: what `write_start_page` takes besides."""
    with claimed_report(folder, overwrite):
        page = write_start_page(folder, *of_page)
    console.print(shown(f"all reports: {page}"), soft_wrap=True)
