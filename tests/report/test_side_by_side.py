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
    assert picture.size == (1064, 272 + WORDS)
    pixels = np.asarray(picture)
    assert (pixels[:8] == 255).all()
    for left in (8, 272, 536, 800):  # two lines above each part
        for top in (8, 27):
            assert (pixels[top : top + 19, left : left + 256] < 160).any()
    pixels = pixels[WORDS:]
    assert (pixels[:, :8] == 255).all()
    for number, (whole, left, top) in enumerate([(image, 96, 0), (other, 8, 16)]):
        first = 8 + number * 528
        panel = pixels[8:264, first : first + 256]
        expected = np.asarray(whole.resize((256, 256)))
        marked = (panel != expected).any(axis=2)
        ys, xs = np.nonzero(marked)
        # Around the patch, at twice its size, with a dark line outside.
        assert xs.min() == 2 * left - 1
        assert xs.max() == min(2 * left + 64, 255)
        assert ys.min() == max(2 * top - 1, 0)
        assert ys.max() == 2 * top + 64
        assert not marked[2 * top + 2 : 2 * top + 62, 2 * left + 2 : 2 * left + 62].any()
        assert tuple(panel[2 * top, 2 * left + 10]) == (255, 40, 40)
        enlarged = pixels[8:264, first + 264 : first + 520]
        patch = np.asarray(whole)[top : top + 32, left : left + 32]
        assert np.array_equal(enlarged, patch.repeat(8, axis=0).repeat(8, axis=1))


def test_pictures_of_any_shape():
    """Without a match; and a small patch of a large image is still seen."""
    region = region_at((2000, 700, 32), (0, 0, 32))
    large = Image.new("RGB", (4000, 1500), (90, 90, 90))
    pixels = np.asarray(side_by_side(large, region, None))[WORDS:]
    assert pixels.shape == (272, 528 + 8, 3)
    ys, xs = np.nonzero((pixels[:104, :264] == (255, 40, 40)).all(axis=2))
    assert xs.max() - xs.min() >= 5
    assert ys.max() - ys.min() >= 5
    for size in [(20_000, 64), (64, 20_000)]:
        picture = side_by_side(Image.new("RGB", size), region_at((0, 0, 64), (0, 0, 64)), None)
        assert picture.height == 272 + WORDS
