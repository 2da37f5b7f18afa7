"""Pictures of a report as text."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from patchsvdd_fast.report.heat_maps import colour_scale
from patchsvdd_fast.report.pictures import contour_path, heat_at, heat_text, outline_path


def _decoded(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


@pytest.mark.parametrize("has_threshold", [True, False])
def test_heat_is_coloured_and_the_more_opaque_the_hotter(has_threshold):
    heat = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (8, 1))
    image = _decoded(heat_text(heat, has_threshold)).convert("RGBA")
    colours = np.asarray(image).astype(int)
    steps = abs(np.diff(colour_scale(np.linspace(0, 1, 49, dtype=np.float32)).astype(int), axis=0))
    assert (abs(colours[..., :3] - colour_scale(heat)) <= steps.max(axis=0)).all()
    opacity = colours[0, :, 3]
    assert opacity[0] < 40 and opacity[-1] == 255 and (np.diff(opacity) >= 0).all()
    assert (opacity[:31] == 0).all() == has_threshold  # below the threshold nothing is seen
    assert opacity[33] > 80


def test_a_contour_runs_where_a_map_crosses_the_middle():
    y, x = np.mgrid[:80, :120]
    heat = np.clip(1 - np.hypot(x - 60.5, y - 30.5) / 40, 0, 1).astype(np.float32)
    path = contour_path(heat_at(heat, (120, 80), 120), (120, 80))
    pieces = np.array(re.findall(r"M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)", path), float)
    ends = pieces.reshape(-1, 2)
    assert len(ends) > 40
    distance = np.hypot(ends[:, 0] - 61, ends[:, 1] - 31)  # pixels' middles lie at halves
    assert (abs(distance - 20) < 1).all()
    _, counts = np.unique(ends.round(1), axis=0, return_counts=True)
    assert (counts % 2 == 0).all()  # a closed line
    assert contour_path(np.full((80, 120), 0.4, np.float32), (120, 80)) == ""
    assert contour_path(np.ones((1, 1), np.float32), (120, 120)) == ""
    noise = np.random.default_rng(0).random((400, 400)).astype(np.float32)
    assert contour_path(noise, (800, 800)) == ""


def test_a_map_lies_over_its_picture_in_its_proportions():
    heat = np.zeros((32, 32), np.float32)
    heat[8:12, 20:28] = 1
    assert heat_at(heat, (600, 300), 400).shape == (100, 200)
    assert heat_at(heat, (60, 30), 400).shape == (30, 60)
    assert heat_at(heat, (4000, 1), 400).shape == (1, 200)
    path = contour_path(heat_at(heat, (600, 300), 400), (600, 300))
    ends = np.array(re.findall(r"([\d.]+) ([\d.]+)", path), float)
    middle = (ends.min(axis=0) + ends.max(axis=0)) / 2
    assert middle == pytest.approx([600 * 24 / 32, 300 * 10 / 32], abs=4)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_outline_surrounds_the_mask(share):
    mask = np.random.default_rng(3).random((23, 31)) < share
    path = outline_path(mask)
    pieces = re.findall(r"M(\d+) (\d+)([hv])(\d+)", path)
    assert "".join("M{} {}{}{}".format(*piece) for piece in pieces) == path
    across, down = np.zeros((24, 31), bool), np.zeros((23, 32), bool)
    for *numbers, direction, count in pieces:
        x, y, length = int(numbers[0]), int(numbers[1]), int(count)
        if direction == "h":
            across[y, x : x + length] ^= True
        else:
            down[y : y + length, x] ^= True
    # Whoever crosses a border changes sides.
    np.testing.assert_array_equal(np.logical_xor.accumulate(across, axis=0)[:-1], mask)
    np.testing.assert_array_equal(np.logical_xor.accumulate(down, axis=1)[:, :-1], mask)
