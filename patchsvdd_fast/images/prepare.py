"""Reading images from files, arrays and batches, as 8-bit RGB of one size."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..files.categories import training_paths

ImageSize = tuple[int, int] | None
"""(height, width) to resize to, in pixels, or None to keep each image's own."""


def parse_size(size: int | tuple[int, int] | None) -> ImageSize:
    """Bring an `image_size` argument to (height, width) or None. One number means a square.

    Raises ValueError for a size below 1.
    """
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"image_size must be positive, got {height}x{width}")
    return height, width


def evenly_spread(count: int, chosen: int) -> npt.NDArray[np.int64]:
    """`chosen` of the numbers 0 .. count - 1, such as those of images, ascending [chosen]."""
    return np.linspace(0, count - 1, chosen).round().astype(np.int64)


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    Gray is repeated over the channels, palettes and CMYK are converted, alpha is dropped, 16-bit
    samples are scaled to 8 bits, and the camera's rotation (EXIF) is applied. Raises ValueError
    naming the file if it is no image, is damaged, has samples of another kind, or more pixels than
    Pillow's limit, `PIL.Image.MAX_IMAGE_PIXELS` (None: any number): a small file may decompress to
    gigabytes.
    """
    name = os.fspath(path)
    try:
        with Image.open(name) as image:
            _check_pixels(image)
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _to_rgb(upright)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that can be read") from error
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # decoders raise many kinds for a damaged file
        raise ValueError(f"cannot read image {name}: {_reason(error)}") from error


@dataclass(frozen=True)
class PreparedImage:
    """An image, read and resized; its light is not matched yet."""

    name: str
    """Its path as given, or its number from 0: "image 3"."""
    pixels: Tensor
    """uint8 [3, H, W], resized."""
    original_size: tuple[int, int]
    """(height, width) before resizing."""
    source: Any = None
    """What it was made from: a path, a PIL image or an array."""


@dataclass(frozen=True)
class ImageSet:
    """Prepared images of one size."""

    names: tuple[str, ...]
    """Paths relative to the folder, or as given."""
    pixels: Tensor
    """uint8 [N, 3, H, W]."""
    original_sizes: tuple[tuple[int, int], ...]
    """(height, width) of each before resizing."""


def prepare_image(item: Any, name: str, size: ImageSize, smallest: int) -> PreparedImage:
    """Read one image: a path, a PIL image, or an array [H, W] or [H, W, 3] uint8.

    size: resize to it with Pillow's default filter (bicubic), or None to keep the image's own.
    smallest: least pixels on a side, before resizing. Raises ValueError, TypeError or OSError
    naming the image.
    """
    image = _as_image(item, name)
    original = image.height, image.width
    if min(original) < smallest:
        raise ValueError(
            f"{name} has {image.width}x{image.height} pixels, less than one patch of "
            f"{smallest}x{smallest}"
        )
    if size is not None:
        image = image.resize((size[1], size[0]))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return PreparedImage(name, pixels, original, item)


def name_of(item: Any, number: int) -> str:
    """What to call an image: its path, or its number."""
    return os.fspath(item) if isinstance(item, str | os.PathLike) else f"image {number}"


def load_images(source: Any, size: ImageSize, smallest: int) -> Tensor:
    """The pixels of `load_image_set`, uint8 [N, 3, H, W]."""
    return load_image_set(source, size, smallest).pixels


def load_image_set(
    source: Any,
    size: ImageSize,
    smallest: int,
    progress: Callable[[float], None] | None = None,
) -> ImageSet:
    """Load images of one size.

    source: a folder (a category's good training images, or every image below it), one image file,
    a sequence of files, PIL images or [H, W, 3] arrays, or a uint8 batch: [N, H, W, 3] or [N, H, W]
    as a NumPy array, [N, 3, H, W] as a tensor. The names of images in a folder are relative to it.
    size, smallest: as for `prepare_image`.
    progress: called after each image with the share that is read, 0 to 1.

    Raises as `prepare_image`, and ValueError if there are no images or their sizes differ and
    `size` is None.
    """
    folder: Path | None = None
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        folder = path if path.is_dir() else None
        source = [path] if folder is None else training_paths(folder)
    if isinstance(source, Tensor):
        source = _batch_of_tensor(source)
    if not isinstance(source, Sequence | np.ndarray):
        raise TypeError(
            "images must be a folder, a file, a sequence of files, PIL images or arrays, or a "
            f"batch, got {type(source).__name__}"
        )
    if len(source) == 0:
        raise ValueError("no images given")
    names, sizes = [], []
    batch: Tensor | None = None
    for index, item in enumerate(source):
        image = prepare_image(item, name_of(item, index), size, smallest)
        names.append(image.name if folder is None else item.relative_to(folder).as_posix())
        sizes.append(image.original_size)
        if batch is None:
            batch = torch.empty(len(source), *image.pixels.shape, dtype=torch.uint8)
        if image.pixels.shape != batch.shape[1:]:
            height, width = image.pixels.shape[1:]
            raise ValueError(
                f"images must all have one size unless they are resized: {names[0]} has "
                f"{batch.shape[3]}x{batch.shape[2]} pixels, {image.name} has {width}x{height}"
            )
        batch[index] = image.pixels
        if progress is not None:
            progress((index + 1) / len(source))
    assert batch is not None
    return ImageSet(tuple(names), batch, tuple(sizes))


def _as_image(item: Any, name: str) -> Image.Image:
    if isinstance(item, str | os.PathLike):
        return read_image(item)
    if isinstance(item, Image.Image):
        try:
            return _to_rgb(item)
        except Exception as error:  # Pillow decodes an opened file only now
            raise ValueError(f"cannot read {name}: {_reason(error)}") from error
    if isinstance(item, np.ndarray) and item.dtype == np.uint8:
        if item.ndim == 2 or (item.ndim == 3 and item.shape[2] in (1, 3, 4)):
            return _to_rgb(Image.fromarray(item.squeeze(2) if item.shape[2:] == (1,) else item))
        raise ValueError(f"{name} must have shape [H, W] or [H, W, 3], got {list(item.shape)}")
    kind = f"{item.dtype} array" if isinstance(item, np.ndarray) else type(item).__name__
    raise TypeError(f"{name} must be a path, a PIL image or a uint8 array, got {kind}")


def _batch_of_tensor(batch: Tensor) -> Sequence[np.ndarray]:
    if batch.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {str(batch.dtype).removeprefix('torch.')}")
    if batch.ndim != 4 or batch.shape[1] != 3:
        raise ValueError(f"images must have shape [N, 3, H, W], got {list(batch.shape)}")
    return list(batch.cpu().permute(0, 2, 3, 1).contiguous().numpy())


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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        samples = np.asarray(image).astype(np.int64)
        if samples.min() < 0 or samples.max() > 65535:
            raise ValueError("32-bit integer samples are not supported, only 8 and 16 bits")
        image = Image.fromarray(((samples + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point samples are not supported, only 8 and 16 bits")
    return image.convert("RGB")
