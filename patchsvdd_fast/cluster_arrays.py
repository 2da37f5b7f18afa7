"""The arrays of a clustered bank, as the native search wants them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, bincount, float16, float32, int8, int32, int64

from . import _native

_LARGEST = 1e16  # coordinates of centroids: beyond, squares might overflow
_DTYPES = {
    "data": (float32, float16),
    "ids": (int64,),
    "starts": (int64,),
    "blocks": (int64,),
    "codes": (int8,),
    "bias": (int32,),
}  # float32 for all others


class ClusterArrays(NamedTuple):
    """A bank of M rows in C clusters and B blocks of 16 rows; K projected coordinates, A padded.

    Rows lie in the order of their clusters, within one by their distance to its centroid. All on
    the CPU and contiguous. csrc/params.h describes each field further.
    """

    data: Tensor
    """[M, D] float32 or float16: the embeddings."""
    ids: Tensor
    """[M] int64: each row's number as the user knows it."""
    starts: Tensor
    """[C + 1] int64: first row of each cluster."""
    blocks: Tensor
    """[C + 1] int64: first block of each cluster."""
    codes: Tensor
    """[B, K / 4, 16, 4] int8: projected rows about their centroid, in units of the scale."""
    bias: Tensor
    """[B * 16] int32: half the squared norm of each code, and what unsigned queries add."""
    block_radius: Tensor
    """[B] float32: largest distance to the centroid within the block."""
    mean: Tensor
    """[D] float32: subtracted before projecting."""
    basis: Tensor
    """[D, A] float32: principal axes in columns; [0, A]: only the mean is subtracted."""
    centroids: Tensor
    """[C, A] float32, projected."""
    scales: Tensor
    """[C] float32: what one unit of a code stands for."""
    slack: Tensor
    """[C] float32: bound on the rounding error of the projection."""
    code_slack: Tensor
    """[C] float32: bound on the distance from a projected row to its code, that error included."""
    reach: Tensor
    """[C] float32: radius of the cluster plus slack."""
    centroid_tiles: Tensor
    """[C / 16, A, 16] float32: the centroids again, transposed."""
    gaps: Tensor
    """[C, C padded to 16] float32: distances between centroids, rounded up."""

    def check(self) -> None:
        """Raise ValueError unless the arrays fit together, so that a search stays within them."""
        for name, tensor in self._asdict().items():
            expected = _DTYPES.get(name, (float32,))
            if tensor.dtype not in expected or not tensor.is_contiguous():
                raise ValueError(f"a bank's {name} must be contiguous {expected[0]}")
            if tensor.device.type != "cpu":
                raise ValueError(f"a clustered bank's {name} must be on the CPU")
        if self.data.ndim != 2 or self.centroids.ndim != 2 or self.codes.ndim != 4:
            raise ValueError("a bank's data, centroids and codes must have 2, 2 and 4 dimensions")
        rows, dim = self.data.shape
        count, axes = self.centroids.shape
        groups = self.codes.shape[1]
        num_blocks = len(self.block_radius)
        shapes = {
            "ids": (rows,),
            "starts": (count + 1,),
            "blocks": (count + 1,),
            "codes": (num_blocks, groups, 16, 4),
            "bias": (num_blocks * 16,),
            "mean": (dim,),
            "basis": (dim if len(self.basis) else 0, axes),
            "scales": (count,),
            "slack": (count,),
            "code_slack": (count,),
            "reach": (count,),
        }
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(
                    f"a bank's {name} must have shape {list(shape)}, "
                    f"got {list(getattr(self, name).shape)}"
                )
        sizes, blocks = self.starts.diff(), self.blocks.diff()
        whole = (
            count >= 1
            and axes >= 16
            and axes % 16 == 0
            and (
                4 * groups == axes if len(self.basis) else 4 * groups == (dim + 3) // 4 * 4 <= axes
            )
            and float(self.centroids.abs().max()) < _LARGEST  # false for NaN
            and bool((sizes >= 1).all())
            and bool((blocks == (sizes + 15) // 16).all())
            and [int(self.starts[0]), int(self.starts[-1])] == [0, rows]
            and [int(self.blocks[0]), int(self.blocks[-1])] == [0, num_blocks]
            and 0 <= int(self.ids.min()) <= int(self.ids.max()) < rows
            and bool((bincount(self.ids, minlength=rows) == 1).all())
        )
        if not whole:
            raise ValueError("a bank's clusters do not cover its rows")

    def native(self, stretch: float) -> _native.cpu.ClusteredBank:
        """The struct of pointers; valid as long as this object lives."""
        pointers = {
            name: tensor.data_ptr()
            for name, tensor in self._asdict().items()
            if name not in ("mean", "basis")
        }
        return _native.cpu.ClusteredBank(
            projection=native_projection(self.mean, self.basis, stretch),
            rows=self.data.shape[0],
            clusters=self.centroids.shape[0],
            groups=self.codes.shape[1],
            is_half=self.data.dtype == float16,
            **pointers,
        )


def native_projection(mean: Tensor, basis: Tensor, stretch: float) -> _native.cpu.Projection:
    """The struct of pointers to a mean [D] and a basis ([D, A], or [0, A]: none)."""
    return _native.cpu.Projection(
        dim=mean.shape[0],
        axes=basis.shape[1],
        mean=mean.data_ptr(),
        basis=basis.data_ptr() if len(basis) else 0,
        stretch=stretch,
    )
