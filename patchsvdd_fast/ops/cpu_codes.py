"""8-bit codes of an unclustered bank on the CPU, kept for many searches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, float16, float32, int8, int32

from . import _native
from .cpu_bank import native_projection

MOST_DIMS = 4096
"""Longer embeddings have no codes (kMostDims in csrc/cpu/search_kernels.h)."""

LEAST_DIMS = 4
"""A search of shorter embeddings makes no use of codes: comparing the values is as fast."""

LEADING_STEP = 64
"""Images under a bank's leading axes have a multiple of so many coordinates (kCodeStride)."""

_TILE_ROWS = 64  # codes are padded to a multiple of it (kTileRows)
_LANES = 16
_DTYPES = {"codes": int8, "bias": int32}  # others are float32
_MOST_EXCESS = 0.9e-5  # of the axes' products over the unit matrix (kLeadingExcess)
_STRETCH = 1 + 1e-5  # by which images may be farther apart for that


class RowCodes(NamedTuple):
    """Codes of M vectors [M, D], cut into B blocks; each has a centre and a scale of its own.

    P is D / 4 rounded up, and M' is M rounded up to a multiple of 64. All arrays are contiguous and
    on the CPU.
    """

    codes: Tensor
    """[M' / 16, P, 16, 4] int8: rows minus their block's centre, in units of its scale."""
    bias: Tensor
    """[M'] int32: per row, half the sum of its squared codes plus 128 times their sum."""
    centres: Tensor
    """[B, D padded to a multiple of 16] float32."""
    scales: Tensor
    """[B] float32: what one unit of a code stands for; 0 for a block without codes."""
    slack: Tensor
    """[B] float32: bound on the distance from a row to what its code stands for."""

    def native(self, block_rows: int) -> _native.cpu.RowCodes:
        """The struct of pointers for the kernels; valid as long as this object lives."""
        pointers = {name: tensor.data_ptr() for name, tensor in self._asdict().items()}
        return _native.cpu.RowCodes(block_rows=block_rows, **pointers)


class LeadingAxes(NamedTuple):
    """A map of vectors [D] to shorter *images* [A] which are never farther apart than the vectors.

    The image of x holds, for y = x - mean, the A - 1 products of y with orthonormal axes, and
    the length of what is left of y without these. A is a multiple of `LEADING_STEP`.
    """

    mean: Tensor
    """[D] float32."""
    basis: Tensor
    """[D, A] float32: axes in columns, orthonormal up to rounding, and a column of zeros."""

    @classmethod
    def along(cls, mean: Tensor, axes: Tensor) -> LeadingAxes:
        """The map for a mean [D] and axes [D, A - 1]; ValueError if these are not orthonormal."""
        basis = torch.nn.functional.pad(axes.float(), (0, 1)).contiguous()
        if basis.shape[1] % LEADING_STEP:
            raise ValueError(f"there must be {LEADING_STEP} n - 1 axes, got {axes.shape[1]}")
        gram = basis[:, :-1].double().T @ basis[:, :-1].double()
        excess = float((gram - torch.eye(len(gram), dtype=gram.dtype, device="cpu")).norm())
        if not excess <= _MOST_EXCESS:
            raise ValueError(f"axes must be orthonormal, their products are off by {excess:.1e}")
        return cls(mean.float().contiguous(), basis)

    @property
    def axes(self) -> int:
        """A."""
        return self.basis.shape[1]

    def native(self, error: float) -> _native.cpu.LeadingAxes:
        """The struct for the kernels; valid as long as this object lives.

        error: a bound on the errors of the images of the rows that are searched.
        """
        return _native.cpu.LeadingAxes(
            projection=native_projection(self.mean, self.basis, _STRETCH), error=error
        )

    def images(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Images [N, A] of vectors [N, D] on the CPU, and bounds on their errors [N], float32.

        vectors: float32 or float16, contiguous. Those too long for squares have the image 0, and
        an infinite error.
        """
        images = torch.empty(len(vectors), self.axes, dtype=float32, device="cpu")
        errors = torch.empty(len(vectors), dtype=float32, device="cpu")
        _native.cpu.leading_images(
            leading_axes=self.native(0.0),
            rows=len(vectors),
            data=vectors.data_ptr(),
            is_half=vectors.dtype == float16,
            images=images.data_ptr(),
            errors=errors.data_ptr(),
            context=torch.get_num_threads(),
        )
        return images, errors


class LeadingCodes(NamedTuple):
    """What a search compares before the codes of the embeddings: codes of shorter images."""

    map: LeadingAxes
    """Of the embeddings to their images."""
    codes: RowCodes
    """Codes of the images [M, A], in blocks of as many rows as those of the embeddings."""
    error: Tensor
    """[] float32: a bound on the error of any of these images."""


class CodedRows(NamedTuple):
    """The embeddings of a bank of M rows, and 8-bit codes that a search looks at first.

    Beside the data, which is shared, a row takes about D + 4 bytes, a quarter of what a float32
    bank takes, half of a float16 one; and A + 4 more where leading axes have codes of their own.
    docs/design/cpu-search.md says how a search uses them.
    """

    data: Tensor
    """[M, D] float32 or float16: the embeddings, contiguous, on the CPU."""
    codes: RowCodes
    """Codes of the embeddings."""
    leading: LeadingCodes | None = None
    """Codes of the embeddings' images, which are compared first; None: there are none."""

    @property
    def leading_axes(self) -> LeadingAxes | None:
        """The map to the images that are compared first."""
        return None if self.leading is None else self.leading.map

    @property
    def block_rows(self) -> int:
        """How many rows a block has, but for the last."""
        dim = self.data.shape[1] if self.leading is None else self.leading.map.axes
        return _native.cpu.code_block_rows(dim)

    @property
    def code_bytes(self) -> int:
        """The memory that the codes take beside the data, in bytes."""
        return sum(array.numel() * array.element_size() for array in self.tensors()[1:])

    def tensors(self) -> list[Tensor]:
        """All arrays, one after the other, for an op; `of_tensors` is the inverse."""
        tensors = [self.data, *self.codes]
        if self.leading is not None:
            tensors += [*self.leading.map, *self.leading.codes, self.leading.error]
        return tensors

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor]) -> CodedRows:
        """What `tensors` was called on."""
        data, codes, leading = tensors[0], RowCodes(*tensors[1:6]), tensors[6:]
        if not leading:
            return cls(data, codes)
        images = LeadingCodes(LeadingAxes(*leading[:2]), RowCodes(*leading[2:7]), leading[7])
        return cls(data, codes, images)

    def native(self) -> _native.cpu.CodedRows:
        """The struct of pointers for the kernels; valid as long as this object lives."""
        codes = self.codes.native(self.block_rows)
        if self.leading is None:
            return _native_rows(self.data, codes, _NO_AXES, codes)
        return _native_rows(
            self.data,
            codes,
            self.leading.map.native(float(self.leading.error)),
            self.leading.codes.native(self.block_rows),
        )


