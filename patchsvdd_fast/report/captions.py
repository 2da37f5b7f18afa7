"""Text in pictures: a line at a given place, cut in its middle where it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from PIL import ImageDraw, ImageFont

from .text import shown

INK, SOFT = (29, 32, 36), (91, 97, 105)
GOOD, BAD = (31, 95, 168), (181, 65, 26)  # of verdicts

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@lru_cache
def font_of(size: int) -> _Font:
    """Pillow's own font, which is there on every machine. size: in pixels."""
    return ImageFont.load_default(size)


def cut_in_middle(text: str, fits: Callable[[str], bool]) -> str:
    """The text, or its beginning and its end with "…" between them, as long as it fits."""
    if fits(text):
        return text
    low, high = 0, len(text) - 1  # characters that are kept: the end says more, such as the number
    while low < high:
        kept = (low + high + 1) // 2
        low, high = (kept, high) if fits(_cut(text, kept)) else (low, kept - 1)
    return _cut(text, low)


def _cut(text: str, kept: int) -> str:
    last = (kept + 1) // 2
    return f"{text[: kept - last]}…{text[len(text) - last :]}"


def write_line(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    width: int,
    size: int,
    colour: tuple[int, int, int] = INK,
) -> None:
    """Write a line of at most `width` pixels. place: its left and top; size: of the font."""
    font = font_of(size)
    # No line shows more characters; measuring takes time with each.
    text = cut_in_middle(shown(text), lambda part: len(part) <= max(3, width // 2))
    text = cut_in_middle(text, lambda part: font.getlength(part) <= width)
    draw.text(place, text, fill=colour, font=font)
