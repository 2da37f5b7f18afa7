"""Paths of single pages or frames, and what pages a file has."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import stack
from patchsvdd_fast.files.pages import file_and_page, num_pages, page_paths, with_every_page


@pytest.mark.parametrize("suffix", [".tif", ".gif", ".webp", ".apng", ".avif"])
def test_each_page_has_a_path(tmp_path, suffix):
    path = stack(tmp_path / f"x{suffix}", 3)
    assert page_paths(path) == [tmp_path / f"x{suffix}#{number}" for number in (1, 2, 3)]
    assert page_paths(str(path)) == page_paths(path)
    single = stack(tmp_path / f"y{suffix}", 1)
    assert page_paths(single) == [single]


def test_paths_that_name_a_page(tmp_path):
    assert file_and_page("x.tif") == ("x.tif", None)
    assert file_and_page(Path("a/x.tif#12")) == ("a/x.tif", 12)
    for name in ("x.tif#0", "x.tif#01", "x.tif#", "x.tif#-1", "#2", "x#2.tif"):
        assert file_and_page(name) == (name, None)
    path = stack(tmp_path / "x.tif", 2)
    assert page_paths(f"{path}#2") == [Path(f"{path}#2")]
    real = path.rename(tmp_path / "x.tif#2")  # a file of this name
    assert file_and_page(real) == (str(real), None)
    assert page_paths(real) == [tmp_path / "x.tif#2#1", tmp_path / "x.tif#2#2"]
    assert file_and_page(f"{real}#1") == (str(real), 1)


def test_what_has_no_pages_is_itself(tmp_path):
    """Files that are missing or no images, whose reading says so; photographs with previews."""
    (tmp_path / "text.tif").write_text("hello")
    for name in ("text.tif", "missing.tif"):
        assert page_paths(tmp_path / name) == [tmp_path / name]
    photograph = tmp_path / "x.jpg"
    one = Image.fromarray(np.zeros((40, 50), np.uint8))
    one.save(photograph, format="MPO", save_all=True, append_images=[one])
    assert page_paths(photograph) == [photograph]
    array = np.zeros((4, 4))
    path = stack(tmp_path / "x.tif", 2)
    expected = [array, one, *page_paths(path), str(photograph)]
    found = with_every_page([array, one, str(path), str(photograph)])
    assert all(a is b or a == b for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_pages_count(tmp_path):
    """So that they are read, which says what is wrong."""
    path = stack(tmp_path / "x.tif", 3)
    whole = path.read_bytes()
    for length in range(len(whole) - 1, len(whole) - 2600, -100):
        path.write_bytes(whole[:length])
        with Image.open(path) as image:
            count = num_pages(image)
            assert image.tell() == 0
        assert count >= 2
