"""Which device to run on."""

from __future__ import annotations

import torch

from . import _native


def resolve_device(device: str) -> torch.device:
    """The device to run on; "auto" prefers a GPU that this build has kernels for."""
    if device == "auto":
        usable = _native.cuda is not None and torch.cuda.is_available()
        return torch.device("cuda" if usable else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f'device must be "auto", "cpu", "cuda" or "cuda:N", got {device!r}'
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch finds no GPU")
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a CUDA GPU, got {device!r}")
    return resolved
