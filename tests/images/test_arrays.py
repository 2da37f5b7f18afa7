"""Images as arrays and tensors of every kind, and errors that name what was mixed up."""

import numpy as np
import pytest
import torch
from PIL import Image

from patchsvdd_fast.images.prepare import load_image_set, load_images, prepare_image
from patchsvdd_fast.images.samples import UNKNOWN, Samples

COLOUR = np.random.default_rng(0).integers(256, size=(80, 70, 3), dtype=np.uint8)
PIXELS = torch.from_numpy(COLOUR).permute(2, 0, 1)
OTHER_GRAY = np.arange(80 * 70, dtype=np.uint16).reshape(70, 80).T  # brightest at the right


class OfAnotherLibrary:
    """An array that NumPy can read, and that is neither NumPy's nor a sequence."""

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def __array__(self, dtype=None, copy=None):
        return self.values


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint16, np.uint8])
def test_samples_of_every_kind_are_the_same_image(dtype):
    factor = {np.uint16: 257, np.uint8: 1}.get(dtype)
    array = (COLOUR / 255).astype(dtype) if factor is None else COLOUR.astype(dtype) * dtype(factor)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for one in (array, tensor, OfAnotherLibrary(array), array.astype(array.dtype.newbyteorder())):
        assert torch.equal(prepare_image(one, "", None, 1).pixels, PIXELS)
        for source in ([one], one):  # a colour image alone is no batch
            assert torch.equal(load_images(source, None, 64), PIXELS[None])
    for batch in (array[None].repeat(2, 0), tensor[None].expand(2, -1, -1, -1)):
        assert torch.equal(load_images(batch, None, 64), PIXELS.expand(2, -1, -1, -1))


def test_tensors_of_every_kind():
    expected = load_images([COLOUR[..., 0]], None, 1)
    gray = PIXELS[:1]
    for source in (gray, gray[None], [gray], [gray[0]], COLOUR[..., 0], COLOUR[None, ..., :1]):
        assert torch.equal(load_images(source, None, 64), expected)
    with_alpha = torch.cat([PIXELS, gray])
    assert torch.equal(load_images(with_alpha, None, 64), PIXELS[None])
    learned = torch.nn.Parameter(PIXELS / 255)
    assert torch.equal(load_images([learned], None, 64), PIXELS[None])
    half = (PIXELS.bool() * 1.0).bfloat16()
    assert torch.equal(load_images([half], None, 64), PIXELS[None].bool() * 255)
    assert load_image_set([PIXELS, COLOUR], None, 64).names == ("image 0", "image 1")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_opencvs_channels_are_turned_around(dtype):
    factor = {np.uint8: 1, np.uint16: 257, np.float32: 1 / 255}[dtype]
    bgr = (COLOUR[..., ::-1].astype(dtype) * factor).astype(dtype)
    with_alpha = np.dstack([bgr, np.zeros_like(bgr[..., 0])])
    for array in (bgr, with_alpha):
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        for source in (array, [array], array[None], tensor, [tensor], tensor[None]):
            assert torch.equal(load_images(source, None, 64, channel_order="bgr"), PIXELS[None])
            assert torch.equal(load_images(source, None, 64), PIXELS.flip(0)[None])


@pytest.mark.parametrize("gray", [COLOUR[..., 0], COLOUR[..., :1], PIXELS[:1]])
def test_gray_images_have_no_order_of_channels(gray):
    with pytest.raises(ValueError, match='image 0 is gray and has no colours for channel_order="b'):
        load_images([gray], None, 64, channel_order="bgr")


@pytest.mark.parametrize("deep", [OTHER_GRAY * 11, OTHER_GRAY % 4096, OTHER_GRAY % 1000 + 0.5])
def test_deep_arrays_are_read_as_files_are(tmp_path, deep):
    """Of 16 and 12 bits, and floats in a range; what is found from files holds for arrays."""
    array = deep.astype(np.float32) if deep.dtype == float else deep
    path = tmp_path / ("deep.tiff" if array.dtype == np.float32 else "deep.png")
    Image.fromarray(array).save(path)
    expected = load_image_set([path], None, 64)
    colour = array[..., None].repeat(3, 2)
    with_alpha = np.dstack([colour, np.full_like(array, 65535)])
    for given in ([array], [torch.from_numpy(array)], [colour], [with_alpha]):
        found = load_image_set(given, None, 64, samples=expected.samples)
        assert torch.equal(found.pixels, expected.pixels)
        if array.dtype == np.uint16:
            assert load_image_set(given, None, 64).samples == expected.samples
    with pytest.raises(ValueError, match="image 0: it has a sample of 60000, more than the 12 "):
        image = np.full_like(OTHER_GRAY, 60000)
        load_image_set([image], None, 64, samples=Samples(bit_depth=12))
    with pytest.warns(UserWarning, match="image 0 has 16-bit samples, which no training image had"):
        load_image_set([OTHER_GRAY], None, 64, samples=UNKNOWN)
    with pytest.raises(ValueError, match="image 0: it has samples that are NaN"):
        load_image_set([deep * np.nan], None, 64, samples=Samples(value_range=(0, 9)))


