"""Data-parallel training: processes that share each batch and add up their gradients."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
from torch import Tensor, distributed

# While the first process fills banks and evaluates, the others wait for the next run of training.
_LONGEST_WAIT = timedelta(hours=6)


class Workers:
    """The processes that train together, as one of them sees them; here, this process alone."""

    rank = 0
    count = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that reports and writes."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """The items of a batch that this process computes; shares differ by one item at most.

        Raises ValueError if there are more processes than items.
        """
        if batch < self.count:
            raise ValueError(
                f"a batch of {batch} cannot be divided over {self.count} processes: "
                "use a larger batch_size"
            )
        return slice(batch * self.rank // self.count, batch * (self.rank + 1) // self.count)

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace the gradient of each parameter by its sum over the processes."""

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes pass."""
        return number

    def agreed(self, number: float) -> float:
        """The number that the first process passes, for all; integers up to 2^53 stay exact."""
        return number


class _ManyWorkers(Workers):
    """A process of torch.distributed's default group."""

    def __init__(self, device: torch.device) -> None:
        # Single numbers are exchanged between CPUs where the group can do that: reading one from a
        # GPU would wait for all work queued there.
        config = distributed.get_backend_config()
        self._numbers_on = torch.device("cpu") if "cpu:" in config else device
        self.rank = distributed.get_rank()
        self.count = distributed.get_world_size()

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(together)
        parts = together.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def largest(self, number: int) -> int:
        found = torch.tensor(number, device=self._numbers_on)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def agreed(self, number: float) -> float:
        value = torch.tensor(number, dtype=torch.float64, device=self._numbers_on)
        distributed.broadcast(value, src=0)
        return float(value)


def under_torchrun() -> bool:
    """Whether torchrun started this process, as one of several or alone."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def local_device(device: torch.device) -> torch.device:
    """The device; for "cuda" without a number under torchrun, this process's own GPU."""
    if device.type == "cuda" and device.index is None and under_torchrun():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


@contextlib.contextmanager
def joined_workers(device: torch.device) -> Iterator[Workers]:
    """Join the other processes of torchrun, by NCCL on GPUs and gloo on CPUs; else work alone.

    An existing process group is used, and kept at the end.
    """
    if distributed.is_available() and distributed.is_initialized():
        yield _ManyWorkers(device)
        return
    if not under_torchrun():
        yield Workers()
        return
    # Adam imports this module, whose functions hold the group that exists then as a default
    # argument. Imported before there is one, it cannot keep the group alive: gloo's threads would
    # abort the interpreter at exit.
    importlib.import_module("torch.distributed.nn")

    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_LONGEST_WAIT
    )
    try:
        yield _ManyWorkers(device)
    finally:
        distributed.destroy_process_group()
