"""Clustering a bank so that a search needs to look at little of it.

The embeddings are projected on their first principal axes, which hold nearly all of the variance of
real patch embeddings, and clustered there. None of this can change an answer: projecting only
shortens distances, and every bound is widened by what rounding may have done (ARCHITECTURE.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..ops import _native
from ..ops.cpu_bank import MOST_CLUSTERS, ClusterArrays, native_projection

LANES = 16
"""Rows per block and multiple of the projected coordinates, as in the native kernels."""

_SMALLEST = 4096  # rows; fewer are searched as fast without clusters
_CLUSTERS_PER_ROOT = 0.8  # clusters per square root of rows; measured, the optimum is flat
_MOST_CLUSTERS = 4096  # bounds the matrix of distances between centroids to 64 MiB
_ITERATIONS = 6
_SAMPLES_PER_CLUSTER = 128
_COVARIANCE_SAMPLES = 32_768
_VARIANCE_LEFT_OUT = 0.015
_LARGEST = 1e15  # coordinates beyond might overflow when squared
_MOST_DIMS = 4096
_ROWS_AT_ONCE = 131_072  # when assigning rows to centroids
_TRIAL_QUERIES = 256
_WORTHWHILE = 0.25  # share of the bank a search may look at


def default_clusters(rows: int) -> int:
    """How many clusters suit a bank of that many rows; 0: none."""
    if rows < _SMALLEST:
        return 0
    return min(_MOST_CLUSTERS, round(_CLUSTERS_PER_ROOT * math.sqrt(rows) / LANES) * LANES)


def can_be_clustered(embeddings: Tensor) -> bool:
    """Whether embeddings [M, D] are of a size and a range that the bounds are made for."""
    low, high = embeddings.aminmax()
    return embeddings.shape[1] <= _MOST_DIMS and max(-float(low), float(high)) <= _LARGEST


def build_clusters(
    embeddings: Tensor, num_clusters: int | None = None, seed: int = 0
) -> tuple[ClusterArrays, float] | None:
    """Cluster a bank; returns its arrays and the stretch of the projection.

    embeddings: [M, D] float32 or float16, finite, contiguous, on the CPU. None as number of
    clusters: chosen from the size, and None is returned if clusters would not pay: for small
    banks, and where a trial finds that searches look at much of the bank nevertheless.
    """
    rows = embeddings.shape[0]
    wanted = default_clusters(rows) if num_clusters is None else num_clusters
    wanted = min(wanted, rows, MOST_CLUSTERS)
    if wanted < 1 or not can_be_clustered(embeddings):
        return None
    generator = torch.Generator("cpu").manual_seed(seed)
    mean, basis, stretch = _principal_axes(embeddings, generator)
    projected, errors = _project(embeddings, mean, basis, stretch)
    centroids = find_centroids(projected, wanted, generator)
    arrays = _pack(embeddings, mean, basis, stretch, projected, errors, centroids)
    del projected, errors
    _native.cpu.release_memory()
    if num_clusters is None and _share_looked_at(arrays, stretch, generator) > _WORTHWHILE:
        return None
    return arrays, stretch


def extend_clusters(
    embeddings: Tensor, arrays: ClusterArrays, stretch: float
) -> tuple[ClusterArrays, float]:
    """Cluster other embeddings [M, D] about the centroids there are."""
    projected, errors = _project(embeddings, arrays.mean, arrays.basis, stretch)
    packed = _pack(
        embeddings, arrays.mean, arrays.basis, stretch, projected, errors, arrays.centroids
    )
    return packed, stretch


def link(arrays: ClusterArrays) -> ClusterArrays:
    """Fill in `centroid_tiles` and `gaps`, which follow from the centroids."""
    count, axes = arrays.centroids.shape
    tiles = -(-count // LANES)
    linked = arrays._replace(
        centroid_tiles=_floats(tiles, axes, LANES), gaps=_floats(count, tiles * LANES)
    )
    _native.cpu.link_clusters(bank=linked.native(1.0), context=torch.get_num_threads())
    return linked


def _principal_axes(embeddings: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Mean [D], axes [D, A] (or [0, A] where projecting does not pay), and their stretch."""
    rows, dim = embeddings.shape
    picked = torch.randint(
        rows, (min(rows, _COVARIANCE_SAMPLES),), generator=generator, device="cpu"
    )
    sample = embeddings[picked].double()
    mean = sample.mean(dim=0).float()
    sample -= mean
    variances, vectors = torch.linalg.eigh(sample.T @ sample / len(sample))  # ascending
    share = variances.flip(0).clamp(min=0).cumsum(0)
    left_out = share[-1] - share
    enough = int((left_out > _VARIANCE_LEFT_OUT * share[-1]).sum()) + 1
    axes = _padded(enough)
    if axes > 3 * dim // 4:
        return mean, _floats(0, _padded(dim)), 1.0
    basis = vectors.flip(1)[:, :axes].float().contiguous()
    # |basis^T x|^2 <= |basis^T basis|_2 |x|^2, and a matrix norm is at most the Frobenius norm.
    gram = basis.double().T @ basis.double()
    excess = float((gram - torch.eye(axes, dtype=torch.float64, device="cpu")).norm())
    return mean, basis, math.sqrt(1 + excess) * (1 + 1e-9)


