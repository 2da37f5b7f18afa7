"""Lines on what a run's verdicts are worth."""

import pytest

from patchsvdd_fast.files.folders import counted
from patchsvdd_fast.report.summary import Alarms, broken_promise


def test_alarms_on_unusual_images_are_counted_with_what_differs():
    alarms = Alarms()
    assert alarms.in_words() == ""
    alarms.add(True, ())
    alarms.add(False, ("darker than the training images (brightness 1, usual 2)",))
    alarms.add(None, ("darker than the training images (brightness 1, usual 2)",))
    assert alarms.in_words() == ""
    alarms.add(True, ("darker than the training images (...)", "less sharp than the training ..."))
    alarms.add(True, ("darker than the training images (...)",))
    line = alarms.in_words()
    assert line.startswith("2 of 3 alarms on images unlike the training images (darker: 2, less")
    assert "less sharp: 1" in line
    assert "patchsvdd update --add" in line


@pytest.mark.parametrize(
    ("false_alarms", "good", "rate", "is_broken"),
    [
        (9, 16, 1 / 17, True),
        (1, 16, 1 / 17, False),
        (0, 0, 0.01, False),
        (0, 100, 0.01, False),
        (2, 2, 0.2, False),  # one in 25 times
        (3, 3, 0.2, True),
    ],
)
def test_a_promise_is_broken_where_chance_explains_it_no_longer(
    false_alarms, good, rate, is_broken
):
    line = broken_promise(false_alarms, good, rate)
    assert bool(line) == is_broken
    if is_broken:
        assert line.startswith(f"{false_alarms} of {good} good images called anomalous")
        assert f"{rate:.2%}" in line


def test_one_image_is_no_images():
    assert [counted(n, "image") for n in (0, 1, 2, 1000)] == [
        *("0 images", "1 image", "2 images", "1,000 images")
    ]
