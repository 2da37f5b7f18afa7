"""Clustering a bank on the CPU, so that a search needs to look at little of it.

The embeddings are projected on their first principal axes, which hold nearly all of the variance of
real patch embeddings, and clustered there. None of this can change an answer: a projection
lengthens no distance by more than its *stretch*, an upper bound on its norm, and every bound allows
for rounding (docs/design/cpu-search.md).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.cpu_bank import (
    LANES,
    ClusterArrays,
    floats,
    link_clusters,
    pack_clusters,
    project,
    release_memory,
)
from ..ops.search_kernels import Found, search_rows
from .centroids import find_centroids, sort_into_clusters

_COVARIANCE_SAMPLES = 8192
# Of wider embeddings only so many axes are looked for, in a sample of so many rows: all axes of
# 4,096 dimensions take half a minute, and more axes than these would save little.
_WIDE, _MOST_AXES, _WIDE_SAMPLES = 512, 384, 4096
_OVERSAMPLING, _POWER_ITERATIONS = 16, 2  # of the range finder (Halko, Martinsson & Tropp 2011)
_VARIANCE_LEFT_OUT = 0.015  # share that the projection may leave out
# What is added to clusters may lie so much farther off the axes, and from the centroids (squared),
# than their own rows, before it needs others.
_MOST_OFF_AXES, _MOST_SPREAD = 0.1, 4.0
_ROWS_AT_ONCE = 131_072  # when assigning rows to centroids
_ROWS_PER_CLUSTER = 16  # of the sample by which the cost of a search is foreseen
# What searches take, in the time that one dimension of a pair of codes takes brute force, which
# compares many queries at a time. Fitted to times on AVX-512 of real features and of drawn ones
# with 16 to 768 dimensions, at their lower end: clusters take this or longer.
_PAIR_OF_CODES = 16  # for a pair, besides its dimensions
_PAIR_IN_CLUSTERS, _DIMENSION_IN_CLUSTERS = 56, 1.4
_RESCORED_DIMENSION = 60  # of a row that passes by its codes in clusters, unless many do
_MOST_RESCORING = 0.25  # of brute force; many rows lie side by side, or are left to brute force


class Spectrum(NamedTuple):
    """How the variance of embeddings [M, D] falls along their principal axes, by a sample."""

    mean: Tensor
    """[D] float32."""
    left_out: Tensor
    """[N] float64: the share of the variance that is left out by the axes up to each."""
    vectors: Tensor
    """[D, N] float64: the first N principal axes, in columns."""


def build_clusters(
    embeddings: Tensor, num_clusters: int, seed: int = 0, known: Spectrum | None = None
) -> tuple[ClusterArrays, float]:
    """Cluster a bank; returns its arrays and the stretch of its projection.

    embeddings: [M, D] float32 or float16, finite, contiguous, on the CPU, fit for clusters
        (`can_be_clustered`). num_clusters: at least 1, see `clusters_wanted`. known: their
        spectrum; None computes it.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    mean, basis, stretch = principal_axes(known or spectrum(embeddings, generator))
    projected, errors = project(embeddings, mean, basis, stretch)
    centroids = find_centroids(projected, num_clusters, generator)
    packed = _pack(embeddings, mean, basis, stretch, projected, errors, centroids)
    del projected, errors
    return _sorted(packed), stretch


def cost_in_clusters(
    embeddings: Tensor,
    num_clusters: int,
    known: Spectrum,
    queries: Tensor,
    distances: Tensor,
    generator: torch.Generator,
) -> float:
    """About what a search in clusters would take at least, as a share of one by codes, by a sample.

    It follows from the shares of the bank that no bound rules out, and that are rescored, if each
    query's bound is the distance to its nearest row from the start.

    embeddings: [M, D], num_clusters: as for `build_clusters`. queries: [Q, D] float32, and
    distances: [Q] float32, to their nearest rows. generator: of the sample.
    """
    mean, basis, stretch = principal_axes(known)
    count = _ROWS_PER_CLUSTER * num_clusters
    picked = torch.randint(len(embeddings), (count,), generator=generator, device="cpu")
    rows, _ = project(embeddings[picked], mean, basis, stretch)
    centroids = find_centroids(rows, num_clusters, generator)
    radii, own = ops.nearest(rows, centroids)
    asked, _ = project(queries, mean, basis, stretch)
    to_centroids = torch.cdist(asked, centroids)
    closest, at = to_centroids.min(dim=1)
    gaps = torch.cdist(centroids, centroids)[at][:, own]
    to_own = to_centroids[:, own]  # [Q, rows of the sample]
    annulus = (to_own - radii).abs()
    half_plane = (to_own.square() - closest[:, None].square()) / (2 * gaps)  # 0 / 0: not ruled out
    ruled_out = (annulus > distances[:, None]) | (half_plane > distances[:, None])
    compared = 1 - ruled_out.double().mean(dim=1)  # [Q], as shares of the rows
    rescored = (torch.cdist(asked, rows) <= distances[:, None]).double().mean(dim=1)
    dim = embeddings.shape[1]
    by_codes, rescoring = dim + _PAIR_OF_CODES, dim * _RESCORED_DIMENSION
    pair = _PAIR_IN_CLUSTERS + _DIMENSION_IN_CLUSTERS * rows.shape[1]
    costs = compared * pair + (rescored * rescoring).clamp(max=_MOST_RESCORING * by_codes)
    return float(costs.mean()) / by_codes


def extend_clusters(
    embeddings: Tensor, arrays: ClusterArrays, stretch: float
) -> tuple[ClusterArrays, float]:
    """Cluster other embeddings [M, D] about the centroids of `arrays`, in the same projection."""
    projected, errors = project(embeddings, arrays.mean, arrays.basis, stretch)
    packed = _pack(
        embeddings, arrays.mean, arrays.basis, stretch, projected, errors, arrays.centroids
    )
    del projected, errors
    return _sorted(packed), stretch


