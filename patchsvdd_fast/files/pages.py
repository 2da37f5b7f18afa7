"""Pages or frames of a file, each with a path: stack.tif#2, clip.mp4#2 are the second ones."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

PAGES = ("first", "all")
"""What is taken of a file with several pages: the first, or each as an image of its own."""

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".ts")
"""Of the files that are read as videos, with OpenCV."""

_STREAM = re.compile(r"camera:(\d+)|(?:rtsp|rtsps|rtmp|http|https|udp)://.+", re.DOTALL)
_NAMED_PAGE = re.compile(r"(.+)#([1-9][0-9]*)", re.DOTALL)


@dataclass(frozen=True)
class FileBytes(os.PathLike[str]):
    """The content of an image file, read already; can be scored as its path can, to the same bits.

    Its first page counts, and no file is looked for under its name.
    """

    name: str
    """What the image is called: a path or an address, as given."""
    content: bytes = field(repr=False)
    """All of the file."""

    def __fspath__(self) -> str:
        return self.name


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


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether a path is named like a video file; a frame of one is none."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def is_stream(name: str) -> bool:
    """Whether this names a camera, "camera:0", or a stream of one, such as "rtsp://...".

    A file of that name comes first.
    """
    return _STREAM.fullmatch(name) is not None and not os.path.lexists(name)


def require_video() -> None:
    """Raise ImportError without OpenCV, which reads videos and cameras."""
    _opencv()


def video_frames(
    source: str | os.PathLike[str], every: int = 1, first: int = 1
) -> Generator[tuple[int, Image.Image], None, None]:
    """Yield frames of a video file, a camera or a stream, as RGB images with their numbers.

    source: a path, or a name as of `is_stream`. every: take the first of so many, and so on.
    first: number of the first frame to take, from 1; of cameras, what it is counted from.

    Raises ImportError without OpenCV, and ValueError if nothing can be read.
    """
    cv2, name = _opencv(), os.fspath(source)
    camera = _STREAM.fullmatch(name) if is_stream(name) else None
    opened = cv2.VideoCapture(int(camera[1]) if camera and camera[1] else name)
    try:
        number = first - 1 if camera else 0
        while opened.isOpened() and opened.grab():
            number += 1
            if number < first or (number - first) % every:
                continue
            read, pixels = opened.retrieve()
            if not read:
                break
            yield number, Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
        if number < first:
            what = "it has no such frame" if number else "OpenCV reads no frame of it"
            raise ValueError(f"cannot read {name}: {what}")
    finally:
        opened.release()


def video_length(path: str | os.PathLike[str]) -> int | None:
    """How many frames a video file says it has; None if it does not."""
    opened = _opencv().VideoCapture(os.fspath(path))
    try:
        count = int(opened.get(_opencv().CAP_PROP_FRAME_COUNT))
    finally:
        opened.release()
    return count if count > 0 else None


def _opencv() -> Any:
    try:
        import cv2
    except ImportError:
        raise ImportError(
            "videos and cameras are read with OpenCV: pip install opencv-python-headless"
        ) from None
    return cv2
