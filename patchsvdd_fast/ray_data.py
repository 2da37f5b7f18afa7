"""Scoring with Ray Data: what scores the batches of a dataset, in actors on many machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from .detector.categories import (
    CategoryDetectors,
    by_category,
    open_detectors,
    require_category,
    score_stream,
    thresholds_of,
)
from .detector.patch_svdd import PatchSVDD
from .files.pages import FileBytes
from .report.table import CATEGORY, COLUMNS, arrow_table, require_parquet, row_of
from .score.image_result import ImageResult
from .score.stream import Stream

MAP_COLUMN = "anomaly_map"
"""The column of anomaly maps, where they are asked for: lists of rows of float32, [H, W]."""

_PATH, _BYTES, _IMAGE = "path", "bytes", "image"  # columns, as Ray's readers call them


class Scorer:
    """Scores batches of images, for `ray.data.Dataset.map_batches`; each actor makes one.

    ``Scorer(...)(batch)`` gives a row for each image, in their order: a `pyarrow.Table` with the
    columns of scores.csv (`COLUMNS`, and `CATEGORY` for a model of several), each of one type
    whatever the batch holds. The values are those of `PatchSVDD.score_stream`, to the bit. An image
    that cannot be read has a row that says so in its column ``error``.

    model_path: the model file, which every machine has to see at this path; it is mapped, so the
        actors of a machine share its banks in memory.
    false_alarm_rate: share of good images that may be called anomalous; None: as in training.
    category: of a model of several, the one of all images, or "nearest"; None: each image's folder
        names it, else it is the nearest.
    maps: add the anomaly maps, a column `MAP_COLUMN`.
    device: "cpu", "cuda", "cuda:1" ..., or "auto": a GPU if the actor has one.
    threads: that an actor computes with; None: as PyTorch finds, in an actor of Ray its `num_cpus`.

    Raises as `PatchSVDD.load`; ValueError for a rate or a category that does not suit the model, or
    fewer than one thread; ImportError without pyarrow.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        false_alarm_rate: float | None = None,
        category: str | None = None,
        maps: bool = False,
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        require_parquet()
        if threads is not None:
            if threads < 1:
                raise ValueError(f"threads must be at least 1, got {threads}")
            torch.set_num_threads(threads)
        self._detectors = open_detectors(model_path, device)
        require_category(self._detectors, category)
        thresholds_of(by_category(self._detectors), false_alarm_rate)  # raises for what is no rate
        self._category, self._rate, self._maps = category, false_alarm_rate, maps
        is_single = isinstance(self._detectors, PatchSVDD)
        self._columns = COLUMNS if is_single else (*COLUMNS, CATEGORY)

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """Score a batch, of any of Ray's batch formats.

        batch: has a column "path", the names of the images, and for what they are made of the first
            of these that it has: "bytes", the content of image files, as of
            `ray.data.read_binary_files(include_paths=True)`; "image", arrays [H, W, 3] or [H, W],
            as of `ray.data.read_images(include_paths=True)` in the batch format "numpy"; else they
            are read from their paths.

        Raises ValueError for a batch without paths.
        """
        names, images = _named_images(batch)
        rows: list[dict[str, Any]] = []
        maps: list[Any] = []

        def note_failure(_: Any, error: Exception) -> None:
            name = names[len(rows)]  # failures and results come in the images' order
            message = str(error) or type(error).__name__
            rows.append({"image": name, "error": message.replace(f"image {len(rows)}", name, 1)})
            maps.append(None)

        with self._stream(names, images, note_failure) as stream:
            for result in stream:
                rows.append(row_of(replace(result, name=names[len(rows)])))
                maps.append(list(result.anomaly_map.numpy()) if self._maps else None)
        table = arrow_table(rows, self._columns)
        if not self._maps:
            return table
        import pyarrow

        kind = pyarrow.list_(pyarrow.list_(pyarrow.float32()))
        return table.append_column(MAP_COLUMN, pyarrow.array(maps, kind))

    def _stream(
        self,
        names: Sequence[str],
        images: Sequence[Any],
        on_error: Callable[[Any, Exception], None],
    ) -> Stream[ImageResult]:
        names_of = {id(image): name for image, name in zip(images, names, strict=True)}

        def category_of(image: Any) -> str | None:  # also of an array, by its path
            name = names_of[id(image)]
            return cast(CategoryDetectors, self._detectors).category_of_path(name)

        choice = self._category or category_of
        options = {"false_alarm_rate": self._rate, "on_error": on_error}
        return score_stream(self._detectors, images, choice, **options)


def _named_images(batch: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
    """The names of a batch's images, and the images as `score_stream` takes them."""
    there = getattr(batch, "column_names", None) or list(batch)  # of Arrow, or others
    if _PATH not in there:
        raise ValueError(
            f'a batch must have a column "path", such as include_paths=True gives, got '
            f"{', '.join(map(repr, there))}"
        )
    names = _values(batch[_PATH])
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f'the column "path" must hold text, got {name!r}')
    if _BYTES in there:
        contents = _values(batch[_BYTES])
        return names, [
            FileBytes(name, content or b"") for name, content in zip(names, contents, strict=True)
        ]
    return names, list(batch[_IMAGE]) if _IMAGE in there else list(names)


def _values(column: Any) -> list[Any]:
    """A column of Arrow, pandas or NumPy as a list."""
    return list(column.to_pylist() if hasattr(column, "to_pylist") else column)
