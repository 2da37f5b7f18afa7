"""HTML reports of commands: a page, or one for each category and a page that leads to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from ..detector.categories import CategoryDetectors, by_category
from ..detector.patch_svdd import PatchSVDD
from ..files.claims import claimed_file, require_new
from ..report.entries import open_report, report_entry
from ..report.html import ReportEntry, ReportWriter, is_report
from ..report.start_page import linked_folders, write_scores_page
from ..report.text import shown
from ..score.image_result import ImageResult
from ..score.regions import Region
from .terminal import console


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
            console.print(shown(f"report: {path}"), soft_wrap=True, markup=False)

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
