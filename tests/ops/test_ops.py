"""The native ops on the CPU against the reference, and as citizens of torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grids import GRIDS, PAIRS
from patchsvdd_fast import NormalBank, ops
from patchsvdd_fast.ops import _native, backends, reference
from patchsvdd_fast.ops.checks import check_finite_rows, first_bad_row


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


@pytest.mark.parametrize("instruction_set", ops.instruction_sets())
@pytest.mark.parametrize("dim", [1, 2, 15, 16, 17, 31, 64, 100, 300])
def test_nearest_is_the_canonical_answer_to_the_bit(instruction_set, dim):
    queries, bank = torch.randn(70, dim), torch.randn(133, dim)
    bank[40] = bank[90] = queries[7]  # an exact match, twice
    expected = reference.nearest(queries, bank)
    with ops.use_instruction_set(instruction_set):
        distances, indices = ops.nearest(queries, bank)
    assert torch.equal(distances, expected[0])
    assert torch.equal(indices, expected[1])
    assert (distances[7], indices[7]) == (0, 40)


@pytest.mark.parametrize("instruction_set", ops.instruction_sets())
def test_nearest_does_not_depend_on_threads_or_batches(instruction_set):
    bank = torch.randn(300, 24) * 0.005 + 0.4
    bank[100:200] = bank[:100]
    queries = torch.cat([torch.randn(300, 24) * 0.005 + 0.4, bank[50:150]])
    expected = reference.nearest(queries, bank)
    threads = torch.get_num_threads()
    try:
        with ops.use_instruction_set(instruction_set):
            for count in (1, 2, 7):
                torch.set_num_threads(count)
                for batch in (3, 37, 400):
                    parts = [ops.nearest(part, bank) for part in queries.split(batch)]
                    distances, indices = (torch.cat(values) for values in zip(*parts, strict=True))
                    assert torch.equal(distances, expected[0])
                    assert torch.equal(indices, expected[1])
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60, deadline=None)
@given(
    dim=st.integers(1, 70),
    bank_rows=st.integers(1, 80),
    count=st.integers(0, 20),
    scale=st.sampled_from([1e-42, 1e-30, 1e-20, 1.0, 1e18, 1e30]),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
    seed=st.integers(0, 2**32),
)
def test_nearest_at_every_scale(dim, bank_rows, count, scale, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 9, (count + bank_rows, dim), generator=generator).float()
    values = (values * scale + offset * scale).float()
    queries, bank = values[:count], values[count:]
    expected = reference.nearest(queries, bank)
    for instruction_set in ops.instruction_sets():
        with ops.use_instruction_set(instruction_set):
            distances, indices = ops.nearest(queries, bank)
        assert torch.equal(distances, expected[0])
        assert torch.equal(indices, expected[1])


def test_nearest_where_expanded_distances_cancel():
    """A tiny ball far from the origin, as trained embeddings form it."""
    bank = (torch.randn(3000, 64) * 0.0005 + 0.45).float()
    queries = (torch.randn(3000, 64) * 0.0005 + 0.45).float()
    distances, indices = ops.nearest(queries, bank)
    exact = torch.cdist(
        queries.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert torch.equal(indices, exact.argmin(dim=1))
    torch.testing.assert_close(distances.double(), exact.amin(dim=1), rtol=1e-6, atol=0)


def test_nearest_keeps_subnormals_while_torch_flushes_them():
    queries, bank = torch.full((1, 4), 3e-23), torch.zeros(1, 4)
    expected = ops.nearest(queries, bank)[0]
    assert expected > 0
    torch.set_flush_denormal(True)
    try:
        assert torch.equal(ops.nearest(queries, bank)[0], expected)
    finally:
        torch.set_flush_denormal(False)


def test_nearest_edge_cases():
    bank = torch.rand(9, 5)
    distances, indices = ops.nearest(torch.empty(0, 5), bank)
    assert distances.shape == indices.shape == (0,)
    strided = torch.rand(5, 11).t()
    assert torch.equal(ops.nearest(strided, bank)[0], ops.nearest(strided.contiguous(), bank)[0])
    huge = torch.full((2, 3), 3e38)
    distances, indices = ops.nearest(huge, -huge)  # every squared distance overflows
    assert torch.isinf(distances).all()
    assert torch.equal(indices, torch.zeros(2, dtype=torch.int64))


class ForeignArray:
    """As CuPy's arrays are to us: no tensor, no NumPy array, but with DLPack."""

    def __init__(self, values):
        self.values = values

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


