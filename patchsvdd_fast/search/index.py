"""The rows of a bank, laid out for a search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files.folders import counted
from ..files.store import MappedFile
from ..ops.checks import (
    NO_GROUPS,
    Groups,
    as_embeddings,
    as_numbers,
    as_vectors,
    check_finite_rows,
    check_same_device,
)
from ..ops.cpu_bank import ClusterArrays
from ..ops.cpu_codes import CodedRows, encode_rows
from ..ops.gpu_bank import SegmentArrays
from ..ops.radius import Within, within_in_bank
from ..ops.search import nearest_in_bank, normalised
from .centroids import can_be_clustered
from .cpu_choice import can_be_coded, choose_codes, lay_out, suit_axes
from .cpu_clusters import extend_clusters, suit_clusters
from .gpu_clusters import build_segments, segments_about

_GROWTH = 2  # beyond this factor since clusters were made or tried, they are made or tried anew
# Added rows are searched plainly until they are more than _FEW_ROWS and this share of the others.
_FEW_ROWS = 1024
_SHARE_BESIDE_CLUSTERS, _SHARE_BESIDE_ROWS = 1 / 64, 1 / 8


class Index(NamedTuple):
    """The M rows of a bank of N images (or of N single embeddings), and how they are searched.

    Nothing here ever changes: a bank that changes gets another index. So a search in one thread
    beside a change in another sees the bank before it or after it.
    """

    data: Tensor
    """[M - T, D] float32 or float16: the rows in the order of their numbers, or of the clusters."""
    appended: Tensor | None
    """[T, D], rows that were added since and follow in number; None: none."""
    groups: Tensor
    """[N] int64: the group of each image."""
    grid: tuple[int, int]
    """Rows and columns of patches per image, (1, 1) for single embeddings."""
    patches: Tensor | None
    """[M] int64, ascending: which patch of all patches of the N images a row is; None: all are."""
    clusters: ClusterArrays | SegmentArrays | None
    """The clusters that `data` is sorted into, if it is."""
    codes: CodedRows | None
    """The codes of `data` where it is not clustered, if they are kept."""
    stretch: float
    """An upper bound on the norm of the projection of clusters on the CPU."""
    wanted_clusters: int | None
    """How many were asked for; None: as pay."""
    seed: int
    """Of the clustering."""
    tried_rows: int
    """How many rows there were when clusters were made or found not to pay."""
    keeps_codes: bool
    """Whether to keep codes."""
    radius: float
    """The covering radius, see `NormalBank.covering_radius`."""
    metric: str
    """Of its distances; rows are normalised for "cosine"."""
    file: MappedFile | None = None
    """The file whose memory a part of this lies in; None: none."""

    @classmethod
    def build(
        cls,
        rows: Tensor,
        groups: Tensor,
        grid: tuple[int, int],
        *,
        patches: Tensor | None = None,
        wanted_clusters: int | None = None,
        seed: int = 0,
        keeps_codes: bool = True,
        radius: float = 0.0,
        metric: str = "euclidean",
    ) -> Index:
        """An index of rows [M, D], clustered if that pays or was asked for."""
        return cls(
            rows,
            None,
            groups,
            grid,
            patches,
            clusters=None,
            codes=None,
            stretch=1.0,
            wanted_clusters=wanted_clusters,
            seed=seed,
            tried_rows=len(rows),
            keeps_codes=keeps_codes,
            radius=radius,
            metric=metric,
        ).laid_out(rows)

    def laid_out(self, rows: Tensor) -> Index:
        """With these rows [M, D], clustered anew if that pays or was asked for; all else stays."""
        none: dict[str, Any] = {"appended": None, "clusters": None, "codes": None}
        plain = self._replace(data=rows, stretch=1.0, tried_rows=len(rows), **none)
        if _on_gpu(rows):
            segments = build_segments(rows, self.wanted_clusters, self.seed)
            if segments is None:
                return plain
            return plain._replace(data=segments.data, clusters=segments)
        found = lay_out(
            rows, self.wanted_clusters, self.seed, plain.excluding(None), self.keeps_codes
        )
        if found is None or isinstance(found, CodedRows):
            return plain._replace(codes=found)
        clusters, stretch = found
        return plain._replace(data=clusters.data, clusters=clusters, stretch=stretch)

    def coded(self) -> Index:
        """With codes of `data`, where they are kept and searches on the CPU make use of them."""
        if self.clusters is not None or not self.keeps_codes or _on_gpu(self.data):
            return self._replace(codes=None)
        return self._replace(codes=choose_codes(self.data, self.seed, self.excluding(None)))

    # --- what it holds ----------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """M."""
        return self.data.shape[0] + (0 if self.appended is None else self.appended.shape[0])

    @property
    def patches_per_image(self) -> int:
        """I * J of the grid."""
        return self.grid[0] * self.grid[1]

    def in_words(self) -> str:
        """What it holds, without any of its values: such as "5,625 x 64, 9 images, 2.1 MB, cpu"."""
        parts = [f"{self.rows:,} x {self.data.shape[1]}"]
        if self.patches_per_image > 1:
            parts.append(counted(len(self.groups), "image"))
        if self.patches is not None:
            parts.append("coreset")
        if self.clusters is not None:
            parts.append(counted(len(self.clusters.centroids), "cluster"))
        elif self.codes is not None:
            parts.append("codes")
        if self.metric != "euclidean":
            parts.append(self.metric)
        return ", ".join([*parts, _size_in_words(self._bytes()), str(self.data.device)])

    def _bytes(self) -> int:
        """The memory of all its arrays, also where that is a file's; shared ones count once."""
        searched = () if self.clusters is None else tuple(self.clusters)
        coded = [] if self.codes is None else self.codes.tensors()
        arrays = [self.data, self.appended, self.groups, self.patches, *searched, *coded]
        sizes = {t.data_ptr(): t.nbytes for t in arrays if isinstance(t, Tensor)}
        return sum(sizes.values())

    def check_file(self) -> None:
        """Raise OSError if the file that it lies in was changed since it was opened."""
        if self.file is not None:
            self.file.check()

    def in_order(self) -> Tensor:
        """All rows [M, D] in the order of their numbers; `data` itself where that is all."""
        self.check_file()
        rows = self.data
        if self.clusters is not None:
            rows = torch.empty_like(self.data)
            rows[self.clusters.ids] = self.data
        return rows if self.appended is None else torch.cat([rows, self.appended])

    def at(self, numbers: Tensor) -> Tensor:
        """The rows [..., D] with these numbers [...] int64."""
        self.check_file()
        first = len(self.data)  # number of the first row that was appended
        places = numbers.clamp(max=first - 1)
        if self.clusters is not None:
            ids = self.clusters.ids
            wanted = torch.zeros(first, dtype=torch.bool, device=ids.device)
            wanted[places] = True
            found = wanted[ids].nonzero()[:, 0]
            found = found[ids[found].argsort()]  # where they lie, by number
            places = found[torch.searchsorted(ids[found], places)]
        rows = self.data[places]
        if self.appended is None:
            return rows
        others = self.appended[(numbers - first).clamp(min=0)]
        return torch.where((numbers < first)[..., None], rows, others)

    def patch_numbers(self) -> Tensor:
        """[M] int64: which patch of all patches of the N images each row is."""
        if self.patches is not None:
            return self.patches
        return torch.arange(self.rows, device=self.data.device)

    def excluding(self, query_groups: Tensor | None) -> Groups:
        """Groups for a search in which queries match no row of their own group [Q]."""
        if self.patches is None:
            return Groups(query_groups, self.groups, self.patches_per_image)
        return Groups(query_groups, self.groups[self.patches // self.patches_per_image])

    def asked(
        self, queries: Any, exclude_same_group: Any
    ) -> tuple[Tensor, torch.Size, Tensor | None]:
        """`as_queries` of this bank."""
        self.check_file()
        return as_queries(queries, exclude_same_group, self.data.shape[1], self.metric)

    def nearest(
        self,
        queries: Tensor,
        query_groups: Tensor | None,
        k: int | None,
        progress: Callable[[float], None] | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """`nearest_in_bank`, which has the options, for queries [Q, D] as `asked` gives them."""
        return nearest_in_bank(
            queries,
            self._layout,
            self.stretch,
            NO_GROUPS if query_groups is None else self.excluding(query_groups),
            progress,
            k=k,
            appended=self.appended,
            cosine=self.metric == "cosine",
            **options,
        )

    def within(
        self,
        queries: Tensor,
        radii: Tensor,
        query_groups: Tensor | None,
        most: int | None,
        progress: Callable[[float], None] | None,
    ) -> Within:
        """`within` for queries [Q, D], as for `nearest`, and radii [Q]."""
        return within_in_bank(
            queries,
            self._layout,
            radii,
            self.stretch,
            NO_GROUPS if query_groups is None else self.excluding(query_groups),
            progress,
            appended=self.appended,
            most=most,
            cosine=self.metric == "cosine",
        )

    @property
    def _layout(self) -> Tensor | CodedRows | ClusterArrays | SegmentArrays:
        """What of the rows is searched, but for those appended."""
        layout = self.codes if self.clusters is None else self.clusters
        return self.data if layout is None else layout

    # --- others made from it ----------------------------------------------------------------------

    def append(self, rows: Tensor, groups: Tensor, patches: Tensor | None) -> Index:
        """With more rows [M', D] of images [N'].

        patches: [M'] as of the index, among the patches of the N' images; None: all of them.
        """
        appended = rows if self.appended is None else torch.cat([self.appended, rows])
        together = self._replace(appended=appended, groups=torch.cat([self.groups, groups]))
        if patches is not None or self.patches is not None:
            first = len(self.groups) * self.patches_per_image
            new = torch.arange(len(rows), device=rows.device) if patches is None else patches
            together = together._replace(patches=torch.cat([self.patch_numbers(), first + new]))
        share = _SHARE_BESIDE_ROWS if self.clusters is None else _SHARE_BESIDE_CLUSTERS
        few = len(appended) <= max(_FEW_ROWS, share * len(self.data))
        return together if few else together.merged()

    def merged(self) -> Index:
        """Without `appended`: about the same centroids, unless the bank has changed too much."""
        if self.appended is None:
            return self
        clusters = self.clusters
        grown = self.rows > _GROWTH * self.tried_rows
        suits = True
        if isinstance(clusters, ClusterArrays):
            suits = suit_clusters(self.appended, clusters, self.stretch)
        elif self.codes is not None and self.codes.leading_axes is not None:
            suits = suit_axes(self.appended, self.codes.leading_axes)
        return self._with_rows(self.in_order(), anew=grown or not suits)

    def without(self, gone: Tensor) -> Index:
        """Without the images where `gone` [N] is true; those that follow get lower numbers."""
        images = self.patch_numbers() // self.patches_per_image
        kept = ~gone[images]
        patches = self.patches
        if patches is not None:
            fewer = gone.cumsum(0)[images[kept]]  # images gone before the row's
            patches = patches[kept] - fewer * self.patches_per_image
        changed = self._replace(groups=self.groups[~gone], patches=patches)
        return changed._with_rows(self.in_order()[kept], anew=False)

    def _with_rows(self, rows: Tensor, anew: bool) -> Index:
        """With these rows [M, D] instead; anew: as far as clusters go, too."""
        if anew or not can_be_clustered(rows):
            return self.laid_out(rows)
        changed = self._replace(data=rows, appended=None, codes=None)
        if self.codes is not None and can_be_coded(rows):
            return changed._replace(codes=encode_rows(rows, self.codes.leading_axes))
        if self.clusters is None:
            return changed.coded()
        if isinstance(self.clusters, SegmentArrays):
            segments = segments_about(rows, self.clusters.centroids)
            return changed._replace(data=segments.data, clusters=segments)
        clusters, stretch = extend_clusters(rows, self.clusters, self.stretch)
        return changed._replace(data=clusters.data, clusters=clusters, stretch=stretch)


def _size_in_words(size: float) -> str:
    """Bytes, such as "2.1 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB"


def as_queries(
    queries: Any, exclude_same_group: Any, dim: int, metric: str
) -> tuple[Tensor, torch.Size, Tensor | None]:
    """Queries as users give them [..., D]: [Q, D], their shape [...], and their groups [Q].

    exclude_same_group: [...], or the first axes of it, or None. Raises ValueError, TypeError.
    """
    given = as_vectors("queries", queries)
    if given.ndim < 1 or given.shape[-1] != dim:
        raise ValueError(
            f"queries must have shape [..., {dim}] to match the bank, got {list(given.shape)}"
        )
    shape = given.shape[:-1]
    groups = None
    if exclude_same_group is not None:
        groups = as_numbers("exclude_same_group", exclude_same_group)
        if groups.shape != shape[: groups.ndim]:
            raise ValueError(
                f"exclude_same_group must have shape {list(shape)} to match the queries, "
                f"got {list(groups.shape)}"
            )
        missing = (1,) * (len(shape) - groups.ndim)
        groups = groups.view(*groups.shape, *missing).expand(shape).flatten()
    flat = given.reshape(-1, dim)
    return normalised("queries", flat) if metric == "cosine" else flat, shape, groups


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


# --- what users give ------------------------------------------------------------------------------


def as_rows(
    embeddings: Any, storage: torch.dtype, metric: str = "euclidean"
) -> tuple[Tensor, tuple[int, int]]:
    """The checked rows [M, D], contiguous and in the storage dtype, and their grid (I, J).

    embeddings: [M, D] or [N, I, J, D]. metric: "cosine" normalises them.
    """
    given, grid = as_embeddings(embeddings)
    if given.numel() == 0:
        raise ValueError(f"a bank needs at least one embedding, got {list(given.shape)}")
    rows = given.detach().reshape(-1, given.shape[-1])
    check_finite_rows("embeddings", rows)
    if metric == "cosine":
        rows = normalised("embeddings", rows.float())
    stored = rows.to(storage).contiguous()
    if storage == torch.float16 and rows.dtype != storage:
        try:
            check_finite_rows("embeddings", stored)
        except ValueError as error:
            raise ValueError("embeddings are too large for float16 storage") from error
    return stored, grid


def as_groups(groups: Any, rows: Tensor, grid: tuple[int, int], count: int | None = None) -> Tensor:
    """Groups [N] of rows [M, D], checked, or numbered from 0. count: N where rows do not tell."""
    count = len(rows) // (grid[0] * grid[1]) if count is None else count
    if groups is None:
        return torch.arange(count, device=rows.device)
    given = as_numbers("groups", groups)
    check_same_device("groups", given, "embeddings", rows)
    if given.shape != (count,):
        raise ValueError(f"groups must have shape [{count}], got {list(given.shape)}")
    return given
