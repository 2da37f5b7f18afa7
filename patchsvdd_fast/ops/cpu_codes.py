"""8-bit codes of an unclustered bank on the CPU, kept for many searches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, float16, float32, int8, int32

from . import _native

MOST_DIMS = 4096
"""Longer embeddings have no codes (kMostDims in csrc/cpu/search_kernels.h)."""

LEAST_DIMS = 4
"""A search of shorter embeddings makes no use of codes: comparing the values is as fast."""

_TILE_ROWS = 64  # codes are padded to a multiple of it (kTileRows)
_LANES = 16
_NOTHING = 2**31 - 1  # bias of padding (kNothing)
_MOST_BIAS = 1 << 15  # per code c: more than c^2 / 2 + 128 |c| can be
_SMALLEST_SCALE = 0.99e-30  # codes.cpp computes none smaller, but 0 for a block without codes
_LARGEST = 1.3e17  # of differences below 1e15 in 4,096 dimensions, no sum comes near
_LARGEST_FLOAT = torch.finfo(float32).max
_DTYPES = {"data": (float32, float16), "codes": (int8,), "bias": (int32,)}  # others are float32


class CodedRows(NamedTuple):
    """The embeddings of a bank of M rows, and 8-bit codes that a search looks at first.

    D is the dimension of an embedding, P = D / 4 rounded up, and M' is M rounded up to a multiple
    of 64. Rows are cut into B blocks, whose size follows from D alone; each has a centre and a
    scale of its own. All arrays are contiguous and on the CPU. Beside the data, which is shared, a
    row takes about D + 4 bytes: a quarter of what a float32 bank takes, half of a float16 one.
    docs/design/cpu-search.md says how a search uses them.
    """

    data: Tensor
    """[M, D] float32 or float16: the embeddings."""
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

    @property
    def code_bytes(self) -> int:
        """The memory that the codes take beside the data, in bytes."""
        return sum(array.numel() * array.element_size() for array in self[1:])

    def check(self) -> None:
        """Raise ValueError unless the arrays fit together, so that a search stays within them.

        That codes, centres and bounds are those of the data is not checked: with others, a search
        may miss the nearest row, but reads nothing else.
        """
        for name, tensor in self._asdict().items():
            expected = _DTYPES.get(name, (float32,))
            if tensor.dtype not in expected or not tensor.is_contiguous():
                raise ValueError(f"a coded bank's {name} must be contiguous {expected[0]}")
            if tensor.device.type != "cpu":
                raise ValueError(f"a coded bank's {name} must be on the CPU")
        if self.data.ndim != 2 or len(self.data) < 1 or not 1 <= self.data.shape[1] <= MOST_DIMS:
            raise ValueError(
                f"a coded bank's data must have shape [M, D] with 1 <= D <= {MOST_DIMS}, "
                f"got {list(self.data.shape)}"
            )
        for name, shape in _shapes(*self.data.shape).items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(
                    f"a coded bank's {name} must have shape {list(shape)}, "
                    f"got {list(getattr(self, name).shape)}"
                )
        coded = self.scales != 0
        for name, values, low, high in (
            ("centres", self.centres, -_LARGEST_FLOAT, _LARGEST_FLOAT),
            ("scales", self.scales[coded], _SMALLEST_SCALE, _LARGEST),
            ("slack", self.slack, 0.0, _LARGEST),
        ):
            if not bool(((values >= low) & (values <= high)).all()):  # false for NaN
                raise ValueError(f"a coded bank's {name} must be in [{low:g}, {high:g}]")
        self._check_codes(coded)

    def _check_codes(self, coded: Tensor) -> None:
        """Require biases whose sums with products cannot overflow, and padding that looks it."""
        rows, dim = self.data.shape
        block = torch.arange(len(self.bias)) // _native.cpu.code_block_rows(dim)
        is_row = coded[block]
        is_row[rows:] = False
        limit = _MOST_BIAS * 4 * self.codes.shape[1]
        is_small = (self.bias >= -limit) & (self.bias <= limit)
        fits = torch.where(is_row, is_small, self.bias == _NOTHING)
        has_code = (self.codes != 0).any(dim=3).any(dim=1).view(-1)
        if not bool(fits.all()) or bool((has_code & ~is_row).any()):
            raise ValueError("a coded bank's bias does not fit its codes")

    def native(self) -> _native.cpu.CodedRows:
        """The struct of pointers for the kernels; valid as long as this object lives."""
        rows, dim = self.data.shape
        return _native.cpu.CodedRows(
            rows=rows,
            dim=dim,
            is_half=self.data.dtype == float16,
            **{name: tensor.data_ptr() for name, tensor in self._asdict().items()},
        )


def encode_rows(embeddings: Tensor) -> CodedRows:
    """Codes of the embeddings [M, D] float32 or float16, finite (which is not checked).

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
    arrays = {
        name: torch.empty(shape, dtype=_DTYPES.get(name, (float32,))[0], device="cpu")
        for name, shape in _shapes(*data.shape).items()
    }
    coded = CodedRows(data=data, **arrays)
    _native.cpu.encode_rows(bank=coded.native(), context=torch.get_num_threads())
    return coded


def _shapes(rows: int, dim: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays but for the data."""
    padded_rows = -(-rows // _TILE_ROWS) * _TILE_ROWS
    blocks = -(-rows // _native.cpu.code_block_rows(dim))
    return {
        "codes": (padded_rows // _LANES, -(-dim // 4), _LANES, 4),
        "bias": (padded_rows,),
        "centres": (blocks, -(-dim // _LANES) * _LANES),
        "scales": (blocks,),
        "slack": (blocks,),
    }
