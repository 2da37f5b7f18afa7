"""Checks of user input whose errors name the argument, what was expected and what was given."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from . import _native
from .pair_protocol import Draw, PairKind


class DLPackArray(Protocol):
    """An array of another library, such as CuPy, that shares its memory through DLPack."""

    def __dlpack__(self) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, Any]: ...


FloatArray = npt.NDArray[np.floating[Any]] | DLPackArray
IntArray = npt.NDArray[np.int64] | DLPackArray

_LIKE_NUMPY = (np.ndarray, list, tuple)  # what is answered with NumPy arrays


def as_tensor(name: str, value: Any) -> Tensor:
    """A tensor that shares the memory of a tensor, a NumPy array, or an array with DLPack.

    A NumPy array that is not contiguous, or in the other byte order, is copied. Raises TypeError
    for any other value, sparse tensors, those without values (on the device "meta"), and masked
    arrays.
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type == "meta":
            what = "meta" if value.device.type == "meta" else str(value.layout)
            raise TypeError(f"{name} must be a dense tensor with values, got {what}")
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must have no masked values: fill them, or leave their rows out")
    if isinstance(value, np.ndarray):
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        # Of no axes, ascontiguousarray makes one.
        return torch.from_numpy(np.ascontiguousarray(native).reshape(native.shape))
    if hasattr(value, "__dlpack__"):
        return from_dlpack(value)
    raise TypeError(
        f"{name} must be a torch tensor, a NumPy array or another array with __dlpack__ (CuPy), "
        f"got {type(value).__name__}"
    )


def as_vectors(name: str, value: Any, *, halves: bool = False) -> Tensor:
    """Vectors of any real numbers as a float32 tensor, without a gradient.

    The one rule: each number becomes the float32 that is nearest to it, ties to even. That changes
    no float16, no bfloat16 and no integer up to 2^24 in size; other integers and float64 are
    rounded, once. Arguments are as for `as_tensor`, and nested sequences of numbers.

    halves: leave float16 as it is, for a bank that keeps it.

    Raises TypeError for bool, complex numbers and what is no number, ValueError for ragged
    sequences and for numbers too large for float32.
    """
    if isinstance(value, list | tuple):
        try:
            value = np.array(value)
        except ValueError as error:
            raise ValueError(f"{name} must be numbers in rows of equal length: {error}") from None
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        if value.dtype.kind not in "fiu":
            raise TypeError(f"{name} must be real numbers, got {value.dtype}")
        if value.dtype.kind == "u" or value.dtype.itemsize > 8:  # torch has few of these
            with np.errstate(over="ignore"):
                value = value.astype(np.float32)
    given = as_tensor(name, value).detach()
    if given.dtype == torch.float32 or (halves and given.dtype == torch.float16):
        return given
    if given.dtype == torch.bool or given.is_complex():
        raise TypeError(f"{name} must be real numbers, got {_short(given.dtype)}")
    vectors = given.float()
    if given.dtype == torch.float64 and vectors.device.type == "cpu":
        too_large = vectors.isinf() & given.isfinite()
        if bool(too_large.any()):
            largest = float(given[too_large].abs().max())
            raise ValueError(f"{name} must fit float32, got a value of size {largest:g}")
    return vectors


def as_embeddings(embeddings: Any) -> tuple[Tensor, tuple[int, int]]:
    """Embeddings as a tensor [M, D] or [N, I, J, D], and their grid (I, J); (1, 1) for the former.

    Raises what `as_vectors` does, and ValueError for another shape.
    """
    given = as_vectors("embeddings", embeddings, halves=True)
    if given.ndim not in (2, 4):
        raise ValueError(
            f"embeddings must have shape [M, D] or [N, I, J, D], got {list(given.shape)}"
        )
    return given, ((1, 1) if given.ndim == 2 else (given.shape[1], given.shape[2]))


def as_numbers(name: str, value: Any) -> Tensor:
    """Integers, such as groups and row numbers, as an int64 tensor; arguments as `as_vectors`.

    An empty list is no integers; one number is an array without axes. Raises TypeError for what is
    no integer (bool is none), and ValueError for one that int64 does not hold.
    """
    if isinstance(value, list | tuple):
        value = np.asarray(value) if len(value) else np.empty(0, np.int64)
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        value = np.array(value)
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":
        raise TypeError(f"{name} must be int64 or other integers, got {value.dtype}")
    if isinstance(value, np.ndarray) and value.dtype == np.uint64 and value.size:
        largest = int(value.max())
        if largest > np.iinfo(np.int64).max:
            raise ValueError(f"{name} must be at most 2^63 - 1, got {largest}")
    given = as_tensor(name, value)
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"{name} must be int64 or other integers, got {_short(given.dtype)}")
    return given.long()


def is_of_type(value: Any, kind: type) -> bool:
    """Whether a value is an `Integral` or `Real` number, which bools are not here, or a bool."""
    is_bool = isinstance(value, bool | np.bool_)
    return is_bool if kind is bool else isinstance(value, kind) and not is_bool


