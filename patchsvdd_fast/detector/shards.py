"""Banks of a detector that lie in parts: in several processes, and in several files.

Each process embeds its own images, keeps the banks of these, and writes them to files of its own.
All processes call each function at once; one alone can, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..files.shards import Index, NewShards, Shard
from ..files.store import below, naming
from ..search.bank import NormalBank
from ..search.processes import Processes, ToldError, share_of
from ..search.rounds import AnyBank, parts_of, processes_of
from ..search.sharded import ShardedBank

_MAIN, _PART = "sharded", "shard"  # kinds of files: with all but banks, and with parts of these


def is_sharded(banks: Mapping[Any, AnyBank]) -> bool:
    """Whether banks lie in parts."""
    return isinstance(next(iter(banks.values())), ShardedBank)


def save_in_shards(
    path: str | Path,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    banks: Mapping[PatchLevel, AnyBank],
) -> None:
    """Write a model: an index, a file with these tensors, and one for each part of the banks.

    path: of the index, NAME.safetensors.index.json. The first process writes all but the parts.
    Until the index is written, last, an older model of this name is as it was.

    Raises ValueError for another name; OSError, or ToldError in the processes without an error of
    their own, if anything cannot be written.
    """
    processes = processes_of(banks)
    own = list(zip(*(parts_of(bank) for bank in banks.values()), strict=True))
    images = processes.told([len(parts[0].groups) for parts in own])
    first = sum(map(len, images[: processes.rank]))  # number of the first part of this process
    word = processes.told(NewShards.new_word())[0]
    files = NewShards(path, word, 1 + sum(map(len, images)))
    shards: list[Shard] = []
    try:
        with processes.together():
            if processes.rank == 0:
                about = {**header, "images_of_shards": [*chain.from_iterable(images)]}
                shards.append(files.write(1, _MAIN, tensors, about))
            for number, parts in enumerate(own, first):
                part: dict[str, Tensor] = {}
                for level, bank in zip(banks, parts, strict=True):
                    state = bank.state_dict()
                    part |= {f"{_prefix(number, level)}{name}": state[name] for name in state}
                shards.append(files.write(number + 2, _PART, part, {"parameters": {}}))
    except BaseException:
        files.discard()
        raise
    # From here on an index may name the files, so they stay unless it is known that none does.
    told = processes.told(shards)
    try:
        with processes.together():
            if processes.rank == 0:
                files.finish([*chain.from_iterable(told)])
    except (OSError, ToldError):  # the first process could not write it; tells the others
        files.discard()
        raise


def _prefix(number: int, level: PatchLevel) -> str:
    """What the names of tensors of a part start with; no other part has the same."""
    return f"shard.{number}.bank.{level}."


def parts_in(
    index: Index, levels: Sequence[PatchLevel], device: torch.device, processes: Processes
) -> dict[PatchLevel, list[NormalBank]]:
    """The parts of a model in shards that this process opens, of each about as many.

    Raises ValueError or OSError naming a file that is damaged, or of another model.
    """
    count = len(index.names) - 1
    own = share_of(count, processes.rank, processes.count)
    parts: dict[PatchLevel, list[NormalBank]] = {level: [] for level in levels}
    for number in range(own.start, own.stop):
        tensors, _ = index.load(number + 1, _PART)
        with naming(index.path.with_name(index.names[number + 1])):
            for level in levels:
                bank = NormalBank.from_state_dict(below(tensors, _prefix(number, level)))
                parts[level].append(bank.to(device))
    return parts


def banks_of_parts(parts: Mapping[PatchLevel, Sequence[NormalBank]]) -> dict[PatchLevel, AnyBank]:
    """The banks whose parts all processes have opened."""
    return {level: ShardedBank.of(some) for level, some in parts.items()}


def load_main(index: Index) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a model in shards but its banks, and its header; see `store.load`."""
    return index.load(0, _MAIN)
