"""Registration of ops, choice of kernels by device, settings of searches, versions."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from . import _native

library = torch.library.Library("patchsvdd_fast", "DEF")


def define_op(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    devices: tuple[str, ...] = ("CPU", "CUDA"),
) -> None:
    """Register a torch op for the devices.

    kernel: runs the op. fake: checks the arguments and returns tensors of the right shape, so that
    `torch.compile` can trace the op without running it.
    """
    library.define(schema)
    name = schema.partition("(")[0]
    for device in devices:
        library.impl(name, kernel, device)
    torch.library.register_fake(f"patchsvdd_fast::{name}", fake, lib=library)


@contextlib.contextmanager
def backend_of(tensor: Tensor) -> Iterator[tuple[type[_native.Backend], int]]:
    """The kernels for the tensor's device, and their context: number of threads, or CUDA stream."""
    if tensor.device.type == "cpu":
        yield _native.cpu, torch.get_num_threads()
        return
    if _native.cuda is None:
        raise RuntimeError(
            "got a CUDA tensor, but this build of patchsvdd_fast has no CUDA kernels: install the "
            "CUDA toolkit and reinstall with PATCHSVDD_CUDA=ON"
        )
    with torch.cuda.device(tensor.device):
        yield _native.cuda, torch.cuda.current_stream().cuda_stream


def resolve_device(device: str) -> torch.device:
    """The named device; "auto" is the GPU if this build has kernels for one, else the CPU.

    Raises ValueError for any device but a CPU or a CUDA GPU, and for a GPU that torch does not
    find.
    """
    if device == "auto":
        usable = _native.cuda is not None and torch.cuda.is_available()
        return torch.device("cuda" if usable else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'device must be "auto", "cpu", "cuda" or "cuda:N", got {device!r}'
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch finds no GPU")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} was asked for, but torch finds {torch.cuda.device_count()} GPUs, "
            "numbered from 0"
        )
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a CUDA GPU, got {device!r}")
    return resolved


# --- settings of searches -------------------------------------------------------------------------


def instruction_sets() -> list[str]:
    """Instruction sets the CPU search can use on this machine, best first."""
    return _native.cpu.instruction_sets()


@contextlib.contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Within the context, search with the named instruction set (for tests and benchmarks)."""
    before = _native.cpu.instruction_set()
    _native.cpu.set_instruction_set(name)
    try:
        yield
    finally:
        _native.cpu.set_instruction_set(before)


_METHODS = ("auto", "plain", "screened")
search_method = ContextVar("search_method", default="auto")


@contextlib.contextmanager
def use_method(name: str) -> Iterator[None]:
    """Within the context, brute-force searches use the named method (for tests and benchmarks).

    "plain" computes the canonical distance of every pair, "screened" only of the pairs that a
    low-precision screen cannot rule out, "auto" chooses by size. All give the same answer.
    """
    if name not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {name}")
    with _setting(search_method, name):
        yield


workspace_limit = ContextVar("workspace_limit", default=1 << 30)


@contextlib.contextmanager
def use_workspace_limit(num_bytes: int) -> Iterator[None]:
    """Within the context, a search on a GPU keeps its scratch memory near `num_bytes`.

    The default is 1 GiB. A lower limit means more and smaller chunks, and the same answer; one
    chunk, about 1 MiB, is always needed.
    """
    with byte_limit(workspace_limit, num_bytes):
        yield


@contextlib.contextmanager
def byte_limit(setting: ContextVar[Any], num_bytes: int) -> Iterator[None]:
    """Within the context, set the setting to `num_bytes`. Raises ValueError below 1."""
    if num_bytes < 1:
        raise ValueError(f"the limit must be at least 1 byte, got {num_bytes}")
    with _setting(setting, num_bytes):
        yield


@contextlib.contextmanager
def _setting(setting: ContextVar[Any], value: Any) -> Iterator[None]:
    """Within the context, the setting has the value."""
    token = setting.set(value)
    try:
        yield
    finally:
        setting.reset(token)


def new_workspace(like: Tensor, num_bytes: int) -> Tensor:
    """Scratch memory on the device of `like`; if it does not fit, the error says what to set."""
    try:
        return like.new_empty(num_bytes, dtype=torch.uint8)
    except torch.cuda.OutOfMemoryError as error:
        raise torch.cuda.OutOfMemoryError(
            f"the search asked for {num_bytes / 2**20:,.0f} MiB of scratch memory, more than is "
            f"free on {like.device}: lower it with ops.use_workspace_limit(bytes)"
        ) from error


@contextlib.contextmanager
def reporting_to(progress: Callable[[float], None] | None) -> Iterator[None]:
    """Within the context, long work on the CPU calls `progress` with the share done, 0 to 1.

    None: no one is called.
    """
    if progress is None:
        yield
        return
    before = _native.cpu.set_progress(progress)
    try:
        yield
    finally:
        _native.cpu.set_progress(before)


# --- arguments of kernels -------------------------------------------------------------------------


def pointer(tensor: Tensor | None) -> int:
    """Address of the tensor's data; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


# --- forks ----------------------------------------------------------------------------------------

# GNU's OpenMP, which torch computes with on Linux, keeps the threads of a parallel loop for the
# next one. A child of a fork does not have them, and would wait for them for ever. So they are
# ended before a fork; the next loop starts others. This library's own threads last for one call.

_OMP_PAUSE_SOFT = 1
_were_ended = True  # whether the last fork found no threads that its child would wait for


def _end_idle_threads() -> None:
    """End the OpenMP threads that wait for the next parallel loop of the calling thread."""
    global _were_ended  # noqa: PLW0603
    _were_ended = False
    with contextlib.suppress(OSError, AttributeError):  # before GCC 9 there is no such call
        for path in _loaded_openmp():
            if ctypes.CDLL(path).omp_pause_resource_all(_OMP_PAUSE_SOFT) != 0:
                return
        _were_ended = True


def _loaded_openmp() -> list[str]:
    """The files of all GNU OpenMP libraries in this process; torch and others bring their own."""
    maps = Path("/proc/self/maps")
    if not maps.exists():  # not on Linux
        return []
    lines = maps.read_text(errors="surrogateescape").splitlines()
    return sorted({line.split(maxsplit=5)[-1] for line in lines if "/libgomp" in line})


def _settle_threads() -> None:
    """In a child of a fork: one thread where the parent's could not be ended, else as many."""
    # Setting the number also makes torch's other pool of threads anew, which several threads of
    # the child must not do at once: "Invalid thread pool".
    torch.set_num_threads(torch.get_num_threads() if _were_ended else 1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_end_idle_threads, after_in_child=_settle_threads)


# --- versions -------------------------------------------------------------------------------------


def describe() -> dict[str, str]:
    """Versions, instruction sets and GPUs by topic, for `patchsvdd info` and for benchmarks."""
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
