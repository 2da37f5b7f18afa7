"""Images as other libraries give them, arrays and tensors, as arrays with channels last.

Samples are uint8, uint16, read as those of 16-bit files, or floats: in 0 to 1, as torchvision gives
them, or in the value range of a model's images. Others are not guessed at: errors name the remedy.
Nor is the order of their colours: it is RGB, or BGR where that is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from .samples import AS_STORED, DeepSamples, Samples, scaled

Values = npt.NDArray[np.uint8] | npt.NDArray[np.float32]

Parts = list[Image.Image]
"""An image while it is prepared: one of 8-bit RGB, or of more bits its one or three channels, each
of floating-point samples in 0 to 255."""

CHANNEL_ORDERS = ("rgb", "bgr")
"""How the colours of arrays are ordered; OpenCV's are "bgr"."""

_CHANNELS = (1, 3, 4)  # gray, RGB, and RGB with alpha, which is dropped
_COLOURS = (3, 4)
_ROUNDING = float(np.finfo(np.float32).eps)
_ROUNDINGS = 4  # by which floats in 0 to 1 may lie outside, after a computation or two
_OVERSHOOT = 0.5  # of floats in 0 to 1 that were resized, at most


def is_array(item: Any) -> bool:
    """Whether this is a tensor, a NumPy array, or an array of a library that gives NumPy's."""
    return not isinstance(item, Image.Image) and (
        isinstance(item, Tensor | np.ndarray) or hasattr(item, "__array__")
    )


def image_of_array(
    item: Any, name: str, channel_order: str = "rgb", samples: Samples = AS_STORED
) -> Values:
    """An image [H, W] or [H, W, 3], gray or RGB, from an array or a tensor.

    Of uint8 it is uint8; of others float32 in 0 to 255, not rounded.

    item: an array [H, W] or [H, W, C], or a tensor [H, W] or [C, H, W]; C is 1, 3 or 4.
    channel_order: of its colours, one of `CHANNEL_ORDERS`.
    samples: the depth of uint16, and the range of floats; without one, theirs is 0 to 1.

    Raises ValueError for another shape or other values, and for a gray image whose colours are said
    to be BGR; TypeError for another dtype. Errors name the image.
    """
    array = _with_channels_last(item, name, channel_order)
    if array.dtype != np.uint16 and not (samples.value_range and array.dtype.kind == "f"):
        return _of_0_to_1(array, name)
    try:
        return scaled(DeepSamples(array, None), samples, name).astype(np.float32)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def deep_array(item: Any) -> DeepSamples | None:
    """The samples of a uint16 array or tensor; None of other dtypes, and of unusable ones."""
    try:
        array = _with_channels_last(item, "")
    except (TypeError, ValueError):  # whoever reads it next says why
        return None
    return DeepSamples(array, None) if array.dtype == np.uint16 else None


def _with_channels_last(item: Any, name: str, channel_order: str = "rgb") -> npt.NDArray[Any]:
    """An array [H, W] or [H, W, 3] of any dtype, of what `image_of_array` takes."""
    is_tensor = isinstance(item, Tensor)
    array = _numpy(item)
    channels_at = 0 if is_tensor else -1
    if array.ndim != 2 and (array.ndim != 3 or array.shape[channels_at] not in _CHANNELS):
        wanted = "[H, W] or [3, H, W]" if is_tensor else "[H, W] or [H, W, 3]"
        likely = _likely_axes(array, is_tensor)
        if not likely and array.ndim == 4:
            likely = ": it is a batch, give its images one by one"
        raise ValueError(f"{name} must have shape {wanted}, got {list(array.shape)}{likely}")
    if is_tensor and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    if channel_order == "bgr":
        if array.shape[2:] not in ((3,), (4,)):
            raise ValueError(f'{name} is gray and has no colours for channel_order="bgr"')
        array = array[..., 2::-1]
    if array.ndim == 2:
        return array
    return array[..., 0] if array.shape[2] == 1 else array[..., :3]


