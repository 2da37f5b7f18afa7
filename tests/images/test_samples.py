"""Samples of more than 8 bits: depths and ranges, found from files of every kind."""

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from data_sets import png_of
from patchsvdd_fast.files.pages import FileBytes
from patchsvdd_fast.images.prepare import (
    load_image_set,
    prepare_image,
    read_deep_samples,
    read_image,
)
from patchsvdd_fast.images.samples import (
    AS_STORED,
    DEPTHS,
    UNKNOWN,
    Samples,
    samples_from_header,
    to_8_bits,
)

SHAPE = (40, 50)


def ramp(depth, shape=SHAPE):
    """All levels of so many bits, as evenly as the shape has room for: [H, W] uint16."""
    return (
        np.linspace(0, 2**depth - 1, shape[0] * shape[1]).round().astype(np.uint16).reshape(shape)
    )


def eight_bits(samples, depth):
    """The same in 8 bits, as it is defined: rounded once."""
    return np.floor(samples * 255.0 / (2**depth - 1) + 0.5).astype(np.uint8)


def colour(samples):
    return np.stack([samples, samples[::-1], samples[:, ::-1]], axis=-1)


def tiff_of(samples, order="<"):
    """A TIFF file of 16-bit colour, not compressed; of four channels it is CMYK."""
    height, width, channels = samples.shape
    pixels = samples.astype(f"{order}u2").tobytes()
    bits = struct.pack(f"{order}{channels}H", *[16] * channels)
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 2 if channels == 3 else 5),
        (273, 4, 1, 8 + len(bits)),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(pixels)),
    ]

    def entry(tag, kind, count, value):
        short = kind == 3 and count == 1
        return struct.pack(
            f"{order}HHI{'HH' if short else 'I'}", tag, kind, count, value, *[0] * short
        )

    directory = struct.pack(f"{order}H", len(tags)) + b"".join(entry(*tag) for tag in tags)
    start = struct.pack(
        f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(bits) + len(pixels)
    )
    return start + bits + pixels + directory + b"\0\0\0\0"


def loaded(*paths, **options):
    """The samples found, and the pixels [N, H, W, 3], in 8 bits."""
    images = load_image_set([str(path) for path in paths], None, 1, **options)
    return images.samples, to_8_bits(images.pixels).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jp2"])
def test_a_depth_is_found_from_the_largest_sample(tmp_path, depth, suffix):
    path = tmp_path / f"deep{suffix}"
    Image.fromarray(ramp(depth)).save(path)
    samples, pixels = loaded(path)
    assert samples == Samples(bit_depth=depth, fractions=depth > 8)
    assert np.array_equal(pixels[0, ..., 1], eight_bits(ramp(depth), depth))
    assert len(np.unique(pixels)) == 256


