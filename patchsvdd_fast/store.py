"""Model files: one safetensors file of tensors with a JSON header, written atomically.

safetensors is imported when it is needed: scoring embeddings of one's own does without.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import written_whole

SCHEMA_VERSION = 3
_OLDEST_SCHEMA = 2  # that is still read
_HEADER_KEY = "patchsvdd_fast"


def save(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Write tensors and a JSON-serialisable header; `kind` is "detector" or "checkpoint".

    The file appears under its name only when it is complete and on disk; a failure leaves what was
    there before. Raises OSError if it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

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
    with written_whole(path) as partial:
        mode = partial.stat().st_mode  # as the user's umask has it; safetensors makes it private
        try:
            save_file(stored, partial, metadata={_HEADER_KEY: text})
        except SafetensorError as error:  # wraps the system's error in its text
            raise OSError(str(error)) from error
        partial.chmod(mode)


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the header of a model file.

    Raises FileNotFoundError, or ValueError if the file is damaged, of another program, or of a
    newer schema.
    """
    import safetensors
    from safetensors import SafetensorError

    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a model file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _HEADER_KEY not in metadata:
                raise ValueError(f"{path} is a safetensors file, but not one of patchsvdd_fast")
            header = json.loads(metadata[_HEADER_KEY])
            if header["schema_version"] < _OLDEST_SCHEMA:
                raise ValueError(
                    f"{path} has file schema {header['schema_version']} of a development version, "
                    f"this version reads {_OLDEST_SCHEMA} to {SCHEMA_VERSION}: train it anew"
                )
            if header["schema_version"] > SCHEMA_VERSION:
                raise ValueError(
                    f"{path} was written by a newer patchsvdd_fast (file schema "
                    f"{header['schema_version']}, this version reads up to {SCHEMA_VERSION})"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a model file, or is damaged: {error}") from error


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, under the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