def _project(
    embeddings: Tensor, mean: Tensor, basis: Tensor, stretch: float
) -> tuple[Tensor, Tensor]:
    """Projected rows [M, A] float32 and bounds on their error [M] float32."""
    rows = embeddings.shape[0]
    projected = _floats(rows, basis.shape[1])
    errors = _floats(rows)
    _native.cpu.project(
        projection=native_projection(mean, basis, stretch),
        rows=rows,
        data=embeddings.data_ptr(),
        is_half=embeddings.dtype == torch.float16,
        projected=projected.data_ptr(),
        errors=errors.data_ptr(),
        context=torch.get_num_threads(),
    )
    return projected, errors


def find_centroids(points: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    """Lloyd's k-means on a sample: centroids [C, A] float32, C <= wanted. Empty clusters go.

    points: [M, A] float32 or float16, on any device.
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
    """Rows [M] by cluster, within one by radius, the lowest first on ties; rows per cluster [C]."""
    by_radius = torch.argsort(radii, stable=True)
    order = by_radius[torch.argsort(nearest[by_radius], stable=True)]
    return order, torch.bincount(nearest, minlength=count)


def _pack(
    embeddings: Tensor,
    mean: Tensor,
    basis: Tensor,
    stretch: float,
    projected: Tensor,
    errors: Tensor,
    centroids: Tensor,
) -> ClusterArrays:
    """Assign every row to its nearest centroid and lay the rows out cluster by cluster."""
    dim = embeddings.shape[1]
    found = [ops.nearest(part, centroids) for part in projected.split(_ROWS_AT_ONCE)]
    radii, nearest = (torch.cat(parts) for parts in zip(*found, strict=True))
    order, counts = in_order_of_clusters(nearest, radii, len(centroids))
    used = counts > 0
    centroids, counts = centroids[used].contiguous(), counts[used]
    blocks = -(-counts // LANES)
    num_blocks = int(blocks.sum())
    groups = basis.shape[1] // 4 if len(basis) else -(-dim // 4)
    count = len(centroids)
    arrays = link(
        ClusterArrays(
            data=embeddings[order],
            ids=order,
            starts=_offsets(counts),
            blocks=_offsets(blocks),
            codes=torch.empty(num_blocks, groups, LANES, 4, dtype=torch.int8, device="cpu"),
            bias=torch.empty(num_blocks * LANES, dtype=torch.int32, device="cpu"),
            block_radius=_floats(num_blocks),
            mean=mean,
            basis=basis,
            centroids=centroids,
            scales=_floats(count),
            slack=_floats(count),
            code_slack=_floats(count),
            reach=_floats(count),
            centroid_tiles=_floats(0),
            gaps=_floats(0),
        )
    )
    _native.cpu.pack_clusters(
        bank=arrays.native(stretch),
        projected=projected.data_ptr(),
        errors=errors.data_ptr(),
        radii=radii.data_ptr(),
        context=torch.get_num_threads(),
    )
    return arrays


def _share_looked_at(arrays: ClusterArrays, stretch: float, generator: torch.Generator) -> float:
    """Share of the bank that a search for one of its own rows, itself excluded, looks at."""
    rows = arrays.data.shape[0]
    picked = torch.randint(rows, (_TRIAL_QUERIES,), generator=generator, device="cpu")
    queries, own, all_rows = (
        arrays.data[picked].float(),
        arrays.ids[picked],
        torch.arange(rows, device="cpu"),
    )
    distances, indices = _floats(_TRIAL_QUERIES), torch.empty_like(own)
    looked_at = _native.cpu.nearest_in_clusters(
        bank=arrays.native(stretch),
        queries=_TRIAL_QUERIES,
        query_data=queries.data_ptr(),
        query_groups=own.data_ptr(),
        bank_groups=all_rows.data_ptr(),
        rows_per_group=1,
        distances=distances.data_ptr(),
        indices=indices.data_ptr(),
        context=torch.get_num_threads(),
    )
    return looked_at / (rows * _TRIAL_QUERIES)


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _floats(*shape: int) -> Tensor:
    """For the native code, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _padded(count: int) -> int:
    return -(-count // LANES) * LANES