def test_arrays_of_other_libraries():
    queries, bank = torch.rand(2, 3, 5), torch.rand(9, 5)
    groups = torch.arange(2)[:, None].expand(2, 3).contiguous(), torch.arange(9)
    given = ForeignArray(queries.numpy()), ForeignArray(bank.numpy())
    foreign_groups = tuple(ForeignArray(values.numpy()) for values in groups)
    found = ops.nearest(ForeignArray(queries[0].numpy()), given[1])
    for ours, expected in zip(found, ops.nearest(queries[0], bank), strict=True):
        assert torch.equal(ours, expected)
    found = NormalBank(given[1], groups=foreign_groups[1]).nearest(
        given[0], exclude_same_group=foreign_groups[0]
    )
    expected = NormalBank(bank).nearest(queries, exclude_same_group=groups[0])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    maps = ops.score_map(given[0], 4, 2, 8, 12)
    assert torch.equal(maps, ops.score_map(queries, 4, 2, 8, 12))


def test_values_are_not_read_back_while_a_graph_is_captured(monkeypatch):
    """A meta tensor's values cannot be read at all, as a card's cannot during a capture."""
    rows = torch.empty(3, 4, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        check_finite_rows("queries", rows)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_finite_rows("queries", rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_first_bad_row_is_found_on_devices_without_a_kernel_for_it(dtype):
    largest = torch.finfo(dtype).max
    rows = torch.randn(9, 5).to(dtype)
    rows[2], rows[3, 1], rows[3, 2] = largest, largest, -largest
    assert first_bad_row(rows) == -1
    assert first_bad_row(rows[:0]) == -1
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = rows.clone()
        bad[4, 4] = bad[7, 0] = value
        assert first_bad_row(bad) == 4
    rows[5, 0], rows[5, 1] = torch.inf, -torch.inf
    assert first_bad_row(rows) == 5


def test_a_build_without_cuda_says_how_to_rebuild(monkeypatch):
    monkeypatch.setattr(_native, "cuda", None)
    elsewhere = torch.empty(1, device="meta")
    with pytest.raises(RuntimeError, match="PATCHSVDD_CUDA=ON"), backends.backend_of(elsewhere):
        pass


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


def _crop(
    images=None,
    mean=None,
    image_of=(0, 1),
    size=32,
    kind="position",
    step=0,
    redraw_clipped=False,
    first_pair=0,
):
    images = torch.zeros(2, 1, 40, 50, dtype=torch.uint8) if images is None else images
    mean = torch.zeros(1, 40, 50) if mean is None else mean
    return ops.crop_pairs(
        images, mean, torch.as_tensor(image_of), size, kind, 0, step, redraw_clipped, first_pair
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.extract_patches(torch.rand(3, 8, 8), 4, 2), ValueError, r"\[N, C, H, W\]"),
        (lambda: ops.extract_patches(torch.rand(1, 3, 8, 8), 9, 2), ValueError, "at least 9x9"),
        (lambda: ops.extract_patches(torch.rand(1, 3, 8, 8), 4, 0), ValueError, "stride"),
        (lambda: ops.extract_patches(torch.ones(1, 3, 8, 8).int(), 4, 2), TypeError, "int32"),
        (
            lambda: ops.extract_patches(torch.rand(1, 3, 8, 8), 4, 2, torch.rand(3, 8, 9)),
            ValueError,
            r"mean must have shape \[3, 8, 8\].*got \[3, 8, 9\]",
        ),
        (lambda: ops.score_map(torch.rand(1, 3, 3), 4, 2, 8, 9), None, None),
        (
            lambda: ops.score_map(torch.rand(1, 3, 3), 4, 2, 9, 10),
            ValueError,
            r"\[N, 3, 4\].*got \[1, 3, 3\]",
        ),
        (lambda: ops.score_map(torch.rand(1, 3, 3).double(), 4, 2, 8, 8), TypeError, "float32"),
        (
            lambda: ops.nearest(torch.rand(4, 128), torch.rand(9, 64)),
            ValueError,
            r"queries must have shape \[Q, 64\] to match the bank, got \[4, 128\]",
        ),
        (lambda: ops.nearest(torch.rand(4, 8), torch.rand(0, 8)), ValueError, "at least one"),
        (lambda: ops.nearest(torch.rand(4, 8).double(), torch.rand(9, 8)), TypeError, "queries"),
        (
            lambda: ops.nearest(torch.tensor([[0.0], [torch.nan]]), torch.rand(9, 1)),
            ValueError,
            "queries must be finite.*row 1",
        ),
        (
            lambda: ops.nearest(torch.rand(2, 1), torch.tensor([[0.0], [1], [torch.inf]])),
            ValueError,
            "bank must be finite.*row 2",
        ),
        (lambda: _crop(images=torch.zeros(2, 1, 40, 50)), TypeError, "images must be uint8"),
        (lambda: _crop(mean=torch.zeros(3, 40, 50)), ValueError, r"mean must have.*\[1, 40, 50\]"),
        (lambda: _crop(image_of=[[0]]), ValueError, r"image_of must have shape \[B\]"),
        (lambda: _crop(image_of=[0.0]), TypeError, "image_of must be int64, got float32"),
        (lambda: _crop(image_of=[1, 2]), ValueError, "image_of.*less than 2, got 2 at position 1"),
        (lambda: _crop(image_of=[-1]), ValueError, "image_of.*got -1 at position 0"),
        (
            lambda: _crop(torch.zeros(0, 1, 40, 50, dtype=torch.uint8)),
            ValueError,
            "images must hold at least one",
        ),
        (lambda: _crop(image_of=torch.zeros(1).long().expand(2**30)), ValueError, "shorter than"),
        (lambda: _crop(size=41), ValueError, "at least 41x41"),
        (lambda: _crop(size=3), ValueError, "size must be at least 4 for position pairs, got 3"),
        (lambda: _crop(size=31, kind="neighbour"), ValueError, "at least 32 for neighbour pairs"),
        (lambda: _crop(size=0, kind="view"), ValueError, "at least 1 for view pairs, got 0"),
        (
            lambda: _crop(kind="other"),
            ValueError,
            "kind must be 'position' or 'neighbour' or 'view', got 'other'",
        ),
        (lambda: _crop(step=-1), ValueError, "step must be at least 0"),
        (lambda: _crop(step=2**32), ValueError, r"step.*less than 2\^32, got 4294967296"),
        (lambda: _crop(first_pair=-1), ValueError, "first_pair must be at least 0.*got -1"),
        (lambda: _crop(first_pair=2**32 - 2), ValueError, r"less than 2\^32 - 2 for 2 pairs"),
        (lambda: _crop(first_pair=2**32 - 3), None, None),
        (lambda: _crop(redraw_clipped=True), ValueError, "at least 63x63.*got 50x40"),
    ],
)
def test_bad_input_is_named(call, error, message):
    if error is None:
        call()
        return
    with pytest.raises(error, match=message):
        call()


