"""How convolutions compute: their precision on a GPU, and what makes them fast in training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..ops import instruction_sets

PRECISIONS = ("float32", "tf32", "bfloat16")
"""What `computing_in` knows."""


@contextlib.contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Within the context, convolutions and matrix products on a GPU use this precision.

    "float32" turns off TF32, which PyTorch allows for convolutions by default: its ten bits of
    mantissa cannot tell embeddings apart that differ by 1e-6. "bfloat16" is PyTorch's autocast.
    Nothing changes on a CPU. Raises ValueError for a precision not in `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if device.type != "cuda":
        yield
        return
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


def fastest_layout(device: torch.device, mode: str) -> torch.memory_format:
    """The fastest layout for training convolutions, measured in docs/design/training.md.

    mode: of training, one of `training.settings.MODES`.
    """
    wide = any("avx512" in name for name in instruction_sets())
    if device.type == "cpu" and mode != "faithful" and not wide:
        return torch.contiguous_format
    return torch.channels_last


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """Flush subnormal numbers to zero: they are slow, and vanishing gradients are full of them."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
