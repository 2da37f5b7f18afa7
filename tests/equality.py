"""Comparing what the ops give on two devices, bit for bit, from arrays of any kind."""

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


class ForeignArray:
    """As CuPy's arrays are to us: no tensor, no NumPy array, but with DLPack."""

    def __init__(self, values):
        self.values = values

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()
