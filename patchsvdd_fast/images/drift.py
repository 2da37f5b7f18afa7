"""Whether images look like the training images at all: light, contrast, focus, colour, size.

A score alone cannot tell a dark lamp from a scratch. A few figures of each training image are kept;
an image whose figures leave their range, or a stream whose recent images lie elsewhere in it than
the training images did, is said to be unusual, in words.
"""

from __future__ import annotations

import math
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
    "height": ("shorter", "taller", 0),
}
STATISTICS = tuple(_NAMES)
"""Names of the figures, in their order."""

_SIZES = 2  # the last of them, in pixels: any other than the training images' is unusual
_FEWEST = 4  # training images that have a range
_WIDENING = 0.25  # of the training images' range, on either side, at least
_WIDENING_OF_FEW = 6.0  # over the number of images, likewise: few show little of what there is
_FLOOR = 0.02  # of the median, likewise: images of one lamp differ by less than what matters
_SURE = 1e-6  # probability of a stream's figures, were its images like the training images
_RETURNED = 1e-2  # likewise, when it is no longer said to have drifted
_EVERY = 10  # images between looks at a stream
_PIXELS_AT_ONCE = 1 << 20
_LUMA = torch.tensor([0.299, 0.587, 0.114])


def image_statistics(images: Tensor, original_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """The figures of uint8 images [N, 3, H, W], as [N, 7] float64 in the order of `STATISTICS`.

    Brightness and contrast: mean and standard deviation of the luma, 0 to 255. Sharpness: mean
    absolute Laplacian of the luma over its mean, in percent. Red and blue: the channel's mean over
    that of all. Width and height: of the file, before resizing, in pixels; original_sizes gives
    (height, width).
    """
    rows = [
        [*_figures(image), width, height]
        for image, (height, width) in zip(images, original_sizes, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64).view(-1, len(STATISTICS))


def _figures(image: Tensor) -> tuple[float, ...]:
    """The figures of one image but for the size, looking at some rows at a time."""
    height, width = image.shape[1:]
    channels = torch.zeros(3, dtype=torch.float64)
    squares = laplacian = 0.0
    step = max(1, _PIXELS_AT_ONCE // width)
    for top in range(0, height, step):
        above = min(top, 1)  # the rows beside them are needed, too
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
    """Lowest and highest usual value of each figure, [7] and [7], for training images' [N, 7].

    Their range, widened on either side by a quarter, with fewer than 24 images by 6 / N, and by 2 %
    of the median at least; not so the size. Fewer than four images have no range but of the size:
    there it is infinite.
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
    stream still have moved, as when a lamp ages; by 2 % of the median at least. Five training
    images are the fewest that can be compared so. training: their figures, [N, 7].
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
        middle, usual = recent.median(dim=0).values, self._training.median(dim=0).values
        least = _FLOOR * usual.abs()
        least[-_SIZES:] = 0
        drifted = set()
        for index in range(len(STATISTICS)):
            test = ks_2samp(recent[:, index], self._training[:, index], method="exact")
            unlikely = test.pvalue < (_RETURNED if index in self._said else _SURE)
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
