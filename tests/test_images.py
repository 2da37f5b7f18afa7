"""Reading images of every kind, and refusing what cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image

from patchsvdd_fast.folders import Category, find_categories, find_images, training_paths
from patchsvdd_fast.images import (
    load_images,
    match_illumination,
    mean_colour,
    mean_image,
    read_image,
    read_mask,
)

RAMP = np.linspace(0, 255, 80 * 70).astype(np.uint8).reshape(80, 70)
COLOUR = np.stack([RAMP, RAMP.T.reshape(80, 70), 255 - RAMP], axis=-1)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".tif", ".PNG"])
def test_lossless_formats(tmp_path, suffix):
    Image.fromarray(COLOUR).save(tmp_path / f"image{suffix}")
    (path,) = find_images(tmp_path)
    assert np.array_equal(np.asarray(read_image(path)), COLOUR)


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


def test_float_samples_are_refused(tmp_path):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif.*8 and 16 bits"):
        read_image(tmp_path / "float.tif")


def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(COLOUR)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned.png")), np.rot90(COLOUR, k=-1))


def test_nested_folders_in_order(tmp_path):
    for name in ("b/2.png", "a/3.png", "a/deep/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(COLOUR).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    names = [str(path.relative_to(tmp_path)) for path in find_images(tmp_path)]
    assert names == ["a/3.png", "a/deep/1.jpg", "b/2.png"]
    assert training_paths(tmp_path) == find_images(tmp_path)


def test_category_layout(category_folder):
    category = Category(category_folder)
    assert [path.name for path in category.train_paths()] == ["0.png", "1.png", "2.png", "3.png"]
    tests = category.test_images()
    assert [(t.defect, t.is_anomalous, t.mask is not None) for t in tests] == (
        [("good", False, False)] * 3 + [("spot", True, True)] * 3
    )
    mask = read_mask(tests[-1].mask, (48, 48))
    assert mask.sum() == 15 * 15
    assert training_paths(category_folder) == category.train_paths()
    assert [c.name for c in find_categories(category_folder.parent)] == ["stripes"]
    assert find_categories(category_folder)[0].name == "stripes"
    with pytest.raises(ValueError, match="no category"):
        find_categories(category_folder / "test")


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
    with pytest.raises(TypeError, match="float64 array"):
        load_images([COLOUR / 255], None, 1)
    with pytest.raises(TypeError, match="uint8, got float32"):
        load_images(torch.rand(1, 3, 80, 80), None, 1)


def test_mean_image_is_exact():
    images = torch.randint(256, (7, 3, 5, 6), dtype=torch.uint8)
    assert torch.equal(mean_image(images), images.double().mean(dim=0).float())
    channels = mean_image(images, "channel")
    assert channels.shape == (3, 5, 6)
    expected = images.double().mean(dim=(0, 2, 3), keepdim=True)[0].expand(3, 5, 6)
    torch.testing.assert_close(channels, expected.float())


def test_matched_images_do_not_depend_on_the_light():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(20, 200, (3, 3, 24, 30), dtype=torch.uint8, generator=generator)
    colour = mean_colour(images)
    torch.testing.assert_close(colour, images.double().mean(dim=(0, 2, 3)).float())
    expected = match_illumination(images, colour)
    torch.testing.assert_close(
        expected.double().mean(dim=(2, 3)), colour.double().expand(3, 3), rtol=0, atol=0.5
    )
    for light in (torch.tensor([0.9, 1.0, 1.2]), torch.tensor(0.8)):
        lit = (images * light.reshape(-1, 1, 1)).round().byte()
        found = match_illumination(lit, colour)
        assert (found.int() - expected.int()).abs().max() <= 1  # rounding


def test_matching_knows_its_limits():
    black = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    dark = torch.full((1, 3, 4, 4), 10, dtype=torch.uint8)
    colour = torch.full((3,), 100.0)
    assert (match_illumination(black, colour) == 0).all()
    assert (match_illumination(dark, colour) == 20).all()
    assert (match_illumination(dark + 245, colour) == 128).all()
