"""Where images to score come from: files, folders, globs, a list, a folder that is watched."""

from __future__ import annotations

import glob
import io
import itertools
import os
import time
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO, TextIO

from PIL import Image

from .folders import SUFFIXES, Skipped, is_hidden, walk_images
from .masks import masks_beside
from .pages import (
    check_pages,
    file_and_page,
    is_stream,
    is_video,
    page_paths,
    require_video,
    video_frames,
    video_length,
)

_GLOB_SIGNS = frozenset("*?[")
_LONGEST_LINE = 1 << 16  # bytes in a line of a list


@dataclass(frozen=True)
class Source(os.PathLike[str]):
    """An image to score; can be passed wherever a path can."""

    path: Path
    """Of its file, or of one of its pages (stack.tif#2)."""
    inner: PurePath
    """What its outputs are named after: its path within the given folder, or the given path."""
    image: Image.Image | None = None
    """What was read of it already, such as a frame of a video; None: it is read from its path."""

    def __fspath__(self) -> str:
        return str(self.path)


def image_sources(
    given: Sequence[str], listed: TextIO, pages: str = "first", every: int = 1
) -> Iterator[Source]:
    """Yield the images that the arguments name: files, folders and globs ("**" is any depth).

    given: the arguments, in order; "-" stands for the paths in `listed`.
    listed: one path per line; may be endless, such as standard input.
    pages: of a file with several, "first", or "all": each as an image named after it, stack.tif#1.
    every: of a video file, take the first of so many frames, and so on: clip.mp4#1, clip.mp4#11.

    A missing file is yielded too, and fails when it is read; `require_given` finds it before. Warns
    of what is skipped in a folder, such as files of other kinds. When an argument's turn comes,
    raises ValueError for a folder or a glob without images, and for a list that is none of paths.
    """
    check_pages(pages)
    for source in _sources(given, listed):
        if is_video(source.path):
            yield from _frames(source, every)
            continue
        paths = page_paths(source.path) if pages == "all" else [source.path]
        if len(paths) == 1:
            yield source
            continue
        for number, path in enumerate(paths, start=1):
            yield Source(path, PurePath(f"{source.inner}#{number}"))


def _frames(video: Source, every: int) -> Iterator[Source]:
    """Yield the frames of a video file; itself if nothing can be read, which then fails."""
    try:
        for number, image in video_frames(video.path, every):
            path = Path(f"{video.path}#{number}")
            yield Source(path, PurePath(f"{video.inner}#{number}"), image)
    except ValueError:
        yield video


def camera_frames(name: str, is_done: Callable[[Path], bool], interval: float) -> Iterator[Source]:
    """Yield a frame of a camera or stream every `interval` seconds, until it ends.

    Frames are numbered from 1, "camera:0#1", or from the first that is not done. Raises as
    `video_frames`.
    """
    first = 1
    while is_done(Path(f"{name}#{first}")):
        first += 1
    due, taken = 0.0, first
    for _, image in video_frames(name, first=first):
        if time.monotonic() >= due:
            due = time.monotonic() + interval
            frame = f"{name}#{taken}"
            yield Source(Path(frame), PurePath(frame), image)
            taken += 1


def num_images(
    given: Sequence[str], pages: str, done: Container[str] = (), every: int = 1
) -> int | None:
    """How many images `image_sources` yields whose paths are not in `done`.

    None where only reading tells: for the paths of a list, and for all pages of files.
    """
    if "-" in given or pages == "all":
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `image_sources` says it
        count = 0
        for source in _sources(given, io.StringIO()):
            if is_video(source.path):
                frames = video_length(source.path) or 1
                names = (f"{source.path}#{number}" for number in range(1, frames + 1, every))
                count += sum(name not in done for name in names)
            else:
                count += str(source.path) not in done
        return count


def _sources(given: Sequence[str], listed: TextIO) -> Iterator[Source]:
    alone = len(given) == 1
    for argument in given:
        path = Path(argument)
        if argument == "-":
            for name in _listed_paths(listed.buffer):
                yield Source(Path(name), PurePath(name))
        elif os.path.isdir(argument):  # noqa: PTH112 (isdir raises nothing)
            yield from _some(
                argument,
                (
                    Source(image, image.relative_to(path) if alone else image)
                    for image in _walked(path)
                ),
            )
        elif _is_glob(argument):
            images = (image for image in sorted(_globbed(argument), key=str) if image.is_file())
            yield from _some(argument, (Source(image, image) for image in images))
        else:
            yield Source(path, PurePath(path.name) if alone else path)


