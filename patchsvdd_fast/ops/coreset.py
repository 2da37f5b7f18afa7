"""Greedy k-centre selection of rows, by the kernels of the CPU and of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native, backends
from .backends import pointer, reporting_to, search_method
from .gpu_bank import as_cuda

MOST_ROWS = 2**32 - 1
"""Row numbers have 32 bits in the keys that rows are compared by."""

_LOW = 2**32 - 1  # the lower half of a key: this less the row; the upper: a squared distance
_INFINITY = 0x7F800000  # the bits of that float32
_STEPS_AT_ONCE = 256  # on a GPU, between two looks for Ctrl-C


class Screen(NamedTuple):
    """What the CPU needs to tell from few coordinates that rows are far apart."""

    projected: Tensor
    """[M, A] float32, on the CPU: the rows on A axes, as from `cpu_bank.project`."""
    errors: Tensor
    """[M] float32: bounds on their rounding error."""
    stretch: float
    """Bound on the factor by which the projection lengthens a vector."""
    scale: float
    """What one unit of an 8-bit code of a coordinate stands for, > 0."""


Chosen = tuple[Tensor, Tensor, float]
"""Rows [count] int64 in the order chosen, their distances [count] float32, and the radius."""


def coreset_on_cpu(
    embeddings: Tensor,
    first: int,
    count: int,
    screen: Screen | None = None,
    progress: Callable[[float], None] | None = None,
) -> Chosen:
    """`reference.coreset` by the CPU's kernels, arguments unchecked.

    embeddings: [M, D] float32 or float16, finite, contiguous, on the CPU. screen: None compares
    canonically only. With `use_method("plain")` every row is compared with every choice.
    """
    rows, dim = embeddings.shape
    chosen = torch.empty(count, dtype=torch.int64, device="cpu")
    distances = torch.empty(count, dtype=torch.float32, device="cpu")
    with reporting_to(progress):
        radius = _native.cpu.coreset(
            rows=rows,
            dim=dim,
            count=count,
            first=first,
            data=embeddings.data_ptr(),
            is_half=embeddings.dtype == torch.float16,
            method=getattr(_native.SearchMethod, search_method.get().upper()),
            projected=pointer(None if screen is None else screen.projected),
            errors=pointer(None if screen is None else screen.errors),
            axes=0 if screen is None else screen.projected.shape[1],
            stretch=1.0 if screen is None else screen.stretch,
            scale=1.0 if screen is None else screen.scale,
            chosen=chosen.data_ptr(),
            distances=distances.data_ptr(),
            context=torch.get_num_threads(),
        )
    return chosen, distances, radius


def coreset_on_gpu(
    embeddings: Tensor, first: int, count: int, progress: Callable[[float], None] | None = None
) -> Chosen:
    """`reference.coreset` by the GPU's kernels, arguments unchecked.

    embeddings: [M, D] float32 or float16, finite, contiguous, on a GPU.
    """
    rows, dim = embeddings.shape
    squared = torch.full((rows,), torch.inf, dtype=torch.float32, device=embeddings.device)
    keys = torch.zeros(count + 1, dtype=torch.int64, device=embeddings.device)
    keys[0] = _INFINITY << 32 | _LOW - first
    with backends.backend_of(embeddings) as (backend, context):
        for begin in range(0, count, _STEPS_AT_ONCE):
            end = min(count, begin + _STEPS_AT_ONCE)
            as_cuda(backend).coreset_steps(
                rows=rows,
                dim=dim,
                data=embeddings.data_ptr(),
                is_half=embeddings.dtype == torch.float16,
                begin=begin,
                end=end,
                squared=squared.data_ptr(),
                keys=keys.data_ptr(),
                context=context,
            )
            keys[end].item()  # waits, so that Ctrl-C and progress are not far behind the GPU
            if progress is not None:
                progress(end / count)
    squares = (keys >> 32).int().view(torch.float32)
    # Through float64, since torch's float32 root is not always the correctly rounded one.
    distances = squares.double().sqrt().float()
    return _LOW - (keys[:count] & _LOW), distances[:count].contiguous(), float(distances[count])
