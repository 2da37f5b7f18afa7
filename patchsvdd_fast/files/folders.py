"""Finding images below a folder, and saying what there is passed over."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath

SUFFIXES = {
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    ".webp": "WebP",
    ".gif": "GIF",
    ".avif": "AVIF",
    **dict.fromkeys((".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c"), "JPEG 2000"),
    **dict.fromkeys((".pgm", ".ppm", ".pbm", ".pnm", ".pfm"), "PNM"),
}
"""Of the files that count as images, in any case, each with the name of its format."""

_LEFT_BY_SYSTEMS = (  # beside names that begin with a dot
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    *("$recycle.bin", "system volume information", "@eadir", "#recycle"),  # @eadir: thumbnails
)


class Skipped:
    """What was passed over among images, and why; what systems leave behind is not counted."""

    def __init__(self) -> None:
        self._found: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def __call__(self, path: Path, reason: str) -> None:
        """Count one. reason: in words, for all that are skipped for it."""
        self._found[reason] += 1
        self._first.setdefault(reason, path.name)

    def in_words(self, folder: Path) -> str:
        """A line with numbers, reasons and a name for each; empty if nothing was skipped."""
        if not self._found:
            return ""
        parts = [f"{why}: {n:,} ({self._first[why]})" for why, n in sorted(self._found.items())]
        return f"skipped in {folder}: {', '.join(parts)}"

    def warn(self, folder: Path) -> None:
        """Warn of what was skipped, if anything was."""
        if self._found:
            warnings.warn(self.in_words(folder), stacklevel=3)


def find_images(folder: Path) -> list[Path]:
    """All images below a folder, in the order of their paths. Warns of what is skipped.

    Raises ValueError if the folder is missing or holds no image.
    """
    skipped = Skipped()
    paths = list(walk_images(folder, skipped))
    skipped.warn(folder)
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    return paths


def walk_images(
    folder: Path, on_skipped: Callable[[Path, str], None] | None = None
) -> Iterator[Path]:
    """The images below a folder in the order of their paths, one folder in memory at a time.

    Links to folders are not followed, and names that begin with a dot, and others that systems
    leave behind (Thumbs.db, __MACOSX, @eaDir), are passed over. A folder that may not be opened, or
    a link that leads nowhere, is yielded as if it were an image, so that reading it reports the
    error. Raises ValueError if `folder` is not a folder.

    on_skipped: called with links to folders and files of other kinds, and why they are skipped.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    yield from _walk(folder, on_skipped or (lambda path, reason: None))


def is_hidden(name: str) -> bool:
    """Whether it is a name that no user gave an image: .ipynb_checkpoints, ._001.png, __MACOSX."""
    return name.startswith(".") or name.lower() in _LEFT_BY_SYSTEMS


def _walk(folder: Path, on_skipped: Callable[[Path, str], None]) -> Iterator[Path]:
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                is_folder = entry.is_dir(follow_symlinks=False)
                if is_folder or _is_image(entry):
                    found.append((entry.name, is_folder))
                else:
                    on_skipped(folder / entry.name, _why(entry))
    except OSError:
        yield folder
        return
    for name, is_folder in sorted(found):
        if is_folder:
            yield from _walk(folder / name, on_skipped)
        else:
            yield folder / name


def _is_image(entry: os.DirEntry[str]) -> bool:
    if PurePath(entry.name).suffix.lower() not in SUFFIXES:
        return False
    try:
        return entry.is_file() or not Path(entry.path).exists()
    except OSError:  # a link to itself
        return True


def _why(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "links to folders, which are not followed"
    except OSError:  # a link to itself
        pass
    if entry.is_symlink() and not Path(entry.path).exists():
        return "links that lead nowhere"
    suffix = PurePath(entry.name).suffix.lower()
    if suffix in SUFFIXES:
        return "what is neither a file nor a folder"
    return f"files {suffix or 'without a suffix'}, which are not read"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number of things, such as "1 image" and "1,200 images"; plural: None: with an "s"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def some_of(paths: Sequence[Path], of: int | None = None) -> str:
    """How many files there are, of how many, and which: the first three."""
    first = ", ".join(f"{path.parent.name}/{path.name}" for path in paths[:3])
    among = "" if of is None else f" of {of:,}"
    return f"{len(paths):,}{among} ({first}{', ...' if len(paths) > 3 else ''})"


def report_unreadable(found: Sequence[Exception | str], of: int, skip: bool) -> None:
    """Say which of some images could not be read, all at once: by a warning if they are skipped.

    found: why, each naming its file. Raises ValueError unless `skip`, and if none is left.
    """
    if not found:
        return
    listed = "; ".join(str(error) for error in found)
    if len(found) == of:
        raise ValueError(f"none of the {counted(of, 'image')} can be read: {listed}")
    if not skip:
        raise ValueError(
            f"{len(found):,} of {counted(of, 'image')} cannot be read (to go on without them: "
            f"--skip-unreadable, skip_unreadable): {listed}"
        )
    warnings.warn(
        f"left out {len(found):,} of {of:,} images, which cannot be read: {listed}", stacklevel=3
    )
