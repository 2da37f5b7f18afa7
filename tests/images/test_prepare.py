"""Reading images of every kind, and refusing what cannot be read."""

import io
import random
import warnings
from pathlib import PurePath

import numpy as np
import pytest
import torch
from PIL import AvifImagePlugin, Image, ImageOps, WebPImagePlugin, features

from patchsvdd_fast.files.folders import SUFFIXES, find_images
from patchsvdd_fast.files.sources import Source
from patchsvdd_fast.images.prepare import (
    ORIGINAL_SIDE,
    UnreadableError,
    load_image_set,
    load_images,
    name_of,
    prepare_image,
    read_image,
)
from patchsvdd_fast.images.samples import Samples

RAMP = np.linspace(0, 255, 80 * 70).astype(np.uint8).reshape(80, 70)
COLOUR = np.stack([RAMP, RAMP.T.reshape(80, 70), 255 - RAMP], axis=-1)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".tif", ".PNG"])
def test_lossless_formats(tmp_path, suffix):
    Image.fromarray(COLOUR).save(tmp_path / f"image{suffix}")
    (path,) = find_images(tmp_path)
    assert np.array_equal(np.asarray(read_image(path)), COLOUR)


def save_as(path, image=COLOUR, **options):
    """Write an image file in the format of its suffix, in those that Pillow does not know, too."""
    kinds = {"JPEG 2000": "JPEG2000", "PNM": "PPM"}
    kind = kinds.get(SUFFIXES[path.suffix], SUFFIXES[path.suffix].upper())
    Image.fromarray(image).save(path, format=kind, **options)


# Of a gray image: the lossy formats keep it nearly as it is.
@pytest.mark.parametrize("suffix", sorted(set(SUFFIXES) - {".pfm", ".pbm"}))
def test_every_format_that_is_listed_is_read(tmp_path, suffix):
    smooth = np.linspace(0, 255, 80 * 70).astype(np.uint8).reshape(80, 70)
    save_as(tmp_path / f"image{suffix}", smooth)
    (path,) = find_images(tmp_path)
    pixels = np.asarray(read_image(path)).astype(int)
    assert pixels.shape == (80, 70, 3)
    assert np.abs(pixels - smooth[..., None]).max() < 16


def test_portable_bitmaps_and_float_maps(tmp_path):
    bits = RAMP > 100
    Image.fromarray(bits).save(tmp_path / "image.pbm")
    assert np.array_equal(np.asarray(read_image(tmp_path / "image.pbm"))[..., 0], 255 * bits)
    Image.fromarray((RAMP / 255).astype(np.float32)).save(tmp_path / "image.pfm", format="PPM")
    images = load_image_set(tmp_path / "image.pfm", None, 1)
    assert images.samples.value_range == (0, 1)
    assert np.array_equal(images.pixels[0, 0].numpy(), RAMP)


