"""Writing files so that they appear complete or not at all."""

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
    """Yield the path of a new file to write to, which then replaces `path`.

    It replaces `path` only when it is complete and on disk; after a failure, `path` is as it was.
    Raises OSError naming `path` if it cannot be written.
    """
    partial = path.with_name(f"{_prefix(path)}{os.getpid()}{_PARTIAL}")
    try:
        partial.unlink(missing_ok=True)  # left by a killed process with the same number
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
    """Remove the partial files of processes on this computer that were killed writing `path`.

    This lists the whole folder, so use it for large files, of which a folder holds few.
    """
    if os.name != "posix":
        return  # on Windows, os.kill with signal 0 might end the process
    prefix = _prefix(path)
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*{_PARTIAL}"):
        number = leftover.name.removeprefix(prefix).removesuffix(_PARTIAL)
        if number.isdecimal() and not _runs(int(number)):
            with contextlib.suppress(OSError):
                leftover.unlink()


def _prefix(path: Path) -> str:
    """Prefix of partial files' names; has the computer's, as folders may be on a network."""
    return f".{path.name}.{platform.node()}."


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it belongs to another user
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
