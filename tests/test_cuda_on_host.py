"""The CUDA kernels, compiled for the host and executed there, against reference and CPU kernels."""

import contextlib

import pytest
import torch

from grids import GRIDS, PAIRS
from patchsvdd_fast import ops, reference


@pytest.fixture
def on_cuda_kernels(cuda_on_host, monkeypatch):
    """Within the context, ops on CPU tensors run the CUDA kernels."""

    @contextlib.contextmanager
    def use():
        @contextlib.contextmanager
        def backend(tensor):
            assert tensor.device.type == "cpu"
            yield cuda_on_host.cuda, 0

        with monkeypatch.context() as patch:
            patch.setattr(ops, "_backend", backend)
            yield

    return use


@pytest.mark.parametrize(("size", "stride", "height", "width"), GRIDS)
def test_extract_patches(on_cuda_kernels, size, stride, height, width):
    for dtype in (torch.uint8, torch.float16, torch.float32, torch.float64):
        images = (torch.rand(2, 3, height, width) * 255).to(dtype)
        mean = None if dtype == torch.float64 else torch.rand(3, height, width)
        for offset in (None, mean):
            with on_cuda_kernels():
                patches = ops.extract_patches(images, size, stride, offset)
            assert torch.equal(patches, reference.extract_patches(images, size, stride, offset))


@pytest.mark.parametrize(("size", "stride", "height", "width"), GRIDS)
def test_extract_patches_backward(on_cuda_kernels, size, stride, height, width):
    rows, columns = (height - size) // stride + 1, (width - size) // stride + 1
    for dtype in (torch.float32, torch.float64):
        gradients = torch.rand(2, rows, columns, 3, size, size, dtype=dtype)
        backward = torch.ops.patchsvdd_fast.extract_patches_backward
        with on_cuda_kernels():
            on_cuda = backward(gradients, stride, height, width)
        assert torch.equal(on_cuda, backward(gradients, stride, height, width))


@pytest.mark.parametrize(
    ("size", "stride", "height", "width"), [*GRIDS, (64, 16, 256, 256), (32, 4, 70, 90)]
)
def test_score_map_is_that_of_the_cpu_to_the_bit(on_cuda_kernels, size, stride, height, width):
    rows, columns = (height - size) // stride + 1, (width - size) // stride + 1
    distances = torch.rand(3, rows, columns) * 10.0 ** torch.randint(-6, 6, (3, rows, columns))
    with on_cuda_kernels():
        on_cuda = ops.score_map(distances, size, stride, height, width)
    assert torch.equal(on_cuda, ops.score_map(distances, size, stride, height, width))


@pytest.mark.parametrize("dim", [1, 5, 16, 17, 64, 100])
@pytest.mark.parametrize("count", [1, 3, 300])
def test_nearest_is_the_canonical_answer_to_the_bit(on_cuda_kernels, dim, count):
    queries, bank = torch.randn(count, dim), torch.randn(77, dim)
    bank[40] = bank[70] = queries[0]  # a tie across two ranges of the bank
    with on_cuda_kernels():
        distances, indices = ops.nearest(queries, bank)
    expected = reference.nearest(queries, bank)
    assert torch.equal(distances, expected[0])
    assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("count", [1, 40])
def test_nearest_excludes_groups(on_cuda_kernels, count):
    queries, bank = torch.randn(count, 20), torch.randn(90, 20)
    groups = torch.randint(3, (count,)), torch.randint(3, (90,))
    expected = ops.nearest(queries, bank, exclude_same_group=groups)
    nothing = torch.zeros(count, dtype=torch.int64), torch.zeros(90, dtype=torch.int64)
    with on_cuda_kernels():
        found = ops.nearest(queries, bank, exclude_same_group=groups)
        none = ops.nearest(queries, bank, exclude_same_group=nothing)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.isinf(none[0]).all()
    assert (none[1] == -1).all()


def test_nearest_of_no_queries(on_cuda_kernels):
    with on_cuda_kernels():
        distances, indices = ops.nearest(torch.empty(0, 4), torch.rand(3, 4))
    assert distances.shape == indices.shape == (0,)


@pytest.mark.parametrize(("kind", "size", "channels", "height", "width", "redraw_clipped"), PAIRS)
def test_crop_pairs_are_those_of_the_cpu_to_the_bit(
    on_cuda_kernels, kind, size, channels, height, width, redraw_clipped
):
    images = torch.randint(256, (3, channels, height, width), dtype=torch.uint8)
    mean = torch.rand(channels, height, width) * 255
    arguments = (images, mean, torch.randint(3, (5,)), size, kind, 3, 4, redraw_clipped)
    with on_cuda_kernels():
        on_cuda = ops.crop_pairs(*arguments)
    for found, expected in zip(on_cuda, ops.crop_pairs(*arguments), strict=True):
        assert torch.equal(found, expected)


def test_crop_pairs_of_no_pairs(on_cuda_kernels):
    images, nothing = torch.zeros(1, 1, 9, 9, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    with on_cuda_kernels():
        patches, _, _ = ops.crop_pairs(images, torch.zeros(1, 9, 9), nothing, 8, "position", 0, 0)
    assert patches.shape == (2, 0, 1, 8, 8)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 3000])
def test_the_runtime_runs_every_thread(cuda_on_host, count):
    """A copy of `count` elements has that many elements: the harness itself is not vacuous."""
    images = torch.arange(count, dtype=torch.float32).reshape(1, 1, 1, count)
    patches = torch.full((1, 1, count, 1, 1, 1), -1.0)
    module = cuda_on_host
    grid = module.PatchGrid(1, 1, 1, count, 1, count, 1, 1)
    module.cuda.extract_patches(
        grid, images.data_ptr(), 0, patches.data_ptr(), 4, module.PixelType.FLOAT32, 0
    )
    assert torch.equal(patches.flatten(), images.flatten())
