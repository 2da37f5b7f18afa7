"""Whether images look like the training images at all: light, contrast, focus, colour, size.

A score alone cannot tell a dark lamp from a scratch. A few figures of each training image are kept;
an image whose figures leave their range, or a stream whose recent images lie elsewhere in it than
the training images did, is said to be unusual, in words.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

WINDOW = 50
"""Images of a stream that are compared with the training images."""

# By figure: what an image below and above the usual range is called, and its decimals.
_NAMES = {
    "brightness": ("darker", "brighter", 1),
    "contrast": ("flatter", "richer in contrast", 1),
    "sharpness": ("less sharp", "sharper or noisier", 2),
    "red": ("less red", "redder", 3),
    "blue": ("less blue", "bluer", 3),
    "width": ("narrower", "wider", 0),
    "height": ("lower", "higher", 0),
}
STATISTICS = tuple(_NAMES)
"""Names of the figures, in their order."""

_SIZES = 2  # the last of them, in pixels: any other than the training images' is unusual
_WIDENING = 0.25  # of the training images' range, on either side
_FLOOR = 0.02  # of the median, at least: images of one lamp differ by less than what matters
_SURE = 1e-6  # probability of a stream's figures, were its images like the training images
_EVERY = 10  # images between looks at a stream


def image_statistics(images: Tensor, original_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """The figures of uint8 images [N, 3, H, W], as [N, 7] float64 in the order of `STATISTICS`.

    Brightness and contrast: mean and standard deviation of the luma, 0 to 255. Sharpness: mean
    absolute Laplacian of the luma over its mean, in percent. Red and blue: the channel's mean over
    that of all. Width and height: of the file, before resizing, in pixels; original_sizes gives
    (height, width).
    """
    weights = torch.tensor([0.299, 0.587, 0.114])
    rows = []
    for image, (height, width) in zip(images, original_sizes, strict=True):
        pixels = image.float()
        luma = torch.einsum("c,chw->hw", weights, pixels)
        inner = luma[1:-1, 1:-1]
        around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
        brightness = luma.mean().clamp(min=1e-6)
        channels = pixels.mean(dim=(1, 2))
        red, _, blue = channels / channels.mean().clamp(min=1e-6)
        sharpness = 100 * (around - 4 * inner).abs().mean() / brightness
        rows.append([brightness, luma.std(), sharpness, red, blue, width, height])
    return torch.tensor(rows, dtype=torch.float64).view(-1, len(STATISTICS))


def usual_range(training: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest usual value of each figure, [7] and [7], for training images' [N, 7].

    Their range, widened by a quarter on either side, or by 2 % of the median where they are all
    alike; not so the size.
    """
    low, high = training.amin(dim=0), training.amax(dim=0)
    floor = _FLOOR * training.median(dim=0).values.abs()
    margin = torch.maximum(_WIDENING * (high - low), floor)
    margin[-_SIZES:] = 0
    return low - margin, high + margin


def unusual(statistics: Tensor, training: Tensor) -> tuple[str, ...]:
    """In words, how an image with figures [7] leaves the range of the training images' [N, 7]."""
    low, high = usual_range(training)
    return tuple(
        _departure(index, float(statistics[index]), float(low[index]), float(high[index]))
        for index in range(len(STATISTICS))
        if not low[index] <= statistics[index] <= high[index]
    )


class StreamDrift:
    """Compares the last 50 images of a stream with the training images, figure by figure.

    By the Kolmogorov-Smirnov test: each image may lie within the training images' range and the
    stream still have moved, as when a lamp ages. training: their figures, [N, 7].
    """

    def __init__(self, training: Tensor) -> None:
        self._training = training
        self._recent: deque[Tensor] = deque(maxlen=WINDOW)
        self._seen = 0
        self._said: set[int] = set()

    def update(self, statistics: Tensor) -> tuple[str, ...]:
        """Take note of an image's figures [7]; in words, what has newly drifted, else nothing.

        A figure that has returned is said again when it drifts again.
        """
        self._recent.append(statistics)
        self._seen += 1
        if len(self._recent) < WINDOW or self._seen % _EVERY:
            return ()
        from scipy.stats import ks_2samp

        recent = torch.stack(tuple(self._recent))
        drifted = set()
        for index in range(len(STATISTICS)):
            test = ks_2samp(recent[:, index], self._training[:, index], method="asymp")
            if test.pvalue < _SURE:
                drifted.add(index)
        new, self._said = drifted - self._said, drifted
        middle, usual = recent.median(dim=0).values, self._training.median(dim=0).values
        return tuple(
            f"the last {WINDOW} images are "
            + _comparison(index, float(middle[index]), float(usual[index]))
            for index in sorted(new)
        )


def _departure(index: int, value: float, low: float, high: float) -> str:
    name = STATISTICS[index]
    below, above, digits = _NAMES[name]
    word = below if value < low else above
    usual = f"{low:.{digits}f}" if low == high else f"{low:.{digits}f} to {high:.{digits}f}"
    return f"{word} than the training images ({name} {value:.{digits}f}, usual {usual})"


def _comparison(index: int, value: float, usual: float) -> str:
    name = STATISTICS[index]
    below, above, digits = _NAMES[name]
    if value == usual:
        return f"spread otherwise in {name} than the training images (median {value:.{digits}f})"
    word = below if value < usual else above
    return (
        f"{word} than the training images (median {name} {value:.{digits}f}, "
        f"theirs {usual:.{digits}f})"
    )
