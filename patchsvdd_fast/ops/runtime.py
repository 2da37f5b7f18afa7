"""What the library runs on: versions, backends, instruction sets, GPUs."""

from __future__ import annotations

import platform

import numpy as np
import torch

from . import _native
from .backends import instruction_sets


def describe() -> dict[str, str]:
    """One line per topic, for `patchsvdd info` and for benchmark results."""
    from .. import __version__

    sets = instruction_sets()
    if _native.cuda is None:
        kernels = "none: built for the CPU only (reinstall with nvcc on PATH, PATCHSVDD_CUDA=ON)"
    else:
        kernels = f"built for architectures {_native.cuda_architectures}"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.version.cuda is None:
        gpu = "not usable: this PyTorch is a CPU build"
    else:
        gpu = ", ".join(gpus) or "none found"
    return {
        "patchsvdd_fast": __version__,
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "NumPy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "CPU search": f"{sets[0]} (available: {', '.join(sets)})",
        "threads": str(torch.get_num_threads()),
        "CUDA kernels": kernels,
        "GPU": gpu,
    }
