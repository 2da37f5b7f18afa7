"""A region of an image and the normal patch most like it, as one picture."""

from __future__ import annotations

from PIL import Image, ImageDraw

from ..score.image_result import relative
from ..score.regions import Region
from .captions import SOFT, write_line

_PANEL = 384  # side of each part of a picture, in pixels
_BORDER = 8
_TEXT, _LINE = 13, 19  # size of the words above each part, and from line to line, in pixels
_SMALLEST_MARK = 8  # side in pixels of the mark of a small patch in a large image
_MARK = (255, 40, 40)


def side_by_side(
    image: Image.Image,
    region: Region,
    match_image: Image.Image | None,
    threshold: float | None = None,
    map_size: tuple[int, int] | None = None,
) -> Image.Image:
    """A picture of four parts: the image and its patch, the training image and its nearest patch.

    Patches are marked in the images and enlarged beside them. Two lines above each part say what it
    shows: where the patch lies, which training image it is, and how far its patch is away.

    image: the scored image; of any size with `map_size`, such as `ImageResult.original_picture`.
    region: the region to show.
    match_image: the training image of `region.match`, as large as it was when encoded
        (`PatchSVDD.match_picture`). None: the picture has its first two parts alone.
    threshold: `ImageResult.map_threshold`, to give the region's peak as a multiple of it.
    map_size: (height, width) of the anomaly map, in whose pixels positions are; None: the image's.
    """
    frame = image.size if map_size is None else map_size[::-1]
    parts = [*_with_patch(image, region.patch, frame, image.size)]
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
        # In the scored image's proportions: both were resized alike.
        proportions = image.size if frame == match_image.size else match_image.size
        parts += _with_patch(match_image, region.match, match_image.size, proportions)
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


def _with_patch(
    image: Image.Image,
    patch: tuple[int, int, int],
    frame: tuple[int, int],
    proportions: tuple[int, int],
) -> tuple[Image.Image, Image.Image]:
    """The whole image with the patch marked, and the patch, each at a panel's size.

    frame: (width, height) of the image in the pixels that the patch is given in.
    proportions: (width, height) that the whole image is shown in, at any scale.
    """
    left, top, size = patch
    whole = image.resize(_fitted(*proportions))
    largest = max(proportions)
    across, down = (_PANEL * p / largest / f for p, f in zip(proportions, frame, strict=True))
    first, last = [], []
    for start, scale in ((left, across), (top, down)):
        side, middle = max(size * scale, _SMALLEST_MARK), (start + size / 2) * scale
        first.append(round(middle - side / 2))
        last.append(round(middle + side / 2) - 1)
    draw = ImageDraw.Draw(whole)
    draw.rectangle([*(v - 1 for v in first), *(v + 1 for v in last)], outline="black")
    draw.rectangle([*first, *last], outline=_MARK, width=2)

    own = image.width / frame[0], image.height / frame[1]
    x, x_end = round(left * own[0]), round((left + size) * own[0])
    y, y_end = round(top * own[1]), round((top + size) * own[1])
    cut = image.crop((x, y, x_end, y_end))
    panel = _fitted(size * across, size * down)
    is_enlarged = panel[0] >= cut.width
    sampling = Image.Resampling.NEAREST if is_enlarged else Image.Resampling.LANCZOS
    return whole, cut.resize(panel, sampling)


def _fitted(width: float, height: float) -> tuple[int, int]:
    """These proportions in pixels, as large as a panel."""
    scale = _PANEL / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))
