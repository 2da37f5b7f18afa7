"""A bank whose rows have numbers of the user's own, and are removed by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import store
from ..ops.checks import FloatArray, IntArray, as_numbers, like_input
from ..ops.radius import MOST_WITHIN, Within
from .bank import NormalBank


class IdentifiedBank:
    """A `NormalBank` whose rows have ids: searches answer with them, and they name what to remove.

    A row of a `NormalBank` moves up when one before it is removed; an id stays what it is.

    bank: made from embeddings [M, D], whatever its metric, storage and groups; it may be a coreset.
        It is not changed by what happens here, nor this by changes to it.
    ids: [M] int64, one per row, each at least 0 and there once.

    A change happens as a whole, and a search beside it in another thread sees the bank before it or
    after it. Raises ValueError for a bank of grids [N, I, J, D], and for ids of a wrong shape,
    below 0, or there twice, naming one; TypeError for what are no integers.
    """

    def __init__(self, bank: NormalBank, ids: Tensor | IntArray) -> None:
        if not isinstance(bank, NormalBank):
            raise TypeError(f"bank must be a NormalBank, got {type(bank).__name__}")
        if bank.grid != (1, 1):
            raise ValueError(
                f"ids need a bank made from embeddings [M, D], got one of grids {list(bank.grid)}"
            )
        self._held = _copy(bank), _checked_ids(ids, len(bank), bank.device)

    def __len__(self) -> int:
        return len(self._held[1])

    def __repr__(self) -> str:
        return f"IdentifiedBank({self._held[0]._index.in_words()})"

    @property
    def bank(self) -> NormalBank:
        """The rows without their ids, in the order of `ids`: a copy, which shares their memory."""
        return _copy(self._held[0])

    @property
    def ids(self) -> Tensor:
        """[M] int64: the id of each row, in the order in which they were added."""
        return self._held[1].clone()

    def nearest(
        self,
        queries: Tensor | FloatArray,
        *,
        k: int | None = None,
        exclude_same_group: Tensor | IntArray | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`NormalBank.nearest`, with ids instead of rows; -1 where there is no row.

        Of equally near rows, the one that was added first comes first, whatever its id.
        """
        bank, ids = self._held
        distances, rows = bank.nearest(
            queries, k=k, exclude_same_group=exclude_same_group, progress=progress
        )
        return like_input(queries, torch.as_tensor(distances), _ids_of(rows, ids))

    def within(
        self,
        queries: Tensor | FloatArray,
        radius: float | Tensor | FloatArray,
        *,
        exclude_same_group: Tensor | IntArray | None = None,
        most: int | None = MOST_WITHIN,
        progress: Callable[[float], None] | None = None,
    ) -> Within:
        """`NormalBank.within`, whose `indices` are ids here; equally near rows as for `nearest`."""
        bank, ids = self._held
        found = bank.within(
            queries, radius, exclude_same_group=exclude_same_group, most=most, progress=progress
        )
        starts, distances = map(torch.as_tensor, found[:2])
        return Within(*like_input(queries, starts, distances, _ids_of(found.indices, ids)))

    def add(
        self,
        embeddings: Tensor | FloatArray,
        ids: Tensor | IntArray,
        groups: Tensor | IntArray | None = None,
    ) -> None:
        """Append rows [M', D] with ids [M'] int64; groups: as for `NormalBank.add`.

        Raises ValueError for ids as the class does, and for one that is in the bank, naming it.
        """
        bank, held = _copy(self._held[0]), self._held[1]
        bank.add(embeddings, groups)
        self._held = bank, _joined(held, _checked_ids(ids, len(bank) - len(held), bank.device))

    def merge(self, other: IdentifiedBank, groups: Tensor | IntArray | None = None) -> None:
        """Append all rows of another bank with their ids; groups: as for `NormalBank.merge`.

        Raises ValueError for an id that is in both, naming one.
        """
        if not isinstance(other, IdentifiedBank):
            raise TypeError(f"only an IdentifiedBank can be merged, got {type(other).__name__}")
        theirs, their_ids = other._held
        bank, held = _copy(self._held[0]), self._held[1]
        joined = _joined(held, their_ids.to(held.device))
        bank.merge(theirs, groups)
        self._held = bank, joined

    def remove(self, ids: Tensor | IntArray) -> None:
        """Remove the rows with these ids, [G] int64, in any order; each may be given repeatedly.

        Raises ValueError if an id is not in the bank, naming one, or if the bank would be left
        empty; nothing is removed then.
        """
        bank, held = self._held
        named = as_numbers("ids", ids).to(held.device).flatten()
        missing = named[~torch.isin(named, held)]
        if len(missing):
            raise ValueError(f"id {int(missing[0])} is not in the bank")
        gone = torch.isin(held, named)
        if gone.all():
            raise ValueError("removing these ids would leave the bank empty")
        index = bank._index
        images = torch.zeros(len(index.groups), dtype=torch.bool, device=held.device)
        images[index.patch_numbers()[gone]] = True  # each row is one, as the grid is 1 x 1
        self._held = NormalBank._over(index.without(images)), held[~gone]

    def coreset(self, size: float, **options: Any) -> IdentifiedBank:
        """`NormalBank.coreset`, with its options; the rows keep their ids."""
        bank, ids = self._held
        small = bank.coreset(size, **options)
        kept = torch.isin(bank._index.patch_numbers(), small._index.patch_numbers())
        return _over(small, ids[kept])

    def to(self, device: torch.device | str) -> IdentifiedBank:
        """`NormalBank.to`: a copy on a device; the bank itself if it is there."""
        bank, ids = self._held
        moved = bank.to(device)
        return self if moved is bank else _over(moved, ids.to(moved.device))

    def save(self, path: str | Path) -> None:
        """Write the bank and its ids to one safetensors file, atomically. Raises OSError.

        `NormalBank.open` opens it, too, without the ids.
        """
        store.save(path, "bank", self.state_dict(), {"parameters": {}})

    @classmethod
    def open(cls, path: str | Path, keep_codes: bool = True) -> IdentifiedBank:
        """A bank over the memory of a file written by `save`; as `NormalBank.open`."""
        tensors, header = store.load(path)
        if header["kind"] != "bank":
            raise ValueError(f"{path} holds a {header['kind']}, not a bank alone")
        if "own_ids" not in tensors:
            raise ValueError(f"{path} holds a bank without ids: use NormalBank.open")
        with store.naming(path):
            return cls.from_state_dict(tensors, keep_codes)

    def state_dict(self) -> dict[str, Tensor]:
        """As named tensors on the CPU: those of `NormalBank.state_dict`, and `own_ids` [M]."""
        bank, ids = self._held
        return {**bank.state_dict(), "own_ids": ids.cpu()}

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], keep_codes: bool = True
    ) -> IdentifiedBank:
        """A bank over the memory of the tensors of `state_dict`; as for `NormalBank`."""
        if "own_ids" not in state:
            raise ValueError("these tensors are no bank with ids: own_ids is missing")
        rows = {name: values for name, values in state.items() if name != "own_ids"}
        rows = store.with_file_of(state, rows)
        return cls(NormalBank.from_state_dict(rows, keep_codes), state["own_ids"])


