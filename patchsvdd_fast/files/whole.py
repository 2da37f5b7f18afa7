"""Writing files so that they are whole or not there."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
from collections.abc import Iterator
from pathlib import Path

_PARTIAL = ".partial"


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields an empty file to write to, which then takes the place of `path`.

    It does so only when complete and on disk; after a failure what was there before still is.
    Raises OSError naming `path` if it cannot be written.
    """
    partial = path.with_name(f"{_prefix(path)}{os.getpid()}{_PARTIAL}")
    try:
        partial.unlink(missing_ok=True)  # of a killed process that had this one's number
        partial.touch()
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what processes of this machine that were killed while writing `path` have left.

    Looks through the folder: for large files, of which there are few.
    """
    if os.name != "posix":
        return  # elsewhere asking after a process might end it
    prefix = _prefix(path)
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*{_PARTIAL}"):
        number = leftover.name.removeprefix(prefix).removesuffix(_PARTIAL)
        if number.isdecimal() and not _runs(int(number)):
            with contextlib.suppress(OSError):
                leftover.unlink()


def _prefix(path: Path) -> str:
    """Of the names that `path` has while it is written: a folder may be that of many machines."""
    return f".{path.name}.{platform.node()}."


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
