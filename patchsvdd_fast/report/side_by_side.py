"""A region of an image and the normal patch most like it, as one picture."""

from __future__ import annotations

from PIL import Image, ImageDraw

from ..score.regions import Region

_PANEL = 256  # side of each part of a picture, in pixels
_BORDER = 8
_SMALLEST_MARK = 8  # side in pixels of the mark of a small patch in a large image
_MARK = (255, 40, 40)


def side_by_side(
    image: Image.Image, region: Region, match_image: Image.Image | None
) -> Image.Image:
    """A picture of four parts: the image and its patch, the training image and its nearest patch.

    Patches are marked in the images and enlarged beside them.

    image: the scored image, as large as its anomaly map.
    region: the region to show.
    match_image: the training image of `region.match`, as large as it was when encoded
        (`PatchSVDD.match_picture`). None: the picture has its first two parts alone.
    """
    parts = [*_with_patch(image, region.patch)]
    if match_image is not None:
        parts += _with_patch(match_image, region.match)
    widths = [part.width for part in parts]
    height = max(part.height for part in parts)
    picture = Image.new(
        "RGB", (sum(widths) + _BORDER * (len(parts) + 1), height + 2 * _BORDER), "white"
    )
    left = _BORDER
    for part in parts:
        picture.paste(part, (left, _BORDER))
        left += part.width + _BORDER
    return picture


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
