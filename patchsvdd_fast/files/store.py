"""Model files: one safetensors file of tensors with a JSON header, written atomically.

A file from anywhere may be opened. Nothing in it is executed, damage is noticed by checksums, and
whoever reads a tensor or a field checks that it is what it should be. Checksums are no signature:
a forged file can give wrong answers, but not make a search leave its arrays.

Opening maps the file. It must not be cut short while it is in use, which would end the process;
`save` replaces files and never writes into one.

safetensors is imported when a file is read: scoring embeddings of one's own does without.
"""

from __future__ import annotations

import contextlib
import json
import platform
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .whole import remove_leftovers, written_whole

SCHEMA_VERSION = 4
_OLDEST_SCHEMA = 2  # that is still read
_OLDEST_WITH_CHECKSUMS = 4
_KINDS = ("detector", "checkpoint")
_HEADER_KEY = "patchsvdd_fast"
_CHECKSUMS_KEY = "checksums"
_DTYPES = {  # that models have, and their names in files
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
# JSON takes up to thirty times its size when read. Models have a hundred tensors and some kilobytes
# of header.
_MOST_HEADER_BYTES = 1 << 22
_MOST_TENSORS = 4096
_PART_BYTES = 1 << 22  # that a thread takes the checksum of at once; part of the format
_THREADS = 2


def save(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Write tensors and a JSON-serialisable header; `kind` is "detector" or "checkpoint".

    The file appears under its name only when it is complete and on disk; a failure leaves what was
    there before. Raises OSError if it cannot be written.
    """
    path = Path(path)
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


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the header of a model file.

    Tensors lie in the mapped file: contiguous, aligned, of the dtypes that models have. The header
    has a `kind`, a `schema_version` and a dict of `parameters`. All else is for the caller to
    check, within `naming`. Raises OSError if the file cannot be read, and ValueError if it is
    damaged, of another program, or of a newer schema.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a model file")
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
                    raise ValueError(f"{len(names)} tensors, a model has a hundred or so")
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a model file, or is damaged: {error}") from error
        for name, tensor in tensors.items():
            if tensor.dtype not in _DTYPES or tensor.data_ptr() % tensor.element_size():
                raise ValueError(f"{name} is {tensor.dtype}, or not aligned")
        _verify(metadata, tensors, header["schema_version"])
    return tensors, header


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, under the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Within the context, what the contents of a file are found to lack is a ValueError naming it.

    So are the errors of code that takes a field for what it is not: a list for a dict, say.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:  # not the file's fault
        raise
    except ValueError as error:
        if str(error).startswith(f"{path} "):
            raise
        raise ValueError(f"{path} is damaged: {error}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged, a field is not what it should be ({what})") from error


# --- inside ---------------------------------------------------------------------------------------


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, of contiguous tensors on the CPU.

    Not by `safetensors.torch.save_file`, which writes to a name of its own beside the path: if it
    is killed, nobody knows whose that file was.
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
    """Refuse before it is read what would take much memory to read."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")  # of all that comes before the tensors' bytes
    if size > _MOST_HEADER_BYTES:
        raise ValueError(f"{path} is not a model file, or is damaged: a header of {size:,} bytes")


def _parsed(path: Path, text: str) -> dict[str, Any]:
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError(f"its header must be a JSON object, got {text[:40]}")
    for name, kind in {"kind": str, "schema_version": int, "parameters": dict}.items():
        if type(header.get(name)) is not kind:  # a bool is no number
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
        raise ValueError(f"kind must be one of {_KINDS}, got {header['kind'][:40]!r}")
    return header


def _verify(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], schema: int) -> None:
    # Whatever the schema says: it may be what is damaged.
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
    """Of the header, and of each tensor: over its name, dtype, shape and bytes."""
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
