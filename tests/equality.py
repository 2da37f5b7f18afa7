"""Comparing what the ops give on two devices, bit for bit."""

import torch


def to(device, values):
    """Tensors on a device, in the tuples they come in; None stays None."""
    if isinstance(values, tuple):
        return tuple(to(device, value) for value in values)
    return values.to(device) if isinstance(values, torch.Tensor) else values


def assert_same(found, expected, device):
    """Tensors, or tuples of them: found on `device`, expected on the CPU, equal to the bit."""
    if isinstance(expected, torch.Tensor):
        found, expected = (found,), (expected,)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device == device
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.cpu(), theirs)
