"""The picture of a region beside the normal patch most like it."""

import numpy as np
from PIL import Image

from patchsvdd_fast.report.side_by_side import side_by_side
from patchsvdd_fast.score.regions import Region

WORDS = 38  # pixels above the parts


def region_at(patch, match):
    return Region(0, 0, 1, 1, 1, 1.0, "K32", 1.0, patch, 0, "a", match)


def test_side_by_side_shows_both_patches():
    rng = np.random.default_rng(0)
    image, other = (
        Image.fromarray(rng.integers(0, 200, (128, 128, 3), dtype=np.uint8)) for _ in range(2)
    )
    picture = side_by_side(image, region_at((96, 0, 32), (8, 16, 32)), other)
    assert picture.size == (1576, 400 + WORDS)
    pixels = np.asarray(picture)
    assert (pixels[:8] == 255).all()
    for left in (8, 400, 792, 1184):  # two lines above each part
        for top in (8, 27):
            assert (pixels[top : top + 19, left : left + 384] < 160).any()
    pixels = pixels[WORDS:]
    assert (pixels[:, :8] == 255).all()
    for number, (whole, left, top) in enumerate([(image, 96, 0), (other, 8, 16)]):
        first = 8 + number * 784
        panel = pixels[8:392, first : first + 384]
        expected = np.asarray(whole.resize((384, 384)))
        marked = (panel != expected).any(axis=2)
        ys, xs = np.nonzero(marked)
        # Around the patch, at three times its size, with a dark line outside.
        assert xs.min() == 3 * left - 1
        assert xs.max() == min(3 * left + 96, 383)
        assert ys.min() == max(3 * top - 1, 0)
        assert ys.max() == 3 * top + 96
        assert not marked[3 * top + 2 : 3 * top + 94, 3 * left + 2 : 3 * left + 94].any()
        assert tuple(panel[3 * top, 3 * left + 10]) == (255, 40, 40)
        enlarged = pixels[8:392, first + 392 : first + 776]
        patch = np.asarray(whole)[top : top + 32, left : left + 32]
        assert np.array_equal(enlarged, patch.repeat(12, axis=0).repeat(12, axis=1))


def test_pictures_of_any_shape():
    """Without a match; and a small patch of a large image is still seen."""
    region = region_at((2000, 700, 32), (0, 0, 32))
    large = Image.new("RGB", (4000, 1500), (90, 90, 90))
    pixels = np.asarray(side_by_side(large, region, None))[WORDS:]
    assert pixels.shape == (400, 784 + 8, 3)
    ys, xs = np.nonzero((pixels[:152, :392] == (255, 40, 40)).all(axis=2))
    assert xs.max() - xs.min() >= 5
    assert ys.max() - ys.min() >= 5
    for size in [(20_000, 64), (64, 20_000)]:
        picture = side_by_side(Image.new("RGB", size), region_at((0, 0, 64), (0, 0, 64)), None)
        assert picture.height == 400 + WORDS


def test_an_image_is_shown_at_its_own_pixels_and_proportions():
    rng = np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 200, (256, 512, 3), dtype=np.uint8))
    match = Image.new("RGB", (128, 128), (10, 200, 10))  # resized, as the image was
    region = region_at((32, 64, 32), (0, 0, 64))
    pixels = np.asarray(side_by_side(wide, region, match, map_size=(128, 128)))[WORDS + 8 :]
    cut = np.asarray(wide)[128:192, 128:256]  # the patch of the map, in the image's pixels
    assert np.array_equal(pixels[:192, 400:784], cut.repeat(3, axis=0).repeat(3, axis=1))
    green = (pixels == (10, 200, 10)).all(axis=-1)
    assert green[:192, 1184:1568].all() and not green[192:].any()  # the match is wide as well
