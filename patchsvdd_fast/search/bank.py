"""The bank: embeddings of normal patches, searched exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import store
from ..ops.checks import (
    FloatArray,
    IntArray,
    as_numbers,
    check_int,
    check_same_device,
    like_input,
)
from ..ops.radius import MOST_WITHIN, Within, as_radii
from ..ops.search import as_neighbours, is_cosine
from .coreset import as_count, select_coreset
from .index import Index, as_groups, as_rows
from .index_state import STORAGES, index_of, state_of

_LARGEST_INT = 2**63 - 1


class NormalBank:
    """Holds the embeddings of normal patches and finds the nearest to a query, exactly.

    embeddings: [M, D], or [N, I, J, D] with one grid of patches per image; finite real numbers, not
        empty; a tensor, a NumPy array, an array with DLPack, or lists. The bank may share the
        memory of float32. Rows are numbered in this order.
    groups: [M] or [N] int64, the group of each entry of the first axis (row, or image). A search
        can leave out the rows of a query's own group. By default each entry is its own group,
        numbered from 0.
    storage: torch.float32, or torch.float16 to halve the memory. Embeddings are rounded to float32
        and then to it, here; answers are exact for the stored embeddings.
    clusters: how many clusters to sort the bank into; 0 for none; None chooses from the size and
        spread of the embeddings. It changes the speed, not the answers.
    seed: of the clustering.
    keep_codes: keep 8-bit codes of the embeddings of a bank that is not clustered, which take a
        quarter of the memory of float32; else every search makes them. For the CPU.
    metric: "euclidean", or "cosine", see `nearest`. The bank then keeps the normalised rows, in
        float32.

    Raises ValueError for wrong shapes and values, naming the first row that holds NaN or infinity,
    and for "cosine" the first that is zero; TypeError for a wrong dtype.
    """

    def __init__(
        self,
        embeddings: Tensor | FloatArray,
        *,
        groups: Tensor | IntArray | None = None,
        storage: torch.dtype = torch.float32,
        clusters: int | None = None,
        seed: int = 0,
        keep_codes: bool = True,
        metric: str = "euclidean",
    ) -> None:
        if storage not in STORAGES:
            raise ValueError(f"storage must be torch.float32 or torch.float16, got {storage}")
        if is_cosine(metric) and storage != torch.float32:
            raise ValueError(
                "a bank with metric='cosine' needs storage=torch.float32: rounded to float16, its "
                "rows would no longer have length one"
            )
        if clusters is not None:
            clusters = check_int("clusters", clusters, 0, _LARGEST_INT)
        seed = check_int("seed", seed, 0, _LARGEST_INT)
        rows, grid = as_rows(embeddings, storage, metric)
        self._index = Index.build(
            rows,
            as_groups(groups, rows, grid),
            grid,
            wanted_clusters=clusters,
            seed=seed,
            keeps_codes=bool(keep_codes),
            metric=metric,
        )

    @classmethod
    def _over(cls, index: Index) -> NormalBank:
        bank = cls.__new__(cls)
        bank._index = index
        return bank

    def __len__(self) -> int:
        return self._index.rows

    def __repr__(self) -> str:
        return f"NormalBank({self._index.in_words()})"

    @property
    def dim(self) -> int:
        """D, the length of an embedding."""
        return self._index.data.shape[1]

    @property
    def metric(self) -> str:
        """Of its distances: "euclidean" or "cosine"."""
        return self._index.metric

    @property
    def device(self) -> torch.device:
        """Where the bank lies and is searched."""
        return self._index.data.device

    @property
    def num_clusters(self) -> int:
        """How many clusters the bank is sorted into; 0 if it is not clustered."""
        clusters = self._index.clusters
        return 0 if clusters is None else len(clusters.centroids)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows I and columns J of patches per image; (1, 1) for a bank made from [M, D]."""
        return self._index.grid

    @property
    def groups(self) -> Tensor:
        """The group of each image [N], or of each row [M] of a bank made from [M, D]; int64."""
        return self._index.groups

    @property
    def embeddings(self) -> Tensor:
        """The stored embeddings [M, D] in the order of their row numbers; mostly a copy.

        Those of a bank with metric "cosine" are normalised.
        """
        return self._index.in_order()

    # --- searching --------------------------------------------------------------------------------

    def nearest(
        self,
        queries: Tensor | FloatArray,
        *,
        k: int | None = None,
        exclude_same_group: Tensor | IntArray | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Exact distance from each query to its nearest bank row, and that row's number.

        Distances are of the bank's metric: Euclidean, or 1 - cos of the angle (`ops.nearest`).

        queries: [..., D], finite, on the bank's device; real numbers, rounded to float32 once.
        k: how many neighbours to find, 1 to 32; None: one, and no axis for it in the results.
        exclude_same_group: [...] int64, the group of each query; a query cannot match rows of its
            own group. Or the first axes only, such as [N] for queries [N, I, J, D].
        progress: called now and then with the share done, 0 to 1 (only on the CPU).

        Returns distances [...] float32 and rows [...] int64, the lowest row on ties; infinity and
        -1 where every row is excluded. With k, [..., k]: by ascending distance, equally near ones
        by row, and infinity and -1 beyond the rows that a query may match. NumPy queries and lists
        give NumPy arrays. Raises ValueError for a wrong shape, for NaN or infinity in a query, and
        with metric "cosine" for a query of zeros; TypeError for what are no real numbers.
        """
        index = self._index
        flat, shape, query_groups = index.asked(queries, exclude_same_group)
        k = as_neighbours(k)
        distances, rows = index.nearest(flat, query_groups, k, progress)
        found = shape if k is None else (*shape, k)
        return like_input(queries, distances.view(found), rows.view(found))

    def within(
        self,
        queries: Tensor | FloatArray,
        radius: float | Tensor | FloatArray,
        *,
        exclude_same_group: Tensor | IntArray | None = None,
        most: int | None = MOST_WITHIN,
        progress: Callable[[float], None] | None = None,
    ) -> Within:
        """All rows whose distance to a query is at most a radius; `ops.within` says more.

        queries, exclude_same_group, progress: as for `nearest`; the bank lies on the CPU.
        radius: one for all queries, or of each [...]; at least 0, rounded to float32 once.
        most: how many rows to return at most, over all queries; None: as many as there are.

        All ties of the nearest row are ``bank.within(queries, bank.nearest(queries)[0])``. Returns
        a `Within`; queries [..., D] are numbered as if they were [N, D]. Raises what `nearest`
        does; ValueError for a radius that is negative or NaN, and for more rows than `most`;
        NotImplementedError for a bank on a GPU: use ``bank.to("cpu")``.
        """
        index = self._index
        flat, shape, query_groups = index.asked(queries, exclude_same_group)
        found = index.within(flat, as_radii(radius, shape), query_groups, most, progress)
        return Within(*like_input(queries, *found))

    def source(self, rows: Tensor | IntArray) -> Tensor:
        """The patches that bank rows came from.

        rows: [...] int64, from `nearest`, or one number.

        Returns [..., 3] int64: the number of the image (or of the embedding, in a bank made from
        [M, D]), then row and column in its grid of patches. Row -1, no match, gives -1, -1, -1.
        """
        index = self._index
        numbers = self._row_numbers(rows, -1)
        patches = numbers if index.patches is None else index.patches[numbers]
        image, patch = patches // index.patches_per_image, patches % index.patches_per_image
        columns = index.grid[1]
        where: Tensor = torch.stack([image, patch // columns, patch % columns], dim=-1)
        return where.where(numbers[..., None] >= 0, -1)

    def embeddings_of(self, rows: Tensor | IntArray) -> Tensor:
        """The stored embeddings [..., D] of bank rows [...] int64, which `nearest` found."""
        return self._index.at(self._row_numbers(rows, 0).to(self.device))

    def _row_numbers(self, rows: Tensor | IntArray, lowest: int) -> Tensor:
        numbers, count = as_numbers("rows", rows), len(self)
        if numbers.numel() and not lowest <= int(numbers.min()) <= int(numbers.max()) < count:
            raise ValueError(f"rows must be in [{lowest}, {count}), got {rows}")
        return numbers

    # --- coresets ---------------------------------------------------------------------------------

    def coreset(
        self,
        size: float,
        *,
        seed: int = 0,
        clusters: int | None = None,
        keep_codes: bool | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> NormalBank:
        """A bank of few of the rows, chosen so that no other row is far from them.

        The selection is PatchCore's, exactly: `search.coreset.select_coreset`.

        size: how many rows, an integer; or a share of them, a float above 0, up to 1.0.
        seed: of the first row and of the clustering.
        clusters, keep_codes: of the new bank, as of `NormalBank`; None for codes: as of this one.
        progress: called now and then with the share done, 0 to 1.

        Rows are numbered anew, in their order here. Groups, grid and `source` are those of this
        bank, so that an image can still be searched among the others. `covering_radius` says what
        it costs. Raises ValueError for a size out of range.
        """
        index = self._index
        count = as_count(size, index.rows)
        if clusters is not None:
            clusters = check_int("clusters", clusters, 0, _LARGEST_INT)
        rows = index.in_order()
        chosen = select_coreset(rows, count, seed, progress)
        kept = chosen.rows.sort().values
        patches = index.patches if count == index.rows else index.patch_numbers()[kept]
        return NormalBank._over(
            index._replace(
                patches=patches,
                wanted_clusters=clusters,
                seed=seed,
                keeps_codes=index.keeps_codes if keep_codes is None else bool(keep_codes),
                radius=index.radius + chosen.radius,
            ).laid_out(rows[kept])
        )

    @property
    def is_coreset(self) -> bool:
        """Whether some patches of its images are missing."""
        index = self._index
        return index.rows < len(index.groups) * index.patches_per_image

    @property
    def covering_radius(self) -> float:
        """How much farther a query's nearest row can be than in the bank of all rows.

        0 for a bank that is no coreset. Of a coreset, the largest distance of any row of the bank
        it was chosen from to the nearest row that was chosen; of a coreset of a coreset, the sum.
        With metric "cosine" this is, and bounds, the Euclidean distance of normalised vectors: the
        root of twice the cosine distance.
        """
        return self._index.radius

    # --- changing ---------------------------------------------------------------------------------

    def add(self, embeddings: Tensor | FloatArray, groups: Tensor | IntArray | None = None) -> None:
        """Append rows, which get the next row numbers.

        embeddings: [M', D] or [N', I, J, D], in the form that the bank was made from.
        groups: [M'] or [N'] int64; by default numbered on from the bank's largest group.

        Few rows cost little: they are searched beside the others until there are more of them.
        Raises ValueError if grid or D are not the bank's.
        """
        index = self._index
        rows, grid = as_rows(embeddings, index.data.dtype, index.metric)
        self._append(index, rows, grid, groups, None)

    def _append(
        self, index: Index, rows: Tensor, grid: tuple[int, int], groups: Any, patches: Tensor | None
    ) -> None:
        """Append rows [M', D]; patches: as for `Index.append`."""
        dim = index.data.shape[1]
        if rows.shape[1] != dim or grid != index.grid:
            raise ValueError(
                f"embeddings must match the bank's grid {list(index.grid)} and D = {dim}, "
                f"got grid {list(grid)} and D = {rows.shape[1]}"
            )
        check_same_device("embeddings", rows, "the bank", index.data)
        if groups is None:
            first = int(index.groups.max()) + 1
            if first > _LARGEST_INT - len(rows):
                raise ValueError(
                    "there are no groups beyond the bank's largest, so groups must be given"
                )
            count = len(rows) // index.patches_per_image
            groups = torch.arange(first, first + count, device=rows.device)
        elif patches is None:
            groups = as_groups(groups, rows, grid)
        # Last, and in one step: nothing has changed if this is interrupted.
        self._index = index.append(rows, groups, patches)

    def remove(self, groups: Tensor | IntArray) -> None:
        """Remove all rows of the given groups, [G] int64; later rows get lower numbers.

        Raises ValueError if a group is not in the bank, or if the bank would be left empty.
        """
        index = self._index
        named = as_numbers("groups", groups).to(self.device)
        missing = named[~torch.isin(named, index.groups)]
        if len(missing):
            raise ValueError(f"group {int(missing[0])} is not in the bank")
        gone = torch.isin(index.groups, named)
        if gone.all():
            raise ValueError("removing these groups would leave the bank empty")
        self._index = index.without(gone)

    def merge(self, other: NormalBank, groups: Tensor | IntArray | None = None) -> None:
        """Append all rows of another bank.

        groups: [M'] or [N'] int64, as for `add`; by default the groups that they have there.

        Raises ValueError if grid, D or metric are not the bank's.
        """
        if not isinstance(other, NormalBank):
            raise TypeError(f"only a NormalBank can be merged, got {type(other).__name__}: use add")
        index, theirs = self._index, other._index
        if index.metric != theirs.metric:
            raise ValueError(f"a bank with metric {theirs.metric!r} does not fit {index.metric!r}")
        rows, _ = as_rows(theirs.in_order(), index.data.dtype)
        given = theirs.groups if groups is None else groups
        named = as_groups(given, rows, theirs.grid, count=len(theirs.groups))
        self._append(index, rows, theirs.grid, named, theirs.patches)

    def to(self, device: torch.device | str) -> NormalBank:
        """A copy of this bank on a device, clustered anew; the bank itself if it is there."""
        target, index = torch.device(device), self._index
        if target.type == self.device.type and target.index in (None, self.device.index):
            return self
        return NormalBank._over(
            index._replace(
                groups=index.groups.to(target),
                patches=None if index.patches is None else index.patches.to(target),
            ).laid_out(index.in_order().to(target))
        )

    # --- saving -----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the bank to one safetensors file, atomically, for `open`. Raises OSError."""
        store.save(path, "bank", self.state_dict(), {"parameters": {}})

    @classmethod
    def open(cls, path: str | Path, keep_codes: bool = True) -> NormalBank:
        """A bank over the memory of a file written by `save`, which is mapped, not copied.

        keep_codes: as of `NormalBank`. Raises OSError if the file cannot be read; ValueError if it
        holds no bank, is damaged, or of a newer version.
        """
        tensors, header = store.load(path)
        if header["kind"] != "bank":
            raise ValueError(f"{path} holds a {header['kind']}, not a bank alone")
        with store.naming(path):
            return cls.from_state_dict(tensors, keep_codes)

    def state_dict(self) -> dict[str, Tensor]:
        """The bank as named tensors on the CPU, for `from_state_dict`.

        The clusters of a bank on the CPU are kept; a bank on a GPU is clustered anew for the CPU.
        """
        bank = self.to("cpu")
        bank._index = bank._index.merged()
        return state_of(bank._index)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], keep_codes: bool = True) -> NormalBank:
        """A bank over the memory of the tensors of `state_dict` (which may be a mapped file).

        keep_codes: as of `NormalBank`; they are made anew. Raises ValueError if tensors are
        missing, do not fit together, or hold NaN or infinity.
        """
        return cls._over(index_of(state, keep_codes))
