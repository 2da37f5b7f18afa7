"""Samples of more than 8 bits: the depth of 16-bit files, the value range of floating-point ones.

Cameras write 10, 12 or 14 bits into 16-bit files, and mostly say so nowhere. Both the depth and the
range are therefore found from the training images, kept in the model, and applied to new images.
All samples become 0 to 255; where training images have more than 8 bits, with fractions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DEPTHS = (8, 10, 12, 14, 16)
"""Bits that cameras give to a sample; what is found is one of these."""

ValueRange = tuple[float, float]
"""Lowest and highest floating-point sample: what becomes 0, and what becomes 255."""

DEEPEST = DEPTHS[-1]
"""Of these the largest, which 16-bit files have if nothing tells another."""
_LEAST_OF_UNIT = 0.25  # the highest sample from which on 0 to 1 is taken for the range
_ROOM = 0.25  # by this share of the range it is widened at both ends, for new images


@dataclass(frozen=True)
class Samples:
    """How samples of more than 8 bits become 0 to 255; samples of 8 bits stay as they are."""

    bit_depth: int | None = None
    """Bits that samples in 16-bit files have, 8 to 16; None: not known."""
    value_range: ValueRange | None = None
    """Of floating-point samples; None: not known."""
    fractions: bool = False
    """Whether what is finer than 8 bits is kept: images are then float32, else uint8."""

    def __post_init__(self) -> None:
        depth, limits = self.bit_depth, self.value_range
        if depth is not None and not DEPTHS[0] <= depth <= DEEPEST:
            raise ValueError(f"bit_depth must be {DEPTHS[0]} to {DEEPEST}, or None, got {depth}")
        if limits is not None and not (np.isfinite(limits).all() and limits[0] < limits[1]):
            raise ValueError(f"value_range must be (lowest, highest), got {limits}")

    def effective(self) -> tuple[int, ValueRange | None, bool]:
        """Depth and range that are applied, 16 bits where nothing is known; and `fractions`."""
        return self.bit_depth or DEEPEST, self.value_range, self.fractions

    def in_words(self) -> str:
        """The depth and the range, as far as they are known; "" if neither is."""
        parts = []
        if self.bit_depth is not None:
            parts.append(f"16-bit files hold {self.bit_depth} bits")
        if self.value_range is not None:
            low, high = self.value_range
            parts.append(f"floating-point samples from {low:.6g} to {high:.6g}")
        if parts and not self.fractions:
            parts.append("rounded to 8 bits")
        return ", ".join(parts)


AS_STORED = Samples(bit_depth=DEEPEST)
"""16-bit files fill their 16 bits, and are rounded to 8; floating-point samples are refused."""
UNKNOWN = Samples()
"""Neither depth nor range is known."""


def samples_from_header(header: Mapping[str, Any]) -> Samples:
    """How a model's images are read; older files do not say: 16 bits, rounded to 8.

    Raises ValueError.
    """
    if "samples" not in header:
        return AS_STORED
    depth, limits = header["samples"]["bit_depth"], header["samples"]["value_range"]
    return Samples(
        None if depth is None else int(depth),
        None if limits is None else (float(limits[0]), float(limits[1])),
        bool(header["samples"].get("fractions", False)),
    )


class DeepSamples(NamedTuple):
    """The samples of a file that has more than 8 bits."""

    values: npt.NDArray[Any]
    """Integers or float32, [H, W] or [H, W, 3]."""
    told: int | None
    """Bits of a sample as the file itself says; None if it does not."""

    @property
    def is_float(self) -> bool:
        """Whether they are floating-point, not integers."""
        return bool(self.values.dtype.kind == "f")


def scaled(deep: DeepSamples, samples: Samples, name: str) -> npt.NDArray[np.float64]:
    """Scale samples to 0 .. 255, without rounding: of D bits, 2^D - 1 becomes 255.

    name: of the image, for messages. Floating-point samples outside of the range are clipped, with
    a warning. Raises ValueError for an integer sample of more bits than `samples` has, for NaN and
    infinity, and for floating-point samples if there is no range.
    """
    scale = _scaled_floats if deep.is_float else _scaled_integers
    return scale(deep, samples, name)


def to_8_bits(pixels: Tensor) -> Tensor:
    """Pixel values 0 to 255 of any dtype and shape, rounded to uint8; uint8 as it is."""
    return pixels if pixels.dtype == torch.uint8 else pixels.round().to(torch.uint8)


def _scaled_integers(deep: DeepSamples, samples: Samples, name: str) -> npt.NDArray[np.float64]:
    depth = samples.bit_depth
    if depth is None:
        depth = deep.told or DEEPEST
        warnings.warn(
            f"{name} has 16-bit samples, which no training image had: taken as {depth} bits",
            stacklevel=3,
        )
    full, largest = 2**depth - 1, int(deep.values.max(initial=0))
    if largest > full:
        raise ValueError(
            f"it has a sample of {largest}, more than the {depth} bits of the training images "
            "allow (train with --bit-depth, bit_depth)"
        )
    inside: npt.NDArray[np.float64] = 255.0 * deep.values / full
    return inside


def _scaled_floats(deep: DeepSamples, samples: Samples, name: str) -> npt.NDArray[np.float64]:
    values = deep.values
    if samples.value_range is None:
        raise ValueError(
            "floating-point samples need a value range, and the training images gave none "
            "(train with --value-range, value_range)"
        )
    if not np.isfinite(values).all():
        raise ValueError("it has samples that are NaN or infinite")
    low, high = samples.value_range
    lowest, highest = float(values.min(initial=low)), float(values.max(initial=high))
    if lowest < low or highest > high:
        warnings.warn(
            f"{name} has samples from {values.min():.6g} to {values.max():.6g}; what lies outside "
            f"of the value range, {low:.6g} to {high:.6g}, is clipped",
            stacklevel=3,
        )
    share = (values.astype(np.float64) - low) / (high - low)
    inside: npt.NDArray[np.float64] = 255 * share.clip(0, 1)
    return inside


def survey(images: Iterable[DeepSamples | None], given: Samples) -> Samples:
    """What is `given`, and of the rest what all training images together show; None: 8 bits.

    The depth is the largest that a file tells of itself; of files that tell nothing, that of the
    largest sample, rounded up to one of `DEPTHS`. The range is 0 to 1 if all samples lie there and
    the highest above 0.25; else that of the samples, widened by a quarter at both ends, though not
    below 0 if none lies there. Fractions are kept if any image has more than 8 bits.

    Raises ValueError if all floating-point samples are the same.
    """
    depth, limits = given.bit_depth, given.value_range
    depths: set[int] = set()
    extremes: set[float] = set()
    for deep in images:
        if deep is None:
            continue
        if not deep.is_float:
            depths.add(deep.told or rounded_up(int(deep.values.max(initial=0))))
        elif (finite := deep.values[np.isfinite(deep.values)]).size:
            extremes |= {float(finite.min()), float(finite.max())}
    if depth is None and depths:
        depth = max(depths)
    if limits is None and extremes:
        limits = _usable(min(extremes), max(extremes))
    is_deep = bool(extremes) or (bool(depths) and depth is not None and depth > DEPTHS[0])
    return Samples(depth, limits, given.fractions or is_deep)


def _usable(low: float, high: float) -> ValueRange:
    if low == high:
        raise ValueError(
            f"all floating-point samples are {low:.6g}: give their range "
            "(--value-range, value_range)"
        )
    if low >= 0 and _LEAST_OF_UNIT < high <= 1:
        return 0.0, 1.0
    room = _ROOM * (high - low)
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def rounded_up(largest: int) -> int:
    """The least of `DEPTHS` that a sample fits into."""
    return next(depth for depth in DEPTHS if largest < 2**depth)
