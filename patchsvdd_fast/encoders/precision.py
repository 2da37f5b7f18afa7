"""The arithmetic of convolutions on a GPU: full float32 unless something less is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

PRECISIONS = ("float32", "tf32", "bfloat16")


@contextlib.contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Within the context, convolutions and products on a GPU are made in this precision.

    "float32" does without TF32, which PyTorch allows by default: its ten bits would drown
    embeddings that differ by 1e-6. "bfloat16" is autocast. Nothing changes on a CPU.
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
