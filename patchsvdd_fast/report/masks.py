"""Which pixels of an image are anomalous: mask files, and annotations in the format of COCO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from ..files.whole import written_whole
from ..score.image_result import ImageResult

Mask = npt.NDArray[np.bool_]
"""[H, W], True where a pixel is anomalous."""


def anomalous_pixels(result: ImageResult) -> Mask:
    """The mask of an image at its own size: where its map exceeds the threshold.

    The map is interpolated. If nothing of it exceeds the threshold then, but a pixel of the map
    does, these pixels are enlarged or joined as they are; so an image that is called anomalous has
    anomalous pixels. Raises ValueError without a threshold.
    """
    threshold = result.map_threshold
    if threshold is None:
        raise ValueError("masks need a threshold, which needs at least two training images")
    height, width = result.original_size
    values = result.anomaly_map.numpy()
    resized = Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)
    mask = np.asarray(resized) > threshold
    above = values > threshold
    if above.any() and not mask.any():
        covered = Image.fromarray(above.astype(np.float32))
        mask = np.asarray(covered.resize((width, height), Image.Resampling.BOX)) > 0
    return mask


def write_mask(path: Path, mask: Mask) -> None:
    """Write a mask as a PNG of 8-bit gray: 255, white, where it is anomalous. Raises OSError."""
    with written_whole(path) as partial:
        Image.fromarray(mask.astype(np.uint8) * 255).save(partial, format="PNG")


class CocoFile:
    """Collects the anomalous regions of images, and writes them as a COCO file in the end.

    Its annotations are the connected parts of `anomalous_pixels`. Their `score` is the highest
    value of the map in them, as a multiple of the threshold; `segmentation` is a run-length
    encoding, uncompressed, column by column. The only category is "anomaly".
    """

    def __init__(self) -> None:
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, result: ImageResult, mask: Mask) -> None:
        """Add an image and its regions; mask: of `anomalous_pixels`."""
        height, width = mask.shape
        image = len(self._images) + 1
        self._images.append(
            {"id": image, "file_name": result.name, "width": width, "height": height}
        )
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        resized = Image.fromarray(result.anomaly_map.numpy()).resize((width, height))
        threshold = result.map_threshold or 1.0
        for number, window in enumerate(ndimage.find_objects(labels, count), start=1):
            inside = labels == number
            rows, columns = window
            peak = float(np.asarray(resized)[inside].max())
            self._annotations.append(
                {
                    "id": len(self._annotations) + 1,
                    "image_id": image,
                    "category_id": 1,
                    "bbox": [
                        columns.start,
                        rows.start,
                        columns.stop - columns.start,
                        rows.stop - rows.start,
                    ],
                    "area": int(inside.sum()),
                    "segmentation": {"size": [height, width], "counts": run_lengths(inside)},
                    "iscrowd": 0,
                    "score": round(peak / threshold, 6),
                }
            )

    def write(self, path: Path, version: str) -> None:
        """Write the file; version: of this package. Raises OSError."""
        content = {
            "info": {"description": "anomalous regions", "version": f"patchsvdd_fast {version}"},
            "licenses": [],
            "images": self._images,
            "annotations": self._annotations,
            "categories": [{"id": 1, "name": "anomaly", "supercategory": "anomaly"}],
        }
        with written_whole(path) as partial:
            partial.write_text(json.dumps(content), encoding="utf-8")


def run_lengths(mask: Mask) -> list[int]:
    """COCO's uncompressed run lengths of a mask, column by column; the first are of False."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *lengths] if flat[0] else lengths
