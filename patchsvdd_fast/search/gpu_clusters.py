"""Clustering a bank on a GPU, for `csrc/cuda/nearest_in_segments.cu`.

As in `cpu_clusters`, nothing here can change an answer. There is no projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.checks import Groups
from ..ops.gpu_bank import (
    SEGMENT_ROWS,
    SegmentArrays,
    encode_segments,
    padded_code_dim,
    visit_tile,
)
from ..ops.search_kernels import Found, search_segments
from .centroids import clusters_wanted, find_centroids, sort_into_clusters

_ROWS_AT_ONCE = 1 << 20  # when assigning rows to centroids
_TRIAL_RUNS = 8  # runs of consecutive rows, like the patches of an image
_TRIAL_RUN = 256  # rows of a run
_WORTHWHILE = 0.5  # most of the segments that a tile of queries may look at, as a share


def build_segments(
    embeddings: Tensor, num_clusters: int | None = None, seed: int = 0
) -> SegmentArrays | None:
    """Cluster a bank on its GPU; returns its arrays, or None.

    embeddings: [M, D] float32 or float16, finite, contiguous.
    num_clusters: None chooses it from M, and gives up clusters where they would not pay: in small
        banks, and where a trial search still looks at much of the bank.

    Returns None where clusters were given up, asked for as 0, or where `can_be_clustered` is false.
    """
    wanted = clusters_wanted(embeddings, num_clusters)
    if wanted == 0:
        return None
    generator = torch.Generator("cpu").manual_seed(seed)
    centroids = find_centroids(embeddings, wanted, generator)
    arrays = segments_about(embeddings, centroids[_neighbours_together(centroids)])
    if num_clusters is None and _share_looked_at(arrays, embeddings, generator) > _WORTHWHILE:
        return None
    return arrays


def segments_about(embeddings: Tensor, centroids: Tensor) -> SegmentArrays:
    """Assign every row to its nearest centroid and lay the rows out in segments."""
    rows, dim = embeddings.shape
    device = embeddings.device
    order, radii, centroids, counts = sort_into_clusters(embeddings, centroids, _ROWS_AT_ONCE)

    starts = counts.cumsum(0) - counts  # [C], first row of each cluster
    per_cluster = -(-counts // SEGMENT_ROWS)
    first_segments = per_cluster.cumsum(0) - per_cluster
    count = int(per_cluster.sum())
    clusters = torch.repeat_interleave(torch.arange(len(counts), device=device), per_cluster)
    within = torch.arange(count, device=device) - first_segments[clusters]
    ends = starts.new_full((1,), rows)
    segment_starts = torch.cat([starts[clusters] + SEGMENT_ROWS * within, ends])
    sorted_radii = radii[order]

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    padded_rows, padded = count * SEGMENT_ROWS, padded_code_dim(embeddings)
    arrays = SegmentArrays(
        data=embeddings[order],
        ids=order,
        segment_starts=segment_starts,
        segment_clusters=clusters.int(),
        cluster_segments=torch.cat([first_segments, first_segments.new_full((1,), count)]).int(),
        least_radius=sorted_radii[segment_starts[:-1]],
        largest_radius=sorted_radii[segment_starts[1:] - 1],
        centroids=centroids,
        gaps=_gaps(centroids),
        centre=floats(dim),
        largest=floats(1),
        halves=torch.empty(padded_rows, padded, dtype=torch.float16, device=device),
        squares=floats(padded_rows),
        errors=floats(padded_rows),
        segment_norms=floats(count),
        segment_errors=floats(count),
    )
    encode_segments(arrays)
    return arrays


def _neighbours_together(centroids: Tensor) -> Tensor:
    """An order [C] that puts centroids that are near each other together, by repeated halving.

    Each part is sorted along the line from its point farthest from the mean to the point farthest
    from that one (about its longest extent), and cut in the middle. Queries are searched in the
    order of their centroids, so those that share a list of segments want much the same ones.
    """
    points = centroids.cpu()
    order: list[Tensor] = []
    parts = [torch.arange(len(points), device="cpu")]
    while parts:
        part = parts.pop()
        if len(part) <= 2:
            order.append(part)
            continue
        here = points[part]
        end = here[(here - here.mean(dim=0)).norm(dim=1).argmax()]
        away = here - end
        along = away @ away[away.norm(dim=1).argmax()]
        part = part[torch.argsort(along, stable=True)]
        parts += [part[len(part) // 2 :], part[: len(part) // 2]]
    return torch.cat(order).to(centroids.device)


def _gaps(centroids: Tensor) -> Tensor:
    """Distances [C, C], rounded up; from differences, as a matrix product would lose digits."""
    points = centroids.double()
    gaps = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return (gaps * (1 + 1e-6) + 1e-30).float()


def _share_looked_at(
    arrays: SegmentArrays, embeddings: Tensor, generator: torch.Generator
) -> float:
    """Share of the segments that a tile of queries looks at, besides the queries' own clusters.

    Tried with runs of rows of the bank, each itself excluded.
    """
    rows, device = len(embeddings), embeddings.device
    last = max(1, rows - _TRIAL_RUN)
    firsts = torch.randint(last, (_TRIAL_RUNS, 1), generator=generator, device="cpu")
    within = torch.arange(min(_TRIAL_RUN, rows), device="cpu")
    picked = (firsts + within).flatten().to(device)
    visits = torch.zeros(1, dtype=torch.int64, device=device)
    itself = Groups(picked, torch.arange(rows, device=device))
    queries = embeddings[picked].float()
    search_segments(Found.nothing(queries, None), queries, arrays, itself, visits)
    tiles = -(-len(picked) // visit_tile(embeddings))
    return int(visits) / (tiles * len(arrays.segment_clusters))
