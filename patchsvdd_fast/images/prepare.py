"""Reading images from files, arrays and batches, as 8-bit RGB of one size."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from ..files.categories import training_paths
from ..files.folders import SUFFIXES, counted, report_unreadable
from ..files.pages import (
    FileBytes,
    check_pages,
    file_and_page,
    is_video,
    num_pages,
    video_frames,
    with_every_page,
)
from ..files.sources import Source
from .arrays import (
    Parts,
    deep_array,
    has_fractions,
    image_of_array,
    images_of_batch,
    is_array,
    parts_of,
    rgb_picture,
)
from .deep_files import deep_samples, warn_of_lost_bits, why_unidentified
from .samples import AS_STORED, UNKNOWN, DeepSamples, Samples, scaled, survey

ImageSize = tuple[int, int] | None
"""(height, width) to resize to, in pixels, or None to keep each image's own."""
PathsIn = Callable[[Path], Sequence[Path]]  # gives the images of a folder


class UnreadableError(ValueError):
    """A file or PIL image cannot be read; the message names it."""


ORIGINAL_SIDE = 1024
"""Most pixels on the longer side of `PreparedImage.original`."""

_CODECS = {"WebP": "webp", "AVIF": "avif", "JPEG 2000": "jpg_2000"}  # that Pillow may lack
_ORIENTATION = 0x0112  # of EXIF


def read_image(path: str | os.PathLike[str], samples: Samples = AS_STORED) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    Gray is repeated over the channels, palettes and CMYK are converted, alpha is dropped, samples
    of more than 8 bits are scaled as `samples` says and rounded, and the camera's rotation (EXIF)
    is applied. Of several pages or frames the first is read, with a warning, unless the path names
    another: stack.tif#2.

    Raises ValueError naming the file if it is no image, is damaged, of a format that this Pillow
    was built without, has samples that do not suit `samples`, or more pixels than Pillow's limit,
    `PIL.Image.MAX_IMAGE_PIXELS` (None: any number): a small file may decompress to gigabytes.
    """
    (image,) = _read_parts(path, replace(samples, fractions=False))
    return image


def _read_parts(path: str | os.PathLike[str], samples: Samples) -> Parts:
    """Read an image file, upright, as `read_image` does; keep fractions if `samples` says so."""
    name = os.fspath(path)
    with _naming(name), _opened(path) as (image, file):
        is_whole = isinstance(path, FileBytes) or file == name
        if is_whole and (count := num_pages(image)) > 1:
            warnings.warn(f"{name} has {count:,} pages or frames; the first is read", stacklevel=3)
        return _upright_parts(image, file, samples, name)


def read_deep_samples(item: Any) -> DeepSamples | None:
    """The samples of a file, PIL image or uint16 array; None of 8 bits, or if it is unreadable."""
    try:
        if is_array(item):
            return deep_array(item)
        if isinstance(item, Image.Image):
            return deep_samples(item, None)
        if isinstance(item, str | os.PathLike):
            with _opened(item) as (image, file):
                return deep_samples(image, file)
    except Exception:  # decoders raise many kinds; whoever reads it next says which
        return None
    return None


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Image.Image, str | bytes]]:
    """The image at a path, which may name a page, not decoded yet; and its file or its content."""
    if isinstance(path, FileBytes):
        with Image.open(io.BytesIO(path.content)) as image:
            _check_pixels(image)
            yield image, path.content
        return
    name = os.fspath(path)
    file, page = file_and_page(name)
    if is_video(file):
        if page is None:
            raise ValueError(f"it is a video; name one of its frames, such as {name}#1")
        with contextlib.closing(video_frames(file, first=page)) as frames:
            _, frame = next(frames)
        yield frame, file
        return
    with Image.open(file) as image:
        _check_pixels(image)
        if page is not None:
            try:
                image.seek(page - 1)
            except EOFError:
                raise ValueError(f"it has no page or frame {page}") from None
            _check_pixels(image)
        yield image, file


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Within the context errors of reading an image become ValueErrors that name it."""
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # decoders raise many kinds for a damaged file
        file = file_and_page(name)[0]
        lacking = SUFFIXES.get(PurePath(file).suffix.lower(), "")
        if lacking in _CODECS and not _has_codec(_CODECS[lacking]):
            raise UnreadableError(
                f"cannot read image {name}: the Pillow here was built without {lacking}"
            ) from error
        if isinstance(error, UnidentifiedImageError):
            raise UnreadableError(f"{name} {why_unidentified(file)}") from error
        raise UnreadableError(f"cannot read image {name}: {_reason(error)}") from error


