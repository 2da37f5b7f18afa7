"""How convolutions compute: their precision, and what makes them fast in training."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from ..ops import instruction_sets

PRECISIONS = ("float32", "tf32", "bfloat16")
"""What `computing_in` knows."""


@contextlib.contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Within the context, convolutions and matrix products use this precision.

    "bfloat16" is PyTorch's autocast. "float32" turns off TF32 on a GPU, which PyTorch allows for
    convolutions by default: its ten bits of mantissa cannot tell embeddings apart that differ by
    1e-6. On a CPU "tf32" is float32. Raises ValueError for a precision not in `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if device.type != "cuda":
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
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


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself, by AVX512-BF16 or AMX."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def warn_of_slow_bfloat16(device: torch.device) -> None:
    """Warn that bfloat16 is slower than float32, if it is on this device."""
    if device.type == "cpu" and not has_bfloat16():
        warnings.warn(
            "this CPU has no bfloat16 (AVX512-BF16 or AMX): float32 is faster here", stacklevel=2
        )


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
