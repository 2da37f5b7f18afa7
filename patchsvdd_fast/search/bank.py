"""The bank: embeddings of normal patches, searched exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import (
    NO_GROUPS,
    FloatArray,
    Groups,
    IntArray,
    as_tensor,
    check_dtype,
    check_finite_rows,
    check_int,
    check_same_device,
    like_input,
)
from ..ops.cpu_bank import ClusterArrays, link_clusters
from ..ops.gpu_bank import SegmentArrays
from ..ops.search import nearest_in_bank
from .centroids import can_be_clustered
from .cpu_clusters import build_clusters, extend_clusters
from .gpu_clusters import build_segments, segments_about

_DERIVED = ("centroid_tiles", "gaps")  # fields of ClusterArrays that are not saved
_STORAGES = (torch.float32, torch.float16)
_LARGEST_INT = 2**63 - 1
_GROWTH = 2  # a bank that has grown beyond this factor since it was clustered is clustered anew


class NormalBank:
    """Holds the embeddings of normal patches and finds the nearest to a query, exactly.

    embeddings: [M, D], or [N, I, J, D] with one grid of patches per image; float32 or float16,
        finite, not empty; a tensor, a NumPy array or an array with DLPack, whose memory the bank
        may share. Rows are numbered in this order.
    groups: [M] or [N] int64, the group of each entry of the first axis (row, or image). A search
        can leave out the rows of a query's own group. By default each entry is its own group,
        numbered from 0.
    storage: torch.float32, or torch.float16 to halve the memory. Embeddings are rounded to it once,
        here; answers are exact for the stored embeddings.
    clusters: how many clusters to sort the bank into; 0 for none; None chooses from the size and
        spread of the embeddings. It changes the speed, not the answers.
    seed: of the clustering.

    Raises ValueError for wrong shapes and values, naming the first row that holds NaN or infinity;
    TypeError for a wrong dtype.
    """

    def __init__(
        self,
        embeddings: Tensor | FloatArray,
        *,
        groups: Tensor | IntArray | None = None,
        storage: torch.dtype = torch.float32,
        clusters: int | None = None,
        seed: int = 0,
    ) -> None:
        if storage not in _STORAGES:
            raise ValueError(f"storage must be torch.float32 or torch.float16, got {storage}")
        if clusters is not None:
            clusters = check_int("clusters", clusters, 0, _LARGEST_INT)
        seed = check_int("seed", seed, 0, _LARGEST_INT)
        values, grid = _as_rows(as_tensor("embeddings", embeddings), storage)
        self._grid = grid
        self._groups = _as_groups(groups, values, self._rows_per_group)
        self._storage, self._wanted_clusters, self._seed = storage, clusters, seed
        self._cluster(values, self._groups)

    def __len__(self) -> int:
        return self._data.shape[0]

    def __repr__(self) -> str:
        clusters = "" if self._clusters is None else f", {len(self._clusters.centroids):,} clusters"
        return f"NormalBank({len(self):,} x {self.dim}, {self._data.device}{clusters})"

    @property
    def dim(self) -> int:
        """D, the length of an embedding."""
        return self._data.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the bank lies and is searched."""
        return self._data.device

    @property
    def num_clusters(self) -> int:
        """How many clusters the bank is sorted into; 0 if it is not clustered."""
        return 0 if self._clusters is None else len(self._clusters.centroids)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows I and columns J of patches per image; (1, 1) for a bank made from [M, D]."""
        return self._grid

    @property
    def groups(self) -> Tensor:
        """The group of each row [M], or of each image [N], int64."""
        return self._groups

    @property
    def embeddings(self) -> Tensor:
        """The stored embeddings [M, D] in the order of their row numbers; a copy if clustered."""
        if self._clusters is None:
            return self._data
        rows = torch.empty_like(self._data)
        rows[self._clusters.ids] = self._data
        return rows

    # --- searching --------------------------------------------------------------------------------

    def nearest(
        self,
        queries: Tensor | FloatArray,
        *,
        exclude_same_group: Tensor | IntArray | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Exact L2 distance from each query to its nearest bank row, and that row's number.

        queries: [..., D] float32, finite, on the bank's device.
        exclude_same_group: [...] int64, the group of each query; a query cannot match rows of its
            own group.
        progress: called now and then with the share done, 0 to 1 (only on the CPU).

        Returns distances [...] float32 and rows [...] int64, the lowest row on ties; infinity and
        -1 where every row is excluded. NumPy queries give NumPy arrays. Raises ValueError for a
        wrong shape, and for NaN or infinity in a query; TypeError for a wrong dtype.
        """
        given = as_tensor("queries", queries).detach()  # there is no gradient
        if given.ndim < 1 or given.shape[-1] != self.dim:
            raise ValueError(
                f"queries must have shape [..., {self.dim}] to match the bank, "
                f"got {list(given.shape)}"
            )
        shape = given.shape[:-1]
        groups = NO_GROUPS
        if exclude_same_group is not None:
            query_groups = as_tensor("exclude_same_group", exclude_same_group)
            if query_groups.shape != shape:
                raise ValueError(
                    f"exclude_same_group must have shape {list(shape)} to match the queries, "
                    f"got {list(query_groups.shape)}"
                )
            groups = Groups(query_groups.reshape(-1), self._groups, self._rows_per_group)
        distances, rows = nearest_in_bank(
            given.reshape(-1, self.dim),
            self._data if self._clusters is None else self._clusters,
            self._stretch,
            groups,
            progress,
        )
        return like_input(queries, distances.view(shape), rows.view(shape))

    def source(self, rows: Tensor | IntArray) -> Tensor:
        """The patches that bank rows came from.

        rows: [...] int64, from `nearest`.

        Returns [..., 3] int64: the number of the image (or of the embedding, in a bank made from
        [M, D]), then row and column in its grid of patches. Row -1, no match, gives -1, -1, -1.
        """
        numbers = as_tensor("rows", rows)
        check_dtype("rows", numbers, torch.int64)
        if numbers.numel() and not -1 <= int(numbers.min()) <= int(numbers.max()) < len(self):
            raise ValueError(f"rows must be in [-1, {len(self)}), got {rows}")
        image, patch = numbers // self._rows_per_group, numbers % self._rows_per_group
        columns = self._grid[1]
        where: Tensor = torch.stack([image, patch // columns, patch % columns], dim=-1)
        return where.where(numbers[..., None] >= 0, -1)

    # --- changing ---------------------------------------------------------------------------------

    def add(self, embeddings: Tensor | FloatArray, groups: Tensor | IntArray | None = None) -> None:
        """Append rows, which get the next row numbers.

        embeddings: [M', D] or [N', I, J, D], in the form that the bank was made from.
        groups: [M'] or [N'] int64; by default numbered on from the bank's largest group.

        Raises ValueError if grid or D are not the bank's.
        """
        values, grid = _as_rows(as_tensor("embeddings", embeddings), self._storage)
        if values.shape[1] != self.dim or grid != self._grid:
            raise ValueError(
                f"embeddings must match the bank's grid {list(self._grid)} and D = {self.dim}, "
                f"got grid {list(grid)} and D = {values.shape[1]}"
            )
        check_same_device("embeddings", values, "the bank", self._data)
        first = int(self._groups.max()) + 1
        if groups is None and first > _LARGEST_INT - len(values):
            raise ValueError(
                "there are no groups beyond the bank's largest, so groups must be given"
            )
        added = _as_groups(groups, values, self._rows_per_group, first)
        self._recluster(torch.cat([self.embeddings, values]), torch.cat([self._groups, added]))

    def remove(self, groups: Tensor | IntArray) -> None:
        """Remove all rows of the given groups, [G] int64; later rows get lower numbers.

        Raises ValueError if a group is not in the bank, or if the bank would be left empty.
        """
        gone = as_tensor("groups", groups).to(self.device)
        check_dtype("groups", gone, torch.int64)
        missing = gone[~torch.isin(gone, self._groups)]
        if len(missing):
            raise ValueError(f"group {int(missing[0])} is not in the bank")
        kept = ~torch.isin(self._groups, gone)
        if not kept.any():
            raise ValueError("removing these groups would leave the bank empty")
        rows = self.embeddings.view(-1, self._rows_per_group, self.dim)[kept]
        self._recluster(rows.flatten(0, 1), self._groups[kept])

    def merge(self, other: NormalBank, groups: Tensor | IntArray | None = None) -> None:
        """Append all rows of another bank.

        groups: [M'] or [N'] int64, as for `add`; by default the groups that they have there.
        """
        if not isinstance(other, NormalBank):
            raise TypeError(f"only a NormalBank can be merged, got {type(other).__name__}: use add")
        embeddings = other.embeddings
        if other._grid != (1, 1):
            embeddings = embeddings.view(-1, *other._grid, other.dim)
        self.add(embeddings.float(), other._groups if groups is None else groups)

    def to(self, device: torch.device | str) -> NormalBank:
        """A copy of this bank on a device, clustered anew; the bank itself if it is there."""
        target = torch.device(device)
        if target.type == self.device.type and target.index in (None, self.device.index):
            return self
        embeddings = self.embeddings.to(device).float()
        return NormalBank(
            embeddings.view(-1, *self._grid, self.dim),
            groups=self._groups.to(device),
            storage=self._storage,
            clusters=self._wanted_clusters,
            seed=self._seed,
        )

    # --- saving -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The bank as named tensors on the CPU, for `from_state_dict`.

        The clusters of a bank on the CPU are kept; a bank on a GPU is clustered anew for the CPU.
        """
        if _on_gpu(self._data):
            return self.to("cpu").state_dict()
        state = {
            "groups": self._groups,
            "grid": torch.tensor(self._grid),
            "settings": torch.tensor(
                [-1 if self._wanted_clusters is None else self._wanted_clusters, self._seed]
            ),
        }
        if self._clusters is None:
            return state | {"data": self._data}
        assert isinstance(self._clusters, ClusterArrays)
        arrays = self._clusters._asdict()
        kept = {name: values for name, values in arrays.items() if name not in _DERIVED}
        return (
            state
            | kept
            | {
                "stretch": torch.tensor([self._stretch], dtype=torch.float64),
                "clustered_rows": torch.tensor([self._clustered_rows]),
            }
        )

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> NormalBank:
        """A bank over the memory of the tensors of `state_dict` (which may be a mapped file).

        Raises ValueError if tensors are missing, do not fit together, or hold NaN or infinity.
        """
        bank = cls.__new__(cls)
        try:
            for name, tensor in state.items():
                if tensor.data_ptr() % tensor.element_size():
                    raise ValueError(f"a bank's {name} must be aligned in memory")
            rows, columns = _integers(state, "grid", 2)
            wanted, seed = _integers(state, "settings", 2)
            data, groups = state["data"], state["groups"]
            if data.ndim != 2 or data.numel() == 0 or data.dtype not in _STORAGES:
                raise ValueError(
                    "a bank's data must have shape [M, D], float32 or float16, "
                    f"got {list(data.shape)}, {data.dtype}"
                )
            if min(rows, columns) < 1 or groups.ndim != 1 or groups.dtype != torch.int64:
                raise ValueError(
                    "a bank's groups must be int64 [N] and its grid at least 1 x 1, "
                    f"got {groups.dtype} {list(groups.shape)} and {rows} x {columns}"
                )
            if len(groups) * rows * columns != len(data):
                raise ValueError(f"a bank of {len(groups)} groups cannot have {len(data)} rows")
            check_finite_rows("data", data)
            bank._grid, bank._groups, bank._seed = (rows, columns), groups, seed
            bank._wanted_clusters = None if wanted < 0 else wanted
            bank._data, bank._storage = data, data.dtype
            bank._clusters, bank._stretch, bank._clustered_rows = None, 1.0, 0
            if "ids" in state:
                empty = {name: data.new_empty(0, dtype=torch.float32) for name in _DERIVED}
                arrays = ClusterArrays(
                    **{n: empty[n] if n in empty else state[n] for n in ClusterArrays._fields}
                )
                arrays.check()
                if state["stretch"].shape != (1,) or not 1 <= float(state["stretch"]) < 2:
                    raise ValueError(f"a bank's stretch must be about 1, got {state['stretch']}")
                bank._clusters, bank._stretch = link_clusters(arrays), float(state["stretch"])
                (bank._clustered_rows,) = _integers(state, "clustered_rows", 1)
        except KeyError as error:
            raise ValueError(f"these tensors are not a bank: {error} is missing") from error
        return bank

    # --- inside -----------------------------------------------------------------------------------

    @property
    def _rows_per_group(self) -> int:
        return self._grid[0] * self._grid[1]

    def _cluster(self, values: Tensor, groups: Tensor) -> None:
        """Use these rows [M, D], in the order of their numbers; clustered if that pays."""
        clusters: ClusterArrays | SegmentArrays | None = None
        stretch = 1.0
        if self._wanted_clusters != 0 and _on_gpu(values):
            clusters = build_segments(values, self._wanted_clusters, self._seed)
        elif self._wanted_clusters != 0:
            whose = Groups(of_bank=groups, rows_per_group=self._rows_per_group)
            built = build_clusters(values, self._wanted_clusters, self._seed, whose)
            clusters, stretch = (None, 1.0) if built is None else built
        self._clusters, self._stretch = clusters, stretch
        self._data = values if self._clusters is None else self._clusters.data
        self._clustered_rows = len(values)

    def _recluster(self, values: Tensor, groups: Tensor) -> None:
        """Use changed rows [M, D]: about the same centroids, unless the bank has grown much."""
        grown = len(values) > _GROWTH * self._clustered_rows
        if self._clusters is None or grown or not can_be_clustered(values):
            self._cluster(values, groups)
        else:
            if isinstance(self._clusters, SegmentArrays):
                self._clusters = segments_about(values, self._clusters.centroids)
            else:
                clusters, stretch = extend_clusters(values, self._clusters, self._stretch)
                self._clusters, self._stretch = clusters, stretch
            self._data = self._clusters.data
        self._groups = groups  # last, so that nothing has changed if clustering is interrupted


def _integers(state: Mapping[str, Tensor], name: str, count: int) -> list[int]:
    """The values of the tensor [count] int64 of that name in a state."""
    values = state[name]
    if values.dtype != torch.int64 or values.shape != (count,):
        raise ValueError(
            f"a bank's {name} must be int64 [{count}], got {values.dtype} {list(values.shape)}"
        )
    return [int(value) for value in values]


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def _as_rows(embeddings: Tensor, storage: torch.dtype) -> tuple[Tensor, tuple[int, int]]:
    """The checked rows [M, D], contiguous and in the storage dtype, and their grid (I, J)."""
    if embeddings.ndim not in (2, 4):
        raise ValueError(
            f"embeddings must have shape [M, D] or [N, I, J, D], got {list(embeddings.shape)}"
        )
    check_dtype("embeddings", embeddings, torch.float32, torch.float16)
    if embeddings.numel() == 0:
        raise ValueError(f"a bank needs at least one embedding, got {list(embeddings.shape)}")
    grid = (1, 1) if embeddings.ndim == 2 else (embeddings.shape[1], embeddings.shape[2])
    rows = embeddings.detach().reshape(-1, embeddings.shape[-1])
    check_finite_rows("embeddings", rows)
    stored = rows.to(storage).contiguous()
    if storage == torch.float16 and rows.dtype != storage:
        try:
            check_finite_rows("embeddings", stored)
        except ValueError as error:
            raise ValueError("embeddings are too large for float16 storage") from error
    return stored, grid


def _as_groups(groups: Any, values: Tensor, rows_per_group: int, first: int = 0) -> Tensor:
    count = len(values) // rows_per_group
    if groups is None:
        return torch.arange(first, first + count, device=values.device)
    given = as_tensor("groups", groups)
    check_dtype("groups", given, torch.int64)
    check_same_device("groups", given, "embeddings", values)
    if given.shape != (count,):
        raise ValueError(f"groups must have shape [{count}], got {list(given.shape)}")
    return given