@pytest.mark.parametrize("suffix", [".tif", ".gif", ".webp", ".apng", ".avif"])
def test_of_several_pages_the_first_is_read_with_a_warning(tmp_path, suffix):
    others = [Image.fromarray(255 - COLOUR), Image.fromarray(COLOUR // 2)]
    lossless = {"lossless": True} if suffix == ".webp" else {}
    path = tmp_path / f"pages{suffix}"
    save_as(path, save_all=True, append_images=others, **lossless)
    with pytest.warns(UserWarning, match=rf"pages\{suffix} has 3 pages or frames; the first is"):
        pixels = np.asarray(read_image(path)).astype(int)
    assert np.abs(pixels - COLOUR).mean() < (1 if suffix in (".tif", ".webp", ".apng") else 30)
    save_as(path, **lossless)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(path)


def test_damage_beyond_the_first_page_does_not_matter(tmp_path):
    path = tmp_path / "pages.tif"
    save_as(path)
    first = path.stat().st_size
    save_as(path, save_all=True, append_images=[Image.fromarray(255 - COLOUR)])
    whole = path.read_bytes()
    for length in (len(whole) - 3000, first + 60, first + 4):
        path.write_bytes(whole[:length])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert np.array_equal(np.asarray(read_image(path)), COLOUR)


def test_a_path_may_name_a_page(tmp_path):
    """Of other sizes, other kinds, and with more than 8 bits, of which two decodings are joined."""
    path, deep = tmp_path / "pages.tif", (RAMP.astype(np.uint16) << 4) + 3
    others = [Image.fromarray(deep), Image.fromarray(RAMP[:20])]
    save_as(path, save_all=True, append_images=others)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(np.asarray(read_image(f"{path}#1")), COLOUR)
        images = load_image_set([f"{path}#2"], None, 1)
        assert images.samples.bit_depth == 12
        assert images.names == (f"{path}#2",)
        assert np.allclose(images.pixels[0, 0].numpy(), deep * (255 / 4095), rtol=1e-6)
        assert read_image(f"{path}#3").size == (RAMP.shape[1], 20)
        sets = load_image_set(tmp_path, (20, 20), 1, pages="all")
    assert sets.names == ("pages.tif#1", "pages.tif#2", "pages.tif#3")
    with pytest.raises(ValueError, match=r"cannot read image .*pages\.tif#4: it has no page .* 4"):
        read_image(f"{path}#4")
    with pytest.raises(FileNotFoundError, match=r"other\.tif'"):
        read_image(tmp_path / "other.tif#1")
    with pytest.raises(ValueError, match="pages must be one of"):
        load_image_set(tmp_path, None, 1, pages="2")


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".webp", "WebP"), (".avif", "AVIF"), (".jp2", "JPEG 2000")]
)
@pytest.mark.filterwarnings("ignore:image file could not be identified")
def test_formats_that_pillow_lacks_are_named(tmp_path, monkeypatch, suffix, kind):
    """As in a Pillow that was built without them."""
    path = tmp_path / f"image{suffix}"
    save_as(path)
    monkeypatch.setattr(WebPImagePlugin, "SUPPORTED", False)
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    monkeypatch.delattr(Image.core, "jpeg2k_decoder")
    monkeypatch.setattr(features, "check", lambda name: name not in ("webp", "avif", "jpg_2000"))
    with pytest.raises(
        UnreadableError, match=rf"image\{suffix}: the Pillow here .* without {kind}"
    ):
        read_image(path)
    monkeypatch.undo()
    path.write_text("no image")
    with pytest.raises(UnreadableError, match="is not an image that can be read"):
        read_image(path)


def test_jpeg(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "image.jpg", quality=95)
    pixels = np.asarray(read_image(find_images(tmp_path)[0])).astype(int)
    assert pixels.shape == COLOUR.shape
    assert np.abs(pixels - COLOUR).mean() < 20


def test_gray_and_one_bit_are_repeated(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "gray.png")
    Image.fromarray(RAMP).convert("1").save(tmp_path / "bit.png")
    gray = np.asarray(read_image(tmp_path / "gray.png"))
    assert np.array_equal(gray, np.stack([RAMP] * 3, axis=-1))
    bits = np.asarray(read_image(tmp_path / "bit.png"))
    assert set(np.unique(bits)) == {0, 255}
    assert bits.shape == (80, 70, 3)


