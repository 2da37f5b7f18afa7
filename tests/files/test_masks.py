"""Masks as data sets write them: which pixels they mark, and which image they belong to."""

from pathlib import PurePath

import numpy as np
import pytest
from PIL import Image

from data_sets import MASKS, SIDE, colour, gray, png_of
from patchsvdd_fast.files.masks import marks_anything, masks_beside, matched_masks, read_mask

SQUARE = np.zeros((SIDE, SIDE), bool)
SQUARE[30:60, 40:80] = True
SIZE = (96, 96)


def expected(tmp_path):
    gray(255)(SQUARE).save(tmp_path / "expected.png")
    return read_mask(tmp_path / "expected.png", SIZE)


@pytest.mark.parametrize("kind", MASKS)
def test_every_kind_marks_the_same_pixels(kind, tmp_path):
    suffix, make = MASKS[kind]
    make(SQUARE).save(tmp_path / f"mask.{suffix}")
    found = read_mask(tmp_path / f"mask.{suffix}", SIZE)
    assert found.any()
    assert np.array_equal(found, expected(tmp_path))
    assert marks_anything([tmp_path / f"mask.{suffix}"])


@pytest.mark.parametrize("make", [gray(255), colour((255, 0, 0), (0, 0, 0))])
def test_lossy_masks_mark_nearly_the_same(make, tmp_path):
    make(SQUARE).save(tmp_path / "mask.jpg", quality=80)
    found = read_mask(tmp_path / "mask.jpg", SIZE)
    assert (found != expected(tmp_path)).mean() < 0.02


def test_soft_edges_keep_the_cut_at_128(tmp_path):
    soft = gray(255)(SQUARE).resize((40, 40)).resize((SIDE, SIDE))
    soft.save(tmp_path / "soft.png")
    resized = np.asarray(soft.resize(SIZE))
    assert np.array_equal(read_mask(tmp_path / "soft.png", SIZE), resized > 128)
    red = Image.merge("RGB", [soft, *[gray(0)(SQUARE)] * 2])
    red.save(tmp_path / "red.png")
    differ = read_mask(tmp_path / "red.png", SIZE) != (resized > 128)
    assert differ.mean() < 0.01


def test_empty_masks_mark_nothing(tmp_path):
    for mode in ("L", "RGB", "RGBA", "I;16", "P", "1"):
        Image.new(mode, (SIDE, SIDE)).save(tmp_path / "empty.png")
        assert not read_mask(tmp_path / "empty.png", SIZE).any()
        assert not marks_anything([tmp_path / "empty.png"])


def with_void():
    classes = np.where(SQUARE, 1, 0).astype(np.uint8)
    classes[30, 40:80] = 255
    return Image.fromarray(classes)


def contradicting():
    image = np.zeros((SIDE, SIDE, 4), np.uint8)
    image[SQUARE, 0], image[:64, :64, 3] = 255, 255
    return Image.fromarray(image, "RGBA")


def without_background():
    image = np.full((SIDE, SIDE, 3), (0, 200, 0), np.uint8)
    image[:50], image[50:90] = (200, 0, 0), (0, 0, 200)
    return Image.fromarray(image)


@pytest.mark.parametrize("make", [with_void, contradicting, without_background])
def test_what_can_be_read_in_two_ways_is_an_error(make, tmp_path):
    make().save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask\.png: ambiguous"):
        read_mask(tmp_path / "mask.png", SIZE)


def test_other_errors_name_the_file(tmp_path, monkeypatch):
    (tmp_path / "mask.png").write_text("no image")
    with pytest.raises(ValueError, match=r"mask\.png is not an image"):
        read_mask(tmp_path / "mask.png", SIZE)
    gray(3)(SQUARE).convert("L").save(tmp_path / "faint.jpg", quality=95)
    with pytest.raises(ValueError, match=r"faint\.jpg: ambiguous: its highest value is"):
        read_mask(tmp_path / "faint.jpg", SIZE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(ValueError, match="more than the limit of 10,000"):
        read_mask(tmp_path / "faint.jpg", SIZE)


def test_low_values_of_16_bit_colour_are_an_error(tmp_path):
    samples = np.where(SQUARE[..., None], (255, 255, 255), 0)
    (tmp_path / "mask.png").write_bytes(png_of(257 * samples))
    assert np.array_equal(read_mask(tmp_path / "mask.png", SIZE), expected(tmp_path))
    (tmp_path / "mask.png").write_bytes(png_of(samples))
    with pytest.raises(ValueError, match="16-bit colour only the high 8 bits are read"):
        read_mask(tmp_path / "mask.png", SIZE)


def test_of_several_pages_the_first_marks(tmp_path):
    gray(255)(SQUARE).save(tmp_path / "mask.tif", save_all=True, append_images=[gray(255)(~SQUARE)])
    with pytest.warns(UserWarning, match=r"mask .*mask\.tif has 2 pages or frames; the first"):
        assert np.array_equal(read_mask(tmp_path / "mask.tif", SIZE), expected(tmp_path))


def matched(images, masks, tmp_path):
    found, unmatched = matched_masks(
        {PurePath(name): tmp_path / "test" / name for name in images},
        {PurePath(name): tmp_path / "masks" / name for name in masks},
    )
    short = {
        path.name: [mask.relative_to(tmp_path / "masks").as_posix() for mask in of_one]
        for path, of_one in found.items()
    }
    return short, [path.name for path in unmatched]


def test_masks_are_found_by_any_name_that_is_usual(tmp_path):
    for mask in ("a.png", "a.jpg", "a_mask.JPG", "a_mask.PNG", "a_Mask.tiff", "a_GT.bmp", "a.TIF"):
        assert matched(["spot/a.png"], [f"spot/{mask}"], tmp_path) == (
            {"a.png": [f"spot/{mask}"]},
            [],
        )
    several = ["spot/a/000.png", "spot/a/001.png", "spot/b_mask.png", "spot/b.png", "spot/c.png"]
    assert matched(["spot/a.png", "spot/b.png", "dent/c.png"], several, tmp_path) == (
        {"a.png": ["spot/a/000.png", "spot/a/001.png"], "b.png": ["spot/b_mask.png"]},
        ["c.png"],
    )


def test_masks_beside_images(tmp_path):
    names = ("1.png", "1_GT.png", "2.jpg", "2_label.bmp", "3_mask.png", "_mask.png", "4.png")
    found = masks_beside([tmp_path / name for name in names])
    assert {mask.name: image.name for mask, image in found.items()} == {
        "1_GT.png": "1.png",
        "2_label.bmp": "2.jpg",
    }
