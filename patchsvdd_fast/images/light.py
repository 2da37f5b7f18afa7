"""What images go through before they are encoded: matching their light, subtracting a mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ILLUMINATIONS = ("as_is", "matched")
"""Whether images are encoded as they are, or in the training images' light.

See `match_illumination`.
"""

MEANS = {
    "pixel": "the mean image; from training images, the mean of the others",
    "channel": "a mean of each channel",
    "paper": "one mean image from all",
    "fixed": "the constants that the encoder was trained with",
}
"""What is subtracted from images, and how to say so.

The mean image holds a part of each training image, and nothing of a new one. So with "pixel", a
training image that is embedded for the banks has the mean of the other training images subtracted;
with "paper" the mean of all, as in the paper's implementation.
"""

PER_CHANNEL = ("channel", "fixed")
"""The kinds of mean that have one value per channel, and so suit images of any size."""


_UNITS = 2**24  # of a pixel value, that sums of fractions count: integers, exact in any order


def of_one_process(total: Tensor) -> Tensor:
    """What images add up to, where one process has all."""
    return total


def mean_image(
    images: Tensor, of: str = "pixel", summed: Callable[[Tensor], Tensor] = of_one_process
) -> Tensor:
    """The mean of images [N, C, H, W] as [C, H, W] float32; of uint8 ones exactly rounded.

    of: the kind of mean, a key of `MEANS` but "fixed", which no images decide; "channel" repeats
    one value over each channel. summed: adds up int64 tensors over all processes, if each has a
    part of the images. Raises ValueError for another kind.
    """
    if of not in MEANS or of == "fixed":
        raise ValueError(f"mean must be one of {tuple(MEANS)}, got {of!r}")
    if of == "channel":
        return mean_colour(images, summed)[:, None, None].expand(images.shape[1:]).contiguous()
    total, units = torch.zeros(images.shape[1:], dtype=torch.int64), 1
    if images.is_floating_point():
        units = _UNITS
    for image in images:
        total += image if units == 1 else (image.double() * units).round().long()
    count = int(summed(torch.tensor(len(images))))
    return (summed(total).double() / (count * units)).float()


def constant_mean(values: Sequence[float], height: int, width: int) -> Tensor:
    """A value per channel as a mean image, [3, height, width] float32."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None].repeat(1, height, width)


def mean_colour(images: Tensor, summed: Callable[[Tensor], Tensor] = of_one_process) -> Tensor:
    """The mean of each channel of images [N, C, H, W], as [C] float32; summed: see `mean_image`."""
    return mean_image(images, summed=summed).double().mean(dim=(1, 2)).float()


def mean_of_size(mean: Tensor, of: str, height: int, width: int) -> Tensor:
    """The mean to subtract from images of `height` x `width` pixels, [3, height, width].

    mean: [3, H, W]; of: its kind, a key of `MEANS`. Raises ValueError for another size than H x W,
    unless the kind is one of `PER_CHANNEL`.
    """
    if mean.shape[1:] == (height, width):
        return mean
    if of in PER_CHANNEL:
        return mean[:, :1, :1].expand(3, height, width)
    raise ValueError(
        f"images must have {mean.shape[2]}x{mean.shape[1]} pixels as in "
        f'training (or mean="channel"), got {width}x{height}'
    )


def match_illumination(images: Tensor, colour: Tensor | None) -> Tensor:
    """Scale each channel of each image [N, C, H, W] so that its mean is that of `colour` [C].

    An image taken in brighter light, or in light of another colour, then looks as in the usual
    light, except where pixels are clipped to 0 .. 255. Factors are limited to 1/2 .. 2: larger
    differences do not come from light.

    images: uint8 ones are rounded to uint8 again, float32 ones are not rounded. colour: None leaves
    the images as they are.
    """
    if colour is None:
        return images
    matched = torch.empty_like(images)
    for number, image in enumerate(images):
        # Channel by channel, to save memory.
        for channel, usual, out in zip(image, colour, matched[number], strict=True):
            own = channel.double().mean().clamp(min=1e-6)
            factor = (usual.to(own) / own).clamp(0.5, 2)
            values = channel * factor
            out.copy_((values if images.is_floating_point() else values.round_()).clamp_(0, 255))
    return matched


def normalize(
    images: Tensor,
    mean: Tensor,
    num_in_mean: int | None = None,
    scale: Sequence[float] = (255.0,),
) -> Tensor:
    """`(pixel - mean) / scale`: [N, C, H, W], float32 [C, H, W] -> float32 [N, C, H, W].

    images: uint8, or float32 in 0 to 255. scale: one number, or one per channel.
    num_in_mean: N, if these images are among the N that the mean was taken from; None for others.

    The mean image holds 1/N of each image it was taken from, and nothing of a new one. So with
    num_in_mean, each image has the mean of the other N - 1 subtracted.
    """
    if len({*scale}) == 1:
        normalized = (images - mean) / scale[0]
    else:
        normalized = (images - mean) / mean.new_tensor(scale)[:, None, None]
    if num_in_mean is not None:
        # pixel - (N * mean - pixel) / (N - 1) = N / (N - 1) * (pixel - mean)
        normalized *= num_in_mean / (num_in_mean - 1)
    return normalized
