"""Folders of images and categories in MVTec layout."""

import numpy as np
import pytest
from PIL import Image

from patchsvdd_fast.files.categories import Category, find_categories, training_paths
from patchsvdd_fast.files.folders import find_images
from patchsvdd_fast.files.masks import read_mask

RAMP = np.linspace(0, 255, 80 * 70).astype(np.uint8).reshape(80, 70)


COLOUR = np.stack([RAMP, RAMP.T.reshape(80, 70), 255 - RAMP], axis=-1)


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
    assert [(t.defect, t.is_anomalous, bool(t.masks)) for t in tests] == (
        [("good", False, False)] * 3 + [("spot", True, True)] * 3
    )
    mask = read_mask(tests[-1].masks[0], (48, 48))
    assert mask.sum() == 15 * 15
    assert training_paths(category_folder) == category.train_paths()
    assert [c.name for c in find_categories(category_folder.parent)] == ["stripes"]
    assert find_categories(category_folder)[0].name == "stripes"
    with pytest.raises(ValueError, match="no category"):
        find_categories(category_folder / "test")
