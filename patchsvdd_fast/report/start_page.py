"""The page that leads to the reports of several categories, with a row of figures for each."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from .. import __version__
from ..detector.evaluation import CategoryResult
from ..files.folders import counted
from ..files.whole import written_whole
from ..score.metrics import METRICS
from .html import is_report, page_parts
from .text import failures_section, html_text

_LINK = '<th scope="row"><a href="{}/index.html">'
_HEADINGS = ("good", "anomalous", "map", *METRICS.values(), "missed", "false alarms")


def write_start_page(
    folder: Path, results: Mapping[str, CategoryResult], failed: Mapping[str, str], data: str
) -> Path:
    """Write `folder`/index.html, which links to the report of each category; returns its path.

    results: of each category, by the name of the folder in `folder` with its report. failed: why
    others have none, by category. data: what was evaluated, in words. Raises OSError.
    """
    headings = list(_HEADINGS)
    has_validation = any(result.num_validation for result in results.values())
    if has_validation:
        headings.append("in validation")
    return _write_page(
        folder,
        f"{data}: {counted(len(results), 'category', 'categories')}",
        "AUROC and AUPRO in percent; missed and false alarms at each model's threshold.",
        headings,
        [_row(name, result, has_validation) for name, result in results.items()],
        [*failed.items()],
    )


def write_scores_page(
    folder: Path,
    counts: Mapping[str, tuple[int, int]],
    failed: Sequence[tuple[str, str]],
    facts: Mapping[str, str],
) -> Path:
    """As `write_start_page`, of images without labels.

    counts: images and anomalous ones of each category, by the name of the folder with its report.
    failed: images that could not be read, and why. facts: what to say of them all, values by name.
    """
    rows = [
        _Row(name, name, [f"{images:,}", f"{anomalous:,}"])
        for name, (images, anomalous) in sorted(counts.items())
    ]
    told = "".join(f" {name.capitalize()}: {value}." for name, value in facts.items())
    note = f"Each image was compared with the normal images of its category.{told}"
    headings = ("images", "anomalous")
    return _write_page(folder, "Anomaly scores", note, headings, rows, failed)


def linked_folders(page: Path) -> set[Path]:
    """The folders of the reports that such a page, `folder`/index.html, links to, if it is one."""
    if not (page.exists() and is_report(page)):
        return set()
    links = re.findall(_LINK.format(r'([^"/]+)'), page.read_text(encoding="utf-8"))
    return {page.parent / unquote(link) for link in links} - {page.parent / "..", page.parent}


class _Row(NamedTuple):
    """A category's row of the table."""

    folder: str
    """With its report."""
    name: str
    cells: Sequence[str]
    """Of text, one for each heading."""

    def html(self, headings: Sequence[str]) -> str:
        """The row; on a narrow screen each cell shows its heading itself."""
        link = _LINK.format(quote(os.fsencode(self.folder)))
        cells = "".join(
            f'<td data-heading="{html_text(heading)}">{html_text(cell)}</td>'
            for heading, cell in zip(headings, self.cells, strict=True)
        )
        return f"<tr>{link}{html_text(self.name)}</a></th>{cells}</tr>"


def _write_page(
    folder: Path,
    title: str,
    note: str,
    headings: Sequence[str],
    rows: Sequence[_Row],
    failed: Sequence[tuple[str, str]],
) -> Path:
    """headings: of the rows' cells."""
    names = ("category", *headings)
    heads = "".join(f'<th scope="col">{html_text(name)}</th>' for name in names)
    body = "".join(row.html(headings) for row in rows)
    head, style, policy = page_parts()
    title = html_text(title)
    path = folder / "index.html"
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.write_text(
            head.replace("{{policy}}", policy).replace("{{title}}", title)
            + f"<style>{style}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
            f"<p>{html_text(note)}</p>"
            f'<div class="table start"><table><thead><tr>{heads}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>\n{failures_section(list(failed))}\n"
            f'<p class="soft">patchsvdd_fast {html_text(__version__)}</p>\n</body>\n</html>\n',
            encoding="utf-8",
        )
    return path


def _row(folder: str, result: CategoryResult, has_validation: bool) -> _Row:
    """The category's figures; of several levels those of the product of their maps.

    has_validation: whether there is a column for false alarms on images for validation.
    """
    *_, combination = result.percent
    metrics = [result.percent[combination].get(metric) for metric in METRICS]
    reached = result.at_threshold
    cells = [
        f"{result.num_good:,}",
        f"{result.num_anomalous:,}",
        combination,
        *("-" if value is None else f"{value:.1f}" for value in metrics),
        "-" if reached is None else f"{reached.missed:,} of {reached.num_anomalous:,}",
        "-" if reached is None else f"{reached.false_alarms:,} of {reached.num_good:,}",
        *([result.validation_alarms or "-"] if has_validation else []),
    ]
    return _Row(folder, result.category, cells)
