"""Metrics of a search, and vectors divided by their norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native
from .backends import define_op
from .checks import FloatArray, as_vectors, check_dtype, check_finite_rows, check_shape, like_input

METRICS = ("euclidean", "cosine")


def is_cosine(metric: Any) -> bool:
    """Whether the metric is "cosine"; ValueError unless it is one of `METRICS`."""
    if metric not in METRICS:
        raise ValueError(f"metric must be {' or '.join(map(repr, METRICS))}, got {metric!r}")
    return bool(metric == "cosine")


def _normalise_fake(vectors: Tensor) -> Tensor:
    check_shape("vectors", vectors, "N, D")
    check_dtype("vectors", vectors, torch.float32)
    if vectors.shape[1] == 0:
        raise ValueError(f"vectors must have at least one value, got {list(vectors.shape)}")
    return torch.empty_like(vectors, memory_format=torch.contiguous_format)


def _normalise(vectors: Tensor) -> Tensor:
    _normalise_fake(vectors)
    check_finite_rows("vectors", vectors)
    values = vectors.cpu().contiguous()  # a GPU's own roots might round otherwise
    normalised = torch.empty_like(values)
    zero = _native.cpu.normalise(
        rows=values.shape[0],
        dim=values.shape[1],
        data=values.data_ptr(),
        normalised=normalised.data_ptr(),
        context=torch.get_num_threads(),
    )
    if zero >= 0:
        raise ValueError(f"vectors must have a direction, got only zeros in row {zero}")
    return normalised.to(vectors.device)


define_op("normalise(Tensor vectors) -> Tensor", _normalise, _normalise_fake)


def normalised(name: str, vectors: Tensor) -> Tensor:
    """`normalise` of a tensor [N, D] float32; errors call it `name`."""
    try:
        result: Tensor = torch.ops.patchsvdd_fast.normalise(vectors)
    except ValueError as error:
        raise ValueError(str(error).replace("vectors", name, 1)) from None
    return result


def normalise(vectors: Tensor | FloatArray) -> Tensor:
    """Divide each vector by its norm, as the cosine distance does.

    The norm is the canonical distance to the zero vector (`nearest` says what that is), and each
    value is divided by it in float32, rounded once. Before, a power of two brings the largest
    value of a vector to [1, 2): so that the squares of values like 1e30 or 1e-30 do not overflow
    or underflow. It changes no result else: multiplying by it is exact, but for values 2^126
    times smaller than the largest, which are rounded as subnormal numbers are.

    vectors: [N, D], D >= 1, finite; real numbers as `nearest` takes them.

    Returns [N, D] float32, a NumPy array if `vectors` is one or a list. The same bits for every
    instruction set and device; those on a GPU are computed on the CPU and copied back. Not
    differentiable. Raises ValueError for a wrong shape, for NaN or infinity, and for a vector of
    zeros, which has no direction, naming its row; TypeError for what are no real numbers.
    """
    result: Tensor
    (result,) = like_input(vectors, normalised("vectors", as_vectors("vectors", vectors)))
    return result
