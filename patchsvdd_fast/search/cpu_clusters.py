"""Clustering a bank on the CPU, so that a search needs to look at little of it.

The embeddings are projected on their first principal axes, which hold nearly all of the variance of
real patch embeddings, and clustered there. None of this can change an answer: a projection
lengthens no distance by more than its *stretch*, an upper bound on its norm, and every bound allows
for rounding (docs/design/cpu-search.md).
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from ..ops.checks import NO_GROUPS, Groups
from ..ops.cpu_bank import (
    LANES,
    ClusterArrays,
    floats,
    link_clusters,
    pack_clusters,
    project,
    release_memory,
)
from ..ops.cpu_codes import encode_rows
from ..ops.search_kernels import Found, search_clusters, search_codes, search_rows
from .centroids import clusters_wanted, find_centroids, sort_into_clusters

_COVARIANCE_SAMPLES = 32_768
# Of wider embeddings only so many axes are looked for, in a sample of so many rows: all axes of
# 4,096 dimensions take half a minute, and more axes than these would save little.
_WIDE, _MOST_AXES, _WIDE_SAMPLES = 512, 384, 4096
_OVERSAMPLING, _POWER_ITERATIONS = 16, 2  # of the range finder (Halko, Martinsson & Tropp 2011)
_VARIANCE_LEFT_OUT = 0.015  # share that the projection may leave out
# What is added to clusters may lie so much farther off the axes, and from the centroids (squared),
# than their own rows, before it needs others.
_MOST_OFF_AXES, _MOST_SPREAD = 0.1, 4.0
_ROWS_AT_ONCE = 131_072  # when assigning rows to centroids
_TRIAL_RUNS, _TRIAL_RUN = 4, 128  # of rows that follow each other, as an image's patches do
_TRIALS = 2  # of each way, in turn, while it is not clear; the faster counts
# The bank's own rows are easier to find than new images' patches, which clusters may take up to
# three times as long for; brute force takes as long for all.
_WORTHWHILE = 2.0


def build_clusters(
    embeddings: Tensor,
    num_clusters: int | None = None,
    seed: int = 0,
    groups: Groups = NO_GROUPS,
) -> tuple[ClusterArrays, float] | None:
    """Cluster a bank; returns its arrays and the stretch of its projection, or None.

    embeddings: [M, D] float32 or float16, finite, contiguous, on the CPU.
    num_clusters: None chooses it from M, and gives up clusters where they would not pay: in small
        banks, and where a trial search is faster without them.
    groups: `of_bank`, the groups of the rows; a trial's queries match none of their own.

    Returns None where clusters were given up, asked for as 0, or where `can_be_clustered` is false.
    """
    wanted = clusters_wanted(embeddings, num_clusters)
    if wanted == 0:
        return None
    generator = torch.Generator("cpu").manual_seed(seed)
    mean, basis, stretch = principal_axes(embeddings, generator)
    projected, errors = project(embeddings, mean, basis, stretch)
    centroids = find_centroids(projected, wanted, generator)
    arrays = _pack(embeddings, mean, basis, stretch, projected, errors, centroids)
    del projected, errors
    release_memory()
    if num_clusters is None and not _pays(embeddings, arrays, stretch, groups, generator):
        return None
    return arrays, stretch


def extend_clusters(
    embeddings: Tensor, arrays: ClusterArrays, stretch: float
) -> tuple[ClusterArrays, float]:
    """Cluster other embeddings [M, D] about the centroids of `arrays`, in the same projection."""
    projected, errors = project(embeddings, arrays.mean, arrays.basis, stretch)
    packed = _pack(
        embeddings, arrays.mean, arrays.basis, stretch, projected, errors, arrays.centroids
    )
    return packed, stretch


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
    embeddings: Tensor, generator: torch.Generator, left_out_share: float = _VARIANCE_LEFT_OUT
) -> tuple[Tensor, Tensor, float]:
    """Mean [D], principal axes [D, A] ([0, A] where projecting does not pay), and their stretch.

    embeddings: [M, D] on the CPU. left_out_share: of the variance, what the axes may leave out.
    """
    rows, dim = embeddings.shape
    samples = _WIDE_SAMPLES if dim > _WIDE else _COVARIANCE_SAMPLES
    picked = torch.randint(rows, (min(rows, samples),), generator=generator, device="cpu")
    sample = embeddings[picked].double()
    mean = sample.mean(dim=0).float()
    sample -= mean
    variances, vectors = (_first_axes if dim > _WIDE else _all_axes)(sample, generator)
    total = float(sample.square().sum()) / len(sample)
    left_out = total - variances.clamp(min=0).cumsum(0)
    enough = int((left_out > left_out_share * total).sum()) + 1
    axes = _padded(enough)
    if axes > min(3 * dim // 4, len(variances)):
        return mean, floats(0, _padded(dim)), 1.0
    basis = vectors[:, :axes].float().contiguous()
    # |basis^T x|^2 <= |basis^T basis|_2 |x|^2, and a matrix norm is at most the Frobenius norm.
    gram = basis.double().T @ basis.double()
    excess = float((gram - torch.eye(axes, dtype=torch.float64, device="cpu")).norm())
    return mean, basis, math.sqrt(1 + excess) * (1 + 1e-9)


def _all_axes(sample: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Variances, descending, and principal axes in columns, of a centred sample [N, D] float64."""
    del generator
    variances, vectors = torch.linalg.eigh(sample.T @ sample / len(sample))
    return variances.flip(0), vectors.flip(1)


