"""Which pixels of an image are anomalous: mask files, and annotations in the format of COCO."""

from __future__ import annotations

import json
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from ..files.folders import counted
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
    encoding, uncompressed, column by column. Their category is "anomaly"; for a model of several
    categories it is that of the image, with "anomaly" as its supercategory.

    path: of the file. Meanwhile a hidden file beside it, `.NAME.rows`, has a line for each image.
    kept: names of images to keep of those that an earlier run wrote, which may have been killed.

    Raises ValueError if they are to be kept of a file that no such run wrote, or are not all there;
    OSError.
    """

    def __init__(self, path: Path, kept: AbstractSet[str] = frozenset()) -> None:
        self._path, self._rows = path, path.with_name(f".{path.name}.rows")
        earlier = self._earlier() if kept else []
        self._images = [image for image in earlier if image["file_name"] in kept]
        lacking = sorted(kept - {image["file_name"] for image in self._images})
        if lacking:
            few = f"{counted(len(lacking), 'image')} of the earlier run, such as {lacking[0]}"
            raise ValueError(f"{path} lacks the regions of {few}: use another --output")
        with written_whole(self._rows) as partial:
            partial.write_bytes(b"".join(map(_line, self._images)))
        self._file = self._rows.open("ab", buffering=0)

    def _earlier(self) -> list[dict[str, Any]]:
        """What an earlier run collected; [] if there was none."""
        if self._rows.exists():  # of a run that did not end
            lines = self._rows.read_bytes().split(b"\n")[:-1]  # half a line is left out
            return [json.loads(line) for line in lines]
        if not self._path.exists():
            return []
        try:
            return _images_in(json.loads(self._path.read_text(encoding="utf-8")))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{self._path} is no COCO file of this program") from error

    def add(self, image: dict[str, Any]) -> None:
        """Add an image and its regions, as `coco_image` makes it. Raises OSError."""
        self._images.append(image)
        self._file.write(_line(image))

    def close(self) -> None:
        """Write no more; what is there can be gone on with."""
        self._file.close()

    def write(self, version: str) -> None:
        """Write the file; version: of this package. Raises OSError."""
        found = {image.get("category", "anomaly") for image in self._images}
        categories = {name: number for number, name in enumerate(sorted(found) or ["anomaly"], 1)}
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, image in enumerate(self._images, start=1):
            images.append({"id": number, **image})
            of_image = images[-1].pop("annotations")
            category = categories[image.get("category", "anomaly")]
            for one in of_image:
                owner = {"image_id": number, "category_id": category}
                annotations.append({"id": len(annotations) + 1, **owner, **one})
        content = {
            "info": {"description": "anomalous regions", "version": f"patchsvdd_fast {version}"},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": number, "name": name, "supercategory": "anomaly"}
                for name, number in categories.items()
            ],
        }
        with written_whole(self._path) as partial:
            partial.write_text(json.dumps(content), encoding="utf-8")
        self.close()
        self._rows.unlink(missing_ok=True)


def coco_image(result: ImageResult, mask: Mask) -> dict[str, Any]:
    """An image and its regions for a `CocoFile`; mask: of `anomalous_pixels`."""
    height, width = mask.shape
    annotations: list[dict[str, Any]] = []
    image = {"file_name": result.name, "width": width, "height": height}
    if result.category is not None:
        image["category"] = result.category
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    resized = Image.fromarray(result.anomaly_map.numpy()).resize((width, height))
    threshold = result.map_threshold or 1.0
    for number, window in enumerate(ndimage.find_objects(labels, count), start=1):
        inside = labels == number
        rows, columns = window
        peak = float(np.asarray(resized)[inside].max())
        annotations.append(
            {
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
    return image | {"annotations": annotations}


def _images_in(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The images of a COCO file, each with its annotations, all without numbers."""
    images = {image.pop("id"): image | {"annotations": []} for image in content["images"]}
    for annotation in content["annotations"]:
        image = images[annotation.pop("image_id")]
        del annotation["id"], annotation["category_id"]
        image["annotations"].append(annotation)
    return list(images.values())


def _line(image: dict[str, Any]) -> bytes:
    return json.dumps(image).encode() + b"\n"


def run_lengths(mask: Mask) -> list[int]:
    """COCO's uncompressed run lengths of a mask, column by column; the first are of False."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *lengths] if flat[0] else lengths
