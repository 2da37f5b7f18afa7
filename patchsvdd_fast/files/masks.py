"""Masks of anomalous images: which file belongs to which image, and which pixels it marks."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from .folders import walk_images
from .pages import num_pages

MASK_THRESHOLD = 128
"""Of a mask from 0 to 255: pixels above this are anomalous."""

_Gray = npt.NDArray[np.uint8]

_FOLDERS = ("ground_truth", "masks")  # in any case: what is inside are masks
_ENDING = re.compile(r"_(mask|gt|label)$", re.IGNORECASE)  # of a mask's name
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP")
_NOISE = 31  # what compression may leave where a lossy mask was 0
_ORIENTATION = 0x0112  # of EXIF,
_TURNED = 5  # whose values from this on exchange width and height
_FLAT = 32  # colours at the most of a mask without soft edges


# --- which belongs to which image -----------------------------------------------------------------


def masks_beside(paths: Iterable[Path]) -> dict[Path, Path]:
    """The masks among images: x_GT, x_mask or x_label beside an x, each with its image."""
    paths = list(paths)
    images = {path.with_suffix(""): path for path in paths}
    found = {}
    for path in paths:
        plain = _plain(path.with_suffix(""))
        if plain != path.with_suffix("") and plain in images:
            found[path] = images[Path(plain)]
    return found


def masks_alone(paths: Iterable[Path], beside: Mapping[Path, Path]) -> set[Path]:
    """Those of the files that are named as masks beside the others are, but whose image is missing.

    beside: what `masks_beside` found of the same files.
    """
    endings = {_ending(mask) for mask in beside}
    return {path for path in paths if path not in beside and _ending(path) in endings - {""}}


def _ending(path: Path) -> str:
    found = _ENDING.search(path.stem)
    return found[0].lower() if found else ""


def images_and_masks(
    folder: Path, on_skipped: Callable[[Path, str], None]
) -> tuple[dict[PurePath, Path], dict[PurePath, Path]]:
    """The images below a folder, and what lies there in folders of masks, by their paths within.

    The path of a mask is without the name of its folder of masks, so that it is that of its image.
    on_skipped: as of `walk_images`.
    """
    images: dict[PurePath, Path] = {}
    masks: dict[PurePath, Path] = {}
    for path in walk_images(folder, on_skipped):
        *folders, name = path.relative_to(folder).parts or (folder.name,)  # if not to open
        kept = [part for part in folders if part.lower() not in _FOLDERS]
        found = images if kept == folders else masks
        found[PurePath(*kept, name)] = path
    return images, masks


def without_masks(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """Of files below a folder, those that are no masks by their names or their folders'.

    Warns of those that are.
    """
    beside = masks_beside(paths)
    masks = {*beside} | masks_alone(paths, beside)
    for path in paths:
        inside = path.relative_to(folder).parts[:-1]
        if any(part.lower() in _FOLDERS for part in inside):
            masks.add(path)
    if masks:
        first = min(masks).relative_to(folder)
        warnings.warn(
            "left out, as they are masks by their names or those of their folders: "
            f"{len(masks):,} in {folder}, such as {first}",
            stacklevel=3,
        )
    return [path for path in paths if path not in masks]


def matched_masks(
    images: Mapping[PurePath, Path], masks: Mapping[PurePath, Path]
) -> tuple[dict[Path, tuple[Path, ...]], list[Path]]:
    """Find each image's masks: x, x_mask, x_GT or x_label of any kind, or all in a folder x.

    images, masks: files by their paths within the two folders. Returns the masks of the images
    that have some, and the masks that match no image.
    """
    by_name = {inside.with_suffix(""): path for inside, path in images.items()}
    exact: dict[Path, list[Path]] = {}
    ended: dict[Path, list[Path]] = {}
    unmatched = []
    for inside, mask in masks.items():
        name = inside.with_suffix("")
        if (image := by_name.get(_plain(name))) and _plain(name) != name:
            ended.setdefault(image, []).append(mask)
        elif image := by_name.get(name) or by_name.get(name.parent):
            exact.setdefault(image, []).append(mask)
        else:
            unmatched.append(mask)
    # x_mask is the mask where both are there: x may be a copy of the image.
    return {image: tuple(found) for image, found in (exact | ended).items()}, unmatched


def _plain(name: PurePath) -> PurePath:
    plain = _ENDING.sub("", name.name)
    return name.with_name(plain) if plain else name


# --- which pixels it marks ------------------------------------------------------------------------


def read_mask(path: str | os.PathLike[str], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Read a mask as a boolean array of (height, width), true where it is anomalous.

    Gray masks from 0 to 255 (16 bits: to 65535) are cut at 128; those that never exceed it hold
    class numbers, and are anomalous wherever they are not 0. In colour, also of a palette, all that
    differs from the background is anomalous: black, or the colour of most pixels if none is black.
    Where only the transparency differs, what is not transparent is anomalous. Of several pages or
    frames the first is read, with a warning.

    Raises ValueError naming the file if it cannot be read, or can be understood in two ways.
    """
    gray = Image.fromarray(_read(path)).resize((size[1], size[0]))
    return np.asarray(gray) > MASK_THRESHOLD


