"""Heat maps: colours, scale, overlay."""

import numpy as np
import pytest
from PIL import Image

from patchsvdd_fast.report.heat_maps import (
    colour_scale,
    heat_map_overlay,
    scale_map,
    write_heat_map,
)
from patchsvdd_fast.report.map_files import MAP_THRESHOLD
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


def test_a_heat_map_is_the_image_and_beside_it_the_map(tmp_path):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(256, size=(30, 40, 3), dtype=np.uint8))
    anomaly_map = np.zeros((30, 40), np.float32)
    anomaly_map[10:20, 10:20] = 5
    write_heat_map(tmp_path / "a.png", picture, anomaly_map, 2.5)
    with Image.open(tmp_path / "a.png") as written:
        pixels = np.asarray(written).astype(int)
        assert float(written.text[MAP_THRESHOLD]) == 2.5
    assert pixels.shape == (30, 80, 3)
    plain, heat = pixels[:, :40], pixels[:, 40:]
    assert np.array_equal(plain, np.asarray(picture))
    hot = np.abs(heat - colour_scale(np.float32(1)).astype(int)).mean(axis=-1)
    assert hot[10:20, 10:20].max() < hot[anomaly_map == 0].mean()
    half = heat_map_overlay(picture, np.zeros((15, 20), np.float32), None)
    assert half.size == (40, 15)
    with largest_file(50), pytest.raises(OSError, match=r"cannot write .*b\.png"):
        write_heat_map(tmp_path / "b.png", picture, anomaly_map, None)
    assert not (tmp_path / "b.png").exists()
