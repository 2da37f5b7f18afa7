"""Patches, their gradients and anomaly maps on a GPU against those on the CPU."""

import pytest
import torch

from equality import assert_same, to
from grids import GRIDS, PAIRS
from patchsvdd_fast import ops
from patchsvdd_fast.ops import reference

BACKWARD = torch.ops.patchsvdd_fast.extract_patches_backward


def cells(size, stride, height, width):
    """Rows and columns of the grid of patches."""
    return (height - size) // stride + 1, (width - size) // stride + 1


@pytest.mark.parametrize(("size", "stride", "height", "width"), [*GRIDS, (32, 4, 256, 256)])
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_small_patches_are_copied(device, size, stride, height, width, dtype):
    images = (torch.rand(2, 3, height, width) * 255).to(dtype)
    patches = ops.extract_patches(images.to(device), size, stride)
    assert_same(patches, reference.extract_patches(images, size, stride), device)


@pytest.mark.parametrize(("size", "stride", "height", "width"), [*GRIDS, (32, 4, 256, 256)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
def test_small_patches_are_normalized(device, size, stride, height, width, dtype):
    images = (torch.rand(2, 3, height, width) * 255).to(dtype)
    mean = torch.rand(3, height, width) * 255
    patches = ops.extract_patches(images.to(device), size, stride, mean.to(device))
    assert_same(patches, ops.extract_patches(images, size, stride, mean), device)


def test_half_conversion_is_exact_for_every_finite_value(device):
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    images = halves[torch.isfinite(halves)].reshape(1, 1, 1, -1)
    mean = torch.zeros(1, 1, images.shape[-1])
    patches = ops.extract_patches(images.to(device), 1, 1, mean.to(device))
    assert torch.equal(patches.flatten().cpu(), images.flatten().float() / 255)


def test_patches_of_many_images_and_of_none(device):
    images = torch.randint(256, (70_001, 1, 4, 5), dtype=torch.uint8)
    found = ops.extract_patches(images.to(device), 3, 1)
    assert_same(found, reference.extract_patches(images, 3, 1), device)
    none = ops.extract_patches(torch.empty(0, 3, 8, 8, device=device), 4, 2)
    assert none.shape == (0, 3, 3, 3, 4, 4)
    assert none.device == device


def test_patches_of_images_that_are_not_contiguous(device):
    images, mean = torch.rand(2, 40, 50, 3), torch.rand(1, 40, 50)
    expected = ops.extract_patches(images.permute(0, 3, 1, 2), 8, 3, mean.expand(3, 40, 50))
    on_device = images.to(device).permute(0, 3, 1, 2), mean.to(device).expand(3, 40, 50)
    found = ops.extract_patches(on_device[0], 8, 3, on_device[1])
    assert_same(found, expected, device)
    misaligned = torch.rand(3 * 40 * 50 + 1)
    view = misaligned[1:].view(1, 3, 40, 50)
    found = ops.extract_patches(misaligned.to(device)[1:].view(1, 3, 40, 50), 8, 4)
    assert_same(found, reference.extract_patches(view, 8, 4), device)


@pytest.mark.needs_card
def test_more_than_two_to_the_31_elements_of_patches(device):
    images = torch.randint(256, (220, 3, 256, 256), dtype=torch.uint8, device=device)
    patches = ops.extract_patches(images, 32, 4)
    assert patches.numel() > 2**31
    expected = reference.extract_patches(images[-1:].cpu(), 32, 4)
    assert torch.equal(patches[-1:].cpu(), expected)


@pytest.mark.parametrize(("size", "stride", "height", "width"), [*GRIDS, (32, 4, 96, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_gradients(device, size, stride, height, width, dtype):
    rows, columns = cells(size, stride, height, width)
    gradients = torch.rand(2, rows, columns, 3, size, size, dtype=dtype)
    found = BACKWARD(gradients.to(device), stride, height, width)
    assert_same(found, BACKWARD(gradients, stride, height, width), device)


def test_autograd(device):
    images, mean = torch.rand(3, 2, 12, 13) * 255, torch.rand(2, 12, 13)
    weights = torch.rand(3, 3, 3, 2, 6, 6)
    gradients = []
    for where in (device, torch.device("cpu")):
        leaves = [values.to(where).requires_grad_() for values in (images, mean)]
        loss = (ops.extract_patches(leaves[0], 6, 3, leaves[1])[:, :, :3] * weights.to(where)).sum()
        gradients.append([g.cpu() for g in torch.autograd.grad(loss, leaves)])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)  # torch divides and sums


def test_gradcheck(device):
    images = torch.rand(1, 2, 6, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.extract_patches(x, 3, 2), images)


@pytest.mark.parametrize(("kind", "size", "channels", "height", "width", "redraw_clipped"), PAIRS)
@pytest.mark.parametrize("count", [0, 1, 70])
def test_small_pairs(device, kind, size, channels, height, width, redraw_clipped, count):
    images = torch.randint(256, (3, channels, height, width), dtype=torch.uint8)
    images_of = torch.randint(3, (count,))
    given = images, torch.rand(channels, height, width) * 255, images_of
    options = size, kind, 3, 4, redraw_clipped, 2**32 - 1 - count
    found = ops.crop_pairs(*to(device, given), *options)
    assert_same(found, ops.crop_pairs(*given, *options), device)


@pytest.mark.parametrize(
    ("size", "stride", "height", "width"), [*GRIDS, (64, 16, 256, 256), (32, 4, 256, 256)]
)
def test_small_maps(device, size, stride, height, width):
    grid = (3, *cells(size, stride, height, width))
    distances = torch.rand(grid) * 10.0 ** torch.randint(-6, 6, grid)
    found = ops.score_map(distances.to(device), size, stride, height, width)
    assert_same(found, ops.score_map(distances, size, stride, height, width), device)


def test_every_grid_up_to_some_size(device):
    for size in range(1, 13):
        for stride in range(1, size + 1):
            height, width = size + 3 * stride + 1, size + 17
            distances = torch.rand(2, *cells(size, stride, height, width))
            found = ops.score_map(distances.to(device), size, stride, height, width)
            assert_same(found, ops.score_map(distances, size, stride, height, width), device)


def test_many_maps_none_and_infinity(device):
    distances = torch.rand(70_001, 3, 2)
    distances[5, 1, 1] = torch.inf
    found = ops.score_map(distances.to(device), 4, 2, 9, 7)
    assert_same(found, ops.score_map(distances, 4, 2, 9, 7), device)
    assert ops.score_map(torch.rand(0, 3, 2, device=device), 4, 2, 9, 7).shape == (0, 9, 7)


def test_maps_of_distances_that_are_not_contiguous(device):
    distances = torch.rand(13, 2, 13)
    found = ops.score_map(distances.to(device).transpose(0, 1), 64, 16, 256, 256)
    assert_same(found, ops.score_map(distances.transpose(0, 1), 64, 16, 256, 256), device)
