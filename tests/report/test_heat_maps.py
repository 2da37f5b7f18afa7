"""Heat maps: colours, scale, overlay."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from patchsvdd_fast.report.captions import BAD, cut_in_middle
from patchsvdd_fast.report.heat_maps import (
    TRUTH,
    colour_scale,
    heat_map_overlay,
    heat_map_picture,
    map_at,
    opacity_scale,
    scale_map,
    smooth_map,
    write_heat_map,
)
from patchsvdd_fast.report.map_files import MAP_THRESHOLD, png_bytes
from patchsvdd_fast.score.image_result import ImageResult
from patchsvdd_fast.score.maps import ScoreResult
from processes import largest_file


def test_colours_grow_lighter_with_the_value():
    colours = colour_scale(np.linspace(-0.5, 1.5, 201, dtype=np.float32)).astype(int)
    assert colours.shape == (201, 3)
    lightness = colours @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness) >= -1).all()  # but for rounding
    assert (colours[:50] == colours[0]).all()
    assert (colours[150:] == colours[-1]).all()
    assert lightness[-1] - lightness[0] > 150


def test_heat_maps_of_one_detector_are_comparable():
    values = np.float32([[-1, 0, 1e-9, 2e-9, 4e-9, 100]])
    assert scale_map(values, 2e-9)[0].tolist() == pytest.approx([0, 0, 0.25, 0.5, 1, 1], abs=1e-6)
    assert scale_map(values, None)[0].tolist() == pytest.approx(
        ((values[0] - values.min()) / (values.max() - values.min())).tolist()
    )
    assert (scale_map(np.full((2, 3), 7, np.float32), None) == 0).all()


def test_below_the_threshold_nothing_is_seen():
    scaled = np.linspace(0, 1, 101, dtype=np.float32)
    opacity = opacity_scale(scaled, True)
    assert (opacity[scaled <= 0.5] == 0).all()
    assert opacity[51] > 0.25 and (np.diff(opacity[51:]) > 0).all()
    assert (np.diff(opacity_scale(scaled, False)) > 0).all()


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(60, 200, size=(60, 80, 3), dtype=np.uint8))


def _disc(radius=12.0):
    """A map [60, 80] that falls from 2 to 0, and is 1 at this distance from (x, y) = (40, 30)."""
    y, x = np.mgrid[:60, :80]
    return np.clip(2 - np.hypot(x - 40, y - 30) / radius, 0, None).astype(np.float32)


@pytest.mark.parametrize("factor", [1, 2])
def test_an_overlay_has_a_line_at_the_threshold_and_is_the_image_outside(picture, factor):
    large = picture.resize((80 * factor, 60 * factor))
    before = np.asarray(large).astype(int)
    drawn = np.asarray(heat_map_overlay(large, _disc(), 1.0)).astype(int)
    assert drawn.shape == (60 * factor, 80 * factor, 3)
    y, x = (np.mgrid[: 60 * factor, : 80 * factor] + 0.5) / factor - 0.5
    distance = np.hypot(x - 40, y - 30)
    changed = (drawn != before).any(axis=-1)
    assert not changed[distance > 16].any() and changed[distance < 11].all()
    light = (drawn > 245).all(axis=-1)
    assert light.any() and (abs(distance[light] - 12) < 1.5).all()
    angles = np.arctan2(y - 30, x - 40)[light]  # all around
    assert np.histogram(angles, 24, (-np.pi, np.pi))[0].min() > 0


def test_a_mask_is_outlined():
    picture = Image.new("RGB", (80, 60), (120, 110, 130))
    mask = np.zeros((60, 80), bool)
    mask[10:50, 20:60] = True
    drawn = np.asarray(heat_map_overlay(picture, np.zeros((60, 80), np.float32), 1.0, mask))
    near = np.abs(drawn.astype(int) - TRUTH).max(axis=-1) < 80
    assert (
        near[10:50, 19:21].any(axis=1).mean() > 0.9 and near[9:11, 20:60].any(axis=0).mean() > 0.9
    )
    assert not near[14:46, 24:56].any() and not near[:7].any()


def _scores(maps, combination):
    maps = {name: torch.from_numpy(m)[None] for name, m in maps.items()}
    return ScoreResult(combination, maps, {}, {}, {})


@pytest.mark.parametrize("combination", ["mult", "sum", "K64"])
def test_maps_are_smoothed_and_keep_their_maximum(combination):
    rng = np.random.default_rng(0)
    coarse, fine = (rng.random((64 // n, 96 // n)).astype(np.float32) + 0.5 for n in (16, 4))
    stairs = [m.repeat(n, axis=0).repeat(n, axis=1) for m, n in ((coarse, 16), (fine, 4))]
    scores = _scores(dict(zip(("K64", "K32"), stairs, strict=True)), combination)
    before, after = scores.anomaly_map[0].numpy(), smooth_map(scores)
    assert after.shape == before.shape and after.max() == before.max()
    for axis in (0, 1):
        assert abs(np.diff(after, axis=axis)).max() < 0.6 * abs(np.diff(before, axis=axis)).max()
    assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.85


def test_smooth_and_constant_maps_stay():
    for values in (_disc(), np.full((60, 80), 3, np.float32), np.zeros((60, 80), np.float32)):
        assert np.array_equal(smooth_map(_scores({"K24": values}, "K24")), values)


@pytest.mark.parametrize("size", [(320, 240), (97, 31), (40, 30), (7, 300)])
def test_a_map_at_another_size_is_smooth_and_keeps_its_maximum(size):
    values = _disc()
    resized = map_at(values, size)
    assert resized.shape == size[::-1] and resized.dtype == np.float32
    assert resized.max() == pytest.approx(values.max(), rel=1e-6)
    assert resized.min() >= 0
    place = np.unravel_index(resized.argmax(), resized.shape)
    middle = [(at + 0.5) / length for at, length in zip(place, resized.shape, strict=True)]
    assert middle == pytest.approx([30.5 / 60, 40.5 / 80], abs=0.04)
    if size == (320, 240):  # four times as large: steps are a quarter as high
        assert abs(np.diff(resized, axis=1)).max() < 0.4 * abs(np.diff(values, axis=1)).max()


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (64, 33)])
def test_png_files_hold_what_was_given(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(png_bytes(pixels, {"a.key": "1e-09"}))) as image:
        assert image.mode == "RGB" and image.text == {"a.key": "1e-09"}
        assert np.array_equal(np.asarray(image), pixels)


def test_a_heat_map_has_the_images_own_pixels_and_proportions():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(60, 200, size=(300, 700, 3), dtype=np.uint8))
    values = np.zeros((64, 64), np.float32)  # of the image resized to a square
    values[16:24, 48:56] = 2.0
    pixels = np.asarray(heat_map_picture(image, values, 1.0))
    lefts = range(8, pixels.shape[1] - 700, 708)
    (top,) = {y for y in range(8, 250) if (pixels[y : y + 300, 8:708] == image).all()}
    mask = pixels[top : top + 300, lefts[3] : lefts[3] + 700, 0] == 255
    rows, columns = mask.nonzero()
    assert (rows.mean() + 0.5) / 300 == pytest.approx(20 / 64, abs=0.01)
    assert (columns.mean() + 0.5) / 700 == pytest.approx(52 / 64, abs=0.01)


def test_a_saved_picture_shows_image_heat_map_map_and_mask(picture):
    large = picture.resize((320, 240), Image.Resampling.NEAREST)
    saved = heat_map_picture(large, _disc(), 1.0, "a/b.png", "anomalous", True)
    pixels = np.asarray(saved)
    lefts = range(8, 8 + 4 * 328, 328)
    assert saved.width == 8 + 4 * 328
    (top,) = {y for y in range(saved.height - 240) if (pixels[y : y + 240, 8:328] == large).all()}
    panels = [pixels[top : top + 240, left : left + 320] for left in lefts]
    assert np.array_equal(panels[1], heat_map_overlay(large, _disc(), 1.0))
    mask = panels[3][..., 0]
    assert set(np.unique(mask)) == {0, 255}
    assert (mask == 255).sum() == pytest.approx(np.pi * 48**2, rel=0.05)
    words = (pixels[:top] < 200).any(axis=-1)
    assert words.any()
    assert (pixels[:top] == BAD).all(axis=-1).any()
    ramp = colour_scale(np.float32([0, 1]))
    below = pixels[top + 240 :].reshape(-1, 3)
    assert all((below == colour).all(axis=1).any() for colour in ramp)


def test_saved_pictures_of_any_shape():
    name = "folder/" * 40 + "\udcff\n日本.png"
    for size in [(1, 1), (20, 3000), (3000, 20), (2500, 2000)]:
        image, values = Image.new("RGB", size), np.ones((size[1], size[0]), np.float32)
        for threshold in (None, 0.5):
            saved = heat_map_picture(image, values, threshold, name, "normal", False)
            assert saved.width < 4 * 1040 and saved.height < 1300


def test_a_written_heat_map_says_its_scale(picture, tmp_path):
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    result = ImageResult(
        *("a.png", 2.0, 0.1, 1.0, True, "K24", (), pixels, torch.tensor([0.0, 0, 0, 0, 0, 80, 60])),
        _scores({"K24": _disc()}, "K24"),
        None,
    )
    write_heat_map(tmp_path / "a.png", result)
    with Image.open(tmp_path / "a.png") as written:
        assert float(written.text[MAP_THRESHOLD]) == 1.0
    with largest_file(50), pytest.raises(OSError, match=r"cannot write .*b\.png"):
        write_heat_map(tmp_path / "b.png", result)
    assert not (tmp_path / "b.png").exists()


def test_long_names_are_cut_in_the_middle():
    assert cut_in_middle("abc", lambda text: True) == "abc"
    assert cut_in_middle("abcdefghij", lambda text: len(text) <= 6) == "ab…hij"
    assert cut_in_middle("abcdefghij", lambda text: len(text) <= 1) == "…"
