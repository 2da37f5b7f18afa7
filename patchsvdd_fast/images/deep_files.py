"""The samples of image files that have more than 8 bits, whose colours Pillow cuts to 8."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from .samples import DEEPEST, DEPTHS, DeepSamples, rounded_up

_TIFF_BITS, _TIFF_LARGEST = 258, 281  # tags: BitsPerSample, MaxSampleValue
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TIFF_PLANAR = 284  # tag: PlanarConfiguration
_PNG_HEAD = 8  # bytes before the first chunk
_JPEG_2000_START = b"\xff\x4f\xff\x51"  # of its codestream, followed by sizes,
_JPEG_2000_SIZES = 38  # bytes of them up to the first channel's bits,
_JPEG_2000_HEAD = 1 << 16  # and all that within these first bytes


def deep_samples(image: Image.Image, file: str | bytes | None) -> DeepSamples | None:
    """The samples of an image as its file has them; None if they are of 8 bits or less.

    image: as opened, not decoded yet. file: its path or content, if there is one; else, of colour
    and of gray with alpha, the high 8 bits that Pillow gives are taken of 16: `warn_of_lost_bits`.

    Raises ValueError for integers that do not fit into 16 bits, for 16-bit colour of which Pillow
    gives wrong values (TIFF in planes, JPEG 2000), and as Pillow does.
    """
    if image.mode == "F":
        return DeepSamples(np.asarray(image), None)
    values: npt.NDArray[Any]
    if not image.mode.startswith("I"):
        if file is not None and (largest := _largest_of_pixmap(image)) is not None:
            told = None if largest == 65535 else _bits(largest)
            return DeepSamples(_pixmap(image, file), told)
        whole = None if file is None else _whole_samples(image, file)
        if whole is None:
            _refuse_misread(image, file)
            return None
        if image.mode == "CMYK":
            return DeepSamples(_rgb_of_inks(whole), DEEPEST)
        values = whole
    else:
        scaled_to = _scaled_from(image)
        values = np.asarray(image).astype(np.int32)
        lowest, highest = int(values.min(initial=0)), int(values.max(initial=0))
        if lowest < 0 or highest > 65535:
            raise ValueError(
                f"integer samples must lie between 0 and 65535, got {lowest} to {highest}: "
                "floating-point samples may have any range"
            )
        if scaled_to is not None:  # back to what the file has
            values = (values.astype(np.int64) * scaled_to + 32767) // 65535
            return DeepSamples(values, _bits(scaled_to))
    return DeepSamples(values, _told_depth(image, file, int(values.max(initial=0))))


def why_unidentified(file: str) -> str:
    """What may be wrong with a file that Pillow does not take for an image; of a TIFF, its kind."""
    with contextlib.suppress(OSError), _reading(file) as stream:
        if stream.read(4) in _TIFF_STARTS:
            return (
                "is a TIFF that is damaged, or of a kind that Pillow does not know, such as 64-bit "
                "or colour in floating point (gray of float32, and 16 bits, it knows)"
            )
    return "is not an image that can be read"


def _reading(file: str | bytes) -> BinaryIO:
    """A file, by its path or its content, to read from."""
    return io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb")  # noqa: PTH123


def _bits(largest: int) -> int:
    return max(DEPTHS[0], largest.bit_length())


def _told_depth(image: Image.Image, file: str | bytes | None, largest: int) -> int | None:
    """The depth that a file tells of its samples, the largest of which is given."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        bits = max(_numbers(tags.get(_TIFF_BITS)), default=DEEPEST)
        if bits < DEEPEST:  # packed, such as 12 bits
            return max(bits, _bits(largest))
        told = max(_numbers(tags.get(_TIFF_LARGEST)), default=0)
        # 65535 is what the tag says by default, hence of any file.
        return rounded_up(max(told, largest)) if 255 < told < 65535 else None
    if image.format == "PNG" and file is not None:
        significant = _significant_bits(file)
        if significant is not None:
            # By the format samples fill 16 bits all the same; many writers leave them as they were.
            return significant if largest < 2**significant else DEEPEST
    return None


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, tuple) else (value,)
    return [int(one) for one in values if isinstance(one, int)]