def _copy(bank: NormalBank) -> NormalBank:
    """A bank of the same rows, which share their memory; either may be changed alone."""
    return NormalBank._over(bank._index)


def _over(bank: NormalBank, ids: Tensor) -> IdentifiedBank:
    """A bank that has these two, unchecked."""
    identified = IdentifiedBank.__new__(IdentifiedBank)
    identified._held = bank, ids
    return identified


def _checked_ids(ids: Any, rows: int, device: torch.device) -> Tensor:
    """A copy of ids [rows] on a device, checked."""
    given = as_numbers("ids", ids).to(device, copy=True)
    if given.shape != (rows,):
        raise ValueError(f"ids must have shape [{rows}], one per row, got {list(given.shape)}")
    if int(given.min()) < 0:
        raise ValueError(f"ids must be at least 0, got {int(given.min())}")
    in_order = given.sort().values
    twice = in_order[1:][in_order.diff() == 0]
    if len(twice):
        raise ValueError(f"ids must be unique, got {int(twice[0])} more than once")
    return given


def _joined(held: Tensor, more: Tensor) -> Tensor:
    """Ids [M] and [M'] together."""
    present = more[torch.isin(more, held)]
    if len(present):
        raise ValueError(f"id {int(present[0])} is already in the bank")
    return torch.cat([held, more])


def _ids_of(rows: Any, ids: Tensor) -> Tensor:
    """The ids of rows; -1 of row -1."""
    numbers = torch.as_tensor(rows)
    return ids[numbers.clamp(min=0)].where(numbers >= 0, -1)
