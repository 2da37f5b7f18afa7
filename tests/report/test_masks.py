"""Masks at an image's own size, and annotations in the format of COCO."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from patchsvdd_fast.report.masks import (
    CocoFile,
    anomalous_pixels,
    coco_image,
    run_lengths,
    write_mask,
)
from patchsvdd_fast.score.image_result import ImageResult
from patchsvdd_fast.score.maps import ScoreResult

# The fields of https://cocodataset.org/#format-data for object detection.
IMAGE = {"id": int, "file_name": str, "width": int, "height": int}
ANNOTATION = {
    "id": int,
    "image_id": int,
    "category_id": int,
    "bbox": list,
    "area": int,
    "segmentation": dict,
    "iscrowd": int,
}
CATEGORY = {"id": int, "name": str, "supercategory": str}


def result_of(values, size, threshold=1.0):
    """A result with this map [H, W], of an image of (height, width) pixels."""
    values = torch.as_tensor(values, dtype=torch.float32)
    scores = ScoreResult("K32", {"K32": values[None]}, {}, {}, {})
    return ImageResult(
        name="a.png",
        score=float(values.max()),
        p_value=None,
        threshold=threshold,
        anomalous=threshold is not None and bool(values.max() > threshold),
        level="K32",
        unusual=(),
        pixels=torch.zeros(3, *values.shape, dtype=torch.uint8),
        statistics=torch.tensor([0, 0, 0, 0, 0, size[1], size[0]], dtype=torch.float64),
        scores=scores,
        source="a.png",
    )


def decoded(segmentation):
    """The mask of COCO's uncompressed run lengths."""
    height, width = segmentation["size"]
    counts = segmentation["counts"]
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


@pytest.mark.parametrize("size", [(32, 48), (8, 8), (3, 5)])
def test_a_mask_has_the_size_of_the_image(size, tmp_path):
    values = np.zeros((8, 8), dtype=np.float32)
    values[2:5, 4:7] = 3.0
    mask = anomalous_pixels(result_of(values, size))
    assert mask.shape == size
    write_mask(tmp_path / "mask.png", mask)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "L"
        assert image.size == (size[1], size[0])
        assert set(np.unique(np.asarray(image))) == {0, 255}
    rows, columns = mask.nonzero()
    centre = (rows.mean() + 0.5) / size[0], (columns.mean() + 0.5) / size[1]
    assert centre == pytest.approx((3.5 / 8, 5.5 / 8), abs=0.1)


@pytest.mark.parametrize("size", [(64, 64), (2, 2)])
def test_an_anomalous_image_has_anomalous_pixels(size):
    values = np.zeros((8, 8), dtype=np.float32)
    values[5, 2] = 1.001  # interpolation falls below the threshold
    mask = anomalous_pixels(result_of(values, size))
    assert mask.any()
    assert not anomalous_pixels(result_of(values, size, threshold=1.1)).any()


def test_a_mask_needs_a_threshold():
    with pytest.raises(ValueError, match="at least two training images"):
        anomalous_pixels(result_of(np.zeros((4, 4)), (4, 4), threshold=None))


def test_regions_are_written_as_coco_has_them(tmp_path):
    values = np.zeros((10, 12), dtype=np.float32)
    values[1:4, 2:6] = 2.0
    values[7:9, 9:12] = 4.0
    coco = CocoFile(tmp_path / "regions.json")
    for result in (result_of(values, (10, 12)), result_of(np.zeros((4, 4)), (4, 4))):
        coco.add(coco_image(result, anomalous_pixels(result)))
    coco.write("1.0")
    content = json.loads((tmp_path / "regions.json").read_text())
    assert set(content) == {"info", "licenses", "images", "annotations", "categories"}
    for name, fields in (
        ("images", IMAGE),
        ("annotations", ANNOTATION),
        ("categories", CATEGORY),
    ):
        for entry in content[name]:
            assert {key: type(entry[key]) for key in fields} == fields
    assert [image["id"] for image in content["images"]] == [1, 2]
    assert [category["name"] for category in content["categories"]] == ["anomaly"]
    first, second = content["annotations"]
    assert (first["id"], second["id"]) == (1, 2)
    assert first["image_id"] == second["image_id"] == 1
    assert (first["bbox"], first["area"], first["score"]) == ([2, 1, 4, 3], 12, 2.0)
    assert (second["bbox"], second["area"], second["score"]) == ([9, 7, 3, 2], 6, 4.0)
    for entry, expected in ((first, values == 2), (second, values == 4)):
        assert np.array_equal(decoded(entry["segmentation"]), expected)


@pytest.mark.parametrize("ended", [True, False])
def test_regions_can_be_gone_on_with(tmp_path, ended):
    """With those of a run that ended, or of one that was killed while it wrote a line."""
    values = np.zeros((10, 12), dtype=np.float32)
    values[1:4, 2:6] = 2.0
    results = [
        replace(result_of(values * factor, (10, 12)), name=name, category=category)
        for name, category, factor in (("a", "tile", 1), ("b", "cloth", 0), ("c", "cloth", 2))
    ]
    whole, parts = CocoFile(tmp_path / "whole.json"), CocoFile(tmp_path / "parts.json")
    for result in results:
        whole.add(coco_image(result, anomalous_pixels(result)))
    for result in results[:2]:
        parts.add(coco_image(result, anomalous_pixels(result)))
    if ended:
        parts.write("1.0")
    else:
        parts.close()
        with (tmp_path / ".parts.json.rows").open("ab") as file:
            file.write(b'{"file_name": "c", "wid')
    with pytest.raises(
        ValueError, match="lacks the regions of 1 image of the earlier run, such as c"
    ):
        CocoFile(tmp_path / "parts.json", {"a", "c"})
    parts = CocoFile(tmp_path / "parts.json", {"a", "b"})
    parts.add(coco_image(results[2], anomalous_pixels(results[2])))
    for coco in (whole, parts):
        coco.write("1.0")
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    content = json.loads((tmp_path / "parts.json").read_text())
    assert [image["category"] for image in content["images"]] == ["tile", "cloth", "cloth"]
    assert [one["category_id"] for one in content["annotations"]] == [2, 1]
    assert [(one["id"], one["name"]) for one in content["categories"]] == [
        (1, "cloth"),
        (2, "tile"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.json", "whole.json"]


def test_another_file_is_not_gone_on_with(tmp_path):
    (tmp_path / "mine.json").write_text('{"images": 3}')
    with pytest.raises(ValueError, match=r"mine.json is no COCO file of this program"):
        CocoFile(tmp_path / "mine.json", {"a"})


def test_run_lengths_begin_with_what_is_normal():
    assert run_lengths(np.array([[True, False], [True, True]])) == [0, 2, 1, 1]
    assert run_lengths(np.zeros((2, 3), dtype=bool)) == [6]