def _significant_bits(file: str | bytes) -> int | None:
    """What the chunk sBIT of a PNG file says, if 8 to 15; Pillow does not read it."""
    with _reading(file) as stream:
        stream.seek(_PNG_HEAD)
        while len(head := stream.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"sBIT":
                bits = max(stream.read(min(length, 3)), default=DEEPEST)
                return bits if DEPTHS[0] <= bits < DEEPEST else None
            if kind == b"IDAT":
                break
            stream.seek(length + 4, os.SEEK_CUR)
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


def _pixmap(image: Image.Image, file: str | bytes) -> npt.NDArray[np.int32]:
    """The samples of such a file, [H, W, 3]; Pillow scales them to 8 bits."""
    tile: Any = getattr(image, "tile")[0]  # noqa: B009 (of an ImageFile)
    count = 3 * image.width * image.height
    with _reading(file) as stream:
        stream.seek(tile[2])
        content = stream.read(2 * count)
    if len(content) < 2 * count:
        raise ValueError("the file is truncated")
    samples = np.frombuffer(content, ">u2").astype(np.int32)
    return samples.reshape(image.height, image.width, 3)


def _refuse_misread(image: Image.Image, file: str | bytes | None) -> None:
    """Raise ValueError for colour of more than 8 bits that Pillow does not read rightly."""
    tags, bits = getattr(image, "tag_v2", None), 8
    if tags is not None and tags.get(_TIFF_PLANAR) == 2:
        bits = max(_numbers(tags.get(_TIFF_BITS)), default=8)
    elif image.format == "JPEG2000" and file is not None:
        with _reading(file) as stream:
            head = stream.read(_JPEG_2000_HEAD)
        sizes = head.partition(_JPEG_2000_START)[2]
        bits = (sizes[_JPEG_2000_SIZES] & 127) + 1 if len(sizes) > _JPEG_2000_SIZES else 8
    if bits > 8:
        raise ValueError(
            f"colour of {bits} bits in separate planes or in JPEG 2000 is not supported"
        )


def warn_of_lost_bits(image: Image.Image, name: str) -> None:
    """Warn of an opened image that has 16 bits, though `deep_samples` gives none."""
    for tile in getattr(image, "tile", ()):
        raw = _raw_mode(tile)
        if isinstance(raw, str) and ";16" in raw:
            warnings.warn(
                f"{name} has 16-bit samples ({raw}), of which only the high 8 bits are read",
                stacklevel=3,
            )
            return


def _whole_samples(image: Image.Image, file: str | bytes) -> npt.NDArray[np.int32] | None:
    """Samples [H, W], [H, W, 3] or of CMYK [H, W, 4] of 16-bit colour or gray with alpha.

    None for others. Pillow gives the high bytes; the file is decoded once more, as if its bytes
    had another meaning.
    """
    tiles = _read_otherwise(image)
    if not tiles:
        return None
    with _reading(file) as stream, Image.open(stream) as other:
        other.seek(image.tell())
        is_gray = _raw_mode(other.tile[0]) == _GRAY_WITH_ALPHA
        other.tile = _read_otherwise(other)
        other.load()
        found = np.asarray(other).astype(np.int32)
    if is_gray:
        return 256 * found[..., 0] + found[..., 1]
    whole: npt.NDArray[np.int32] = 256 * np.asarray(image).astype(np.int32) + found
    return whole if image.mode == "CMYK" else whole[..., :3]


def _rgb_of_inks(inks: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """RGB [H, W, 3] of CMYK [H, W, 4], all of 16 bits, as Pillow converts 8 bits."""
    light = 65535 - inks.astype(np.int64)
    rgb = (light[..., :3] * light[..., 3:] + 32767) // 65535
    return rgb.astype(np.int32)


def _raw_mode(tile: Any) -> Any:
    """How a tile of an opened image says that samples lie in the file, such as "RGB;16B"."""
    arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
    return arguments[0] if arguments else None


def _read_otherwise(image: Image.Image) -> list[Any]:
    """The image's tiles, whose 16-bit samples are read in the other order; else an empty list."""
    tiles = []
    for tile in getattr(image, "tile", ()):
        raw = _raw_mode(tile)
        if raw not in _OTHERWISE:
            return []
        is_tuple = isinstance(tile[3], tuple)
        changed: Any = (_OTHERWISE[raw], *tile[3][1:]) if is_tuple else _OTHERWISE[raw]
        replace = getattr(tile, "_replace", None)  # of a named tuple, in newer versions of Pillow
        tiles.append((*tile[:3], changed) if replace is None else replace(args=changed))
    return tiles


_NATIVE = "B" if sys.byteorder == "little" else "L"
_GRAY_WITH_ALPHA = "LA;16B"
_OTHERWISE = {
    f"{kind};16{order}": f"{kind};16{other}"
    for kind in ("RGB", "RGBX", "RGBA", "CMYK")
    for order, other in (("L", "B"), ("B", "L"), ("N", _NATIVE))
} | {_GRAY_WITH_ALPHA: "RGBA"}  # its four bytes, one a channel
