"""Charts of an HTML report as inline SVG: the histogram of scores and the ROC curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_curve

from ..score.metrics import detection_auroc
from .text import html_text

_BINS = 40
_STRIP_GAP = 12  # above the highest bin of a group
# Beyond this ratio of the highest score to the lowest a linear axis crowds the good images.
_LOGARITHMIC_FROM = 3

_WIDTH, _HEIGHT = 390, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 376, 10, 218  # edges of the plot area in it


def charts(
    scores: npt.NDArray[np.float64],
    kinds: Sequence[bool | None],
    threshold: float | None,
    good_scores: npt.NDArray[np.float64],
) -> str:
    """The histogram of scores and, where there are both kinds of label, the ROC curve.

    scores: image scores, [N].
    kinds: [N], whether each image is anomalous by its label; None without a label.
    threshold: image score to mark in both charts, above 0 also the unit of the axis; None: neither.
    good_scores: image scores of the calibration, drawn as one more histogram.

    Returns HTML with inline SVG, or "" if there are no images.
    """
    if not len(scores):
        return ""
    unit = "image score"
    if threshold is not None and threshold > 0:  # numbers that mean something, and stay the same
        scores, good_scores, threshold = scores / threshold, good_scores / threshold, 1.0
        unit = "image score, in multiples of the threshold"
    known = np.array([kind is not None for kind in kinds])
    defective = np.array([kind is True for kind in kinds])
    groups = {
        ("good", "good"): scores[known & ~defective],
        ("anomalous", "anomalous"): scores[defective],
        ("scored", "without label" if known.any() else "scored images"): scores[~known],
        ("calibration", "calibration, good"): good_scores,
    }
    drawn = _histogram(
        {key: values for key, values in groups.items() if len(values)}, threshold, unit
    )
    if defective.any() and (known & ~defective).any():
        drawn += _roc(scores[known], defective[known], threshold)
    return drawn


def _histogram(
    groups: Mapping[tuple[str, str], npt.NDArray[np.float64]], threshold: float | None, unit: str
) -> str:
    """A strip for each group, one below the other, each as high as its highest bin.

    groups: the scores to draw, by (CSS class, name). unit: what scores are.
    """
    values = np.concatenate([*groups.values(), [] if threshold is None else [threshold]])
    low, high = float(values.min()), float(values.max())
    logarithmic = low > 0 and high / low > _LOGARITHMIC_FROM
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    edges = (np.geomspace if logarithmic else np.linspace)(low, high, _BINS + 1)
    edges[0], edges[-1] = low, high  # geomspace rounds
    shares = {key: np.histogram(v, edges)[0] / len(v) for key, v in groups.items()}
    strip = (_BOTTOM - _TOP) / len(groups)

    def x_of(value: float) -> float:
        there = np.log([low, high, value]) if logarithmic else np.array([low, high, value])
        return float(_LEFT + (_RIGHT - _LEFT) * (there[2] - there[0]) / (there[1] - there[0]))

    x = [f"{x_of(edge):.1f}" for edge in edges]
    marks = lines = ""
    y_ticks = []
    for row, ((kind, _), share) in enumerate(shares.items()):
        below = _TOP + (row + 1) * strip
        heights = (strip - _STRIP_GAP) * share / share.max()
        steps = "".join(
            f"V{below - height:.1f}H{right}" for height, right in zip(heights, x[1:], strict=True)
        )
        marks += f'<path class="{kind}" d="M{x[0]} {below:.1f}{steps}V{below:.1f}"/>'
        lines += f"M{_LEFT} {below:.1f}H{_RIGHT}"
        y_ticks.append((below - strip + _STRIP_GAP, f"{100 * share.max():.3g}"))
    marks += f'<path class="axis" d="{lines}"/>'
    if threshold is not None:
        marks += f'<path class="threshold" d="M{x_of(threshold):.1f} {_BOTTOM}V{_TOP}"/>'
    ticks = _log_ticks(low, high) if logarithmic else _ticks(low, high)
    axes = _axes(
        [(x_of(tick), f"{tick:.4g}") for tick in ticks],
        y_ticks,
        unit + (", logarithmic" if logarithmic else ""),
        "% of each group",
    )
    legend = "".join(
        f'<li><span class="swatch {kind}"></span>'
        f"{html_text(name)} ({len(groups[kind, name]):,})</li>"
        for kind, name in groups
    )
    if threshold is not None:
        legend += f'<li><span class="swatch threshold"></span>threshold {threshold:.4g}</li>'
    # For the page's slider, which marks another threshold here.
    scale = f'data-low="{low!r}" data-high="{high!r}" data-logarithmic="{int(logarithmic)}"'
    return _figure("Scores", axes + marks, f'<ul class="legend">{legend}</ul>', scale)


def _roc(
    scores: npt.NDArray[np.float64], defective: npt.NDArray[np.bool_], threshold: float | None
) -> str:
    def point(false_alarms: float, found: float) -> tuple[float, float]:
        x = _LEFT + (_RIGHT - _LEFT) * false_alarms
        return round(x, 1), round(_BOTTOM - (_BOTTOM - _TOP) * found, 1)

    false_alarms, found, _ = roc_curve(defective, scores)
    path = "L".join("{} {}".format(*point(f, t)) for f, t in zip(false_alarms, found, strict=True))
    marks = f'<path class="chance" d="M{_LEFT} {_BOTTOM}L{_RIGHT} {_TOP}"/>'
    marks += f'<path class="curve" d="M{path}"/>'
    caption = f"AUROC {100 * detection_auroc(scores, defective):.1f} %"
    if threshold is not None:
        called = scores > threshold
        reached = called[~defective].mean(), called[defective].mean()
        x, y = point(*reached)
        marks += f'<circle class="operating" cx="{x}" cy="{y}" r="5"/>'
        caption += (
            f"; at the threshold {100 * reached[1]:.3g} % found at {100 * reached[0]:.3g} % "
            "false alarms"
        )
    shares = (0, 0.25, 0.5, 0.75, 1)
    axes = _axes(
        [(point(share, 0)[0], f"{100 * share:g}") for share in shares],
        [(point(0, share)[1], f"{100 * share:g}") for share in shares],
        "% of good images called anomalous",
        "% of anomalous images found",
    )
    return _figure("ROC curve", axes + marks, html_text(caption))


def _axes(
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    x_title: str,
    y_title: str,
) -> str:
    """ticks: (position in the drawing, text)."""
    lines = "".join(f"M{_LEFT} {y:.1f}H{_RIGHT}" for y, _ in y_ticks)
    lines += "".join(f"M{x:.1f} {_BOTTOM}v5" for x, _ in x_ticks)
    middle = (_TOP + _BOTTOM) / 2
    return (
        f'<path class="grid" d="{lines}"/><path class="axis" d="M{_LEFT} {_BOTTOM}H{_RIGHT}"/>'
        + "".join(
            f'<text class="x" x="{x:.1f}" y="{_BOTTOM + 19}">{text}</text>' for x, text in x_ticks
        )
        + "".join(
            f'<text class="y" x="{_LEFT - 7}" y="{y + 4:.1f}">{text}</text>' for y, text in y_ticks
        )
        + f'<text class="x" x="{(_LEFT + _RIGHT) / 2}" y="{_HEIGHT - 8}">{x_title}</text>'
        + f'<text class="x" transform="translate(12 {middle}) rotate(-90)">{y_title}</text>'
    )


def _figure(title: str, drawing: str, caption: str, attributes: str = "") -> str:
    return (
        f'<figure><h2>{title}</h2><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{title}" {attributes}>{drawing}</svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], about five."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Numbers 1, 2 and 5 times a power of ten in [low, high]; powers alone if these are many."""
    powers = [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    ticks = [factor * power for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]
