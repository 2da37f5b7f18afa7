"""Tests on a GPU (`make test-gpu`); `pytest tests/gpu --gpu-device cpu` tries them without one.

Results of the ops on the device are compared with those on the CPU, bit for bit.
"""

from __future__ import annotations

import pytest
import torch

from patchsvdd_fast.ops import _native


def _unusable(device: torch.device) -> str | None:
    """Why tests cannot run on the device, if so."""
    if device.type == "cpu":
        return None
    if not torch.cuda.is_available():
        return "no CUDA device here"
    if _native.cuda is None:
        return "this build has no CUDA kernels: make test-gpu builds them"
    return None


class _SkippedModule(pytest.Module):
    """A module that is not imported, only reported as skipped."""

    def collect(self):
        pytest.skip(_unusable(_device(self.config)), allow_module_level=True)


def _device(config: pytest.Config) -> torch.device:
    return torch.device(config.getoption("--gpu-device"))


def pytest_pycollect_makemodule(module_path, parent):
    if _unusable(_device(parent.config)) is None:
        return None
    return _SkippedModule.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(config, items):
    if _device(config).type == "cpu":
        skip = pytest.mark.skip(reason="needs a card")
        for item in items:
            if "needs_card" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def device(request):
    """Where the tests run, with its index."""
    chosen = _device(request.config)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen
