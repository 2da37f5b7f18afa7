"""Where an image is anomalous, and which normal patches are most like those places."""

from __future__ import annotations

from PIL import Image

from ..images.gallery import Gallery
from ..score.image_result import ImageResult
from ..score.regions import Region, find_regions, highest_place
from .thresholds import ThresholdsMixin


class ExplanationsMixin(ThresholdsMixin):
    """Explanations by a detector with thresholds and a gallery."""

    gallery_: Gallery | None
    """The training images' names, statistics and pictures; None if they were not kept."""

    def explain(self, result: ImageResult, false_alarm_rate: float | None = None) -> list[Region]:
        """The anomalous regions of an image, the most anomalous first; none if it is normal.

        Each has the normal patch most like it. result: one of `score_stream`, or of `score`.
        false_alarm_rate: sets the threshold; None: the threshold that the stream had.
        """
        self._require_fitted()
        _require("result", result, ImageResult)
        rate = false_alarm_rate
        threshold = result.threshold if rate is None else self.threshold(rate)
        names = self._image_names()
        return find_regions(result.scores, tuple(self.banks_), self.calibration_, threshold, names)

    def highest_place(self, result: ImageResult) -> Region:
        """The pixel with the highest map value of an image, anomalous or not, as a `Region`."""
        self._require_fitted()
        _require("result", result, ImageResult)
        return highest_place(
            result.scores, tuple(self.banks_), self.calibration_, self._image_names()
        )

    def match_picture(self, region: Region) -> Image.Image | None:
        """The training image that holds a region's nearest normal patch; None if not kept."""
        self._require_fitted()
        _require("region", region, Region)
        if self.gallery_ is None:
            return None
        return self.gallery_.picture(region.match_image, self.image_shape())

    def _image_names(self) -> tuple[str, ...]:
        return () if self.gallery_ is None else self.gallery_.names


_MADE_BY = {
    ImageResult: "one image's result, of score_stream, or such as score(images)[0]",
    Region: "a region, such as explain and highest_place give",
}


def _require(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {_MADE_BY[kind]}, got {type(value).__name__}")
