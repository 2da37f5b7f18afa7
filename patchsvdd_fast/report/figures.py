"""The figures and tables of an HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..score.metrics import METRICS, detection_auroc
from .captions import cut_in_middle

_LONGEST_LABEL = 60  # characters of it in a table

Metrics = Mapping[str, Mapping[str, float | None]]
"""In percent or None, by combination ("K64", "K32", "sum", "mult"), then metric: what
`detector.evaluation.CategoryResult.percent` is."""


@dataclass(frozen=True)
class ListedImage:
    """What a report keeps of an image in memory; fields as of `html.ReportEntry`."""

    name: str
    score: float
    relative_score: float | None
    p_value: float | None
    anomalous: bool | None
    label: str | None
    has_notes: bool

    @property
    def is_defective(self) -> bool | None:
        """By its label; None without one."""
        return None if self.label is None else self.label != "good"


def figures(images: Sequence[ListedImage], failed: int, threshold: float | None) -> dict[str, str]:
    """The figures at the head of the page, by name. failed: images that could not be scored."""
    said = {"images": f"{len(images):,}"}
    if failed:
        said["not scored"] = f"{failed:,}"
    judged = [image for image in images if image.anomalous is not None]
    if judged:
        said["called anomalous"] = f"{sum(bool(image.anomalous) for image in judged):,}"
    for name, is_defective in (("missed", True), ("false alarms", False)):
        kind = [image for image in judged if image.is_defective is is_defective]
        if kind:
            wrong = sum(image.anomalous is not is_defective for image in kind)
            said[name] = f"{wrong:,} of {len(kind):,}"
    if threshold is not None:
        said["threshold"] = f"{threshold:.4g}"
    return said


def metric_rows(metrics: Metrics) -> list[list[str]]:
    """The metrics as rows of a table, the headings first."""
    rows = [["map", *METRICS.values()]]
    for combination, percent in metrics.items():
        values = [percent.get(metric) for metric in METRICS]
        rows.append([combination, *("-" if v is None else f"{v:.1f}" for v in values)])
    return rows


def label_rows(images: Sequence[ListedImage]) -> list[list[str]]:
    """A row of a table for each label, good images first: how many, how high, how many found.

    Empty unless there are defects. The AUROC of a defect is that of its images among the good ones.
    """
    by_label: dict[str, list[ListedImage]] = {}
    for image in images:
        if image.label is not None:
            by_label.setdefault(image.label, []).append(image)
    good = [image.score for image in by_label.get("good", [])]
    if not set(by_label) - {"good"}:
        return []
    rows = [["label", "images", "alarms", "median score", "AUROC"]]
    for label in sorted(by_label, key=lambda label: (label != "good", label)):
        of_label = by_label[label]
        scores = [image.score for image in of_label]
        called = [image.anomalous for image in of_label if image.anomalous is not None]
        relative = [image.relative_score for image in of_label if image.relative_score is not None]
        median = f"{np.median(relative):.3g} x" if relative else f"{np.median(scores):.3g}"
        auroc = "-"
        if good and label != "good":
            defective = np.arange(len(good) + len(scores)) >= len(good)
            auroc = f"{100 * detection_auroc(np.array(good + scores), defective):.1f}"
        share = f"{sum(called):,} of {len(called):,}" if called else "-"
        short = cut_in_middle(label, lambda text: len(text) <= _LONGEST_LABEL)
        rows.append([short, f"{len(of_label):,}", share, median, auroc])
    return rows
