"""Charts of a report: every score is drawn, ticks are round."""

import re

import numpy as np
import pytest

from patchsvdd_fast.report import charts


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [
        ([1.0, 2.0, 2.9], False),
        ([1.0, 2.0, 9.0], True),
        ([1e-12, 1e-10, 3e-9], True),
        ([-5.0, 900.0], False),
        ([3.0], False),
    ],
)
def test_histogram_holds_every_score(values, logarithmic):
    drawing = charts._histogram({("good", "good"): np.array(values)}, None, "score")
    assert (", logarithmic" in drawing) == logarithmic
    (path,) = re.findall(r'class="good" d="([^"]*)"', drawing)
    tops = [float(y) for y in re.findall(r"V([\d.]+)H", path)]
    heights = (charts._BOTTOM - np.array(tops)) / (charts._BOTTOM - charts._TOP)
    shares = heights / heights.max()
    counts = np.round(shares * len(values) / shares.sum())
    assert counts.sum() == len(values)
    assert "nan" not in drawing and "inf" not in drawing


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 8e5), (1e-9, 3e-9), (0.1, 0.1001)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = charts._ticks(low, high)
    assert 2 <= len(ticks) <= 7
    slack = 1e-6 * (high - low)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_logarithmic_ticks_are_inside():
    assert charts._log_ticks(0.04, 3) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])
    assert charts._log_ticks(1e-12, 5e-3) == pytest.approx([10.0**e for e in range(-12, -2)])