def encode_rows(embeddings: Tensor, leading: LeadingAxes | None = None) -> CodedRows:
    """Codes of the embeddings [M, D] float32 or float16, finite (which is not checked).

    leading: makes codes of the embeddings' images, too.

    The result shares the memory of contiguous embeddings. Raises ValueError for more than 4,096
    dimensions, and for embeddings that are empty or not on the CPU.
    """
    data = embeddings.contiguous()
    if data.ndim != 2 or data.numel() == 0 or data.shape[1] > MOST_DIMS:
        raise ValueError(
            f"embeddings to encode must have shape [M, D] with 1 <= D <= {MOST_DIMS}, "
            f"got {list(data.shape)}"
        )
    if data.device.type != "cpu" or data.dtype not in (float32, float16):
        raise ValueError(
            "embeddings to encode must be float32 or float16 on the CPU, "
            f"got {data.dtype} on {data.device}"
        )
    if leading is None:
        return CodedRows(data, _encode(data, _native.cpu.code_block_rows(data.shape[1])))
    block_rows = _native.cpu.code_block_rows(leading.axes)
    images, errors = leading.images(data)
    return CodedRows(
        data,
        _encode(data, block_rows),
        LeadingCodes(leading, _encode(images, block_rows), errors.max()),
    )


def _encode(vectors: Tensor, block_rows: int) -> RowCodes:
    """Codes of vectors [M, D], made in blocks of so many rows."""
    rows, dim = vectors.shape
    padded_rows = -(-rows // _TILE_ROWS) * _TILE_ROWS
    blocks = -(-rows // block_rows)
    shapes = {
        "codes": (padded_rows // _LANES, -(-dim // 4), _LANES, 4),
        "bias": (padded_rows,),
        "centres": (blocks, -(-dim // _LANES) * _LANES),
        "scales": (blocks,),
        "slack": (blocks,),
    }
    codes = RowCodes(
        **{
            name: torch.empty(shape, dtype=_DTYPES.get(name, float32), device="cpu")
            for name, shape in shapes.items()
        }
    )
    native_codes = codes.native(block_rows)
    native = _native_rows(vectors, native_codes, _NO_AXES, native_codes)
    _native.cpu.encode_rows(bank=native, context=torch.get_num_threads())
    return codes


_NO_AXES = _native.cpu.LeadingAxes(
    projection=_native.cpu.Projection(dim=0, axes=0, mean=0, basis=0, stretch=1.0), error=0.0
)


def _native_rows(
    data: Tensor,
    codes: _native.cpu.RowCodes,
    axes: _native.cpu.LeadingAxes,
    leading: _native.cpu.RowCodes,
) -> _native.cpu.CodedRows:
    """leading: not looked at without axes."""
    rows, dim = data.shape
    return _native.cpu.CodedRows(
        rows=rows,
        dim=dim,
        data=data.data_ptr(),
        is_half=data.dtype == float16,
        codes=codes,
        leading_axes=axes,
        leading=leading,
    )
