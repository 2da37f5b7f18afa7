"""Patches, maps and training pairs against their reference, on awkward sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grids import GRIDS, PAIRS
from patchsvdd_fast import ops
from patchsvdd_fast.ops import reference


@pytest.mark.parametrize(("size", "stride", "height", "width"), GRIDS)
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_extract_patches_copies(size, stride, height, width, dtype):
    images = (torch.rand(2, 3, height, width) * 255).to(dtype)
    patches = ops.extract_patches(images, size, stride)
    assert patches.dtype == dtype
    assert torch.equal(patches, reference.extract_patches(images, size, stride))


@pytest.mark.parametrize(("size", "stride", "height", "width"), GRIDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
def test_extract_patches_normalizes(size, stride, height, width, dtype):
    images = (torch.rand(2, 3, height, width) * 255).to(dtype)
    mean = torch.rand(3, height, width) * 255
    patches = ops.extract_patches(images, size, stride, mean)
    assert patches.dtype == torch.float32
    assert torch.equal(patches, reference.extract_patches(images, size, stride, mean))


def test_half_conversion_is_exact_for_every_finite_value():
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16)
    halves = halves[torch.isfinite(halves)]
    images = halves.reshape(1, 1, 1, -1)
    mean = torch.zeros(1, 1, images.shape[-1])
    patches = ops.extract_patches(images, 1, 1, mean)
    assert torch.equal(patches.flatten(), halves.float() / 255)


def test_extract_patches_accepts_what_is_not_contiguous():
    images = torch.rand(2, 40, 50, 3).permute(0, 3, 1, 2)
    mean = torch.rand(1, 40, 50).expand(3, 40, 50)
    patches = ops.extract_patches(images, 8, 3, mean)
    assert torch.equal(patches, reference.extract_patches(images, 8, 3, mean))


def test_extract_patches_of_no_images():
    assert ops.extract_patches(torch.empty(0, 3, 8, 8), 4, 2).shape == (0, 3, 3, 3, 4, 4)


@pytest.mark.parametrize(
    ("size", "stride", "height", "width"), [(1, 1, 1, 1), (3, 1, 4, 5), (4, 3, 9, 6), (2, 2, 7, 5)]
)
def test_extract_patches_gradient(size, stride, height, width):
    images = torch.rand(2, 2, height, width, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.extract_patches(x, size, stride), images)


def test_extract_patches_gradient_through_normalization():
    images = (torch.rand(3, 2, 12, 13) * 255).requires_grad_()
    mean = torch.rand(2, 12, 13).requires_grad_()
    weights = torch.rand(3, 3, 3, 2, 6, 6)
    gradients = []
    for function in (ops.extract_patches, reference.extract_patches):
        loss = (function(images, 6, 3, mean)[:, :, :3] * weights).sum()
        gradients.append(torch.autograd.grad(loss, [images, mean]))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_extract_patches_gradient_of_halves():
    images = torch.rand(1, 1, 9, 9).half().requires_grad_()
    ops.extract_patches(images, 3, 1).float().sum().backward()
    expected = torch.tensor([1.0, 2, 3, 3, 3, 3, 3, 2, 1])
    assert torch.equal(images.grad[0, 0].float(), expected[:, None] * expected)


@pytest.mark.parametrize(("size", "stride", "height", "width"), [*GRIDS, (64, 16, 256, 256)])
def test_score_map_matches_reference(size, stride, height, width):
    rows, columns = (height - size) // stride + 1, (width - size) // stride + 1
    distances = torch.rand(3, rows, columns) * 10.0 ** torch.randint(-6, 6, (3, rows, columns))
    expected = reference.score_map(distances, size, stride, height, width)
    maps = ops.score_map(distances, size, stride, height, width)
    # float64 sums rounded once: half a unit in the last place, 2^-24
    torch.testing.assert_close(maps.double(), expected, rtol=6.1e-8, atol=0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_score_map_on_any_grid(data):
    size = data.draw(st.integers(1, 20), label="size")
    stride = data.draw(st.integers(1, size), label="stride")
    height = data.draw(st.integers(size, size + 40), label="height")
    width = data.draw(st.integers(size, size + 40), label="width")
    rows, columns = (height - size) // stride + 1, (width - size) // stride + 1
    distances = torch.rand(1, rows, columns)
    expected = reference.score_map(distances, size, stride, height, width)
    maps = ops.score_map(distances, size, stride, height, width)
    torch.testing.assert_close(maps.double(), expected, rtol=6.1e-8, atol=0)


def test_score_map_keeps_infinity_to_the_pixels_it_covers():
    distances = torch.ones(1, 13, 13)
    distances[0, 6, 6] = torch.inf
    maps = ops.score_map(distances, 64, 16, 256, 256)
    covered = torch.zeros(256, 256, dtype=torch.bool)
    covered[96:160, 96:160] = True
    assert torch.equal(torch.isinf(maps[0]), covered)
    assert torch.equal(maps[0][~covered], torch.ones(256, 256)[~covered])


def _training_images(channels, height, width, count=3):
    images = torch.randint(256, (count, channels, height, width), dtype=torch.uint8)
    return images, images.float().mean(dim=0)


@pytest.mark.parametrize(("kind", "size", "channels", "height", "width", "redraw_clipped"), PAIRS)
def test_crop_pairs_matches_reference(kind, size, channels, height, width, redraw_clipped):
    images, mean = _training_images(channels, height, width)
    image_of, last = torch.randint(3, (13,)), 2**32 - 14
    arguments = (images, mean, image_of, size, kind, 2**63 + 5, 7, redraw_clipped, last)
    patches, corners, labels = ops.crop_pairs(*arguments)
    expected = reference.crop_pairs(*arguments)
    assert torch.equal(corners, expected[1])
    assert torch.equal(labels, expected[2])
    # five roundings of values up to 1, and normal numbers to 1e-6
    torch.testing.assert_close(patches.double(), expected[0], rtol=0, atol=3e-7)


def test_philox_gives_the_published_numbers():
    """Known answers of the generator's authors, for Philox4x32 with ten rounds."""
    ones = 2**32 - 1
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    for seed, counter, expected in (
        (0, [0] * 4, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (2**64 - 1, [ones] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (0x299F31D0A4093822, pi, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        assert reference.philox(seed, *counter).tolist() == expected


def test_crop_pairs_do_not_depend_on_threads_or_batches():
    images, mean = _training_images(3, 100, 90)
    image_of = torch.randint(3, (23,))
    expected = ops.crop_pairs(images, mean, image_of, 32, "position", 1, 2)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            torch.set_flush_denormal(count == 2)
            for pairs in (1, 10, 23):
                found = ops.crop_pairs(images, mean, image_of[:pairs], 32, "position", 1, 2)
                assert torch.equal(found[0], expected[0][:, :pairs])
                assert torch.equal(found[1], expected[1][:, :pairs])
                assert torch.equal(found[2], expected[2][:pairs])
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("kind", ["position", "neighbour", "view"])
def test_crop_pairs_of_a_split_batch_are_those_of_the_whole(kind):
    images, mean = _training_images(3, 70, 80)
    image_of = torch.randint(3, (11,))

    def crop(first, last):
        return ops.crop_pairs(images, mean, image_of[first:last], 32, kind, 1, 2, first_pair=first)

    for left, right, whole in zip(crop(0, 4), crop(4, 11), crop(0, 11), strict=True):
        axis = 0 if whole.ndim == 1 else 1  # of the pairs
        assert torch.equal(torch.cat([left, right], axis), whole)


def test_crop_pairs_differ_by_seed_and_step():
    images, mean = _training_images(1, 80, 80)
    drawn = {
        (seed, step): ops.crop_pairs(images, mean, torch.zeros(4).long(), 8, "position", seed, step)
        for seed in (0, 1, 2**32, 2**64 - 1)
        for step in (0, 1, 2**32 - 1)
    }
    for values in zip(*drawn.values(), strict=True):
        assert len({value.numpy().tobytes() for value in values}) == len(drawn)
    again = ops.crop_pairs(images, mean, torch.zeros(4).long(), 8, "position", -1, 1)
    assert torch.equal(again[0], drawn[2**64 - 1, 1][0])


def test_crop_pairs_accepts_what_is_not_contiguous():
    images, mean = _training_images(3, 50, 60)
    image_of = torch.tensor([2, 0, 1, 0, 2, 1])[::2]
    expected = ops.crop_pairs(images, mean, image_of.contiguous(), 32, "neighbour", 0, 0)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    transposed = mean.transpose(1, 2).contiguous().transpose(1, 2)
    found = ops.crop_pairs(channels_last, transposed, image_of, 32, "neighbour", 0, 0)
    assert torch.equal(found[0], expected[0])


def test_crop_pairs_of_no_pairs():
    images, mean = _training_images(3, 32, 32)
    patches, corners, labels = ops.crop_pairs(
        images, mean, torch.empty(0, dtype=torch.int64), 16, "position", 0, 0
    )
    assert patches.shape == (2, 0, 3, 16, 16)
    assert corners.shape == (2, 0, 2)
    assert labels.shape == (0,)
