"""The result for one image of a stream, or of several images scored together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from .. import _displays
from ..images.drift import image_statistics, unusual
from ..images.gallery import Gallery
from ..images.prepare import ImageSet, PreparedImage
from ..images.samples import to_8_bits
from .calibration import Calibration
from .maps import ScoreResult
from .regions import level_of_peak

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


def relative(value: float, threshold: float | None) -> float | None:
    """A score or map value as a multiple of the threshold; None without a threshold above 0."""
    return value / threshold if threshold is not None and threshold > 0 else None


@dataclass(frozen=True)
class ImageResult:
    """Scores of one image, and how it compares with the training images."""

    name: str
    """Its path as given, or "image 3" for the fourth of a stream."""
    score: float
    """Maximum of the anomaly map, times the image's weight where scores are re-weighted."""
    p_value: float | None
    """Probability that a good image scores at least so high; None without a calibration."""
    threshold: float | None
    """Score above which an image is called anomalous, for the false-alarm rate asked for; None
    without a calibration, that is, with a single training image."""
    anomalous: bool | None
    """Whether the score exceeds the threshold; None without one."""
    level: str
    """The level that made the highest pixel of the map so high, see `Region.level`."""
    unusual: tuple[str, ...]
    """In words, how its light, contrast, focus, colour or size leave the training images' range."""
    pixels: Tensor = field(repr=False)
    """[3, H, W]: the image, resized as for scoring, before its light is matched; uint8, or float32
    in 0 to 255 where the detector keeps more than 8 bits."""
    statistics: Tensor = field(repr=False)
    """[7] float64, see `images.drift.STATISTICS`."""
    scores: ScoreResult = field(repr=False)
    """Maps, distances and matches, with N = 1."""
    source: Any = field(repr=False)
    """What was given: a path, a PIL image or an array, which lives as long as the result. None for
    an image of `ScoredImages`."""
    category: str | None = None
    """The category whose normal patches it was compared with; None with a single one."""
    original: Image.Image | None = field(default=None, repr=False)
    """The image before it was resized, at most 1,024 pixels a side, if the stream kept it (see
    `PatchSVDD.score_stream`); else None. `original_picture` is always there."""

    def __repr__(self) -> str:
        return f"ImageResult({self.name!r}, {self.in_words()})"

    def _repr_html_(self) -> str:
        return str(_displays().html_of_image(self))

    def in_words(self) -> str:
        """Such as "anomalous, 3.1 x the threshold, p 0.1 (score 2.4e-09)"; with its category, if
        there are several, before it."""
        of = "" if self.category is None else f"{self.category}: "
        if self.anomalous is None:
            return f"{of}score {self.score:.4g}"
        parts = [f"{of}{'anomalous' if self.anomalous else 'normal'}"]
        if self.relative_score is not None:
            parts.append(f"{self.relative_score:.3g} x the threshold")
        if self.p_value is not None:
            parts.append(f"p {self.p_value:.3g}")
        return f"{', '.join(parts)} (score {self.score:.4g})"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the image and its heat map with matplotlib, into these axes or new ones.

        Raises ImportError without matplotlib.
        """
        drawn: Axes = _displays().plot_image(self, axes)
        return drawn

    def to_pandas(self) -> DataFrame:
        """A table of one row, with the columns of scores.csv. Raises ImportError without pandas."""
        return _displays().to_pandas([self])

    @property
    def relative_score(self) -> float | None:
        """The score as a multiple of the threshold: above 1 is anomalous. Unlike scores, these can
        be compared between models. None without a threshold, and with one of 0."""
        return relative(self.score, self.threshold)

    @property
    def map_threshold(self) -> float | None:
        """Map value from which on a pixel makes the image anomalous: the threshold, divided by the
        image's weight where scores are re-weighted. None without a threshold above 0."""
        if self.threshold is None or self.threshold <= 0:
            return None
        weights = self.scores.weights
        return self.threshold / (1.0 if weights is None else max(float(weights[0]), 1e-30))

    @property
    def anomaly_map(self) -> Tensor:
        """[H, W] float32; higher is more anomalous."""
        return self.scores.anomaly_map[0]

    @property
    def picture(self) -> Image.Image:
        """The `pixels` as a PIL image of 8 bits."""
        return Image.fromarray(to_8_bits(self.pixels).permute(1, 2, 0).contiguous().numpy())

    @property
    def original_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the image before it was resized."""
        width, height = (int(side) for side in self.statistics[-2:])
        return height, width

    @property
    def original_picture(self) -> Image.Image:
        """The image to look at, 8-bit RGB: `original`; where that was not kept, `picture` in the
        proportions that the image had before it was resized, as large on its longer side."""
        if self.original is not None:
            return self.original
        picture, (height, width) = self.picture, self.original_size
        scale = max(picture.size) / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return picture if size == picture.size else picture.resize(size)


@dataclass(frozen=True, repr=False)
class ScoredImages(ScoreResult):
    """A `ScoreResult` with its images: what `PatchSVDD.score` returns.

    `len` is N, and `scored[3]` is the `ImageResult` of the fourth image, which is made anew each
    time; so are all of them by `for image in scored`.
    """

    images: ImageSet = field(kw_only=True)
    """What was scored."""
    threshold: float | None = field(kw_only=True)
    """Score above which an image is called anomalous; None without a calibration."""
    calibration: Calibration | None = field(kw_only=True)
    """That of the detector; None with a single training image."""
    training_statistics: Tensor | None = field(kw_only=True)
    """[M, 7] float64 of the M training images, see `images.drift.STATISTICS`; None if not known."""

    @classmethod
    def of(
        cls,
        scores: ScoreResult,
        images: ImageSet,
        threshold: float | None,
        calibration: Calibration | None,
        gallery: Gallery | None,
    ) -> ScoredImages:
        """The scores of these images, in their order."""
        return cls(
            **{part.name: getattr(scores, part.name) for part in fields(scores)},
            images=images,
            threshold=threshold,
            calibration=calibration,
            training_statistics=None if gallery is None else gallery.statistics,
        )

    def __repr__(self) -> str:
        if self.threshold is None:
            return super().__repr__()
        anomalous = int((self.image_scores.double() > self.threshold).sum())
        return f"{super().__repr__()[:-1]}, {anomalous:,} anomalous)"

    def _repr_html_(self) -> str:
        return str(_displays().html_of_images(self))

    def __len__(self) -> int:
        return len(self.images.names)

    def __getitem__(self, number: int) -> ImageResult:
        number = range(len(self))[number]  # raises IndexError, and takes -1 for the last
        pixels, original = self.images.pixels[number], self.images.original_sizes[number]
        image = PreparedImage(self.images.names[number], pixels, original)
        statistics = self.training_statistics
        return _result(image, self.image(number), self.calibration, self.threshold, statistics)

    def __iter__(self) -> Iterator[ImageResult]:
        return map(self.__getitem__, range(len(self)))

    def plot(self, most: int = 12) -> list[Axes]:
        """Draw the first images and their heat maps in a matplotlib figure, `axes[0].figure`.

        most: how many at most, in their order. Returns the axes of each. Raises ImportError without
        matplotlib, ValueError for a `most` below 1.
        """
        drawn: list[Axes] = _displays().plot_images(self, most)
        return drawn

    def to_pandas(self) -> DataFrame:
        """A table of a row an image, with the columns of scores.csv.

        Names are those of `images`: of a folder's images, paths below it. Raises ImportError
        without pandas.
        """
        return _displays().to_pandas(self)


def image_results(
    images: Sequence[PreparedImage],
    scores: ScoreResult,
    calibration: Calibration | None,
    threshold: float | None,
    gallery: Gallery | None,
) -> list[ImageResult]:
    """One result per image; scores: of all N images, in their order."""
    statistics = None if gallery is None else gallery.statistics
    return [
        _result(image, scores.image(number), calibration, threshold, statistics)
        for number, image in enumerate(images)
    ]


def _result(
    image: PreparedImage,
    scores: ScoreResult,
    calibration: Calibration | None,
    threshold: float | None,
    training_statistics: Tensor | None,
) -> ImageResult:
    """The result of one image; scores: its own, with N = 1."""
    score = float(scores.image_scores[0])
    statistics = image_statistics(image.pixels[None], [image.original_size])[0]
    return ImageResult(
        name=image.name,
        score=score,
        p_value=None if calibration is None else float(calibration.p_values(np.float64(score))),
        threshold=threshold,
        anomalous=None if threshold is None else score > threshold,
        level=level_of_peak(scores, calibration),
        unusual=() if training_statistics is None else unusual(statistics, training_statistics),
        pixels=image.pixels,
        statistics=statistics,
        scores=scores,
        source=image.source,
        original=image.original,
    )
