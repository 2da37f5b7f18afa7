"""A report of scored images as one HTML file that needs nothing else: no network, no folder.

Each image's pictures lie in the page as JSON, which the page decodes when the image comes near the
screen. They are written to a temporary file as they are added, so that memory does not grow with
their number.

Names and labels may hold anything: text passes through `shown`, then through `html_text` or
`_json`. A content security policy allows the page its one script, its one style and `data:`
pictures, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..files.whole import written_whole
from ..score.image_result import relative
from ..score.regions import Region
from .charts import charts
from .figures import ListedImage, Metrics, figures, label_rows, metric_rows
from .pictures import contour_path, heat_at, heat_text, jpeg_text, outline_path, scale_text
from .summary import Alarms, broken_promise
from .text import definitions, failures_section, html_text, shown, table

GENERATOR = b'<meta name="generator" content="patchsvdd_fast">'
"""What tells a report from other pages, near its beginning."""


PICTURE_SIDE = 768
"""Most pixels on the longer side of a picture in a report."""


@dataclass(frozen=True)
class Finding:
    """An anomalous region, and the training image that holds its nearest normal patch."""

    region: Region
    """Its `match_name` must name one training image only."""
    match_picture: Image.Image | None
    """That training image, in the size that `region.match` refers to; None if it was not kept."""


@dataclass(frozen=True)
class ReportEntry:
    """What a report shows of one scored image."""

    name: str
    """To show; may hold anything."""
    picture: Image.Image
    """The image, of any size."""
    heat: npt.NDArray[np.float32]
    """The map scaled to [0, 1], see `heat_maps.scale_map`: [H, W], the pixels that positions in
    `findings` are given in."""
    score: float
    """The image score."""
    p_value: float | None
    """How probable it is that a good image scores so high; None if that is unknown."""
    anomalous: bool | None
    """The verdict; None if there is no threshold."""
    label: str | None
    """"good" or the defect's name; None where labels are unknown."""
    mask: npt.NDArray[np.bool_] | None
    """As large as the picture, True where anomalous; None if unknown."""
    findings: Sequence[Finding] = ()
    """Its anomalous regions, in the order to show them."""
    notes: Sequence[str] = ()
    """What is unusual about the image, a short sentence each."""
    map_threshold: float | None = None
    """Map value from which on a pixel is anomalous, for the peaks of `findings`; None if there is
    none above 0."""


def is_report(page: Path) -> bool:
    """Whether this HTML file is a report written here. Raises OSError."""
    with page.open("rb") as file:
        return GENERATOR in file.read(4096)


