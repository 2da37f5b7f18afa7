"""Model files: one safetensors file of tensors with a JSON header, written atomically.

It is safe to open a file of unknown origin. Nothing in it is executed, checksums reveal damage, and
the code that reads a tensor or a field checks its type and values. Checksums are no signature: a
forged file can give wrong answers, but cannot make a search read outside its arrays.

Opening maps the file into memory. If it is cut short while it is open, the process ends; `save`
therefore replaces files and never writes into one. `MappedFile` notices others that did.

safetensors is imported only when a file is read: the search alone does not need it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .whole import remove_leftovers, written_whole

SCHEMA_VERSION = 5
_OLDEST_SCHEMA = 2  # that is still read
_OLDEST_WITH_CHECKSUMS = 4
_KINDS = ("detector", "detectors", "checkpoint", "bank", "sharded", "shard")
_HEADER_KEY = "patchsvdd_fast"
_CHECKSUMS_KEY = "checksums"
_DTYPES = {  # allowed in models, with their names in files
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
# Limits on what is read before it is checked: JSON takes up to thirty times its size when parsed. A
# model has about a hundred tensors and a header of some kilobytes, and some thirty tensors more for
# each category.
_MOST_HEADER_BYTES = 1 << 22
_MOST_TENSORS = 1 << 13
_PART_BYTES = 1 << 22  # bytes per checksum of a part of a tensor; belongs to the format
_THREADS = 2
_MOST_DESCRIPTORS = 64  # that files keep open: a process often has no more than 1,024


class MappedFile:
    """An open file, to notice later that somebody has written into it, whatever its name is then.

    What was replaced as `save` does it, by renaming another file, stays as it was while it is
    mapped; so does what was deleted. Pickled or copied, it becomes None: copies of tensors lie in
    memory of their own.

    It asks by a file descriptor that it keeps open; by the path, as long as that is still the same
    file, if `_MOST_DESCRIPTORS` are open, or if somebody closed all of the process, as daemons do.
    """

    _num_descriptors = 0

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path).absolute()
        self._descriptor = -1
        if MappedFile._num_descriptors < _MOST_DESCRIPTORS:
            self._descriptor = os.open(path, os.O_RDONLY)
            MappedFile._num_descriptors += 1
        self._opened = os.stat(path if self._descriptor == -1 else self._descriptor)  # noqa: PTH116

    def check(self) -> None:
        """Raise OSError if the file was changed in place; costs one `os.stat`."""
        now = self._status_of(self._descriptor) or self._status_of(self._path)
        if now is not None and _changed(now) != _changed(self._opened):
            raise OSError(
                f"{self._path} was changed in place while it was open, so answers would mix what "
                "it held and holds: open it again, and replace files by renaming, as `save` does"
            )

    def _status_of(self, where: int | Path) -> os.stat_result | None:
        """The status of a descriptor or path; None unless it is that of the file."""
        try:
            status = os.stat(where)  # noqa: PTH116 (half the time of Path.stat)
        except (OSError, ValueError):
            return None
        return status if os.path.samestat(status, self._opened) else None

    def __reduce__(self) -> tuple[Any, ...]:
        self.check()
        return _no_file, ()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) == -1:
            return
        type(self)._num_descriptors -= 1
        if self._status_of(self._descriptor) is not None:
            os.close(self._descriptor)


def _changed(status: os.stat_result) -> tuple[int, int]:
    """What writing into a file changes: its size, and when it was written, in nanoseconds."""
    return status.st_size, status.st_mtime_ns


def _no_file() -> None:
    """What becomes of a pickled `MappedFile`."""


class Tensors(dict[str, Tensor]):
    """Tensors by name that lie in the memory of a file."""

    def __init__(self, tensors: Mapping[str, Tensor], file: MappedFile) -> None:
        super().__init__(tensors)
        self.file = file


def save(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Write tensors and a JSON-serialisable header; `kind` is one of `_KINDS`.

    The file appears under its name only when it is complete and on disk; after a failure, an older
    file of that name is as it was. Raises OSError if it cannot be written, ValueError for more
    tensors than `load` takes.
    """
    path = Path(path)
    if len(tensors) > _MOST_TENSORS:
        raise ValueError(f"{len(tensors):,} tensors are more than the {_MOST_TENSORS:,} of a file")
    text = json.dumps(
        {
            **header,
            "kind": kind,
            "schema_version": SCHEMA_VERSION,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
    )
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {_HEADER_KEY: text, _CHECKSUMS_KEY: json.dumps(_checksums(text, stored))}
    remove_leftovers(path)
    with written_whole(path) as partial:
        _write(partial, stored, metadata)


def load(path: str | Path) -> tuple[Tensors, dict[str, Any]]:
    """Read the tensors and the header of a model file.

    Tensors lie in the mapped file: contiguous, aligned, of the dtypes that models have. The header
    has a `kind`, a `schema_version` and a dict of `parameters`. The caller has to check everything
    else, within `naming`. Raises OSError if the file cannot be read, and ValueError if it is
    damaged, not a model file, or of a schema that this version does not read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a model file")
    file_as_it_is = MappedFile(path)
    with naming(path):
        _check_size_of_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if _HEADER_KEY not in metadata:
                    raise ValueError(f"{path} is a safetensors file, but not one of patchsvdd_fast")
                header = _parsed(path, metadata[_HEADER_KEY])
                names = file.keys()
                if len(names) > _MOST_TENSORS:
                    raise ValueError(f"{len(names):,} tensors, more than {_MOST_TENSORS:,}")
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a model file, or is damaged: {error}") from error
        for name, tensor in tensors.items():
            if tensor.dtype not in _DTYPES or tensor.data_ptr() % tensor.element_size():
                raise ValueError(f"{name} is {tensor.dtype}, or not aligned")
        _verify(metadata, tensors, header["schema_version"])
    return Tensors(tensors, file_as_it_is), header


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, by the rest of their names."""
    return with_file_of(
        tensors, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )


def with_file_of(tensors: Mapping[str, Tensor], some: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some of the tensors, as `Tensors` if those are."""
    return some if (file := file_of(tensors)) is None else Tensors(some, file)


def file_of(tensors: Mapping[str, Tensor]) -> MappedFile | None:
    """The file whose memory tensors lie in; None if they lie in none."""
    return tensors.file if isinstance(tensors, Tensors) else None


def fingerprint(path: str | Path) -> str:
    """What differs between model files of other contents: size and a hash of the header.

    The header has the checksums of all tensors. Raises OSError, and ValueError for other files.
    """
    _check_size_of_header(Path(path))
    with Path(path).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        digest = hashlib.sha256(file.read(size)).hexdigest()
        return f"{os.fstat(file.fileno()).st_size}-{digest[:16]}"


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Within the context, turn errors about a file's contents into a ValueError that names it.

    That includes the errors of code that meets a field of the wrong type, such as a TypeError. An
    ImportError, of a package that the file needs, stays one, and names the file as well.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:  # not the file's fault
        raise
    except ImportError as error:  # nor is this, of what it takes to open it
        raise ImportError(f"{path}: {error}") from error
    except ValueError as error:
        if str(error).startswith(f"{path} "):
            raise
        raise ValueError(f"{path} is damaged: {error}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged, a field is not what it should be ({what})") from error


# --- inside ---------------------------------------------------------------------------------------


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of contiguous tensors on the CPU.

    `safetensors.torch.save_file` first writes to a temporary name of its own. If it is killed,
    nobody can tell whose that file was, so it is not used here.
    """
    # The largest elements first, so that all are aligned.
    in_order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    described: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in in_order:
        begin, end = end, end + tensor.nbytes
        described[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= _MOST_HEADER_BYTES, "`load` would refuse it"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in in_order:
            file.write(_bytes_of(tensor).numpy().data)


def _bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, [bytes] uint8."""
    return tensor.reshape(-1).view(torch.uint8)


def _check_size_of_header(path: Path) -> None:
    """Refuse a header that would take much memory to read, before reading it."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")  # of the header, after these 8 bytes
    if size > _MOST_HEADER_BYTES:
        raise ValueError(f"{path} is not a model file, or is damaged: a header of {size:,} bytes")


def _parsed(path: Path, text: str) -> dict[str, Any]:
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError(f"its header must be a JSON object, got {text[:40]}")
    for name, kind in {"kind": str, "schema_version": int, "parameters": dict}.items():
        if type(header.get(name)) is not kind:  # `type`, as a bool is an instance of int
            given = repr(header.get(name))[:40]
            raise ValueError(f"{name} must be of type {kind.__name__}, got {given}")
    schema = header["schema_version"]
    if schema < _OLDEST_SCHEMA:
        raise ValueError(
            f"{path} has file schema {schema} of a development version, "
            f"this version reads {_OLDEST_SCHEMA} to {SCHEMA_VERSION}: train it anew"
        )
    if schema > SCHEMA_VERSION:
        raise ValueError(
            f"{path} was written by a newer patchsvdd_fast (file schema "
            f"{schema}, this version reads up to {SCHEMA_VERSION})"
        )
    if header["kind"] not in _KINDS:
        raise ValueError(
            f"{path} holds a {header['kind'][:40]!r}, which this version does not know: it was "
            "written by a newer patchsvdd_fast, or is damaged"
        )
    return header


def _verify(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], schema: int) -> None:
    # Checked whatever the schema says, since the schema itself may be damaged.
    if _CHECKSUMS_KEY not in metadata:
        if schema >= _OLDEST_WITH_CHECKSUMS:
            raise ValueError("its checksums are missing")
        return
    stored = json.loads(metadata[_CHECKSUMS_KEY])
    found = _checksums(metadata[_HEADER_KEY], tensors)
    for name in sorted(found.keys() | stored.keys()):
        if found.get(name) != stored.get(name):
            raise ValueError(f"the checksum of {name} does not match")


def _checksums(text: str, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """CRC-32 of the header, and of each tensor's name, dtype, shape and bytes."""
    parts = [
        (name, part)
        for name, tensor in tensors.items()
        for part in _bytes_of(tensor).split(_PART_BYTES)
    ]
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(lambda part: zlib.crc32(part[1].numpy()), parts))
    of_parts: dict[str, list[int]] = {name: [] for name in tensors}
    for (name, _), checksum in zip(parts, sums, strict=True):
        of_parts[name].append(checksum)
    described = {
        f"tensor {name}": json.dumps([name, str(tensor.dtype), list(tensor.shape), of_parts[name]])
        for name, tensor in tensors.items()
    }
    return {k: zlib.crc32(v.encode()) for k, v in {"the header": text, **described}.items()}