_KINDS: dict[type, str] = {Integral: "an integer", Real: "a number", bool: "True or False"}


def check_type(name: str, value: Any, kind: type, optional: bool = False) -> None:
    """Require a value for which `is_of_type` is true; None, too, if it is optional."""
    if not is_of_type(value, kind) and not (optional and value is None):
        raise TypeError(f"{name} must be {_KINDS[kind]}, got {value!r}")


def check_int(name: str, value: Any, low: int, high: int) -> int:
    """Require an integer, no bool, of low to high."""
    check_type(name, value, Integral)
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    return int(value)


def like_input(given: Any, *tensors: Tensor) -> tuple[Any, ...]:
    """The tensors as NumPy arrays if `given` is one, or a sequence, else as they are."""
    return tuple(t.numpy() for t in tensors) if isinstance(given, _LIKE_NUMPY) else tensors


def check_shape(name: str, tensor: Tensor, axes: str) -> None:
    """Require one dimension per axis named in `axes`, e.g. "N, C, H, W"."""
    if tensor.ndim != len(axes.split(",")):
        raise ValueError(f"{name} must have shape [{axes}], got {list(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Require one of the `allowed` dtypes."""
    if tensor.dtype not in allowed:
        expected = " or ".join(map(_short, allowed))
        raise TypeError(f"{name} must be {expected}, got {_short(tensor.dtype)}")


def _short(dtype: torch.dtype) -> str:
    """Its name without "torch."."""
    return str(dtype).removeprefix("torch.")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Require both tensors on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name} ({other.device}), got {tensor.device}"
        )


def check_patch(size: int, stride: int) -> None:
    """Require `1 <= stride <= size`, in pixels."""
    if size < 1 or not 1 <= stride <= size:
        raise ValueError(f"patches need 1 <= stride <= size, got size {size} and stride {stride}")


def grid_shape(size: int, stride: int, height: int, width: int) -> tuple[int, int]:
    """Rows I and columns J of patches that fit an image of `height` x `width` pixels.

    size, stride: pixels. Raises ValueError for an image smaller than a patch.
    """
    check_patch(size, stride)
    if height < size or width < size:
        raise ValueError(
            f"images must be at least {size}x{size} pixels for patches of that size, "
            f"got {width}x{height} (width x height)"
        )
    return (height - size) // stride + 1, (width - size) // stride + 1


def check_finite_rows(name: str, tensor: Tensor) -> None:
    """Require finite values in a float32 or float16 tensor [rows, D]; names the first bad row.

    Checks nothing while a CUDA graph is captured: reading the answer would wait for the GPU, which
    a capture forbids.
    """
    if tensor.device.type == "cpu":
        values = tensor.contiguous()
        row = _native.cpu.first_bad_row(
            data=values.data_ptr(),
            rows=values.shape[0],
            dim=values.shape[1],
            is_half=values.dtype == torch.float16,
            context=torch.get_num_threads(),
        )
    elif torch.cuda.is_current_stream_capturing():
        return
    else:
        row = first_bad_row(tensor)
    if row >= 0:
        raise ValueError(f"{name} must be finite, got NaN or infinity in row {row}")


def first_bad_row(tensor: Tensor) -> int:
    """Number of the first row of a tensor [rows, D] that holds NaN or infinity; -1 if none does."""
    # NaN and infinity survive addition: where all sums are finite, so are all values. A sum of
    # finite values may overflow, so other tensors are looked at value by value.
    if torch.isfinite(tensor.sum(dim=1, dtype=torch.float32)).all():
        return -1
    finite = torch.isfinite(tensor).all(dim=1)
    return -1 if finite.all() else int((~finite).nonzero()[0])


def check_search_operands(queries: Tensor, bank: Tensor) -> None:
    """Require float32 queries [Q, D] and a float32 or float16 bank [M, D], M >= 1, same device."""
    check_shape("queries", queries, "Q, D")
    check_shape("bank", bank, "M, D")
    if bank.shape[0] == 0 or bank.shape[1] == 0:
        raise ValueError(f"bank must hold at least one embedding, got shape {list(bank.shape)}")
    if queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"queries must have shape [Q, {bank.shape[1]}] to match the bank, "
            f"got {list(queries.shape)}"
        )
    check_dtype("queries", queries, torch.float32)
    check_dtype("bank", bank, torch.float32, torch.float16)
    check_same_device("queries", queries, "bank", bank)


def check_search(
    queries: Tensor, bank: Tensor, groups: Groups, appended: Tensor | None = None
) -> Groups:
    """Check the operands and groups of a search (ValueError, TypeError); the groups, contiguous.

    appended: [T, D], more rows of the bank, whose numbers follow.
    """
    check_search_operands(queries, bank)
    rows = bank.shape[0]
    if appended is not None:
        check_search_operands(queries, appended)
        rows += appended.shape[0]
    groups.check(queries, rows)
    return groups.contiguous()


