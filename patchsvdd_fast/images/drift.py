"""Whether images look like the training images at all: light, contrast, focus, colour, size.

A score alone cannot tell a dim lamp from a scratch. So a few statistics of each training image are
kept. An image whose statistics leave the training images' range is called unusual, in words; so is
a stream whose recent images are distributed differently within that range.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

WINDOW = 50
"""How many of the last images of a stream are compared with the training images."""

# Per statistic: the words for an image below and above the usual range, and the decimals to show.
_NAMES = {
    "brightness": ("darker", "brighter", 1),
    "contrast": ("flatter", "richer in contrast", 1),
    "sharpness": ("less sharp", "sharper or noisier", 2),
    "red": ("less red", "redder", 3),
    "blue": ("less blue", "bluer", 3),
    "width": ("narrower", "wider", 0),
    "height": ("shorter", "taller", 0),
}
STATISTICS = tuple(_NAMES)
"""Names of the statistics, in their order."""

_SIZES = 2  # of the statistics, the last: width and height, whose range is not widened
_FEWEST = 4  # training images from which the other statistics get a range
# At both ends the training images' range is widened by the largest of these:
_WIDENING = 0.25  # of the range
_WIDENING_OF_FEW = 6.0  # / N of the range: N images, if few, show little of what there is
_FLOOR = 0.02  # of the median: images under one lamp differ by less than what matters
# p-values of the test whether a stream's images are distributed like the training images:
_P_DRIFTED = 1e-6  # below it a stream has drifted,
_P_RETURNED = 1e-2  # and from here on it no longer has
_TEST_EVERY = 10  # images of a stream
_PIXELS_AT_ONCE = 1 << 20
_LUMA = torch.tensor([0.299, 0.587, 0.114])


def image_statistics(images: Tensor, original_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """The statistics of images [N, 3, H, W], as [N, 7] float64 in the order of `STATISTICS`.

    images: uint8, or float32 in 0 to 255. original_sizes: (height, width) of each before resizing,
    in pixels.

    Brightness and contrast are the mean and standard deviation of the luma, 0 to 255. Sharpness is
    the mean absolute Laplacian of the luma, in percent of its mean. Red and blue are the channel's
    mean divided by the mean of all three. Width and height are those before resizing.
    """
    rows = [
        [*_figures(image), width, height]
        for image, (height, width) in zip(images, original_sizes, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64).view(-1, len(STATISTICS))


def _figures(image: Tensor) -> tuple[float, ...]:
    """The statistics of one image, without its size; some rows at a time, to bound memory."""
    height, width = image.shape[1:]
    channels = torch.zeros(3, dtype=torch.float64)
    squares = laplacian = 0.0
    step = max(1, _PIXELS_AT_ONCE // width)
    for top in range(0, height, step):
        above = min(top, 1)  # the Laplacian needs a row above and below, too
        pixels = image[:, top - above : top + step + 1].float()
        luma = torch.einsum("c,chw->hw", _LUMA, pixels)
        own = slice(above, above + step)
        channels += pixels[:, own].sum(dim=(1, 2), dtype=torch.float64)
        squares += float(luma[own].square().sum(dtype=torch.float64))
        inner = luma[1:-1, 1:-1]
        around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
        laplacian += float((around - 4 * inner).abs().sum(dtype=torch.float64))
    channels /= height * width
    brightness = float(_LUMA.double() @ channels)
    contrast = math.sqrt(max(0.0, squares / (height * width) - brightness**2))
    sharpness = 100 * laplacian / ((height - 2) * (width - 2)) / max(brightness, 1e-6)
    red, _, blue = (channels / channels.mean().clamp(min=1e-6)).tolist()
    return brightness, contrast, sharpness, red, blue


def usual_range(training: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest usual value, [7] and [7], from the training images' statistics [N, 7].

    That is their range, widened at both ends by a quarter of it (by 6 / N of it with fewer than 24
    images), or by 2 % of the median where that is more. The range of width and height is not
    widened. With fewer than four images all other statistics have no bounds.
    """
    low, high = training.amin(dim=0), training.amax(dim=0)
    widening = max(_WIDENING, _WIDENING_OF_FEW / len(training))
    floor = _FLOOR * training.median(dim=0).values.abs()
    margin = torch.maximum(widening * (high - low), floor)
    if len(training) < _FEWEST:
        margin[:] = math.inf
    margin[-_SIZES:] = 0
    return (low - margin).clamp(min=0), high + margin


def unusual(statistics: Tensor, training: Tensor) -> tuple[str, ...]:
    """In words, which of an image's statistics [7] leave the usual range of `training` [N, 7]."""
    low, high = usual_range(training)
    return tuple(
        _departure(index, float(statistics[index]), float(low[index]), float(high[index]))
        for index in range(len(STATISTICS))
        if not low[index] <= statistics[index] <= high[index]
    )


class StreamDrift:
    """Compares the last 50 images of a stream with the training images, each statistic by itself.

    Each image may lie within the training images' range and the stream still drift, as when a lamp
    ages. A statistic has drifted if the Kolmogorov-Smirnov test gives p < 1e-6 and the medians
    differ by more than 2 % (width and height: at all). With fewer than five training images p never
    gets so low. training: their statistics, [N, 7].
    """

    def __init__(self, training: Tensor) -> None:
        self._training = training
        self._recent: deque[Tensor] = deque(maxlen=WINDOW)
        self._seen = 0
        self._said: set[int] = set()

    def update(self, statistics: Tensor) -> tuple[str, ...]:
        """Add an image's statistics [7]. Returns what has newly drifted, in words; else nothing.

        Tested with every tenth image. What has drifted is told once, and again only if it returned
        in between.
        """
        self._recent.append(statistics)
        self._seen += 1
        if len(self._recent) < WINDOW or self._seen % _TEST_EVERY:
            return ()
        from scipy.stats import ks_2samp

        recent = torch.stack(tuple(self._recent))
        middle, usual = recent.median(dim=0).values, self._training.median(dim=0).values
        least = _FLOOR * usual.abs()
        least[-_SIZES:] = 0
        drifted = set()
        for index in range(len(STATISTICS)):
            test = ks_2samp(recent[:, index], self._training[:, index], method="exact")
            unlikely = test.pvalue < (_P_RETURNED if index in self._said else _P_DRIFTED)
            if unlikely and abs(middle[index] - usual[index]) > least[index]:
                drifted.add(index)
        new, self._said = drifted - self._said, drifted
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
    word = below if value < usual else above
    return (
        f"{word} than the training images (median {name} {value:.{digits}f}, "
        f"theirs {usual:.{digits}f})"
    )
