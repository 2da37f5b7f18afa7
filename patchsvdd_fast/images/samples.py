"""Samples of more than 8 bits: the depth of 16-bit files, the value range of floating-point ones.

Cameras write 10, 12 or 14 bits into 16-bit files, and mostly say so nowhere. Both the depth and the
range are therefore found from the training images, kept in the model, and applied to new images.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

DEPTHS = (8, 10, 12, 14, 16)
"""Bits that cameras give to a sample; what is found is one of these."""

ValueRange = tuple[float, float]
"""Lowest and highest floating-point sample: what becomes 0, and what becomes 255."""

_DEEPEST = DEPTHS[-1]
_LEAST_OF_UNIT = 0.25  # the highest sample from which on 0 to 1 is taken for the range
_ROOM = 0.25  # by this share of the range it is widened at both ends, for new images
_TIFF_BITS, _TIFF_LARGEST = 258, 281  # tags: BitsPerSample, MaxSampleValue
_TIFF_PLANAR = 284  # tag: PlanarConfiguration
_PNG_HEAD = 8  # bytes before the first chunk
_JPEG_2000_START = b"\xff\x4f\xff\x51"  # of its codestream, followed by sizes,
_JPEG_2000_SIZES = 38  # bytes of them up to the first channel's bits,
_JPEG_2000_HEAD = 1 << 16  # and all that within these first bytes


@dataclass(frozen=True)
class Samples:
    """How samples of more than 8 bits become 8 bits; samples of 8 bits stay as they are."""

    bit_depth: int | None = None
    """Bits that samples in 16-bit files have, 8 to 16; None: not known."""
    value_range: ValueRange | None = None
    """Of floating-point samples; None: not known."""

    def __post_init__(self) -> None:
        depth, limits = self.bit_depth, self.value_range
        if depth is not None and not DEPTHS[0] <= depth <= _DEEPEST:
            raise ValueError(f"bit_depth must be {DEPTHS[0]} to {_DEEPEST}, or None, got {depth}")
        if limits is not None and not (np.isfinite(limits).all() and limits[0] < limits[1]):
            raise ValueError(f"value_range must be (lowest, highest), got {limits}")

    def effective(self) -> tuple[int, ValueRange | None]:
        """Depth and range that are applied: 16 bits where nothing is known."""
        return self.bit_depth or _DEEPEST, self.value_range

    def in_words(self) -> str:
        """The depth and the range, as far as they are known; "" if neither is."""
        parts = []
        if self.bit_depth is not None:
            parts.append(f"16-bit files hold {self.bit_depth} bits")
        if self.value_range is not None:
            low, high = self.value_range
            parts.append(f"floating-point samples from {low:.6g} to {high:.6g}")
        return ", ".join(parts)


AS_STORED = Samples(bit_depth=_DEEPEST)
"""16-bit files fill their 16 bits; floating-point samples are refused."""
UNKNOWN = Samples()
"""Neither depth nor range is known."""


def samples_from_header(header: Mapping[str, Any]) -> Samples:
    """How a model's images are read; older files do not say: 16 bits. Raises ValueError."""
    if "samples" not in header:
        return AS_STORED
    depth, limits = header["samples"]["bit_depth"], header["samples"]["value_range"]
    return Samples(
        None if depth is None else int(depth),
        None if limits is None else (float(limits[0]), float(limits[1])),
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


def deep_samples(image: Image.Image, path: str | None) -> DeepSamples | None:
    """The samples of an image as its file has them; None if they are of 8 bits or less.

    image: as opened, not decoded yet. path: of its file, if there is one; without it, and of gray
    with alpha or CMYK, the high 8 bits that Pillow gives are taken of 16, see `warn_of_lost_bits`.

    Raises ValueError for integers that do not fit into 16 bits, for 16-bit colour of which Pillow
    gives wrong values (TIFF in planes, JPEG 2000), and as Pillow does.
    """
    if image.mode == "F":
        return DeepSamples(np.asarray(image), None)
    if not image.mode.startswith("I"):
        if path is not None and (largest := _largest_of_pixmap(image)) is not None:
            told = None if largest == 65535 else _bits(largest)
            return DeepSamples(_pixmap(image, path), told)
        low = None if path is None else _low_bytes(image, path)
        if low is None:
            _refuse_misread(image, path)
            return None
        values = 256 * np.asarray(image)[..., :3].astype(np.int32) + low[..., :3]
    else:
        scaled_to = _scaled_from(image)
        values = np.asarray(image).astype(np.int32)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError("32-bit integer samples are not supported, only 8 and 16 bits")
        if scaled_to is not None:  # back to what the file has
            values = (values.astype(np.int64) * scaled_to + 32767) // 65535
            return DeepSamples(values, _bits(scaled_to))
    return DeepSamples(values, _told_depth(image, path, int(values.max(initial=0))))


def to_8_bits(deep: DeepSamples, samples: Samples, name: str) -> npt.NDArray[np.uint8]:
    """Scale samples to 0 .. 255, rounding once: of D bits, 2^D - 1 becomes 255.

    name: of the image, for messages. Floating-point samples outside of the range are clipped, with
    a warning. Raises ValueError for an integer sample of more bits than `samples` has, for NaN and
    infinity, and for floating-point samples if there is no range.
    """
    scale = _float_to_8_bits if deep.is_float else _int_to_8_bits
    return scale(deep, samples, name)


def _int_to_8_bits(deep: DeepSamples, samples: Samples, name: str) -> npt.NDArray[np.uint8]:
    depth = samples.bit_depth
    if depth is None:
        depth = deep.told or _DEEPEST
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
    eight: npt.NDArray[np.uint8] = ((510 * deep.values + full) // (2 * full)).astype(np.uint8)
    return eight


def _float_to_8_bits(deep: DeepSamples, samples: Samples, name: str) -> npt.NDArray[np.uint8]:
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
    eight: npt.NDArray[np.uint8] = (255 * share.clip(0, 1)).round().astype(np.uint8)
    return eight


def survey(images: Iterable[DeepSamples | None], given: Samples) -> Samples:
    """What is `given`, and of the rest what all training images together show; None: 8 bits.

    The depth is the largest that a file tells of itself; of files that tell nothing, that of the
    largest sample, rounded up to one of `DEPTHS`. The range is 0 to 1 if all samples lie there and
    the highest above 0.25; else that of the samples, widened by a quarter at both ends, though not
    below 0 if none lies there.

    Raises ValueError if all floating-point samples are the same.
    """
    depth, limits = given.bit_depth, given.value_range
    depths: set[int] = set()
    extremes: set[float] = set()
    for deep in images:
        if deep is None:
            continue
        if not deep.is_float:
            depths.add(deep.told or _rounded_up(int(deep.values.max(initial=0))))
        elif (finite := deep.values[np.isfinite(deep.values)]).size:
            extremes |= {float(finite.min()), float(finite.max())}
    if depth is None and depths:
        depth = max(depths)
    if limits is None and extremes:
        limits = _usable(min(extremes), max(extremes))
    return Samples(depth, limits)


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


def _rounded_up(largest: int) -> int:
    """The least of `DEPTHS` that a sample fits into."""
    return next(depth for depth in DEPTHS if largest < 2**depth)


def _bits(largest: int) -> int:
    return max(DEPTHS[0], largest.bit_length())


def _told_depth(image: Image.Image, path: str | None, largest: int) -> int | None:
    """The depth that a file tells of its samples, the largest of which is given."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        bits = max(_numbers(tags.get(_TIFF_BITS)), default=_DEEPEST)
        if bits < _DEEPEST:  # packed, such as 12 bits
            return max(bits, _bits(largest))
        told = max(_numbers(tags.get(_TIFF_LARGEST)), default=0)
        # 65535 is what the tag says by default, hence of any file.
        return _rounded_up(max(told, largest)) if 255 < told < 65535 else None
    if image.format == "PNG" and path is not None:
        significant = _significant_bits(path)
        if significant is not None:
            # By the format samples fill 16 bits all the same; many writers leave them as they were.
            return significant if largest < 2**significant else _DEEPEST
    return None


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, tuple) else (value,)
    return [int(one) for one in values if isinstance(one, int)]


def _significant_bits(path: str) -> int | None:
    """What the chunk sBIT of a PNG file says, if 8 to 15; Pillow does not read it."""
    with open(path, "rb") as file:  # noqa: PTH123 (a path may be of any kind)
        file.seek(_PNG_HEAD)
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"sBIT":
                bits = max(file.read(min(length, 3)), default=_DEEPEST)
                return bits if DEPTHS[0] <= bits < _DEEPEST else None
            if kind == b"IDAT":
                break
            file.seek(length + 4, os.SEEK_CUR)
    return None


def _scaled_from(image: Image.Image) -> int | None:
    """The largest value that a PNM file tells, if Pillow scales its samples to 65,535."""
    if image.format == "PPM" and image.mode == "I":
        for tile in getattr(image, "tile", ()):
            if isinstance(tile[3], tuple) and isinstance(tile[3][-1], int) and tile[3][-1] < 65535:
                return int(tile[3][-1])
    return None


def _largest_of_pixmap(image: Image.Image) -> int | None:
    """The largest value that a binary PPM file tells, if its samples have 16 bits."""
    tiles: Any = getattr(image, "tile", ())
    if image.format != "PPM" or image.mode != "RGB" or [tile[0] for tile in tiles] != ["ppm"]:
        return None
    largest = int(tiles[0][3][1])
    return largest if largest > 255 else None


def _pixmap(image: Image.Image, path: str) -> npt.NDArray[np.int32]:
    """The samples of such a file, [H, W, 3]; Pillow scales them to 8 bits."""
    tile: Any = getattr(image, "tile")[0]  # noqa: B009 (of an ImageFile)
    count = 3 * image.width * image.height
    with open(path, "rb") as file:  # noqa: PTH123 (a path may be of any kind)
        file.seek(tile[2])
        content = file.read(2 * count)
    if len(content) < 2 * count:
        raise ValueError("the file is truncated")
    samples = np.frombuffer(content, ">u2").astype(np.int32)
    return samples.reshape(image.height, image.width, 3)


def _refuse_misread(image: Image.Image, path: str | None) -> None:
    """Raise ValueError for colour of more than 8 bits that Pillow does not read rightly."""
    tags, bits = getattr(image, "tag_v2", None), 8
    if tags is not None and tags.get(_TIFF_PLANAR) == 2:
        bits = max(_numbers(tags.get(_TIFF_BITS)), default=8)
    elif image.format == "JPEG2000" and path is not None:
        with open(path, "rb") as file:  # noqa: PTH123 (a path may be of any kind)
            head = file.read(_JPEG_2000_HEAD)
        sizes = head.partition(_JPEG_2000_START)[2]
        bits = (sizes[_JPEG_2000_SIZES] & 127) + 1 if len(sizes) > _JPEG_2000_SIZES else 8
    if bits > 8:
        raise ValueError(
            f"colour of {bits} bits in separate planes or in JPEG 2000 is not supported"
        )


def warn_of_lost_bits(image: Image.Image, name: str) -> None:
    """Warn of an opened image that has 16 bits, though `deep_samples` gives none."""
    for tile in getattr(image, "tile", ()):
        raw = tile[3][0] if isinstance(tile[3], tuple) and tile[3] else tile[3]
        if isinstance(raw, str) and ";16" in raw:
            warnings.warn(
                f"{name} has 16-bit samples ({raw}), of which only the high 8 bits are read",
                stacklevel=3,
            )
            return


def _low_bytes(image: Image.Image, path: str) -> npt.NDArray[np.uint8] | None:
    """The low bytes of 16-bit colour, of which Pillow gives the high ones; None for 8 bits.

    The file is decoded once more, as if its bytes had the other order.
    """
    if not _swapped(image):
        return None
    with Image.open(path) as other:
        other.tile = _swapped(other)
        other.load()
        return np.asarray(other)


def _swapped(image: Image.Image) -> list[Any]:
    """The tiles of 16-bit colour, with the order of bytes changed; else an empty list."""
    tiles = []
    for tile in getattr(image, "tile", ()):
        args = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        raw = args[0] if args else None
        if raw not in _OTHER_ORDER:
            return []
        changed: Any = (_OTHER_ORDER[raw], *args[1:])
        changed = changed if isinstance(tile[3], tuple) else changed[0]
        replace = getattr(tile, "_replace", None)  # of a named tuple, in newer versions of Pillow
        tiles.append((*tile[:3], changed) if replace is None else replace(args=changed))
    return tiles


_NATIVE = "B" if sys.byteorder == "little" else "L"
_OTHER_ORDER = {
    f"{kind};16{order}": f"{kind};16{other}"
    for kind in ("RGB", "RGBX", "RGBA")
    for order, other in (("L", "B"), ("B", "L"), ("N", _NATIVE))
}
