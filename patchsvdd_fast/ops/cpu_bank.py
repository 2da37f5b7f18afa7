"""A clustered bank on the CPU: its arrays, and the native calls that build it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, arange, bincount, float16, float32, int8, int32, int64

from . import _native

LANES = 16
"""Rows per block; projected coordinates are padded to a multiple of it (kLanes in csrc/cpu)."""

MOST_CLUSTERS = 4096
"""Keeps the matrix of distances between centroids within 64 MiB."""

_MOST_AXES = 4096  # largest dimension of embeddings, projected or not
# Largest coordinate of a centroid: of rows with coordinates up to 1e15 in 4,096 dimensions, about
# their mean, none can be larger. Sums of squares of such do not overflow.
_LARGEST = 1.3e17
_LARGEST_RADIUS = 1e18  # more than clusters of rows with coordinates up to 1e15 can have
_SMALLEST_SCALE = 0.99e-30  # clusters.cpp computes none smaller
_MOST_BIAS = 1 << 15  # per code c: more than c^2 / 2 + 128 |c| can be
_NOTHING = 2**31 - 1  # bias of the padding of a block (kNothing in csrc/cpu/search_kernels.h)
_DTYPES = {
    "data": (float32, float16),
    "ids": (int64,),
    "starts": (int64,),
    "blocks": (int64,),
    "codes": (int8,),
    "bias": (int32,),
}  # all other fields are float32


class ClusterArrays(NamedTuple):
    """A bank of M rows, sorted into C clusters that are cut into B blocks of up to 16 rows.

    D is the dimension of an embedding and A that of a projected one, padded to a multiple of 16. K
    is the number of codes per row: A, or D rounded up to a multiple of 4 if there is no basis.
    Rows lie cluster by cluster, within a cluster by their distance to its centroid. All arrays are
    contiguous and on the CPU. docs/design/cpu-search.md says how a search uses them.
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
    """[B, K / 4, 16, 4] int8: projected rows minus their centroid, in units of `scales`."""
    bias: Tensor
    """[B * 16] int32: per row, half the sum of its squared codes plus 128 times their sum."""
    block_radius: Tensor
    """[B] float32: largest distance to the centroid within the block."""
    mean: Tensor
    """[D] float32: subtracted before projecting."""
    basis: Tensor
    """[D, A] float32: principal axes in columns; or [0, A]: only the mean is subtracted."""
    centroids: Tensor
    """[C, A] float32: centroids of the projected rows."""
    scales: Tensor
    """[C] float32: what one unit of a code stands for."""
    slack: Tensor
    """[C] float32: bound on the rounding error of the cluster's projected rows."""
    code_slack: Tensor
    """[C] float32: bound on the distance from a projected row to its code, including `slack`."""
    reach: Tensor
    """[C] float32: radius of the cluster plus `slack`."""
    centroid_tiles: Tensor
    """[ceil(C / 16), A, 16] float32: the centroids again, transposed in tiles of 16."""
    gaps: Tensor
    """[C, C padded to 16] float32: distances between centroids, rounded up."""

    def check(self) -> None:
        """Raise ValueError unless the arrays fit together, so that a search stays within them.

        Arrays may come from a forged file: nothing in them may make native code read outside of
        them, or allocate memory out of proportion to the file. Radii, error bounds or a basis that
        do not belong to the rows go unnoticed; they give wrong answers, nothing worse.
        """
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
        packs, num_blocks = self.codes.shape[1], self.block_radius.numel()
        shapes = {
            "ids": (rows,),
            "starts": (count + 1,),
            "blocks": (count + 1,),
            "codes": (num_blocks, packs, 16, 4),
            "bias": (num_blocks * 16,),
            "block_radius": (num_blocks,),
            "mean": (dim,),
            "basis": (dim if self.basis.numel() else 0, axes),
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
        if not (
            1 <= dim <= _MOST_AXES
            and 1 <= count <= MOST_CLUSTERS
            and 16 <= axes <= _MOST_AXES
            and axes % 16 == 0
            and packs == (axes // 4 if len(self.basis) else (dim + 3) // 4)
            and 4 * packs <= axes
        ):
            raise ValueError(
                f"a bank of D = {dim} cannot have {count} clusters of {axes} coordinates "
                f"and {4 * packs} codes a row"
            )
        if not self._covers_rows():
            raise ValueError("a bank's clusters do not cover its rows")
        self._check_values()

    def _covers_rows(self) -> bool:
        """Whether clusters and blocks partition the rows, with valid `ids` and centroids."""
        rows, num_blocks = len(self.data), len(self.block_radius)
        # The range first: differences of any int64 values might wrap around.
        if not (_within(self.starts, 0, rows) and _within(self.blocks, 0, num_blocks)):
            return False
        sizes = self.starts.diff()
        return (
            bool((sizes >= 1).all())
            and bool((self.blocks.diff() == (sizes + 15) // 16).all())
            and [int(self.starts[0]), int(self.starts[-1])] == [0, rows]
            and [int(self.blocks[0]), int(self.blocks[-1])] == [0, num_blocks]
            and _within(self.ids, 0, rows - 1)
            and bool((bincount(self.ids, minlength=rows) == 1).all())
            and _within(self.centroids, -_LARGEST, _LARGEST)
        )

    def _check_values(self) -> None:
        """Raise ValueError for values that no real bank can have."""
        axes, packs = self.basis.shape[1], self.codes.shape[1]
        limits = {
            "mean": (-_LARGEST, _LARGEST),
            "scales": (_SMALLEST_SCALE, _LARGEST),
            "slack": (0.0, _LARGEST),
            "code_slack": (0.0, _LARGEST),
            "reach": (0.0, _LARGEST_RADIUS),
            "block_radius": (0.0, _LARGEST_RADIUS),
        }
        for name, (low, high) in limits.items():
            if not _within(getattr(self, name), low, high):
                raise ValueError(f"a bank's {name} must be in [{low:g}, {high:g}]")
        # Axes have length 1. Much longer ones could project a query so far out that the padding of
        # the last tile of centroids, which is no cluster, would be nearest to it.
        if not float(self.basis.double().norm()) <= 2 * axes**0.5:  # true for NaN
            raise ValueError("a bank's basis must be orthonormal")
        rises = self.block_radius.diff() >= 0
        rises[self.blocks[1:-1] - 1] = True  # radii start anew with each cluster
        if not bool(rises.all()):
            raise ValueError("a bank's block_radius must not fall within a cluster")
        # Sums of products must not overflow, and the padding of a block must not look like a row.
        last = self.blocks[1:] - 1
        in_last = self.starts.diff() - 16 * (self.blocks.diff() - 1)  # rows, 1 to 16
        fills_up = arange(16) >= in_last[:, None]  # [C, 16]
        bias = self.bias.view(-1, 16)
        padding, codes = bias[last][fills_up], self.codes[last].transpose(1, 2)[fills_up]
        limit = _MOST_BIAS * 4 * packs
        if (
            int(self.bias.min()) < -limit
            or int((self.bias > limit).sum()) != len(padding)
            or bool((padding != _NOTHING).any())
            or bool(codes.any())
        ):
            raise ValueError("a bank's bias does not fit its codes")

    def native(self, stretch: float) -> _native.cpu.ClusteredBank:
        """The struct of pointers for the kernels; valid as long as this object lives."""
        pointers = {
            name: tensor.data_ptr()
            for name, tensor in self._asdict().items()
            if name not in ("mean", "basis")
        }
        return _native.cpu.ClusteredBank(
            projection=native_projection(self.mean, self.basis, stretch),
            rows=self.data.shape[0],
            clusters=self.centroids.shape[0],
            packs=self.codes.shape[1],
            is_half=self.data.dtype == float16,
            **pointers,
        )


def floats(*shape: int) -> Tensor:
    """Uninitialised float32 on the CPU, whatever torch's defaults are."""
    return torch.empty(shape, dtype=float32, device="cpu")


def project(
    embeddings: Tensor, mean: Tensor, basis: Tensor, stretch: float
) -> tuple[Tensor, Tensor]:
    """The projected rows [M, A] float32 of embeddings [M, D], and bounds on their error [M].

    mean: [D], subtracted first. basis: [D, A], or [0, A] to subtract only the mean. stretch: an
    upper bound on the norm of the basis.
    """
    embeddings = embeddings.contiguous()
    projected, errors = floats(len(embeddings), basis.shape[1]), floats(len(embeddings))
    _native.cpu.project(
        projection=native_projection(mean, basis, stretch),
        rows=len(embeddings),
        data=embeddings.data_ptr(),
        is_half=embeddings.dtype == float16,
        projected=projected.data_ptr(),
        errors=errors.data_ptr(),
        context=torch.get_num_threads(),
    )
    return projected, errors


def link_clusters(arrays: ClusterArrays) -> ClusterArrays:
    """The arrays with `centroid_tiles` and `gaps`, which are computed from the centroids."""
    count, axes = arrays.centroids.shape
    tiles = -(-count // LANES)
    linked = arrays._replace(
        centroid_tiles=floats(tiles, axes, LANES), gaps=floats(count, tiles * LANES)
    )
    _native.cpu.link_clusters(bank=linked.native(1.0), context=torch.get_num_threads())
    return linked


def pack_clusters(
    arrays: ClusterArrays, stretch: float, projected: Tensor, errors: Tensor, radii: Tensor
) -> None:
    """Fill in the codes and the bounds of the clusters.

    projected [M, A] and errors [M], from `project`, and radii [M], each row's distance to its
    centroid, are in the order of the row numbers (`ids`).
    """
    _native.cpu.pack_clusters(
        bank=arrays.native(stretch),
        projected=projected.data_ptr(),
        errors=errors.data_ptr(),
        radii=radii.data_ptr(),
        context=torch.get_num_threads(),
    )


def release_memory() -> None:
    """Return freed memory to the operating system (glibc only)."""
    _native.cpu.release_memory()


def native_projection(mean: Tensor, basis: Tensor, stretch: float) -> _native.cpu.Projection:
    """The struct of pointers to a mean [D] and a basis ([D, A], or [0, A]: none)."""
    return _native.cpu.Projection(
        dim=mean.shape[0],
        axes=basis.shape[1],
        mean=mean.data_ptr(),
        basis=basis.data_ptr() if len(basis) else 0,
        stretch=stretch,
    )


def _within(values: Tensor, low: float, high: float) -> bool:
    """Whether all values are in [low, high]; false for NaN."""
    smallest, largest = values.aminmax()
    return low <= smallest.item() and largest.item() <= high
