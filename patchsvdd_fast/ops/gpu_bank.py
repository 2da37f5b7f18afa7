"""The arrays of a clustered bank on a GPU, as the native search wants them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, float16

from . import _native


class SegmentArrays(NamedTuple):
    """A bank of M rows in C clusters and S segments of up to 256 rows; D coordinates, P padded.

    Rows lie in the order of their clusters, within one by their distance to its centroid. All on
    one device and contiguous. csrc/params.h describes each field further.
    """

    data: Tensor
    """[M, D] float32 or float16: the embeddings."""
    ids: Tensor
    """[M] int64: each row's number as the user knows it."""
    segment_starts: Tensor
    """[S + 1] int64: first row of each segment."""
    segment_clusters: Tensor
    """[S] int32: which cluster each belongs to, ascending."""
    cluster_segments: Tensor
    """[C + 1] int32: first segment of each cluster."""
    least_radius: Tensor
    """[S] float32: least distance of a segment's rows to the centroid of its cluster."""
    largest_radius: Tensor
    """[S] float32: the largest."""
    centroids: Tensor
    """[C, D] float32."""
    gaps: Tensor
    """[C, C] float32: distances between centroids, rounded up."""
    centre: Tensor
    """[D] float32: where the codes' origin lies."""
    largest: Tensor
    """[1] float32: largest coordinate about it, which the codes' scale follows from."""
    halves: Tensor
    """[S * 256, P] float16: the codes."""
    squares: Tensor
    """[S * 256] float32: their squared norms; infinity for padding."""
    errors: Tensor
    """[S * 256] float32: bounds on the distance from a row to its code, in units of the code."""
    segment_norms: Tensor
    """[S] float32: largest norm of a segment's codes."""
    segment_errors: Tensor
    """[S] float32: largest of its errors."""

    def native(self, cuda: type[_native.Cuda]) -> _native.Cuda.SegmentedBank:
        """The struct of pointers; valid as long as this object lives."""
        return cuda.SegmentedBank(
            rows=self.data.shape[0],
            dim=self.data.shape[1],
            clusters=self.centroids.shape[0],
            segments=self.segment_clusters.shape[0],
            is_half=self.data.dtype == float16,
            **{name: tensor.data_ptr() for name, tensor in self._asdict().items()},
        )
