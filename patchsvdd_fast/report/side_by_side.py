"""A region of an image and the normal patch most like it, as one picture."""

from __future__ import annotations

from PIL import Image, ImageDraw

from ..score.image_result import relative
from ..score.regions import Region
from .captions import SOFT, write_line

_PANEL = 256  # side of each part of a picture, in pixels
_BORDER = 8
_TEXT, _LINE = 13, 19  # size of the words above each part, and from line to line, in pixels
_SMALLEST_MARK = 8  # side in pixels of the mark of a small patch in a large image
_MARK = (255, 40, 40)


def side_by_side(
    image: Image.Image,
    region: Region,
    match_image: Image.Image | None,
    threshold: float | None = None,
) -> Image.Image:
    """A picture of four parts: the image and its patch, the training image and its nearest patch.

    Patches are marked in the images and enlarged beside them. Two lines above each part say what it
    shows: where the patch lies, which training image it is, and how far its patch is away.

    image: the scored image, as large as its anomaly map.
    region: the region to show.
    match_image: the training image of `region.match`, as large as it was when encoded
        (`PatchSVDD.match_picture`). None: the picture has its first two parts alone.
    threshold: `ImageResult.map_threshold`, to give the region's peak as a multiple of it.
    """
    parts = [*_with_patch(image, region.patch)]
    times = relative(region.peak, threshold)
    peak = f"{region.peak:.4g}" if times is None else f"{times:.3g} x the threshold"
    words = [
        ("this image", f"peak {peak}"),
        ("the patch at the peak", _place(region.patch)),
        ("training image", region.match_name),
        (
            f"nearest normal patch, distance {region.distance:.4g}",
            f"{_place(region.match)}, by {region.level}",
        ),
    ]
    if match_image is not None:
        parts += _with_patch(match_image, region.match)
    else:
        words[1] = (f"the patch at the peak, {_place(region.patch)}", ", ".join(words[3]))
    widths = [max(part.width, _PANEL) for part in parts]  # room for the words
    top = _BORDER + 2 * _LINE
    height = max(part.height for part in parts)
    size = sum(widths) + _BORDER * (len(parts) + 1), top + height + _BORDER
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    left = _BORDER
    for part, width, (what, detail) in zip(parts, widths, words, strict=False):
        write_line(draw, (left, _BORDER), what, width, _TEXT)
        write_line(draw, (left, _BORDER + _LINE), detail, width, _TEXT, SOFT)
        picture.paste(part, (left, top))
        left += width + _BORDER
    return picture


def _place(patch: tuple[int, int, int]) -> str:
    left, top, size = patch
    return f"{size}x{size} at {left},{top}"


def _with_patch(image: Image.Image, patch: tuple[int, int, int]) -> tuple[Image.Image, Image.Image]:
    """The whole image with the patch marked, and the patch, each at a panel's size."""
    left, top, size = patch
    scale = _PANEL / max(image.size)
    whole = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    side = max(size * scale, _SMALLEST_MARK)
    middle = (left + size / 2) * scale, (top + size / 2) * scale
    first = [round(value - side / 2) for value in middle]
    last = [round(value + side / 2) - 1 for value in middle]
    draw = ImageDraw.Draw(whole)
    draw.rectangle([*(v - 1 for v in first), *(v + 1 for v in last)], outline="black")
    draw.rectangle([*first, *last], outline=_MARK, width=2)
    enlarged = image.crop((left, top, left + size, top + size)).resize(
        (_PANEL, _PANEL), Image.Resampling.NEAREST
    )
    return whole, enlarged
