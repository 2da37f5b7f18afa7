"""The centroids of a bank's clusters, for the CPU (`cpu_clusters`) and a GPU (`gpu_clusters`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..ops.cpu_bank import LANES, MOST_CLUSTERS

_SMALLEST = 4096  # rows; fewer are searched as fast without clusters
_CLUSTERS_PER_ROOT = 0.8  # clusters per square root of rows; measured, the optimum is flat
_ITERATIONS = 6
_SAMPLES_PER_CLUSTER = 128
_LARGEST = 1e15  # coordinates beyond might overflow when squared
_MOST_DIMS = 4096


def default_clusters(rows: int) -> int:
    """How many clusters to sort a bank of `rows` rows into; 0 if clusters would not pay."""
    if rows < _SMALLEST:
        return 0
    return min(MOST_CLUSTERS, round(_CLUSTERS_PER_ROOT * math.sqrt(rows) / LANES) * LANES)


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


def in_order_of_clusters(nearest: Tensor, radii: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sort a bank's rows by cluster, within a cluster by radius, the lowest row first on ties.

    nearest: [M] int64, the cluster of each row. radii: [M], its distance to the cluster's centroid.
    Returns the row numbers [M] in that order, and the number of rows in each cluster [count].
    """
    by_radius = torch.argsort(radii, stable=True)
    order = by_radius[torch.argsort(nearest[by_radius], stable=True)]
    return order, torch.bincount(nearest, minlength=count)