class ReportWriter:
    """Collects scored images, and writes `folder`/index.html when it is closed.

    As a context manager it is closed at the end; after an exception nothing is written, and an
    older report stays.

    folder: made if it is missing.
    title: heading of the page.
    facts: what the images were scored with, values by name.
    threshold: image score above which an image is called anomalous; None if there is none.
    promised: share of good images that may exceed it; None if nothing is promised.
    good_scores: image scores of the calibration, [N].
    tables: further tables by caption, each a row of headings and then its rows.
    picture_side: larger pictures of images that are called or labelled anomalous are shrunk to
        this many pixels on the longer side, others to half of it, heat maps to half of theirs.

    Raises ValueError if `folder` is a file or a number is not finite, OSError if nothing can be
    written there.
    """

    def __init__(
        self,
        folder: Path,
        title: str,
        facts: Mapping[str, str],
        threshold: float | None,
        good_scores: Sequence[float] = (),
        tables: Mapping[str, Sequence[Sequence[str]]] | None = None,
        picture_side: int = PICTURE_SIDE,
        promised: float | None = None,
    ) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; a report needs a folder")
        if picture_side < 1:
            raise ValueError(f"picture_side must be at least 1, got {picture_side}")
        if threshold is not None:
            _require_finite("threshold", threshold)
        for score in good_scores:
            _require_finite("good_scores", score)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "index.html"
        self._title = title
        self._facts = facts
        self._threshold = None if threshold is None else float(threshold)
        self._good_scores = np.asarray(good_scores, dtype=np.float64)
        self._tables = dict(tables or {})
        self._side = picture_side
        self._promised = promised
        self._alarms = Alarms()
        self._entries: list[ListedImage] = []
        self._failures: list[tuple[str, str]] = []
        self._matches: dict[str, int] = {}
        # In the report's own folder, which has room for it: /tmp may be kept in memory.
        self._pictures = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by close)

    def __enter__(self) -> ReportWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        self._pictures.close()

    def add(self, entry: ReportEntry) -> None:
        """Add an image: its pictures go to disk, its figures stay in memory.

        Raises ValueError if sizes differ or numbers are not finite, and after `close`.
        """
        self._require_open()
        _check(entry)
        size, has_threshold = entry.picture.size, entry.map_threshold is not None
        height, width = entry.heat.shape
        is_looked_at = entry.anomalous or entry.label not in (None, "good")
        side = self._side if is_looked_at else max(1, self._side // 2)
        heat = heat_at(entry.heat, size, side)
        payload = {
            "size": size,
            "mapSize": [width, height],
            "picture": jpeg_text(entry.picture, side),
            "heat": heat_text(heat, has_threshold),
            "contour": contour_path(heat, size) if has_threshold else "",
            "mask": "" if entry.mask is None else outline_path(entry.mask),
            "notes": [shown(note) for note in entry.notes],
            "findings": [
                _region_json(finding.region, entry.map_threshold)
                | {"matchPicture": self._match_number(finding)}
                for finding in entry.findings
            ],
        }
        self._write(f"entry-{len(self._entries)}", payload)
        self._entries.append(_listed(entry, self._threshold))
        self._alarms.add(entry.anomalous, entry.notes)

    def add_failure(self, name: str, message: str) -> None:
        """List an image that could not be scored. Raises ValueError after `close`."""
        self._require_open()
        self._failures.append((name, message))

    def close(
        self, metrics: Metrics | None = None, more_figures: Mapping[str, str] | None = None
    ) -> Path:
        """Write the page with all that was added, and return its path; a second call does nothing.

        metrics: shown as a table. more_figures: for the head of the page, by name. Raises OSError.
        """
        if self._pictures.closed:
            return self.path
        head, tail = _template(self._values(metrics, more_figures or {}))
        with self._pictures, written_whole(self.path) as partial, partial.open("wb") as file:
            file.write(head)
            self._pictures.seek(0)
            shutil.copyfileobj(self._pictures, file, 1 << 20)
            file.write(tail)
        return self.path

    def _require_open(self) -> None:
        if self._pictures.closed:
            raise ValueError(f"the report {self.path} is closed already")

    def _match_number(self, finding: Finding) -> int | None:
        """Number of the finding's training image in the page, which holds each once."""
        name, picture = finding.region.match_name, finding.match_picture
        if name not in self._matches and picture is not None:
            payload = {"size": list(picture.size), "picture": jpeg_text(picture, self._side)}
            self._write(f"match-{len(self._matches)}", payload)
            self._matches[name] = len(self._matches)
        return self._matches.get(name)

    def _write(self, name: str, payload: Mapping[str, Any]) -> None:
        block = f'<script type="application/json" id="{name}">{_json(payload)}</script>\n'
        self._pictures.write(block.encode())

    def _values(self, metrics: Metrics | None, more_figures: Mapping[str, str]) -> dict[str, str]:
        """Texts for the placeholders of page.html."""
        tables = dict(self._tables)
        if metrics:
            tables = {"Metrics, in %": metric_rows(metrics)} | tables
        entries = self._entries
        labels = label_rows(entries)
        if labels:
            tables = {"By label": labels} | tables
        index = {
            "entries": [
                [e.name, e.score, e.relative_score, e.p_value, e.anomalous, e.label]
                for e in entries
            ],
            "hasNotes": any(entry.has_notes for entry in entries),
            "threshold": self._threshold,
        }
        head = {**figures(entries, len(self._failures), self._threshold), **more_figures}
        return {
            "title": html_text(self._title),
            "figures": definitions(head),
            "facts": definitions(self._facts),
            "remarks": "".join(f"<p>{html_text(line)}</p>" for line in self._remarks()),
            "charts": charts(
                np.array([entry.score for entry in entries]),
                [entry.is_defective for entry in entries],
                self._threshold,
                self._good_scores,
            ),
            "tables": "".join(table(caption, rows) for caption, rows in tables.items()),
            "failures": failures_section(self._failures),
            "scale": scale_text(has_threshold=self._threshold is not None),
            "index": _json(index),
        }

    def _remarks(self) -> list[str]:
        """What has to be known about the verdicts, a line each."""
        lines = [self._alarms.in_words()]
        good = [e.anomalous for e in self._entries if e.is_defective is False]
        if self._promised is not None and None not in good:
            lines.append(broken_promise(sum(map(bool, good)), len(good), self._promised))
        return list(filter(None, lines))


def _listed(entry: ReportEntry, threshold: float | None) -> ListedImage:
    return ListedImage(
        shown(entry.name),
        float(entry.score),
        relative(float(entry.score), threshold),
        None if entry.p_value is None else float(entry.p_value),
        None if entry.anomalous is None else bool(entry.anomalous),
        None if entry.label is None else shown(entry.label),
        bool(entry.notes),
    )


def _check(entry: ReportEntry) -> None:
    where = shown(entry.name)
    width, height = entry.picture.size
    _require_finite(f"score of {where}", entry.score)
    if entry.p_value is not None and not 0 <= entry.p_value <= 1:
        raise ValueError(f"p_value of {where} must lie between 0 and 1, got {entry.p_value}")
    if entry.heat.ndim != 2 or not entry.heat.size:
        raise ValueError(f"heat of {where} must have shape [H, W], got {list(entry.heat.shape)}")
    if not ((entry.heat >= 0) & (entry.heat <= 1)).all():
        raise ValueError(
            f"heat of {where} must lie between 0 and 1, got {entry.heat.min()} to "
            f"{entry.heat.max()}"
        )
    if entry.mask is not None and entry.mask.shape != (height, width):
        raise ValueError(
            f"mask of {where} must have shape [{height}, {width}] as its picture, "
            f"got {list(entry.mask.shape)}"
        )
    for finding in entry.findings:
        _require_finite(f"peak of a finding in {where}", finding.region.peak)
        _require_finite(f"distance of a finding in {where}", finding.region.distance)


def _require_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


# --- text -----------------------------------------------------------------------------------------


def _region_json(region: Region, threshold: float | None) -> dict[str, Any]:
    box = region.left, region.top, region.width, region.height
    return {
        "box": [int(value) for value in box],
        "peak": float(region.peak),
        "relativePeak": relative(float(region.peak), threshold),
        "level": shown(region.level),
        "distance": float(region.distance),
        "patch": [int(value) for value in region.patch],
        "matchName": shown(region.match_name),
        "match": [int(value) for value in region.match],
    }


def _json(value: Any) -> str:
    """JSON in ASCII that cannot end the script element it stands in."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


# --- the page -------------------------------------------------------------------------------------


def _template(values: Mapping[str, str]) -> tuple[bytes, bytes]:
    """page.html before and after its pictures, with the placeholders replaced by `values`."""
    text = _page()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    _, _, policy = page_parts(f"'{_digest(script)}'")
    filled = {**values, "policy": policy}
    head, tail = (
        # In one pass: what is filled in may itself look like a placeholder.
        re.sub(r"\{\{(\w+)\}\}", lambda place: filled[place[1]], part).encode()
        for part in text.split("{{pictures}}")
    )
    return head, tail


def _page() -> str:
    return resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")


def page_parts(script: str = "'none'") -> tuple[str, str, str]:
    """What other pages share with a report: page.html before its style, the style, the policy.

    script: the scripts that the policy allows.
    """
    head, style = _page().split("</style>")[0].split("<style>")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src {script}; base-uri 'none'; form-action 'none'"
    )
    return head, style, policy


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
