"""The result for one image of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..images.drift import image_statistics, unusual
from ..images.gallery import Gallery
from ..images.prepare import PreparedImage
from ..images.samples import to_8_bits
from .calibration import Calibration
from .maps import ScoreResult


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
    """What was given: a path, a PIL image or an array, which lives as long as the result."""

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


def image_results(
    images: Sequence[PreparedImage],
    scores: ScoreResult,
    calibration: Calibration | None,
    threshold: float | None,
    gallery: Gallery | None,
) -> list[ImageResult]:
    """One result per image; scores: of all N images, in their order."""
    results = []
    for number, (image, value) in enumerate(zip(images, scores.image_scores, strict=True)):
        score = float(value)
        statistics = image_statistics(image.pixels[None], [image.original_size])[0]
        results.append(
            ImageResult(
                name=image.name,
                score=score,
                p_value=None
                if calibration is None
                else float(calibration.p_values(np.float64(score))),
                threshold=threshold,
                anomalous=None if threshold is None else score > threshold,
                unusual=() if gallery is None else unusual(statistics, gallery.statistics),
                pixels=image.pixels,
                statistics=statistics,
                scores=scores.image(number),
                source=image.source,
            )
        )
    return results
