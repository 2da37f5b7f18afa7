"""Checks of user input whose errors name the argument, what was expected and what was given."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(name: str, value: Any) -> Tensor:
    """A tensor over the same memory as `value`, which may be a tensor or a NumPy array."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    raise TypeError(f"{name} must be a torch tensor or a NumPy array, got {type(value).__name__}")


def check_shape(name: str, tensor: Tensor, axes: str) -> None:
    """Require one dimension per axis named in `axes`, e.g. "N, C, H, W"."""
    if tensor.ndim != len(axes.split(",")):
        raise ValueError(f"{name} must have shape [{axes}], got {list(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Require one of the `allowed` dtypes."""
    if tensor.dtype not in allowed:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        given = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be {expected}, got {given}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Require both tensors on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name} ({other.device}), got {tensor.device}"
        )


def check_finite_rows(name: str, tensor: Tensor) -> None:
    """Require finite values in a [rows, D] tensor; the error names the first bad row."""
    finite = torch.isfinite(tensor).all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"{name} must be finite, got NaN or infinity in row {row}")


def check_search_operands(queries: Tensor, bank: Tensor) -> None:
    """Require float32 queries [Q, D] and a non-empty bank [M, D] on the same device."""
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
    check_dtype("bank", bank, torch.float32)
    check_same_device("queries", queries, "bank", bank)