def test_of_all_images_the_largest_sample_counts(tmp_path):
    dark, bright = tmp_path / "a.png", tmp_path / "b.tif"
    Image.fromarray(ramp(12) // 8).save(dark)
    Image.fromarray(ramp(12)).save(bright)
    samples, pixels = loaded(dark, bright)
    assert samples.bit_depth == 12
    assert np.array_equal(pixels[0, ..., 0], eight_bits(ramp(12) // 8, 12))
    assert loaded(dark)[0].bit_depth == 10  # 9 bits, which no camera has
    assert loaded(dark, given=Samples(bit_depth=11))[0].bit_depth == 11


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_colour_keeps_its_low_bytes(tmp_path, order):
    """Pillow gives the high bytes alone, of 12 bits 16 levels."""
    deep, alpha = colour(ramp(12)), np.dstack([colour(ramp(12)), ramp(16)])
    (tmp_path / "rgb.png").write_bytes(png_of(deep))
    (tmp_path / "rgba.png").write_bytes(png_of(alpha))
    (tmp_path / "rgb.tif").write_bytes(tiff_of(deep, order))
    for name in ("rgb.png", "rgba.png", "rgb.tif"):
        samples, pixels = loaded(tmp_path / name)
        assert samples.bit_depth == 12, name
        assert np.array_equal(pixels[0], eight_bits(deep, 12)), name


@pytest.mark.parametrize(("largest", "depth"), [(65535, 12), (4095, 12), (16383, 14)])
def test_portable_pixmaps_of_16_bits(tmp_path, largest, depth):
    deep, path = colour(ramp(12)), tmp_path / "deep.ppm"
    content = b"P6\n50 40\n%d\n" % largest + deep.astype(">u2").tobytes()
    path.write_bytes(content)
    samples, pixels = loaded(path)
    assert samples.bit_depth == depth
    assert np.array_equal(pixels[0], eight_bits(deep, depth))
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"deep\.ppm: the file is truncated"):
        loaded(path)


def test_lost_bits_are_warned_of(tmp_path):
    """Of an opened image, of which Pillow gives the high bytes alone."""
    path = tmp_path / "deep.png"
    for deep in (colour(ramp(16)), np.dstack([ramp(16), ramp(16)])):
        path.write_bytes(png_of(deep))
        with pytest.warns(UserWarning, match="^x has 16-bit samples .* only the high 8 bits"):
            image = prepare_image(Image.open(path), "x", None, 1)
        assert np.array_equal(image.pixels[0].numpy(), ramp(16) >> 8)


@pytest.mark.parametrize("depth", [12, 16])
def test_gray_with_alpha_of_16_bits(tmp_path, depth):
    path = tmp_path / "deep.png"
    path.write_bytes(png_of(np.dstack([ramp(depth), ramp(16)[::-1]])))
    images = load_image_set(path, None, 1)
    assert images.samples == Samples(depth, fractions=True)
    expected = ramp(depth) * 255.0 / (2**depth - 1)
    for channel in images.pixels[0].numpy():
        assert np.allclose(channel, expected, rtol=1e-6)
    assert len(np.unique(images.pixels)) > 1000


@pytest.mark.parametrize("order", ["<", ">"])
def test_cmyk_of_16_bits(tmp_path, order):
    """Converted as Pillow does with 8 bits, but with fractions."""
    inks = np.dstack([colour(ramp(16)), ramp(16).T.reshape(SHAPE) // 2])
    path = tmp_path / "deep.tif"
    path.write_bytes(tiff_of(inks, order))
    images = load_image_set(path, None, 1)
    assert images.samples == Samples(16, fractions=True)
    found = images.pixels[0].permute(1, 2, 0).numpy()
    light = 1 - inks / 65535
    assert np.allclose(found, 255 * light[..., :3] * light[..., 3:], atol=0.01)
    eight = Image.fromarray(eight_bits(inks, 16), "CMYK").convert("RGB")
    assert np.abs(found - np.asarray(eight)).max() < 2
    assert len(np.unique(found)) > 1000


def test_colour_that_pillow_misreads_is_refused(tmp_path):
    planes, jpeg = tmp_path / "planes.tif", tmp_path / "deep.jp2"
    content = tiff_of(colour(ramp(12)))
    contiguous = struct.pack("<HHIHH", 278, 4, 1, 40, 0)  # RowsPerStrip gives its place
    assert contiguous in content
    planes.write_bytes(content.replace(contiguous, struct.pack("<HHIHH", 284, 3, 1, 2, 0)))
    Image.fromarray(colour(eight_bits(ramp(8), 8))).save(jpeg)
    read_image(jpeg)
    content = jpeg.read_bytes()
    place = content.index(b"\xff\x4f\xff\x51") + 42  # the first channel's bits, less 1
    assert content[place] == 7
    jpeg.write_bytes(content[:place] + b"\x0b" + content[place + 1 :])
    for path, bits in ((planes, 16), (jpeg, 12)):
        with pytest.raises(ValueError, match=f"{path.name}: colour of {bits} bits in separate"):
            read_image(path)


def test_compressed_16_bit_colour(tmp_path):
    """libtiff hands out bytes in the machine's order."""
    deep = colour(ramp(12))
    plain = tmp_path / "plain.tif"
    plain.write_bytes(tiff_of(deep))
    content = bytearray(plain.read_bytes())
    packed = zlib.compress(content[14 : 14 + deep.nbytes])
    text = tiff_of(deep)[14 + deep.nbytes :]
    text = text.replace(
        struct.pack("<HHIHH", 259, 3, 1, 1, 0), struct.pack("<HHIHH", 259, 3, 1, 8, 0)
    )
    text = text.replace(
        struct.pack("<HHII", 279, 4, 1, deep.nbytes), struct.pack("<HHII", 279, 4, 1, len(packed))
    )
    start = struct.pack("<2sHI", b"II", 42, 14 + len(packed))
    plain.write_bytes(start + bytes(content[8:14]) + packed + text)
    samples, pixels = loaded(plain)
    assert samples.bit_depth == 12
    assert np.array_equal(pixels[0], eight_bits(deep, 12))


def test_files_that_tell_their_depth(tmp_path):
    dark = ramp(8)
    tiff, full, png, filled = (tmp_path / f"{n}" for n in ("a.tif", "b.tif", "c.png", "d.png"))
    Image.fromarray(dark).save(tiff, tiffinfo={281: 4000})  # MaxSampleValue
    Image.fromarray(dark).save(full, tiffinfo={281: 65535})  # the default of the format
    png.write_bytes(png_of(dark, (b"sBIT", b"\x0c")))
    filled.write_bytes(png_of(ramp(16), (b"sBIT", b"\x0c")))
    assert loaded(tiff)[0].bit_depth == 12
    assert loaded(full)[0].bit_depth == 8
    assert loaded(png)[0].bit_depth == 12
    assert loaded(filled)[0].bit_depth == 16  # as the format has it, samples fill 16 bits
    assert loaded(tiff, given=Samples(bit_depth=14))[0].bit_depth == 14
    told = PngImagePlugin.PngInfo()
    told.add(b"sBIT", b"\x08")
    Image.fromarray(eight_bits(dark, 8)).save(tmp_path / "e.png", pnginfo=told)
    assert loaded(tmp_path / "e.png")[0] == UNKNOWN  # 8 bits are 8 bits


@pytest.mark.parametrize("largest", [1023, 4095, 3000])
def test_pnm_tells_its_largest_value(tmp_path, largest):
    """Pillow scales it to 16 bits."""
    samples = (ramp(16).astype(np.int64) * largest // 65535 // 4).astype(np.uint16)
    path = tmp_path / "deep.pgm"
    path.write_bytes(b"P5\n50 40\n%d\n" % largest + samples.astype(">u2").tobytes())
    found, pixels = loaded(path)
    assert found.bit_depth == largest.bit_length()
    assert np.array_equal(pixels[0, ..., 0], eight_bits(samples, found.bit_depth))


def test_images_of_more_bits_than_allowed_are_refused(tmp_path):
    Image.fromarray(ramp(14)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"deep\.tif: .* sample of 16383, more than the 12 bits"):
        read_image(tmp_path / "deep.tif", Samples(bit_depth=12))
    assert np.array_equal(  # without a depth: as ever
        np.asarray(read_image(tmp_path / "deep.tif"))[..., 0], eight_bits(ramp(14), 16)
    )


def test_kinds_of_tiff_that_are_not_read_are_named(tmp_path):
    """Pillow writes neither; both differ in few bytes from what it writes."""
    Image.fromarray(ramp(16).astype(np.float32)).save(tmp_path / "float.tif")
    content = (tmp_path / "float.tif").read_bytes()
    bits = struct.pack("<HHII", 258, 3, 1, 32)
    assert content.count(bits) == 1
    (tmp_path / "double.tif").write_bytes(
        content.replace(bits, struct.pack("<HHII", 258, 3, 1, 64))
    )
    with pytest.raises(ValueError, match=r"double\.tif is a TIFF that .* such as 64-bit"):
        read_image(tmp_path / "double.tif")
    Image.fromarray(ramp(8).astype(np.int32) - 5).save(tmp_path / "signed.tif")
    with pytest.raises(ValueError, match=r"signed\.tif: integer .* 0 and 65535, got -5 to "):
        read_image(tmp_path / "signed.tif")


def test_16_bits_that_no_training_image_had_are_warned_of(tmp_path):
    Image.fromarray(ramp(16)).save(tmp_path / "deep.png")
    with pytest.warns(UserWarning, match=r"deep\.png has 16-bit samples, which no training image"):
        image = prepare_image(tmp_path / "deep.png", "x", None, 1, UNKNOWN)
    assert np.array_equal(image.pixels[0].numpy(), eight_bits(ramp(16), 16))


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (0.0, 0.9, (0.0, 1.0)),
        (0.0, 0.01, (0.0, 0.0125)),  # of 0 to 1 three levels would be left
        (100.0, 3000.0, (0.0, 3725.0)),
        (3000.0, 4000.0, (2750.0, 4250.0)),
        (-1.0, 1.0, (-1.5, 1.5)),
    ],
)
def test_a_range_is_found(tmp_path, low, high, found):
    values = np.linspace(low, high, 2000, dtype=np.float32).reshape(SHAPE)
    Image.fromarray(values).save(tmp_path / "float.tif")
    samples, pixels = loaded(tmp_path / "float.tif")
    assert samples.bit_depth is None
    assert samples.value_range == pytest.approx(found)
    expected = (values - samples.value_range[0]) * 255.0 / np.diff(samples.value_range)
    assert np.abs(pixels[0, ..., 2] - expected).max() < 0.501
    assert len(np.unique(pixels)) > 125


def test_floats_outside_of_the_range_are_clipped_with_a_warning(tmp_path):
    values = np.linspace(0, 2, 2000, dtype=np.float32).reshape(SHAPE)
    Image.fromarray(values).save(tmp_path / "float.tif")
    with pytest.warns(UserWarning, match=r"float\.tif has samples from 0 to 2; .* 0 to 1, is clip"):
        pixels = loaded(tmp_path / "float.tif", samples=Samples(value_range=(0, 1)))[1]
    assert pixels.min() == 0
    assert (pixels == 255).mean() == pytest.approx(0.5, abs=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = loaded(tmp_path / "float.tif", given=Samples(value_range=(0.0, 2.0)))
    assert given[0].value_range == (0, 2)
    assert given[1].max() == 255


def test_floats_that_have_no_range_are_refused(tmp_path):
    path = tmp_path / "float.tif"
    Image.fromarray(np.full(SHAPE, 3, np.float32)).save(path)
    with pytest.raises(ValueError, match=r"all floating-point samples are 3: .*--value-range"):
        loaded(path)
    with pytest.raises(ValueError, match=r"float\.tif: floating-point samples need a value range"):
        loaded(path, samples=AS_STORED)
    Image.fromarray(np.array([[np.nan, 1, 0]], np.float32)).save(path)
    with pytest.raises(ValueError, match=r"float\.tif: it has samples that are NaN"):
        loaded(path)


def test_a_turned_camera_and_deep_samples(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    Image.fromarray(ramp(12)).save(tmp_path / "turned.png", exif=exif)
    pixels = np.asarray(read_image(tmp_path / "turned.png", Samples(bit_depth=12)))[..., 0]
    assert np.array_equal(pixels, np.rot90(eight_bits(ramp(12), 12), k=-1))


def test_opened_images_are_read_as_files_are(tmp_path):
    Image.fromarray(ramp(12)).save(tmp_path / "deep.tif")
    images = load_image_set([Image.open(tmp_path / "deep.tif"), Image.fromarray(ramp(10))], None, 1)
    assert images.samples.bit_depth == 12
    assert np.allclose(images.pixels[1, 0].numpy(), ramp(10) * 255.0 / 4095, rtol=1e-6)


def test_bad_settings_are_refused():
    for depth in (0, 7, 17):
        with pytest.raises(ValueError, match=f"bit_depth must be 8 to 16, or None, got {depth}"):
            Samples(bit_depth=depth)
    for limits in ((1, 1), (2, 1), (0, float("inf")), (float("nan"), 1)):
        with pytest.raises(ValueError, match="value_range must be"):
            Samples(value_range=limits)


def test_headers_are_read_back_and_checked():
    assert samples_from_header({}) == AS_STORED  # of older files
    assert samples_from_header({"samples": {"bit_depth": None, "value_range": None}}) == UNKNOWN
    stored = {"bit_depth": 12, "value_range": [0, 2.5]}
    assert samples_from_header({"samples": stored}) == Samples(12, (0.0, 2.5))  # of older files
    stored["fractions"] = True
    assert samples_from_header({"samples": stored}) == Samples(12, (0.0, 2.5), fractions=True)
    for bad in ({"bit_depth": 40}, {"value_range": [2, 1]}, {"value_range": [0, float("nan")]}):
        with pytest.raises(ValueError, match="must be"):
            samples_from_header({"samples": {"bit_depth": None, "value_range": None, **bad}})


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_content_of_a_file_is_read_as_the_file_is(tmp_path, order):
    deep = ramp(16)
    header = f"P6 {SHAPE[1]} {SHAPE[0]} 65535\n".encode()
    files = {
        "colour.tif": tiff_of(colour(deep), order),
        "inks.tif": tiff_of(np.dstack([colour(deep), deep]), order),
        "colour.png": png_of(colour(deep)),
        "alpha.png": png_of(np.stack([deep, deep], axis=-1)),
        "told.png": png_of(ramp(12), (b"sBIT", b"\x0c")),
        "colour.ppm": header + colour(deep).astype(">u2").tobytes(),
    }
    kept = Samples(bit_depth=16, fractions=True)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        of_path = prepare_image(tmp_path / name, name, None, 1, kept)
        of_bytes = prepare_image(FileBytes("elsewhere", content), name, None, 1, kept)
        assert torch.equal(of_path.pixels, of_bytes.pixels), name
        assert of_path.pixels.unique().numel() > 256 or name == "told.png"
        depth = read_deep_samples(tmp_path / name).told
        assert read_deep_samples(FileBytes("elsewhere", content)).told == depth, name