OPCHECKS = [
    (torch.ops.patchsvdd_fast.extract_patches, (torch.rand(2, 3, 20, 21).requires_grad_(), 6, 3)),
    (
        torch.ops.patchsvdd_fast.extract_patches,
        (torch.ones(2, 3, 20, 21, dtype=torch.uint8), 6, 3, torch.rand(3, 20, 21)),
    ),
    (
        torch.ops.patchsvdd_fast.extract_patches_backward,
        (torch.rand(2, 5, 6, 3, 6, 6), 3, 20, 21),
    ),
    (torch.ops.patchsvdd_fast.score_map, (torch.rand(2, 5, 6), 6, 3, 20, 21)),
    (torch.ops.patchsvdd_fast.nearest, (torch.rand(5, 7), torch.rand(11, 7))),
    (
        torch.ops.patchsvdd_fast.crop_pairs,
        (
            torch.ones(2, 3, 40, 50, dtype=torch.uint8),
            *(torch.rand(3, 40, 50), torch.tensor([1, 0, 1]), 32, "neighbour", 5, 6),
        ),
    ),
    (
        torch.ops.patchsvdd_fast.crop_pairs,
        (
            torch.ones(2, 3, 40, 50, dtype=torch.uint8),
            *(torch.rand(3, 40, 50), torch.tensor([1, 0, 1]), 6, "view", 5, 6, False, 7),
        ),
    ),
]


@pytest.mark.parametrize(("op", "arguments"), OPCHECKS)
def test_opcheck(op, arguments):
    torch.library.opcheck(op, arguments)


def test_compiles_to_a_full_graph():
    def whole_path(images, mean, bank):
        patches = ops.extract_patches(images, 8, 4, mean)
        distances, _ = ops.nearest(patches.flatten(3).flatten(0, 2), bank)
        return ops.score_map(distances.view(patches.shape[:3]), 8, 4, *images.shape[-2:])

    arguments = (
        torch.randint(256, (2, 3, 24, 28), dtype=torch.uint8),
        torch.rand(3, 24, 28) * 255,
        torch.rand(50, 3 * 8 * 8),
    )
    compiled = torch.compile(whole_path, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), whole_path(*arguments))


def test_native_square_root_is_correctly_rounded():
    values = torch.linspace(0.1, 3, 5000)[:, None]
    distances, _ = ops.nearest(values, torch.zeros(1, 1))
    squared = reference.canonical_squared_distances(values, torch.zeros(1, 1))[:, 0]
    assert np.array_equal(distances.numpy(), np.sqrt(squared.numpy()))
