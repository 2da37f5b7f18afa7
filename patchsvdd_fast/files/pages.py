"""Pages or frames of an image file, each with a path: stack.tif#2 is the second of stack.tif."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

PAGES = ("first", "all")
"""What is taken of a file with several pages: the first, or each as an image of its own."""

_NAMED_PAGE = re.compile(r"(.+)#([1-9][0-9]*)", re.DOTALL)


def check_pages(pages: str) -> None:
    """Raise ValueError for what is not one of `PAGES`."""
    if pages not in PAGES:
        raise ValueError(f"pages must be one of {PAGES}, got {pages!r}")


def file_and_page(path: str | os.PathLike[str]) -> tuple[str, int | None]:
    """The file that a path names, and which of its pages, from 1; None if it names none.

    A file that is really called stack.tif#2 is itself.
    """
    name = os.fspath(path)
    found = _NAMED_PAGE.fullmatch(name)
    if found is None or os.path.lexists(name):
        return name, None
    return found[1], int(found[2])


def num_pages(image: Image.Image) -> int:
    """How many pages or frames an opened image has, the first of which is then in place again.

    Of damaged ones the first counts, so that reading it says what is wrong. A photograph whose
    format is MPO has one: the further images are previews and the like.
    """
    if not getattr(image, "is_animated", False) or image.format == "MPO":
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # decoders raise many kinds
        count = 1
        try:
            while True:
                image.seek(count)
                count += 1
        except EOFError:
            return count
        except Exception:  # this one is damaged
            return count + 1
        finally:
            image.seek(0)


def page_paths(path: str | os.PathLike[str]) -> list[Path]:
    """A path for each page of an image file; of one page, or one that cannot be read, its own."""
    name = os.fspath(path)
    if file_and_page(name)[1] is None:
        try:
            with Image.open(name) as image:
                count = num_pages(image)
        except Exception:  # decoders raise many kinds; whoever reads it next says which
            count = 1
        if count > 1:
            return [Path(f"{name}#{number}") for number in range(1, count + 1)]
    return [Path(name)]


def with_every_page(items: Iterable[Any]) -> list[Any]:
    """The items; those that are paths of files with several pages become a path for each page."""
    found: list[Any] = []
    for item in items:
        paths = page_paths(item) if isinstance(item, str | os.PathLike) else []
        found += paths if len(paths) > 1 else [item]
    return found
