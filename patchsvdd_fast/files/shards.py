"""Model files in shards: an index beside files that each hold a part, as safetensors users know it.

`model.safetensors.index.json` says which file has each tensor (`weight_map`), and which files there
are. The first holds everything but the banks, the others parts of these. Names of files have a word
that is new with each save, and the index is replaced last: until then it names the old ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from . import store
from .folders import counted
from .whole import remove_leftovers, written_whole

SUFFIX = ".safetensors.index.json"
_METADATA_KEY = "patchsvdd_fast"
_MOST_BYTES = 1 << 28  # of an index
_FORMAT = 1  # of the entry in its metadata


def is_index(path: str | Path) -> bool:
    """Whether a path is that of an index, by its name."""
    return Path(path).name.endswith(SUFFIX)


class Shard(NamedTuple):
    """A file of a model in shards."""

    name: str
    fingerprint: str
    """As of `store.fingerprint`."""
    tensors: list[str]
    """Their names."""
    num_bytes: int
    """Of the tensors."""


class NewShards:
    """The files of a model that is being written, until an index names them.

    path: of the index, whose name ends with `SUFFIX`; else ValueError is raised. word: that all
    names of files have, the same in all processes that write one model. count: of files.
    """

    def __init__(self, path: str | Path, word: str, count: int) -> None:
        self.path, self.word, self.count = Path(path), word, count
        if not is_index(path):
            raise ValueError(f"a model in shards must be called NAME{SUFFIX}, got {path}")
        self._written: list[Path] = []

    @staticmethod
    def new_word() -> str:
        """A word that no model has had."""
        return secrets.token_hex(4)

    def write(
        self, number: int, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
    ) -> Shard:
        """Write file `number` of the model, from 1 on; see `store.save`."""
        name = f"{_stem(self.path)}-{self.word}-{number:05}-of-{self.count:05}.safetensors"
        path = self.path.with_name(name)
        self._written.append(path)
        store.save(path, kind, tensors, {**header, "model": self.word})
        size = sum(tensor.nbytes for tensor in tensors.values())
        return Shard(name, store.fingerprint(path), list(tensors), size)

    def finish(self, shards: Sequence[Shard]) -> None:
        """Write the index of all files, in their order; then remove those that it does not name.

        Raises OSError if it cannot be written, or if another save has removed a file meanwhile:
        then an older index is as it was.
        """
        names = {tensor: shard.name for shard in shards for tensor in shard.tensors}
        about = {
            "format": _FORMAT,
            "model": self.word,
            "files": {shard.name: shard.fingerprint for shard in shards},
        }
        size = sum(shard.num_bytes for shard in shards)
        index = {"metadata": {"total_size": size, _METADATA_KEY: about}, "weight_map": names}
        with written_whole(self.path) as partial:
            partial.write_text(json.dumps(index, indent=1) + "\n")
            for shard in shards:
                if not self.path.with_name(shard.name).is_file():
                    raise OSError(f"{shard.name} is gone: another save to this path has removed it")
        with contextlib.suppress(Exception):  # the model is there, whatever else is
            _remove_others(self.path)

    def discard(self) -> None:
        """Remove what was written."""
        for path in self._written:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Index:
    """The files of a model in shards, which are all there."""

    path: Path
    """Of the index; where that is a link, and the files are not beside it, of what it links to."""
    word: str
    names: tuple[str, ...]
    """Of the files: first the one without banks."""

    def load(self, number: int, kind: str) -> tuple[store.Tensors, dict[str, Any]]:
        """Open a file, by its number from 0 on; see `store.load`. Raises ValueError."""
        path = self.path.with_name(self.names[number])
        tensors, header = store.load(path)
        if header["kind"] != kind or header.get("model") != self.word:
            raise ValueError(f"{path} is not of the model {self.path}")
        return tensors, header


def read_index(path: str | Path) -> Index:
    """Read an index, and check that its files are there and those that were written with it.

    Raises FileNotFoundError naming a file that is missing, ValueError naming one that is damaged,
    or of another model, and for what is no index; OSError.
    """
    path = Path(path)
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(
            f"{path} is not the index of a model: it has {path.stat().st_size:,} bytes"
        )
    with store.naming(path):
        try:
            about = json.loads(path.read_text(encoding="utf-8"))["metadata"][_METADATA_KEY]
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{path} is not the index of a model of patchsvdd_fast") from None
        if about["format"] != _FORMAT:
            raise ValueError(f"{path} was written by a newer patchsvdd_fast")
        files: dict[str, str] = dict(about["files"])
        for name in files:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"it names a file that cannot be one of its own, {name!r}")
        index = Index(path, str(about["model"]), tuple(files))
    if len(files) < 2:
        raise ValueError(f"{path} is damaged: it names {counted(len(files), 'file')}")
    if path.is_symlink() and not path.with_name(index.names[0]).exists():
        index = replace(index, path=path.resolve())
    for name, written in files.items():
        _check(index.path, name, written)
    return index


def _check(path: Path, name: str, written: str) -> None:
    """Raise ValueError unless a file is the one that was written with the index."""
    shard = path.with_name(name)
    if not shard.is_file():
        raise FileNotFoundError(f"{shard} is missing, which is a part of the model {path}")
    found = store.fingerprint(shard)
    if found == written:
        return
    size, _, header = found.partition("-")
    of_index = str(written).partition("-")[0]
    if size != of_index and of_index.isdecimal():
        why = f"it has {int(size):,} bytes instead of {int(of_index):,}"
    else:
        why = f"its header has the hash {header}"
    raise ValueError(f"{shard} is damaged, or not of the model {path}: {why}")


def first_file(path: str | Path) -> Path:
    """The file with everything but the banks; of a model in one file, that file."""
    if not is_index(path):
        return Path(path)
    index = read_index(path)
    return index.path.with_name(index.names[0])


def fingerprint(path: str | Path) -> str:
    """What differs between models of other contents; see `store.fingerprint`."""
    if not is_index(path):
        return store.fingerprint(path)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _stem(path: Path) -> str:
    return path.name.removesuffix(SUFFIX)


def _remove_others(path: Path) -> None:
    """Remove files of earlier saves under this name, and of those that were killed."""
    ours = re.compile(
        rf"\.?({re.escape(_stem(path))}-[0-9a-f]{{8}}-\d{{5,}}-of-\d{{5,}}\.safetensors)(.*)"
    )
    there = list(path.parent.iterdir())
    # Read after that: of two saves at once the later one's index may be there already.
    named = json.loads(path.read_text(encoding="utf-8"))["metadata"][_METADATA_KEY]["files"]
    for other in there:
        found = ours.fullmatch(other.name)
        if found and found[2]:  # not whole: of a process that was killed, or still writes it
            remove_leftovers(path.with_name(found[1]))
        elif found and other.name not in named:
            with contextlib.suppress(OSError):
                other.unlink()
    remove_leftovers(path)
