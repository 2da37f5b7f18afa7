"""The rows of a bank, laid out for a search."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.checks import NO_GROUPS, Groups
from ..ops.cpu_bank import ClusterArrays
from ..ops.cpu_codes import CodedRows, encode_rows
from ..ops.gpu_bank import SegmentArrays
from ..ops.search import nearest_in_bank
from .centroids import can_be_clustered
from .cpu_choice import choose_codes, lay_out
from .cpu_clusters import extend_clusters, suit_clusters
from .gpu_clusters import build_segments, segments_about

_GROWTH = 2  # beyond this factor since clusters were made or tried, they are made or tried anew
# Rows that were added are searched one by one, without clusters or codes, until they are more than
# _FEW_ROWS and than this share of the others.
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
        ).laid_out(rows)

    def laid_out(self, rows: Tensor) -> Index:
        """With these rows [M, D], clustered anew if that pays or was asked for; all else stays."""
        plain = self._replace(
            data=rows,
            appended=None,
            clusters=None,
            codes=None,
            stretch=1.0,
            tried_rows=len(rows),
        )
        if _on_gpu(rows):
            segments = build_segments(rows, self.wanted_clusters, self.seed)
            return (
                plain if segments is None else plain._replace(data=segments.data, clusters=segments)
            )
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

    def in_order(self) -> Tensor:
        """All rows [M, D] in the order of their numbers; `data` itself where that is all."""
        rows = self.data
        if self.clusters is not None:
            rows = torch.empty_like(self.data)
            rows[self.clusters.ids] = self.data
        return rows if self.appended is None else torch.cat([rows, self.appended])

    def at(self, numbers: Tensor) -> Tensor:
        """The rows [..., D] with these numbers [...] int64."""
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

    def nearest(
        self,
        queries: Tensor,
        query_groups: Tensor | None,
        k: int | None,
        progress: Callable[[float], None] | None,
    ) -> tuple[Tensor, Tensor]:
        """`nearest` for queries [Q, D]; query_groups: [Q], see `excluding`, or None."""
        layout = self.codes if self.clusters is None else self.clusters
        return nearest_in_bank(
            queries,
            self.data if layout is None else layout,
            self.stretch,
            NO_GROUPS if query_groups is None else self.excluding(query_groups),
            progress,
            k=k,
            appended=self.appended,
        )

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
        suits = not isinstance(clusters, ClusterArrays) or suit_clusters(
            self.appended, clusters, self.stretch
        )
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
        if self.codes is not None:
            return changed._replace(codes=encode_rows(rows, self.codes.leading))
        if self.clusters is None:
            return changed.coded()
        if isinstance(self.clusters, SegmentArrays):
            segments = segments_about(rows, self.clusters.centroids)
            return changed._replace(data=segments.data, clusters=segments)
        clusters, stretch = extend_clusters(rows, self.clusters, self.stretch)
        return changed._replace(data=clusters.data, clusters=clusters, stretch=stretch)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"