def test_alpha_is_dropped(tmp_path):
    alpha = np.concatenate([COLOUR, np.full((80, 70, 1), 7, np.uint8)], axis=-1)
    Image.fromarray(alpha).save(tmp_path / "rgba.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "rgba.png")), COLOUR)
    Image.fromarray(np.stack([RAMP, RAMP], axis=-1), mode=None).save(tmp_path / "la.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "la.png"))[..., 0], RAMP)


def test_palette_and_cmyk(tmp_path):
    palette = Image.fromarray(RAMP).convert("P")
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(
        np.asarray(read_image(tmp_path / "palette.png")), np.asarray(palette.convert("RGB"))
    )
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    cmyk.save(tmp_path / "cmyk.tif")
    assert np.array_equal(np.asarray(read_image(tmp_path / "cmyk.tif")), COLOUR)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_gray_is_scaled(tmp_path, suffix):
    samples = (RAMP.astype(np.int64) * 257 + 100).clip(max=65535).astype(np.uint16)
    Image.fromarray(samples).save(tmp_path / f"deep{suffix}")
    pixels = np.asarray(read_image(tmp_path / f"deep{suffix}"))
    assert np.array_equal(pixels[..., 0], RAMP)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(COLOUR)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    image.save(tmp_path / "turned.png", exif=exif)
    turned = np.rot90(COLOUR, k=-1)
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned.png")), turned)
    opened = Image.open(tmp_path / "turned.png")
    for one in (opened, opened.convert("RGBA"), ImageOps.exif_transpose(opened)):
        assert torch.equal(load_images([one], None, 1), load_images([turned], None, 1))


def test_sources_of_every_kind_agree(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(COLOUR).save(path)
    expected = torch.from_numpy(COLOUR).permute(2, 0, 1)[None]
    batch = COLOUR[None]
    for source in (
        tmp_path,
        path,
        str(path),
        [path],
        [Image.fromarray(COLOUR)],
        [COLOUR],
        batch,
        expected,
    ):
        assert torch.equal(load_images(source, None, 1), expected)


def test_resize_is_bicubic():
    expected = np.asarray(Image.fromarray(COLOUR).resize((64, 32), Image.Resampling.BICUBIC))
    loaded = load_images([COLOUR], (32, 64), 1)[0].permute(1, 2, 0)
    assert np.array_equal(loaded.numpy(), expected)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    Image.fromarray(np.random.default_rng(0).integers(256, size=(90, 90, 3), dtype=np.uint8)).save(
        tmp_path / "whole.png"
    )
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.png", "cut.png", "empty.png"):
        with pytest.raises(ValueError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "missing.png")


@pytest.mark.parametrize("kind", [RuntimeError, KeyError, MemoryError, EOFError])
def test_whatever_a_decoder_raises_is_the_images_error(tmp_path, monkeypatch, kind):
    path = tmp_path / "image.png"
    Image.fromarray(COLOUR).save(path)

    def fail(*_):
        raise kind

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ValueError, match=f"cannot read image .*image.png: {kind.__name__}"):
        read_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_are_read_or_refused(tmp_path, monkeypatch):
    """Bytes changed at random, in files of each kind: an image or a ValueError that names it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # so that it takes no time
    wholes = []
    for kind in ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP"):
        content = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {}
        Image.fromarray(COLOUR).save(content, kind, **options)
        wholes.append(content.getvalue())
    generator, path = random.Random(0), tmp_path / "image"
    outcomes = set()
    for number in range(600):
        damaged = bytearray(wholes[number % len(wholes)])
        for _ in range(generator.choice((1, 1, 4))):
            position = generator.randrange(min(len(damaged), generator.choice((60, 400, 10**6))))
            damaged[position] = generator.choice((0, 255, generator.randrange(256)))
        path.write_bytes(damaged[: generator.choice((len(damaged), len(damaged) * 2 // 3))])
        try:
            outcomes.add(read_image(path).mode)
        except ValueError as error:
            assert str(path) in str(error)
            outcomes.add("refused")
    assert outcomes == {"RGB", "refused"}


@pytest.mark.parametrize("kind", ["png", "tiff", "gif", "bmp"])
def test_images_of_too_many_pixels_are_refused_unread(tmp_path, monkeypatch, kind):
    """Before Pillow warns (above the limit) and where it refuses (above twice of it)."""
    path = tmp_path / f"image.{kind}"
    Image.new("L", (100, 90)).save(path)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("it was decoded"))
    for limit in (8_999, 4_499, 1):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        expected = rf"cannot read image .*image.{kind}: .* more than the limit of {limit:,} "
        with (
            pytest.raises(ValueError, match=expected + r"\(--max-pixels; PIL.Image.MAX_IMAGE"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            read_image(path)
    monkeypatch.undo()
    for limit in (9_000, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert read_image(path).size == (100, 90)


def test_prepared_images(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(COLOUR).save(path)
    for item in (path, str(path), COLOUR, Image.fromarray(COLOUR)):
        kept = prepare_image(item, name_of(item, 3), None, 1)
        resized = prepare_image(item, name_of(item, 3), (32, 64), 1)
        assert kept.name == (str(path) if isinstance(item, type(path) | str) else "image 3")
        assert kept.original_size == resized.original_size == (80, 70)
        assert torch.equal(kept.pixels, torch.from_numpy(COLOUR).permute(2, 0, 1))
        assert torch.equal(resized.pixels, load_images([COLOUR], (32, 64), 1)[0])
    gray = prepare_image(RAMP, "gray", None, 1).pixels
    assert torch.equal(gray, torch.from_numpy(RAMP).expand(3, 80, 70))
    assert torch.equal(prepare_image(RAMP[..., None], "gray", None, 1).pixels, gray)
    alpha = np.dstack([COLOUR, RAMP])
    assert torch.equal(prepare_image(alpha, "", None, 1).pixels, kept.pixels)
    turned = prepare_image(COLOUR[::-2, ::-1], "", None, 1).pixels
    assert torch.equal(turned, torch.from_numpy(COLOUR[::-2, ::-1].copy()).permute(2, 0, 1))


def test_an_image_is_kept_as_it_was_up_to_a_limit(tmp_path):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (120, 200, 3), dtype=np.uint8)
    Image.fromarray(small).save(tmp_path / "small.png")
    kept = prepare_image(tmp_path / "small.png", "small", (64, 64), 32, keep_original=True)
    assert np.array_equal(kept.original, small)
    plain = prepare_image(tmp_path / "small.png", "small", (64, 64), 32)
    assert plain.original is None and torch.equal(plain.pixels, kept.pixels)
    large = np.zeros((1500, 3000, 3), np.uint8)
    large[:, 1500:] = 200, 100, 0
    kept = prepare_image(large, "large", (64, 64), 32, keep_original=True)
    assert kept.original.size == (ORIGINAL_SIDE, ORIGINAL_SIDE // 2) == (1024, 512)
    assert kept.original.getpixel((900, 400)) == (200, 100, 0)
    deep = np.full((50, 2000), 40_000, np.uint16)  # of one channel, with fractions
    samples = Samples(bit_depth=16, fractions=True)
    kept = prepare_image(deep, "deep", None, 32, samples, keep_original=True)
    assert kept.pixels.dtype == torch.float32
    assert kept.original.mode == "RGB" and kept.original.size == (1024, 26)
    assert kept.original.getpixel((9, 9)) == (156, 156, 156)


def test_images_that_cannot_be_prepared_are_named(tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(COLOUR).save(path)
    path.write_bytes(path.read_bytes()[:200])
    cases = [
        (Image.open(path), ValueError, "cannot read image 3: "),  # decoded only now
        (Image.new("F", (80, 80)), ValueError, "cannot read image 3: floating-point"),
        (np.zeros((0, 80, 3), np.uint8), ValueError, "image 3 has 80x0 pixels"),
        (np.zeros((80, 80, 2), np.uint8), ValueError, r"image 3 must have shape .*\[80, 80, 2\]"),
        (np.zeros(80, np.uint8), ValueError, r"image 3 must have shape .*\[80\]"),
        (np.zeros((80, 80, 3), int), TypeError, "image 3 must be .* got int64 array"),
        (None, TypeError, "image 3 must be .* got NoneType"),
        (b"image.png", TypeError, "image 3 must be .* got bytes"),
        ("nul\0.png", ValueError, "cannot read image nul"),
        (tmp_path, IsADirectoryError, "Is a directory"),
        (tmp_path / "missing.png", FileNotFoundError, "missing.png"),
    ]
    for item, kind, message in cases:
        with pytest.raises(kind, match=message):
            prepare_image(item, "image 3", None, 1)


def test_sets_keep_names_and_sizes(tmp_path, category_folder):
    sizes = {"a.png": (80, 70), "b/c.png": (64, 90), "z.png": (70, 70)}
    for name, (height, width) in sizes.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, height)).save(tmp_path / "in" / name)
    images = load_image_set(tmp_path / "in", (64, 64), 1)
    assert images.names == tuple(sizes)
    assert images.original_sizes == tuple(sizes.values())
    assert images.pixels.shape == (3, 3, 64, 64)
    one = load_image_set(tmp_path / "in" / "a.png", None, 1)
    assert (one.names, one.original_sizes) == ((str(tmp_path / "in" / "a.png"),), ((80, 70),))
    assert load_image_set([COLOUR, RAMP], None, 1).names == ("image 0", "image 1")
    batch = torch.zeros(2, 3, 64, 48, dtype=torch.uint8)
    assert load_image_set(batch, (32, 32), 1).original_sizes == ((64, 48), (64, 48))
    names = load_image_set(category_folder, None, 1).names
    assert names == tuple(f"train/good/{number}.png" for number in range(4))


def test_bad_sets_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        load_images(tmp_path, None, 1)
    with pytest.raises(ValueError, match="not a folder"):
        find_images(tmp_path / "missing")
    with pytest.raises(ValueError, match="no images given"):
        load_images([], None, 1)
    with pytest.raises(ValueError, match="image 1 has 40x30 pixels, less than one patch of 64x64"):
        load_images([COLOUR, COLOUR[:30, :40]], (256, 256), 64)
    with pytest.raises(ValueError, match=r"image 0 has 70x80 pixels, image 1 has 66x80"):
        load_images([COLOUR, COLOUR[:, :66]], None, 64)


def unreadable_files(folder):
    """Two images, and between them three files that are none."""
    for number in (0, 4):
        Image.fromarray(COLOUR).save(folder / f"{number}.png")
    (folder / "1.png").write_text("hello")
    (folder / "2.webp").write_bytes(b"")
    (folder / "3.tif").symlink_to(folder / "missing.tif")


def test_all_files_that_cannot_be_read_are_listed_at_once(tmp_path):
    unreadable_files(tmp_path)
    listed = r"3 of 5 images cannot be read .*--skip-unreadable.*1\.png is not.*2\.webp.*3\.tif"
    with pytest.raises(ValueError, match=listed):
        load_image_set(tmp_path, None, 1)
    with pytest.raises(ValueError, match=r"none of the 2 images can be read: .*1\.png.*2\.webp"):
        load_image_set([tmp_path / "1.png", tmp_path / "2.webp"], None, 1, skip_unreadable=True)
    with pytest.raises(UnreadableError, match=r"1\.png is not an image that can be read$"):
        load_image_set(tmp_path / "1.png", None, 1)


def test_files_that_cannot_be_read_are_left_out(tmp_path):
    unreadable_files(tmp_path)
    listed = r"left out 3 of 5 images, which cannot be read: .*1\.png.*2\.webp.*3\.tif"
    with pytest.warns(UserWarning, match=listed):
        images = load_image_set(tmp_path, None, 1, skip_unreadable=True)
    assert images.names == ("0.png", "4.png")
    assert images.original_sizes == ((80, 70), (80, 70))
    assert torch.equal(images.pixels, load_images([COLOUR, COLOUR], None, 1))
    small = [tmp_path / "0.png", COLOUR[:30, :40]]  # what can be read is not left out
    with pytest.raises(ValueError, match="image 1 has 40x30 pixels, less than one patch"):
        load_image_set(small, (96, 96), 64, skip_unreadable=True)


def test_anything_that_is_a_path_is_read(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    source = Source(tmp_path / "a.png", PurePath("a.png"))
    for given in (source, [source], str(tmp_path), tmp_path):
        assert torch.equal(load_images(given, None, 8), load_images([COLOUR], None, 8))
    assert load_image_set([source], None, 8).names == (str(source.path),)