def _first_axes(sample: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """As `_all_axes`, but the first `_MOST_AXES` of them, nearly: by a randomised range finder."""
    values = sample.float()
    count = min(_MOST_AXES + _OVERSAMPLING, len(sample))
    directions = torch.randn(values.shape[1], count, generator=generator, device="cpu")
    for _ in range(1 + _POWER_ITERATIONS):
        directions, _ = torch.linalg.qr(values.T @ (values @ directions))
    orthonormal, _ = torch.linalg.qr(directions.double())
    variances, vectors = _all_axes((values @ orthonormal.float()).double(), generator)
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
    """Assign every row to its nearest centroid and lay the rows out cluster by cluster."""
    dim = embeddings.shape[1]
    order, radii, centroids, counts = sort_into_clusters(projected, centroids, _ROWS_AT_ONCE)
    blocks = -(-counts // LANES)
    num_blocks = int(blocks.sum())
    packs = basis.shape[1] // 4 if len(basis) else -(-dim // 4)
    count = len(centroids)
    arrays = link_clusters(
        ClusterArrays(
            data=embeddings[order],
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


def _pays(
    embeddings: Tensor,
    arrays: ClusterArrays,
    stretch: float,
    groups: Groups,
    generator: torch.Generator,
) -> bool:
    """Whether a search for some of the bank's own rows is much faster with its clusters."""
    rows = len(embeddings)
    run = torch.arange(min(_TRIAL_RUN, rows), device="cpu")
    starts = torch.randint(rows - len(run) + 1, (_TRIAL_RUNS, 1), generator=generator, device="cpu")
    picked = (starts + run).flatten()
    queries = embeddings[picked].float()
    excluded = _own_groups(picked, rows, groups)
    clustered, brute = math.inf, math.inf
    codes = encode_rows(embeddings)  # as an unclustered bank keeps them
    for _ in range(_TRIALS):
        began = time.perf_counter()
        search_clusters(Found.nothing(queries, None), queries, arrays, stretch, excluded)
        between = time.perf_counter()
        search_codes(Found.nothing(queries, None), queries, codes, excluded)
        clustered = min(clustered, between - began)
        brute = min(brute, time.perf_counter() - between)
        if not 1 < brute / clustered < 2 * _WORTHWHILE:
            break  # clear
    return clustered * _WORTHWHILE < brute


def _own_groups(picked: Tensor, rows: int, groups: Groups) -> Groups:
    """Groups that exclude each picked row's own from its search, or else the row alone.

    A group that is most of the bank would leave nothing to search.
    """
    if groups.of_bank is not None:
        of_queries = groups.of_bank[picked // groups.rows_per_group]
        largest = int(groups.of_bank.unique(return_counts=True)[1].max()) * groups.rows_per_group
        if largest <= rows // 2:
            return Groups(of_queries, groups.of_bank, groups.rows_per_group)
    return Groups(picked, torch.arange(rows, device="cpu"))


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _padded(count: int) -> int:
    return -(-count // LANES) * LANES