def has_proportions_of(path: str | os.PathLike[str], size: tuple[int, int]) -> bool:
    """Whether a mask is as wide for its height as an image of (height, width), to 2 % or a pixel.

    Raises OSError if it is no image.
    """
    with Image.open(path) as image:
        width, height = image.size
        if image.getexif().get(_ORIENTATION, 1) >= _TURNED:
            width, height = height, width
    difference = abs(width * size[0] - height * size[1])
    return difference <= max(0.02 * width * size[0], *size)


def marks_anything(paths: Sequence[Path]) -> bool:
    """Whether any of the masks has an anomalous pixel. Raises as `read_mask`."""
    return any((_read(path) > MASK_THRESHOLD).any() for path in paths)


def _read(path: str | os.PathLike[str]) -> _Gray:
    """A mask as [H, W], anomalous above `MASK_THRESHOLD`."""
    name = os.fspath(path)
    try:
        with Image.open(name) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise ValueError(f"its pixels are more than the limit of {limit:,}")
            if (count := num_pages(image)) > 1:
                pages = f"{count:,} pages or frames; the first is read"
                warnings.warn(f"mask {name} has {pages}", stacklevel=4)
            is_colour = not image.mode.startswith("I")
            is_cut = is_colour and ";16" in str(getattr(image, "tile", ""))
            image.load()
            found = _anomalous(ImageOps.exif_transpose(image), image.format in _LOSSY)
            if is_cut and not found.any():
                raise ValueError(
                    "ambiguous: of 16-bit colour only the high 8 bits are read, which mark nothing"
                )
            return found
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that can be read") from error
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # decoders raise many kinds for a damaged file
        raise ValueError(f"cannot read mask {name}: {error or type(error).__name__}") from error


def _anomalous(image: Image.Image, lossy: bool) -> _Gray:
    if image.mode.startswith(("I", "F")):
        return _of_gray(np.asarray(image), lossy)
    if not image.has_transparency_data:
        if image.mode in ("L", "1"):
            return _of_gray(np.asarray(image.convert("L")), lossy)
        return _of_colours(np.asarray(image.convert("RGB")), lossy)
    pixels = np.asarray(image.convert("RGBA"))
    colours, alpha = pixels[..., :3], pixels[..., 3]
    if alpha.min() == alpha.max():
        return _of_colours(colours, lossy)
    by_alpha = _of_gray(alpha, lossy)
    if (colours == colours[0, 0]).all():
        return by_alpha
    by_colour = _of_colours(colours, lossy)
    differ = (by_alpha > MASK_THRESHOLD) != (by_colour > MASK_THRESHOLD)
    if (differ & ((alpha == 0) | (alpha == alpha.max()))).any():  # not only at soft edges
        raise ValueError("ambiguous: its colours mark other pixels than its transparency")
    return by_alpha


def _of_gray(samples: npt.NDArray[Any], lossy: bool) -> _Gray:
    values, highest = samples, float(samples.max())
    if samples.dtype == np.uint8:
        scaled = samples.astype(np.uint8, copy=False)
    else:
        values = samples.astype(np.float64)
        if not np.isfinite(values).all() or values.min() < 0 or highest > 65535:
            raise ValueError("samples must lie between 0 and 65535")
        is_share = samples.dtype.kind == "f" and highest <= 1
        full = 1 if is_share else 255 if highest <= 255 else 65535
        scaled = np.rint(values / full * 255).astype(np.uint8)
    above = np.count_nonzero(scaled > MASK_THRESHOLD)
    if above:
        low = values[(values > 0) & (values <= _NOISE)]
        if not lossy and len(low) > above and len(np.unique(low)) <= 4:
            raise ValueError(
                f"ambiguous: {len(low):,} pixels of low values such as {low[0]:.0f}, as of class "
                f"numbers, but {above:,} above {MASK_THRESHOLD}, as of a mask from 0 to 255"
            )
        return scaled
    if lossy and 0 < highest <= _NOISE:
        raise ValueError(
            f"ambiguous: its highest value is {highest:.0f}, which compression alone may leave"
        )
    return _marked(values > (highest / 2 if lossy else 0))


def _of_colours(colours: _Gray, lossy: bool) -> _Gray:
    """As `_of_gray`, of [H, W, 3]."""
    spread = colours.max(axis=2) - colours.min(axis=2)
    if spread.max() <= (_NOISE if lossy else 0):
        return _of_gray(colours.max(axis=2), lossy)
    codes = colours.astype(np.int64) @ (1 << 16, 1 << 8, 1)
    found, counts = np.unique(codes, return_counts=True)
    most = counts.argmax()
    has_black = bool(found[0] == 0 or (lossy and (colours.max(axis=2) <= _NOISE).any()))
    is_most = 2 * counts[most] >= codes.size
    if (has_black and is_most and found[most] != 0 and 2 < len(found) <= _FLAT) or not (
        has_black or is_most
    ):
        raise ValueError("ambiguous: it is in colour, and which is the background cannot be told")
    background = 0 if has_black else int(found[most])
    level = np.array([background >> 16, background >> 8 & 255, background & 255])
    distance = np.abs(colours.astype(np.int64) - level).max(axis=2)
    # A mask of many colours has soft edges.
    return _marked(distance > (0 if len(found) <= _FLAT else distance.max() / 2))


def _marked(marked: npt.NDArray[np.bool_]) -> _Gray:
    return np.where(marked, 255, 0).astype(np.uint8)
