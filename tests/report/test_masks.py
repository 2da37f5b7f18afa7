"""Masks at an image's own size, and annotations in the format of COCO."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from patchsvdd_fast.report.masks import CocoFile, anomalous_pixels, run_lengths, write_mask
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
    coco = CocoFile()
    for result in (result_of(values, (10, 12)), result_of(np.zeros((4, 4)), (4, 4))):
        coco.add(result, anomalous_pixels(result))
    coco.write(tmp_path / "regions.json", "1.0")
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


def test_run_lengths_begin_with_what_is_normal():
    assert run_lengths(np.array([[True, False], [True, True]])) == [0, 2, 1, 1]
    assert run_lengths(np.zeros((2, 3), dtype=bool)) == [6]