def has_fractions(item: Any, samples: Samples = AS_STORED) -> bool:
    """Whether an array or tensor for `image_of_array` has more than 8 bits; not if it is unusable.

    Floats such as torchvision makes of 8 bits have not: in 0 to 255 they are whole numbers, but for
    their dtype's rounding.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whoever reads it next warns, and says why not
            values = image_of_array(item, "", samples=samples)
    except (TypeError, ValueError):
        return False
    if isinstance(item, Tensor):
        rounding = torch.finfo(item.dtype).eps if item.is_floating_point() else 0.0
    else:
        dtype = np.asarray(item).dtype
        rounding = float(np.finfo(dtype).eps) if dtype.kind == "f" else 0.0
    if values.dtype == np.uint8:
        return False
    return bool((np.abs(values - np.rint(values)) > 255 * max(rounding, _ROUNDING)).any())


def images_of_batch(batch: Any) -> Sequence[Any] | npt.NDArray[Any] | Tensor:
    """The images of a batch, each for `image_of_array`.

    batch: an array [N, H, W, C] or [N, H, W], or a tensor [N, C, H, W]; or one colour image alone,
    an array [H, W, 3] or a tensor [3, H, W]. An array of three axes is one image if its last has 3
    or 4 values: no image is so narrow. Or [N] paths or other objects, such as a column of a table.

    Raises ValueError for another shape. Warns of an array [3, H, W]: it is three gray images, but
    may be meant as a colour image.
    """
    shape = list(batch.shape)
    if len(shape) == 1 and _holds_objects(batch):
        return list(_numpy(batch).tolist())
    if isinstance(batch, Tensor):
        if len(shape) == 3 and shape[0] in _CHANNELS:
            return [batch]
        if len(shape) != 4 or shape[1] not in _CHANNELS:
            likely = _likely_axes(batch, True)
            raise ValueError(f"images must have shape [N, 3, H, W], got {shape}{likely}")
    elif len(shape) == 2 or (len(shape) == 3 and shape[2] in _COLOURS):
        return [batch]
    elif len(shape) not in (3, 4):
        raise ValueError(f"images must have shape [N, H, W, 3] or [N, H, W], got {shape}")
    elif len(shape) == 3 and shape[0] in _COLOURS:
        warnings.warn(
            f"an array {shape} is taken for {shape[0]} gray images; if it is one image with its "
            "channels first: transpose(1, 2, 0)",
            stacklevel=3,
        )
    return batch.detach().cpu() if isinstance(batch, Tensor) else _numpy(batch)


def _holds_objects(batch: Any) -> bool:
    return not isinstance(batch, Tensor) and _numpy(batch).dtype.kind in "OU"


def _numpy(item: Any) -> npt.NDArray[Any]:
    if isinstance(item, Tensor):
        values = item.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    array = np.asarray(item)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _likely_axes(array: Any, is_tensor: bool) -> str:
    """What the caller has likely mixed up, as the end of a message; "" if nothing is likely."""
    first, last = array.shape[-3:-2], array.shape[-1:]
    if is_tensor and last and last[0] in _COLOURS and array.ndim in (3, 4):
        axes = "2, 0, 1" if array.ndim == 3 else "0, 3, 1, 2"
        return f": its channels seem to be last, tensors have them first; permute({axes})"
    if not is_tensor and first and first[0] in _CHANNELS and array.ndim == 3:
        return (
            ": its channels seem to be first, arrays have them last; transpose(1, 2, 0), or give a "
            "torch tensor"
        )
    return ""


def _of_0_to_1(array: npt.NDArray[Any], name: str) -> Values:
    """Samples of uint8 as they are, floats in 0 to 1 as 0 to 255."""
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(
            f"{name} must be uint8, uint16, or floats in 0 to 1, got {array.dtype} array: "
            "convert it, with .astype(numpy.uint8) if its values are 0 to 255"
        )
    if array.size == 0:
        return array.astype(np.uint8)
    low, high = float(array.min()), float(array.max())
    rounding = _ROUNDINGS * max(float(np.finfo(array.dtype).eps), _ROUNDING)
    if low >= -rounding and high <= 1 + rounding:  # false for NaN
        return array.clip(0, 1).astype(np.float32) * np.float32(255)
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{name} holds NaN or infinity")
    if low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
        remedy = "if it was resized, .clip(0, 1); if it was normalised, undo that"
    elif low < 0:
        remedy = "undo its normalisation, image * std + mean, or train with value_range"
    elif high <= 255:
        remedy = "divide it by 255, or convert it with .astype(numpy.uint8)"
    else:
        remedy = "divide it by its largest possible value, or train with value_range"
    raise ValueError(f"{name} must be floats in 0 to 1, got {low:.4g} to {high:.4g}: {remedy}")


def parts_of(values: npt.NDArray[Any], fractions: bool) -> Parts:
    """An image [H, W] or [H, W, 3] of values 0 to 255, rounded unless `fractions`."""
    if values.dtype != np.uint8 and not fractions:
        values = np.rint(values).astype(np.uint8)
    if values.dtype == np.uint8:
        return [Image.fromarray(values).convert("RGB")]
    channels = np.atleast_3d(values).astype(np.float32)
    return [
        Image.fromarray(np.ascontiguousarray(channels[..., number]))
        for number in range(channels.shape[2])
    ]


def rgb_picture(parts: Parts, side: int) -> Image.Image:
    """The image as 8-bit RGB, shrunk to `side` pixels on its longer side if it is larger.

    It may be the image of `parts` itself.
    """
    width, height = parts[0].size
    shrink = max(1.0, max(width, height) / side)
    if shrink > 1:
        small = max(1, round(width / shrink)), max(1, round(height / shrink))
        parts = [part.resize(small, reducing_gap=2.0) for part in parts]
    if parts[0].mode == "RGB":
        return parts[0]
    channels = [
        Image.fromarray(np.rint(np.asarray(part).clip(0, 255)).astype(np.uint8)) for part in parts
    ]
    return Image.merge("RGB", channels * (3 // len(channels)))