def require_given(given: Sequence[str]) -> None:
    """Raise ValueError unless each argument of `image_sources` names something that is there.

    That is a file, or a folder or glob with an image. No image is read, and nothing of a list.
    """
    for argument in given:
        if is_video(argument):
            require_video()
        if argument == "-" or any(_first_of(argument)):
            continue
        if is_stream(argument):
            raise ValueError(f"{argument} never ends: patchsvdd watch takes it")
        if os.path.isdir(argument) or _is_glob(argument):  # noqa: PTH112
            raise ValueError(f"{argument} holds no images ({', '.join(SUFFIXES)})")
        require_there(argument)


def require_there(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless the path names a folder, a file, or a page of a file."""
    if not os.path.exists(file_and_page(path)[0]):  # noqa: PTH110
        raise ValueError(f"{path} does not exist")


def _first_of(argument: str) -> Iterator[bool]:
    """Yields True if there is an image; it looks no further."""
    if os.path.isdir(argument):  # noqa: PTH112
        yield from (True for _ in walk_images(Path(argument)))
    elif _is_glob(argument):
        yield from (True for _ in _globbed(argument))
    else:
        yield os.path.exists(file_and_page(argument)[0])  # noqa: PTH110


def _globbed(pattern: str) -> Iterator[Path]:
    """What a glob finds that is named like an image, but for what systems leave behind.

    That it finds only if it names it.
    """
    said = {*Path(pattern).parts}
    for name in glob.iglob(pattern, recursive=True):  # noqa: PTH207
        path = Path(name)
        if path.suffix.lower() in SUFFIXES and not any(map(is_hidden, {*path.parts} - said)):
            yield path


def _is_glob(argument: str) -> bool:
    return bool(_GLOB_SIGNS & set(argument)) and not os.path.exists(argument)  # noqa: PTH110


def _listed_paths(lines: BinaryIO) -> Iterator[str]:
    while line := lines.readline(_LONGEST_LINE):
        if b"\0" in line or len(line) == _LONGEST_LINE:
            raise ValueError(f"a list of images has one path a line, got {line[:60]!r}...")
        name = os.fsdecode(line.rstrip(b"\r\n"))  # a path need not be text in any encoding
        if name:
            yield name


def arriving_images(
    folder: Path, is_done: Callable[[Path], bool], interval: float
) -> Iterator[Source]:
    """Yield the images below a folder, those that are there and those that arrive, for ever.

    The folder is listed every `interval` seconds. An image is yielded once its size and time of
    change are the same in two listings, so that it is complete; and again if they change later.
    is_done: whether an image that is there at the start was scored in an earlier run.
    """
    taken = {path: state for path, state in _files(folder) if is_done(path)}
    seen: dict[Path, tuple[int, int]] = {}
    while True:
        now: dict[Path, tuple[int, int]] = {}
        for path, state in _files(folder):
            now[path] = state
            if state != taken.get(path) and state == seen.get(path):
                taken[path] = state
                yield Source(path, path.relative_to(folder))
        seen = now
        taken = {path: state for path, state in taken.items() if path in now}
        time.sleep(interval)


def _files(folder: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    """The images below a folder, each with its size in bytes and time of change."""
    for path in walk_images(folder):
        try:
            status = path.stat()
        except OSError:  # deleted meanwhile
            continue
        yield path, (status.st_size, status.st_mtime_ns)


def _walked(folder: Path) -> Iterator[Path]:
    skipped, count, first = Skipped(), 0, ""
    for _, paths in itertools.groupby(walk_images(folder, skipped), lambda path: path.parent):
        of_folder: list[Path] = []
        for path in paths:
            of_folder.append(path)
            yield path
        if masks := masks_beside(of_folder):
            count, first = count + len(masks), first or str(min(masks).relative_to(folder))
    skipped.warn(folder)
    if count:
        warnings.warn(
            "scored like the others, though they are named as masks of the images beside them: "
            f"{count:,} in {folder}, such as {first}",
            stacklevel=2,
        )


def _some(argument: str, sources: Iterable[Source]) -> Iterator[Source]:
    found = False
    for source in sources:
        found = True
        yield source
    if not found:
        raise ValueError(f"{argument} holds no images ({', '.join(SUFFIXES)})")
