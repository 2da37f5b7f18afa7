"""What a run's verdicts are worth, in words: how many alarms may come from the light or the camera.

An image that does not look like the training images scores high whether or not it has a defect, and
no promise covers it. A table says so row by row; these lines say it once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..files.folders import counted
from ..score.image_result import ImageResult

_RARE = 0.01  # probability below which more false alarms than promised are no chance


def verdict_in_words(result: ImageResult) -> str:
    """`ImageResult.in_words`."""
    return result.in_words()


class Alarms:
    """Counts the alarms of a run, and those on images unlike the training images."""

    def __init__(self) -> None:
        self.number = 0
        """Images called anomalous."""
        self.unusual = 0
        """Of these, images that are unlike the training images."""
        self._how: Counter[str] = Counter()

    def add(self, anomalous: bool | None, unusual: Iterable[str]) -> None:
        """Count an image. unusual: how it differs, as `ImageResult.unusual` says it."""
        if not anomalous:
            return
        ways = [note.partition(" than ")[0] for note in unusual]
        self.number += 1
        self.unusual += bool(ways)
        self._how.update(ways)

    def in_words(self) -> str:
        """A line on the alarms that may come from how images were taken; "" if there are none."""
        if not self.unusual:
            return ""
        ways = ", ".join(f"{way}: {count:,}" for way, count in self._how.most_common())
        return (
            f"{self.unusual:,} of {counted(self.number, 'alarm')} on images unlike the training "
            f"images ({ways}): light or camera may have raised them, not a defect. Take images as "
            "the training images were taken, or add good ones of this kind to the model (patchsvdd "
            "update --add)"
        )


def broken_promise(false_alarms: int, good: int, rate: float) -> str:
    """A line where labels show more false alarms than chance allows at this rate; else "".

    good: how many images with the label "good" were scored. rate: what the threshold promises.
    """
    from scipy.stats import binom

    if not good or float(binom.sf(false_alarms - 1, good, rate)) > _RARE:
        return ""
    return (
        f"{false_alarms:,} of {counted(good, 'good image')} called anomalous, where at most "
        f"{rate:.2%} were promised: that holds for images like the training images, so these "
        "differ from them. Train on images taken as these are, or add some (patchsvdd update --add)"
    )
