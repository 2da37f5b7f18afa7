"""Maps as files, and the names of what is written."""

import itertools
import os
from pathlib import Path, PurePath, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchsvdd_fast.files.whole import written_whole
from patchsvdd_fast.report.map_files import MAP_UNIT, inner_path, map_unit, write_map
from patchsvdd_fast.score.calibration import Calibration
from processes import largest_file


def calibration(highest):
    return Calibration(
        torch.tensor([0.5 * highest, highest], dtype=torch.float64),
        torch.linspace(0, highest, 302, dtype=torch.float64),
    )


MAPS = {
    "usual": np.random.default_rng(0).random((31, 47), np.float32) ** 3,
    "large": 1e12 * np.random.default_rng(1).random((8, 9), np.float32),
    "tiny": np.float32(1e-40) * np.random.default_rng(2).random((8, 9), np.float32),
    "zero": np.zeros((5, 4), np.float32),
    "one pixel": np.ones((1, 1), np.float32),
}


@pytest.mark.parametrize("anomaly_map", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("calibrated", [True, False])
def test_maps_read_back(tmp_path, anomaly_map, calibrated):
    top = float(anomaly_map.max())
    good = calibration(top / 3) if calibrated else None
    for suffix in ("npy", "tiff", "png"):
        write_map(tmp_path / f"map.{suffix}", anomaly_map, good)
    assert np.array_equal(np.load(tmp_path / "map.npy"), anomaly_map)
    with Image.open(tmp_path / "map.tiff") as image:
        assert image.mode == "F"
        assert np.array_equal(np.asarray(image), anomaly_map)
    with Image.open(tmp_path / "map.png") as image:
        unit = float(image.text[MAP_UNIT])
        steps = np.asarray(image).astype(np.float64)
    assert unit == map_unit(good, anomaly_map) > 0
    assert steps.shape == anomaly_map.shape
    assert steps.max() == (0 if top == 0 else 65535 if good is None else round(top / unit))
    assert (np.abs(steps * unit - anomaly_map) <= unit / 2 * (1 + 1e-9)).all()


def test_maps_of_one_detector_are_comparable_and_cut_off_where_it_says(tmp_path):
    good = calibration(2.0)
    levels = {0.0: 0, 1.0: 2048, 2.0: 4096, 31.999: 65533, 32.0: 65535, 50.0: 65535}
    write_map(tmp_path / "map.png", np.float32([list(levels)]), good)
    steps = np.asarray(Image.open(tmp_path / "map.png"))
    assert np.abs(steps[0].astype(int) - list(levels.values())).max() <= 1
    assert map_unit(good, np.zeros((1, 1), np.float32)) == 32 / 65535


def test_a_map_is_written_whole_or_not_at_all(tmp_path):
    for suffix in ("npy", "tiff", "png"):
        path = tmp_path / f"map.{suffix}"
        with largest_file(100), pytest.raises(OSError, match=rf"cannot write .*map\.{suffix}"):
            write_map(path, MAPS["usual"], None)
    assert list(tmp_path.iterdir()) == []


def test_the_names_of_outputs_are_those_of_the_images():
    examples = {
        "0.png": "0.png",
        "good/0.png": "good/0.png",
        "a.jpg": "a.jpg.png",
        "2024.05.01 12h.png": "2024.05.01 12h.png",
        "é/画像.tif": "é/画像.tif.png",
        "/data/x.png": "root/data/x.png",
        "A.PNG": "A.PNG.png",
        ".hidden.png": ".hidden.png",
    }
    for name, expected in examples.items():
        assert inner_path(PurePosixPath(name), ".png") == Path(expected)
    assert inner_path(PurePosixPath("good/0.png"), ".npy") == Path("good/0.npy")


COLLIDING = (
    *("a.png", "a.PNG", "a", "a.jpg", "a.jpg.png", "a.jpg.png.png", "a.jpeg", "a.JPG", "a.tiff"),
    *("../a.png", "../../a.png", "/a.png", "//a.png", "/../a.png", "root/a.png", "root/root/a.png"),
    *("x/a.png", "x/../a.png", "a.png/b.png", "a.jpg.png/b.png", "a.npy/b.png", "a.tiff/b.png"),
    *("a?.png", "a*.png", "a_.png", "a\n.png", "a\\.png", "..\\a.png", "...png", "....png"),
    *(".png", "b/.png", "b.png", "", "root", "/", "..", "/root/a.png", "root.png", " .png"),
    *("x" * 251 + ".png", "x" * 250 + ".png", "x" * 251 + ".jpg", "é" * 125 + ".png"),
    *("d/" * 2000 + "a.png", "e/" * 2000 + "a.png", "C:a.png", "a:b.png", "CON.png"),
    os.fsdecode(b"a\xff.png"),
    os.fsdecode(b"a\xfe.png"),
)


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".npy", "-1.png"])
def test_no_two_images_write_to_one_place(tmp_path, suffix):
    names = {PurePosixPath(name) for name in COLLIDING}
    paths = {name: inner_path(name, suffix) for name in names}
    assert len(set(paths.values())) == len(names)
    for path in paths.values():  # nor is one's folder another's file, and all can be written
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(tmp_path / path) as partial:
            partial.write_text(str(path))
    for path in paths.values():
        assert (tmp_path / path).read_text() == str(path)


PARTS = st.one_of(
    st.sampled_from(["..", ".", "", "a", "a.png", "a.PNG", "a.jpg", "root", "\n", "\\", "~", "-"]),
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), max_size=6),
    st.binary(max_size=4).map(lambda raw: os.fsdecode(raw.replace(b"/", b"").replace(b"\0", b""))),
    st.integers(130, 255).map(lambda length: length * "n"),
)


LISTED = st.lists(PARTS, min_size=1, max_size=5).map("/".join)


SUFFIXED = st.tuples(LISTED, st.sampled_from(["", ".png", ".jpg", ".PNG", "/"])).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(SUFFIXED, min_size=2, max_size=8), st.sampled_from([".png", ".npy", "-12.png"]))
def test_names_never_lead_outside_and_never_meet(listed, suffix):
    names = {PurePath(name) for name in listed}
    paths = [inner_path(name, suffix) for name in names]
    assert len(set(paths)) == len(names)
    for path in paths:
        assert not path.is_absolute()
        assert os.path.normpath(path) == str(path)
        assert not {"..", ".", ""} & set(path.parts)
        assert path.name.endswith(suffix)
        assert all(len(os.fsencode(part)) < 180 for part in path.parts)
        assert str(path).isprintable()
    for one, other in itertools.permutations(paths, 2):
        assert one not in other.parents
