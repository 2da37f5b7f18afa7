"""The centroids of a bank's clusters, for the CPU (`cpu_clusters`) and a GPU (`gpu_clusters`)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.cpu_bank import LANES, MOST_CLUSTERS

_SMALLEST = 4096  # rows; fewer are searched as fast without clusters
_CLUSTERS_PER_ROOT = 0.8  # clusters per square root of rows; measured, the optimum is flat
_ITERATIONS = 4
_SAMPLES_PER_CLUSTER = 64  # more of either did not make searches faster
_LARGEST = 1e15  # coordinates beyond might overflow when squared
_MOST_DIMS = 4096


def default_clusters(rows: int) -> int:
    """How many clusters to sort a bank of `rows` rows into; 0 if clusters would not pay."""
    if rows < _SMALLEST:
        return 0
    return min(MOST_CLUSTERS, round(_CLUSTERS_PER_ROOT * math.sqrt(rows) / LANES) * LANES)


def clusters_wanted(embeddings: Tensor, num_clusters: int | None) -> int:
    """How many clusters to sort a bank [M, D] into; 0 to search it without clusters.

    num_clusters: what was asked for; None chooses it from M. Never more than rows or MOST_CLUSTERS,
    and 0 where `can_be_clustered` is false.
    """
    rows = embeddings.shape[0]
    wanted = default_clusters(rows) if num_clusters is None else num_clusters
    wanted = min(wanted, rows, MOST_CLUSTERS)
    return wanted if wanted > 0 and can_be_clustered(embeddings) else 0


def can_be_clustered(embeddings: Tensor) -> bool:
    """Whether the search's bounds hold for embeddings [M, D]: in D, and in size of coordinates."""
    low, high = embeddings.aminmax()
    return embeddings.shape[1] <= _MOST_DIMS and max(-float(low), float(high)) <= _LARGEST


def find_centroids(points: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    """Lloyd's k-means on a sample of points; returns centroids [C, A] float32.

    points: [M, A] float32 or float16, on any device. wanted: C, less clusters that become empty.
    """
    rows, axes = points.shape
    picked = torch.randperm(rows, generator=generator, device="cpu")[
        : _SAMPLES_PER_CLUSTER * wanted
    ]
    sample = points[picked.to(points.device)].float()
    centroids = sample[:wanted]
    for _ in range(_ITERATIONS):
        _, nearest = ops.nearest(sample, centroids)
        counts = torch.bincount(nearest, minlength=len(centroids))
        sums = torch.zeros(len(centroids), axes, dtype=torch.float64, device=points.device)
        sums.index_add_(0, nearest, sample.double())
        centroids = (sums / counts[:, None])[counts > 0].float()
    return centroids


class SortedRows(NamedTuple):
    """The M rows of a bank, sorted into C clusters."""

    order: Tensor
    """[M] int64: row numbers by cluster, within a cluster by radius, the lowest first on ties."""
    radii: Tensor
    """[M] float32: distance of each row to its centroid, in the order of the row numbers."""
    centroids: Tensor
    """[C, A] float32: centroids of the clusters, none of which is empty."""
    counts: Tensor
    """[C] int64: rows of each cluster."""


def sort_into_clusters(points: Tensor, centroids: Tensor, rows_at_once: int) -> SortedRows:
    """Assign each of the points [M, A] to its nearest centroid, and drop clusters without any.

    points: float32 or float16. centroids: [C, A] float32. rows_at_once: how many points to convert
    to float32 and search at once.
    """
    found = [ops.nearest(part.float(), centroids) for part in points.split(rows_at_once)]
    radii, nearest = (torch.cat(parts) for parts in zip(*found, strict=True))
    by_radius = torch.argsort(radii, stable=True)
    order = by_radius[torch.argsort(nearest[by_radius], stable=True)]
    counts = torch.bincount(nearest, minlength=len(centroids))
    used = counts > 0
    return SortedRows(order, radii, centroids[used].contiguous(), counts[used])
