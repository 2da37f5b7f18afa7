"""Claiming a file or a folder to write to, so that no run destroys what another has written.

What is there is kept unless the caller was told to replace it, and of two processes that write to
one place the second is refused. A lock is held by the operating system, so a process that crashes
leaves none behind. Where there are no such locks (Windows), only the first half holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from io import RawIOBase
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = ".patchsvdd-run"
"""File in a folder of outputs that lists what was written there, see `RunFolder`; if several
processes write, each but the first has one of its own, `.patchsvdd-run.1`, ..."""

_LOCK = ".patchsvdd-lock"


class BusyError(OSError):
    """Another process is writing to the same file or folder."""


@contextlib.contextmanager
def claimed_file(path: Path, overwrite: bool = False) -> Iterator[None]:
    """Within the context this process alone writes the file `path`.

    overwrite: whether the file may exist. Raises ValueError if it does and may not, BusyError if
    another process writes it, OSError if nothing can be written there.
    """
    with _locked(path.with_name(f".{path.name}.lock"), path):
        if not overwrite:
            require_new(path)
        yield


def require_new(path: Path) -> None:
    """Raise ValueError if the file exists, naming the option that replaces it."""
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists already: --overwrite replaces it")


@contextlib.contextmanager
def _locked(lock: Path, what: Path) -> Iterator[None]:
    """Within the context this process alone holds `lock`, a file that is there only meanwhile.

    what: the path that it stands for, for messages of errors.
    """
    if fcntl is None:
        yield
        return
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(f"cannot write {what}: {error.strerror or error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise BusyError(
                f"another process{holder and f' ({holder})'} is writing {what}: wait until it has "
                "ended, or use another --output"
            ) from None
        except OSError:  # a file system without locks
            os.close(descriptor)
            warnings.warn(f"{what} cannot be locked: run no other command on it", stacklevel=4)
            yield
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                break
        os.close(descriptor)  # its holder removed it between our opening and locking it
    try:
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        lock.unlink(missing_ok=True)  # before it is unlocked, so that nobody's is removed
        os.close(descriptor)


class RunFolder:
    """A folder of outputs that one process writes to at a time, as a context manager.

    A manifest, the file `MANIFEST`, has a line for each file that was written: its path in the
    folder and the image it was made from. So a later run can go on, and what is replaced is what
    such runs have written, never a file of the user's.

    folder: made, where it is missing, when the context is entered.
    own: names in the folder, of files and folders, where such runs write. If one is there without a
        manifest, somebody else has put it there, or a run whose manifest is gone.
    resume: go on with what an earlier run wrote; its files stay.
    overwrite: remove what earlier runs wrote. Neither: there must be nothing of theirs.
    remedy: what can be done if there is, for the message.

    Entering raises ValueError if there are outputs that may not be replaced, BusyError if another
    process writes there, OSError if nothing can be written.
    """

    def __init__(
        self,
        folder: Path,
        own: Sequence[str] = (),
        *,
        resume: bool = False,
        overwrite: bool = False,
        remedy: str = "--overwrite replaces them",
    ) -> None:
        self.folder, self._own, self._remedy = folder, own, remedy
        self._resume, self._overwrite = resume, overwrite
        self._stack = contextlib.ExitStack()
        self._earlier: dict[str, str] = {}
        self._began = 0

    def check(self) -> None:
        """Raise what entering would for outputs that are there; writes nothing."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; --output names a folder")
        if self._resume:
            return
        listed = self._listed()
        there = [name for name in self._own if self._holds(self.folder / name)]
        if not self._overwrite:
            written = [name for name in listed if os.path.lexists(self.folder / name)]
            if there or written:
                raise ValueError(
                    f"{self.folder} holds the outputs of an earlier run ({(there or written)[0]}): "
                    f"{self._remedy}, or use another --output"
                )
            return
        tops = {Path(name).parts[0] for name in listed}
        unknown = [name for name in there if name not in tops]
        if unknown:
            raise ValueError(
                f"{self.folder / unknown[0]} is in the way, and --overwrite removes only what was "
                "written by this program: remove it, or use another --output"
            )

    def __enter__(self) -> RunFolder:
        self.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_locked(self.folder / _LOCK, self.folder))
            self.check()  # again: another process may have ended in between
            listed = self._listed()
            if self._resume:
                self._earlier = listed
            else:
                self._remove(listed)
            try:
                self._file = stack.enter_context(self._opened())
                self._began = os.fstat(self._file.fileno()).st_mtime_ns
            except OSError as error:
                raise OSError(f"cannot write {self.folder}: {error.strerror or error}") from error
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def began(self) -> int:
        """When it was entered: nanoseconds, as the file system counts them."""
        return self._began

    @contextlib.contextmanager
    def joined(self, process: int, began: int) -> Iterator[None]:
        """Within the context, write beside the process that has entered the folder.

        process: number of this one, from 1. began: of that one. Raises OSError.
        """
        self._earlier, self._began = self._listed(), began
        try:
            file = self._appended(self.folder / f"{MANIFEST}.{process}")
        except OSError as error:
            raise OSError(f"cannot write {self.folder}: {error.strerror or error}") from error
        with file as self._file:
            yield

    def made_from(self, inner: str) -> str | None:
        """What a file of the run that is gone on with was made from; None if it wrote no such."""
        return self._earlier.get(inner)

    def place(self, inner: Path, made_from: str = "") -> Path:
        """The path of a file that is about to be written, whose folders are made.

        inner: its path in the folder. made_from: what it is an output of, such as the path of an
        image; the same output of the same image may be written again. If there is a file by that
        name from something else, a hash is added to the name. Raises OSError.
        """
        if self._is_taken(inner, made_from):
            digest = hashlib.sha256(os.fsencode(made_from)).hexdigest()[:16]
            inner = inner.with_name(f"{inner.stem}-{digest}{inner.suffix}")
            if self._is_taken(inner, made_from):
                raise OSError(f"{self.folder / inner} is in the way")
        return self.note(inner, made_from)

    def note(self, inner: Path, made_from: str = "") -> Path:
        """As `place`, for a file that may be replaced, whatever it was made from."""
        path = self.folder / inner
        try:
            self._file.write(_line(os.fspath(inner), made_from))
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        return path

    def _is_taken(self, inner: Path, made_from: str) -> bool:
        if os.fspath(inner) in self._earlier:
            return self._earlier[os.fspath(inner)] != made_from
        try:  # what this run has written itself is newer than its beginning
            return (self.folder / inner).lstat().st_mtime_ns < self._began
        except OSError:
            return False

    def _opened(self) -> RawIOBase:
        """The manifest, to append to; without what is not to be gone on with."""
        path = self.folder / MANIFEST
        if not self._resume:
            for manifest in self.folder.glob(f"{MANIFEST}*"):
                manifest.unlink()
        file = self._appended(path)
        os.utime(path)  # the time of the file system, which may not be this computer's
        return file

    @staticmethod
    def _appended(path: Path) -> RawIOBase:
        """A manifest to append to; a killed run may have left half a line, which goes."""
        with path.open("ab") as before:
            before.truncate(path.read_bytes().rfind(b"\n") + 1)
        return path.open("ab", buffering=0)

    def _listed(self) -> dict[str, str]:
        """Files that earlier runs wrote, by their path in the folder: what each was made from."""
        listed = {}
        manifests = sorted(self.folder.glob(f"{MANIFEST}*"))
        lines = [line for path in manifests for line in path.read_bytes().split(b"\n")[:-1]]
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                entry = json.loads(line)
                parts = Path(entry["file"]).parts
                if parts and not Path(entry["file"]).is_absolute() and ".." not in parts:
                    listed[entry["file"]] = str(entry["made_from"])
        return listed

    def _remove(self, listed: dict[str, str]) -> None:
        """Remove the listed files, and folders that are then empty; nothing outside the folder."""
        root = Path(os.path.realpath(self.folder))
        folders: set[Path] = set()
        for name in listed:
            path = self.folder / name
            if Path(os.path.realpath(path.parent)).is_relative_to(root):  # no link leads out
                with contextlib.suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):
                    path.unlink()
                folders.update(self.folder / parent for parent in Path(name).parents)
        for folder in sorted(folders - {self.folder}, key=lambda path: -len(path.parts)):
            with contextlib.suppress(OSError):
                folder.rmdir()

    @staticmethod
    def _holds(path: Path) -> bool:
        """Whether it is a file, or a folder with something in it."""
        if path.is_dir():
            return any(path.iterdir())
        return os.path.lexists(path)


def _line(file: str, made_from: str) -> bytes:
    return json.dumps({"file": file, "made_from": made_from}).encode() + b"\n"