def _has_codec(name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an older Pillow warns that it does not know the name
        return bool(features.check(name))


@dataclass(frozen=True)
class PreparedImage:
    """An image, read and resized; its light is not matched yet."""

    name: str
    """Its path as given, or its number from 0: "image 3"."""
    pixels: Tensor
    """[3, H, W], resized: uint8, or float32 in 0 to 255 if fractions are kept (`Samples`)."""
    original_size: tuple[int, int]
    """(height, width) before resizing."""
    source: Any = None
    """What it was made from: a path, a PIL image or an array."""
    original: Image.Image | None = None
    """The image before resizing, 8-bit RGB, shrunk to `ORIGINAL_SIDE` pixels on its longer side if
    it is larger; None if it was not asked for."""

    def __repr__(self) -> str:
        return f"PreparedImage({self.name!r}, {_size_in_words(self.pixels)})"


@dataclass(frozen=True)
class ImageSet:
    """Prepared images of one size."""

    names: tuple[str, ...]
    """Paths relative to the folder, or as given."""
    pixels: Tensor
    """[N, 3, H, W]: uint8, or float32 in 0 to 255 if fractions are kept (`samples`)."""
    original_sizes: tuple[tuple[int, int], ...]
    """(height, width) of each before resizing."""
    samples: Samples = UNKNOWN
    """How samples of more than 8 bits were read."""
    left_out: tuple[str, ...] = ()
    """Why files of a share cannot be read; nobody has told that yet."""

    def __repr__(self) -> str:
        return f"ImageSet({counted(len(self.names), 'image')}, {_size_in_words(self.pixels)})"


def _size_in_words(pixels: Tensor) -> str:
    """Of pixels [..., H, W], such as "256x128 pixels, uint8"."""
    height, width = pixels.shape[-2:]
    return f"{width}x{height} pixels, {str(pixels.dtype).removeprefix('torch.')}"


def prepare_image(
    item: Any,
    name: str,
    size: ImageSize,
    smallest: int,
    samples: Samples = AS_STORED,
    channel_order: str = "rgb",
    keep_original: bool = False,
) -> PreparedImage:
    """Read one image: a path, a PIL image, an array [H, W] or [H, W, 3], or a tensor [3, H, W].

    item: arrays are uint8, uint16 (of the depth that 16-bit files have) or floats: in the range
        that files' have if `samples` has one, else in 0 to 1; others are refused.
    size: resize to it with Pillow's default filter (bicubic), or None to keep the image's own.
    smallest: least pixels on a side, before resizing.
    samples: how samples of more than 8 bits are read, and whether they are rounded to 8 bits.
    channel_order: of arrays and tensors, "rgb" or "bgr".
    keep_original: whether `PreparedImage.original` is wanted.

    Raises ValueError, TypeError or OSError naming the image.
    """
    parts = _as_parts(item, name, samples, channel_order)
    height, width = original = parts[0].height, parts[0].width
    if min(original) < smallest:
        raise ValueError(
            f"{name} has {width}x{height} pixels, less than one patch of {smallest}x{smallest}"
        )
    picture = rgb_picture(parts, ORIGINAL_SIDE) if keep_original else None
    if size is not None:
        parts = [part.resize((size[1], size[0])) for part in parts]
    if parts[0].mode == "RGB":
        pixels = torch.from_numpy(np.array(parts[0])).permute(2, 0, 1).contiguous()
        pixels = pixels.float() if samples.fractions else pixels
    else:
        # Of floating-point samples, bicubic resizing leaves 0 to 255 at edges.
        channels = np.stack([np.asarray(part) for part in parts]).clip(0, 255)
        pixels = torch.from_numpy(channels).expand(3, -1, -1).contiguous()
    return PreparedImage(name, pixels, original, item, picture)


def name_of(item: Any, number: int) -> str:
    """What to call an image: its path, or its number."""
    return os.fspath(item) if isinstance(item, str | os.PathLike) else f"image {number}"


def load_images(source: Any, size: ImageSize, smallest: int, channel_order: str = "rgb") -> Tensor:
    """The pixels of `load_image_set`, [N, 3, H, W]."""
    return load_image_set(source, size, smallest, channel_order=channel_order).pixels


def load_image_set(
    source: Any,
    size: ImageSize,
    smallest: int,
    progress: Callable[[float], None] | None = None,
    samples: Samples | None = None,
    given: Samples = UNKNOWN,
    skip_unreadable: bool = False,
    pages: str = "first",
    channel_order: str = "rgb",
    share: Callable[[int], slice] | None = None,
    paths_in: PathsIn = training_paths,
) -> ImageSet:
    """Load images of one size.

    source: a folder (a category's good training images, or every image below it), one image file,
    a sequence of what `prepare_image` takes, or a batch: [N, H, W, 3] or [N, H, W] as an array,
    [N, 3, H, W] as a tensor. An array [H, W, 3] or a tensor [3, H, W] is one image. The names of
    images in a folder are relative to it.
    size, smallest, channel_order, dtypes of arrays: as for `prepare_image`.
    progress: called after each image with the share that is read, 0 to 1.
    samples: how samples of more than 8 bits are read; None: as `given`, and what that leaves open
        is found from these images. Where any has more than 8 bits, all keep their fractions.
    skip_unreadable: leave out files that cannot be read, with a warning that lists them.
    pages: of a file with several, "first", or "all": each as an image, named such as stack.tif#2.
    share: of so many images, those to load; None: all. All decide on `samples`. What cannot be
        read is then `left_out`, whatever `skip_unreadable` is.
    paths_in: the images of a folder, by default good ones alone.

    Raises as `prepare_image`; ValueError if there are no images or their sizes differ and `size` is
    None, and for files that cannot be read, all in one.
    """
    every, folder = _items_of(source, pages, paths_in)
    samples = _surveyed(every, given) if samples is None else samples
    items = every[own := slice(0, None) if share is None else share(len(every))]
    names: list[str] = []
    sizes: list[tuple[int, int]] = []
    unreadable: list[str] = []
    tell, batch = progress or (lambda _: None), None
    for index, item in enumerate(items):
        try:
            name = name_of(item, own.start + index)
            image = prepare_image(item, name, size, smallest, samples, channel_order)
        except (OSError, UnreadableError) as error:
            if len(items) == 1:
                raise
            unreadable.append(str(error))
            tell((index + 1) / len(items))
            continue
        if batch is None:
            batch = image.pixels.new_empty(len(items), *image.pixels.shape)
        if image.pixels.shape != batch.shape[1:]:
            height, width = image.pixels.shape[1:]
            raise ValueError(
                f"images must all have one size unless they are resized: {names[0]} has "
                f"{batch.shape[3]}x{batch.shape[2]} pixels, {image.name} has {width}x{height}"
            )
        batch[len(names)] = image.pixels
        names.append(image.name if folder is None else item.relative_to(folder).as_posix())
        sizes.append(image.original_size)
        tell((index + 1) / len(items))
    if share is None or batch is None:
        report_unreadable(unreadable, len(items), skip_unreadable)
    assert batch is not None
    return ImageSet(tuple(names), batch[: len(names)], tuple(sizes), samples, tuple(unreadable))


def survey_images(sources: Iterable[Any], given: Samples, pages: str = "first") -> Samples:
    """What suits the images of all sources, each as of `load_image_set`; see `survey`."""
    items = [_items_of(source, pages, training_paths)[0] for source in sources]
    return _surveyed([*chain.from_iterable(items)], given)


def _surveyed(items: Sequence[Any], given: Samples) -> Samples:
    samples = survey(map(read_deep_samples, items), given)
    arrays = [item for item in items if is_array(item)]
    if arrays:  # whose 16 bits may hold only 8, multiples of 257
        is_deep = samples.fractions and len(arrays) < len(items)
        is_deep = is_deep or given.fractions or any(has_fractions(a, samples) for a in arrays)
        samples = replace(samples, fractions=is_deep)
    return samples


def _items_of(source: Any, pages: str, paths_in: PathsIn) -> tuple[Sequence[Any], Path | None]:
    """The images of a source, not read yet; and the folder they are in, if that was given."""
    folder: Path | None = None
    if isinstance(source, str | os.PathLike):
        folder = path if (path := Path(source)).is_dir() else None
        source = [path] if folder is None else paths_in(folder)
    if is_array(source):
        source = images_of_batch(source)
    if not isinstance(source, Sequence | np.ndarray | Tensor):
        raise TypeError(
            "images must be a folder, a file, a sequence of files, PIL images or arrays, or a "
            f"batch, got {type(source).__name__}"
        )
    if len(source) == 0:
        raise ValueError("no images given")
    check_pages(pages)
    if pages == "all" and not is_array(source):
        source = with_every_page(source)
    return source, folder


def _as_parts(item: Any, name: str, samples: Samples, channel_order: str) -> Parts:
    if isinstance(item, Source) and item.image is not None:
        return [item.image]
    if isinstance(item, str | os.PathLike):
        return _read_parts(item, samples)
    if isinstance(item, Image.Image):
        try:
            return _upright_parts(item, None, samples, name)
        except Exception as error:  # Pillow decodes an opened file only now
            raise UnreadableError(f"cannot read {name}: {_reason(error)}") from error
    if is_array(item):
        return parts_of(image_of_array(item, name, channel_order, samples), samples.fractions)
    raise TypeError(
        f"{name} must be a path, a PIL image, an array or a tensor, got {type(item).__name__}"
    )


def _check_pixels(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{image.width}x{image.height} pixels are more than {_pixel_limit()}")


def _pixel_limit() -> str:
    return f"the limit of {Image.MAX_IMAGE_PIXELS:,} (--max-pixels; PIL.Image.MAX_IMAGE_PIXELS)"


def _reason(error: Exception) -> str:
    """Why an image cannot be read, in words."""
    if isinstance(error, Image.DecompressionBombError):  # Pillow's message names no remedy
        return f"its pixels are more than {_pixel_limit()}"
    return str(error) or type(error).__name__


def _upright_parts(
    image: Image.Image, file: str | bytes | None, samples: Samples, name: str
) -> Parts:
    """An opened image, turned as its camera was; file: its path or content, if there is one."""
    deep = deep_samples(image, file)
    if deep is None:
        warn_of_lost_bits(image, name)
        image.load()
        return [ImageOps.exif_transpose(image).convert("RGB")]
    parts = parts_of(scaled(deep, samples, name), samples.fractions)
    for part in parts:
        part.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
    return [ImageOps.exif_transpose(part) for part in parts]