def test_a_range_that_is_given_holds_for_arrays():
    counts = OTHER_GRAY * np.float32(0.5)
    found = load_image_set([counts], None, 64, given=Samples(value_range=(0, 4000)))
    assert found.samples.fractions
    torch.testing.assert_close(found.pixels[0, 0], torch.from_numpy(counts) * (255 / 4000))


def test_floats_may_lie_outside_by_their_rounding():
    floats = COLOUR / np.float32(255)
    floats[floats == 0] = -1e-7
    floats[floats == 1] += 1e-7
    assert floats.max() > 1
    for given in (floats, floats.astype(float)):
        assert torch.equal(load_images([given], None, 64), PIXELS[None])


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (COLOUR * 1.0, ValueError, r"image 0 .* floats in 0 to 1, got 0 to 255: divide it by 255"),
        (COLOUR * 9.0, ValueError, r"image 0 .* got 0 to 2295: divide it by its largest possible"),
        (
            COLOUR / 250.0 - 0.01,
            ValueError,
            r"got -0\.01 to 1\.01: if .* resized, \.clip\(0, 1\)",
        ),
        (COLOUR / 99 - 1, ValueError, r"got -1 to 1\.576: undo its normalisation, image \* std"),
        (COLOUR / np.float32(np.nan), ValueError, "image 0 holds NaN or infinity"),
        (COLOUR.astype(int), TypeError, r"image 0 .* got int64 array: convert it, with \.astype"),
        (COLOUR > 9, TypeError, "image 0 must be uint8, uint16, or floats in 0 to 1, got bool"),
        (PIXELS.numpy(), ValueError, r"\[3, 80, 70\]: its channels seem to be first.*\(1, 2, 0\)"),
        (torch.from_numpy(COLOUR), ValueError, r"\[80, 70, 3\]: its channels seem to be last"),
        (
            COLOUR[..., :2],
            ValueError,
            r"must have shape \[H, W\] or \[H, W, 3\], got \[80, 70, 2\]$",
        ),
        (COLOUR[None], ValueError, r"must have shape .* got \[1, 80, 70, 3\]: it is a batch"),
        (PIXELS[None], ValueError, r"must have shape .* got \[1, 3, 80, 70\]: it is a batch"),
    ],
)
def test_errors_name_what_was_mixed_up(image, kind, message):
    with pytest.raises(kind, match=message):
        load_images([image], None, 64)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (PIXELS.numpy()[None], r"image 0 .* \[3, 80, 70\]: its channels seem to be first"),
        (torch.from_numpy(COLOUR)[None], r"got \[1, 80, 70, 3\]: .* last.*permute\(0, 3, 1, 2\)"),
        (torch.from_numpy(COLOUR), r"got \[80, 70, 3\]: .* last.*permute\(2, 0, 1\)"),
        (torch.zeros(80, 70), r"must have shape \[N, 3, H, W\], got \[80, 70\]$"),
        (COLOUR[None, None], r"\[N, H, W, 3\] or \[N, H, W\], got \[1, 1, 80, 70, 3\]"),
        (COLOUR[0, 0], r"\[N, H, W, 3\] or \[N, H, W\], got \[3\]"),
        (COLOUR[:0, None], "no images given"),
    ],
)
def test_errors_of_batches_name_what_was_mixed_up(batch, message):
    with pytest.raises(ValueError, match=message):
        load_images(batch, None, 64)


def test_a_colour_image_with_channels_first_may_be_three_gray_ones():
    array = PIXELS.numpy()
    with pytest.warns(UserWarning, match=r"\[3, 80, 70\] is taken for 3 gray images"):
        found = load_images(array, None, 64)
    assert torch.equal(found, load_images(list(array), None, 64))


def test_columns_of_tables_are_taken(tmp_path):
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path in paths:
        Image.fromarray(COLOUR).save(path)
    objects = np.empty(2, object)
    objects[:] = [COLOUR, PIXELS]
    for column in (np.array(paths), np.array(paths, object), OfAnotherLibrary(np.array(paths))):
        found = load_image_set(column, None, 64)
        assert found.names == tuple(paths)
        assert torch.equal(found.pixels, PIXELS.expand(2, -1, -1, -1))
    assert torch.equal(load_images(objects, None, 64), PIXELS.expand(2, -1, -1, -1))
