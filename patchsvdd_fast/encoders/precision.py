"""The precision of convolutions on a GPU: full float32 unless something less is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

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