class Groups(NamedTuple):
    """The bank rows that a query may not match: those of its own group, such as its own image."""

    of_queries: Tensor | None = None
    """[Q] int64: the group that each query may not match; None: any row may be matched."""
    of_bank: Tensor | None = None
    """[ceil(M / rows_per_group)] int64: the group of row r is entry r // rows_per_group."""
    rows_per_group: int = 1
    """How many consecutive rows share an entry of `of_bank`."""

    def contiguous(self) -> Groups:
        """The same, with contiguous tensors."""
        if self.of_queries is None or self.of_bank is None:
            return self
        return Groups(self.of_queries.contiguous(), self.of_bank.contiguous(), self.rows_per_group)

    def behind(self, row: int) -> Groups:
        """The groups of a bank that begins at this row, the first of a group's entry."""
        if self.of_bank is None:
            return self
        return self._replace(of_bank=self.of_bank[row // self.rows_per_group :])

    def check(self, queries: Tensor, bank_rows: int) -> None:
        """Require groups of all queries and of all bank rows, or of neither."""
        if self.of_queries is None and self.of_bank is None:
            return
        if self.of_queries is None or self.of_bank is None:
            raise ValueError("excluding a group needs the groups of the queries and of the bank")
        for name, groups, count in (
            ("query_groups", self.of_queries, queries.shape[0]),
            ("bank_groups", self.of_bank, -(-bank_rows // self.rows_per_group)),
        ):
            check_dtype(name, groups, torch.int64)
            check_same_device(name, groups, "queries", queries)
            if tuple(groups.shape) != (count,):
                raise ValueError(f"{name} must have shape [{count}], got {list(groups.shape)}")


NO_GROUPS = Groups()
"""A query may match any row."""


def given_groups(exclude_same_group: Any) -> Groups:
    """From the groups of the queries [Q] and of the bank's rows [M], a pair; or None."""
    if exclude_same_group is None:
        return NO_GROUPS
    if not isinstance(exclude_same_group, tuple | list):
        raise TypeError(
            "exclude_same_group must be a pair, the groups of the queries and of the bank, "
            f"got {type(exclude_same_group).__name__}"
        )
    if len(exclude_same_group) != 2:
        raise ValueError(
            "exclude_same_group must hold the groups of the queries and of the bank, "
            f"got {len(exclude_same_group)} items"
        )
    of_queries, of_bank = exclude_same_group
    return Groups(as_numbers("query_groups", of_queries), as_numbers("bank_groups", of_bank))


def check_indices(name: str, indices: Tensor, count: int) -> None:
    """Require 0 <= index < count of an int64 tensor [B] on the CPU; names the first bad one."""
    bad = ((indices < 0) | (indices >= count)).nonzero()
    if len(bad):
        position = int(bad[0])
        raise ValueError(
            f"{name} must be at least 0 and less than {count}, "
            f"got {int(indices[position])} at position {position}"
        )


def check_pairs(images: Tensor, image_of: Tensor, draw: Draw) -> None:
    """Require images [N, C, H, W] large enough for the pairs, `image_of` [B], options in range."""
    size, kind, _, step, redraw_clipped, first_pair = draw
    check_shape("image_of", image_of, "B")
    check_dtype("image_of", image_of, torch.int64)
    check_same_device("image_of", image_of, "images", images)
    kinds = get_args(PairKind)
    if kind not in kinds:
        raise ValueError(f"kind must be {' or '.join(map(repr, kinds))}, got {kind!r}")
    count, channels, height, width = images.shape
    if count == 0:
        raise ValueError(f"images must hold at least one image, got shape {list(images.shape)}")
    smallest = {"position": 4, "neighbour": 32, "view": 1}  # smaller ones have no jitter to draw
    if size < smallest[kind]:
        raise ValueError(f"size must be at least {smallest[kind]} for {kind} pairs, got {size}")
    grid_shape(size, 1, height, width)  # refuses images smaller than a patch
    if channels * size * size >= 2**32:
        raise ValueError(
            f"a patch must have fewer than 2^32 values, got size {size} with {channels} channels"
        )
    if 2 * image_of.shape[0] * channels >= 2**31:
        raise ValueError(
            f"image_of must be shorter than 2^30 / {channels} with {channels} channels, "
            f"got {image_of.shape[0]}"
        )
    if not 0 <= step < 2**32:
        raise ValueError(f"step must be at least 0 and less than 2^32, got {step}")
    pairs = image_of.shape[0]
    if not 0 <= first_pair < 2**32 - pairs:
        raise ValueError(
            f"first_pair must be at least 0 and less than 2^32 - {pairs} for {pairs} pairs, "
            f"got {first_pair}"
        )
    room = 2 * size - 1
    if kind == "position" and redraw_clipped and min(height, width) < room:
        raise ValueError(
            f"redraw_clipped needs images of at least {room}x{room} pixels for patches of {size}, "
            f"got {width}x{height}"
        )
