"""A clustered bank on a GPU: its arrays, and the native calls that build it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, float16

from . import _native, backends

SEGMENT_ROWS = 256
"""Largest number of rows in a segment."""


class SegmentArrays(NamedTuple):
    """A bank of M rows, sorted into C clusters that are cut into S segments of up to 256 rows.

    D is the dimension of an embedding and P that of its code, which is padded. Rows lie cluster by
    cluster, within a cluster by their distance to its centroid. All arrays are contiguous and on
    one device. docs/design/gpu-search.md says how a search uses them.
    """

    data: Tensor
    """[M, D] float32 or float16: the embeddings."""
    ids: Tensor
    """[M] int64: each row's number as the user knows it."""
    segment_starts: Tensor
    """[S + 1] int64: first row of each segment."""
    segment_clusters: Tensor
    """[S] int32: the cluster that each segment belongs to, ascending."""
    cluster_segments: Tensor
    """[C + 1] int32: first segment of each cluster."""
    least_radius: Tensor
    """[S] float32: least distance of a segment's rows to the centroid of its cluster."""
    largest_radius: Tensor
    """[S] float32: largest such distance."""
    centroids: Tensor
    """[C, D] float32."""
    gaps: Tensor
    """[C, C] float32: distances between centroids, rounded up."""
    centre: Tensor
    """[D] float32: subtracted from rows and queries before they are encoded."""
    largest: Tensor
    """[1] float32: largest absolute coordinate of a row minus `centre`; gives the scale."""
    halves: Tensor
    """[S * 256, P] float16: the codes."""
    squares: Tensor
    """[S * 256] float32: squared norms of the codes; infinity for padding."""
    errors: Tensor
    """[S * 256] float32: bounds on the distance from a row to its code, in the codes' units."""
    segment_norms: Tensor
    """[S] float32: largest norm of a segment's codes."""
    segment_errors: Tensor
    """[S] float32: largest of a segment's `errors`."""

    def native(self, cuda: type[_native.Cuda]) -> _native.Cuda.SegmentedBank:
        """The struct of pointers for the kernels; valid as long as this object lives."""
        return cuda.SegmentedBank(
            rows=self.data.shape[0],
            dim=self.data.shape[1],
            clusters=self.centroids.shape[0],
            segments=self.segment_clusters.shape[0],
            is_half=self.data.dtype == float16,
            **{name: tensor.data_ptr() for name, tensor in self._asdict().items()},
        )


def visit_tile(embeddings: Tensor) -> int:
    """How many queries share a list of segments to visit, in a bank of embeddings [M, D]."""
    with backends.backend_of(embeddings) as (backend, _):
        return as_cuda(backend).visit_tile(embeddings.shape[1])


def padded_code_dim(embeddings: Tensor) -> int:
    """Dimension of the codes that a GPU makes of embeddings [M, D], padding included."""
    with backends.backend_of(embeddings) as (backend, _):
        return as_cuda(backend).padded_dim(embeddings.shape[1])


def encode_segments(arrays: SegmentArrays) -> None:
    """Fill in the codes of a bank on a GPU: the fields from `centre` to `segment_errors`."""
    with backends.backend_of(arrays.data) as (backend, context):
        cuda = as_cuda(backend)
        assert cuda.SEGMENT_ROWS == SEGMENT_ROWS
        cuda.encode_segments(bank=arrays.native(cuda), context=context)


def as_cuda(backend: Any) -> type[_native.Cuda]:
    """`backend`, which must be a GPU's: raises TypeError for the CPU's, which has no segments."""
    if backend is _native.cpu:
        raise TypeError("a bank clustered for a GPU can only be searched there")
    return backend