def suit_clusters(embeddings: Tensor, arrays: ClusterArrays, stretch: float) -> bool:
    """Whether other embeddings [M, D] are like those that the clusters were made for.

    Else they lie off the projection's axes or far from all centroids, and a search that ends among
    them prunes little.
    """
    projected, _ = project(embeddings, arrays.mean, arrays.basis, stretch)
    along_axes = float(projected.square().sum(dtype=torch.float64))
    if len(arrays.basis):
        total = float((embeddings.double() - arrays.mean).square().sum())
        if total - along_axes > _MOST_OFF_AXES * total:
            return False
    found = Found.nothing(projected, None)
    search_rows(found, projected, arrays.centroids)
    spread = float(found.squared.mean(dtype=torch.float64))
    own_spread = float(arrays.block_radius.square().mean(dtype=torch.float64))
    return spread <= _MOST_SPREAD * own_spread


def principal_axes(
    known: Spectrum, left_out_share: float = _VARIANCE_LEFT_OUT
) -> tuple[Tensor, Tensor, float]:
    """Mean [D], principal axes [D, A] ([0, A] where projecting does not pay), and their stretch.

    left_out_share: of the variance, what the axes may leave out.
    """
    mean, left_out, vectors = known
    dim = len(mean)
    enough = int((left_out > left_out_share).sum()) + 1
    axes = _padded(enough)
    if axes > min(3 * dim // 4, len(left_out)):
        return mean, floats(0, _padded(dim)), 1.0
    basis = vectors[:, :axes].float().contiguous()
    # |basis^T x|^2 <= |basis^T basis|_2 |x|^2, and a matrix norm is at most the Frobenius norm.
    gram = basis.double().T @ basis.double()
    excess = float((gram - torch.eye(axes, dtype=torch.float64, device="cpu")).norm())
    return mean, basis, math.sqrt(1 + excess) * (1 + 1e-9)


def spectrum(embeddings: Tensor, generator: torch.Generator) -> Spectrum:
    """The spectrum of embeddings [M, D] on the CPU."""
    rows, dim = embeddings.shape
    samples = _WIDE_SAMPLES if dim > _WIDE else _COVARIANCE_SAMPLES
    picked = torch.randint(rows, (min(rows, samples),), generator=generator, device="cpu")
    sample = embeddings[picked].double()
    mean = sample.mean(dim=0).float()
    sample -= mean
    variances, vectors = (_first_axes if dim > _WIDE else _all_axes)(sample, generator)
    total = float(sample.square().sum()) / len(sample)
    left_out = total - variances.clamp(min=0).cumsum(0)
    return Spectrum(mean, left_out / total if total > 0 else left_out, vectors)


def _all_axes(sample: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Variances, descending, and principal axes in columns, of a centred sample [N, D] float64."""
    del generator
    variances, vectors = torch.linalg.eigh(sample.T @ sample / len(sample))
    return variances.flip(0), vectors.flip(1)


def _first_axes(sample: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """As `_all_axes`, but the first `_MOST_AXES` of them, nearly: by a randomised range finder."""
    largest = float(sample.abs().max())
    values = (sample / largest if largest > 0 else sample).float()  # whose squares fit float32
    count = min(_MOST_AXES + _OVERSAMPLING, len(sample))
    directions = torch.randn(
        values.shape[1], count, generator=generator, dtype=torch.float32, device="cpu"
    )
    for _ in range(1 + _POWER_ITERATIONS):
        directions, _ = torch.linalg.qr(values.T @ (values @ directions))
    orthonormal, _ = torch.linalg.qr(directions.double())
    variances, vectors = _all_axes((values @ orthonormal.float()).double(), generator)
    variances *= largest**2
    return variances[:_MOST_AXES], (orthonormal @ vectors)[:, :_MOST_AXES]


def _pack(
    embeddings: Tensor,
    mean: Tensor,
    basis: Tensor,
    stretch: float,
    projected: Tensor,
    errors: Tensor,
    centroids: Tensor,
) -> ClusterArrays:
    """Assign every row to its nearest centroid, and make what is kept beside the rows.

    The rows themselves, `data`, are still in the order of their numbers, see `_sorted`.
    """
    dim = embeddings.shape[1]
    order, radii, centroids, counts = sort_into_clusters(projected, centroids, _ROWS_AT_ONCE)
    blocks = -(-counts // LANES)
    num_blocks = int(blocks.sum())
    packs = basis.shape[1] // 4 if len(basis) else -(-dim // 4)
    count = len(centroids)
    arrays = link_clusters(
        ClusterArrays(
            data=embeddings,
            ids=order,
            starts=_offsets(counts),
            blocks=_offsets(blocks),
            codes=torch.empty(num_blocks, packs, LANES, 4, dtype=torch.int8, device="cpu"),
            bias=torch.empty(num_blocks * LANES, dtype=torch.int32, device="cpu"),
            block_radius=floats(num_blocks),
            mean=mean,
            basis=basis,
            centroids=centroids,
            scales=floats(count),
            slack=floats(count),
            code_slack=floats(count),
            reach=floats(count),
            centroid_tiles=floats(0),
            gaps=floats(0),
        )
    )
    pack_clusters(arrays, stretch, projected, errors, radii)
    return arrays


def _sorted(packed: ClusterArrays) -> ClusterArrays:
    """With the rows laid out cluster by cluster, once their projections take no memory any more."""
    release_memory()
    return packed._replace(data=packed.data[packed.ids])


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _padded(count: int) -> int:
    return -(-count // LANES) * LANES
