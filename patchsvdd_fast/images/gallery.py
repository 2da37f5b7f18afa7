"""The training images behind a bank: names, statistics, and small pictures for explanations."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ..files.folders import counted
from .drift import STATISTICS, image_statistics
from .prepare import ImageSet
from .samples import to_8_bits

_LONGEST_SIDE = 1024  # of a picture, in pixels
_QUALITY = 90  # of JPEG


def evenly_spread(count: int, chosen: int) -> npt.NDArray[np.int64]:
    """`chosen` of the numbers 0 .. count - 1, such as those of images, ascending [chosen]."""
    return np.linspace(0, count - 1, chosen).round().astype(np.int64)


@dataclass(frozen=True)
class Gallery:
    """What is kept of N training images, in the order of the banks' first axis."""

    names: tuple[str, ...]
    """Paths relative to the folder, or as given."""
    statistics: Tensor
    """[N, 7] float64, see `drift.image_statistics`."""
    pictures: tuple[bytes | memoryview, ...] | None
    """JPEG files of at most 1,024 pixels a side; None if they were not to be kept."""

    def __post_init__(self) -> None:
        count = len(self.names)
        if self.statistics.shape != (count, len(STATISTICS)):
            raise ValueError(
                f"statistics must have shape [{count}, {len(STATISTICS)}], "
                f"got {list(self.statistics.shape)}"
            )
        if self.pictures is not None and len(self.pictures) != count:
            raise ValueError(f"{count} training images cannot have {len(self.pictures)} pictures")

    def __repr__(self) -> str:
        pictures = "without" if self.pictures is None else "with"
        return f"Gallery({counted(len(self.names), 'image')}, {pictures} pictures)"

    def __getstate__(self) -> dict[str, Any]:
        # Pictures of an opened model are views of the file, which cannot be pickled.
        pictures = None if self.pictures is None else tuple(map(bytes, self.pictures))
        return {**self.__dict__, "pictures": pictures}

    @classmethod
    def of(cls, images: ImageSet, with_pictures: bool = True) -> Gallery:
        """The gallery of prepared images, whose light has not been matched."""
        return cls(
            images.names,
            image_statistics(images.pixels, images.original_sizes),
            tuple(_as_jpeg(pixels) for pixels in images.pixels) if with_pictures else None,
        )

    @classmethod
    def joined(cls, galleries: Sequence[Gallery]) -> Gallery:
        """The images of all, one gallery after another; see `with_others`."""
        return functools.reduce(cls.with_others, galleries)

    def num_alike(self, others: Gallery | None = None) -> int:
        """How many images have exactly the statistics of another one here.

        others: or, if given, those of one of its images instead.
        """
        rows = (
            self.statistics if others is None else torch.cat([self.statistics, others.statistics])
        )
        _, kinds, counts = rows.unique(dim=0, return_inverse=True, return_counts=True)
        mine = kinds[: len(self.names)]
        if others is None:
            return int((counts[mine] > 1).sum())
        return int(torch.isin(mine, kinds[len(self.names) :]).sum())

    def picture(self, number: int, size: tuple[int, int]) -> Image.Image | None:
        """The training image of this number at (height, width) pixels; None if it was not kept.

        Raises ValueError for a picture from a damaged file.
        """
        if self.pictures is None:
            return None
        try:
            with Image.open(io.BytesIO(self.pictures[number]), formats=("JPEG",)) as picture:
                if max(picture.size) > _LONGEST_SIDE:
                    raise ValueError(f"it has {picture.width}x{picture.height} pixels")
                return picture.convert("RGB").resize((size[1], size[0]))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"the picture of training image {self.names[number]} is damaged: {error}"
            ) from error

    def only(self, numbers: Sequence[int]) -> Gallery:
        """The gallery of the images with these numbers alone, in their order."""
        pictures = self.pictures
        return Gallery(
            tuple(self.names[i] for i in numbers),
            self.statistics[list(numbers)],
            None if pictures is None else tuple(pictures[i] for i in numbers),
        )

    def with_others(self, other: Gallery) -> Gallery:
        """The images of both galleries, these first; without pictures unless both have them."""
        pictures = None
        if self.pictures is not None and other.pictures is not None:
            # Copied: nobody here would notice that the other's file was changed.
            pictures = self.pictures + tuple(map(bytes, other.pictures))
        return Gallery(
            self.names + other.names, torch.cat([self.statistics, other.statistics]), pictures
        )

    def tensors(self) -> dict[str, Tensor]:
        """As tensors by name, which `from_tensors` reads back."""
        tensors = {"names": _as_bytes(json.dumps(self.names)), "statistics": self.statistics}
        if self.pictures is not None:
            tensors["pictures"] = torch.from_numpy(
                np.frombuffer(b"".join(self.pictures), dtype=np.uint8).copy()
            )
            ends = np.cumsum([0, *map(len, self.pictures)])
            tensors["ends"] = torch.from_numpy(ends.astype(np.int64))
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Gallery:
        """A gallery from its `tensors`. Raises ValueError if they are damaged."""
        try:
            names = json.loads(tensors["names"].numpy().tobytes())
            statistics = tensors["statistics"]
        except (KeyError, ValueError) as error:
            raise ValueError("what is kept of the training images is damaged") from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("the training images' names must be a list of strings")
        if statistics.dtype != torch.float64 or not bool(statistics.isfinite().all()):
            raise ValueError("the training images' statistics are damaged")
        pictures = None
        if "pictures" in tensors:
            joined, offsets = tensors["pictures"], tensors.get("ends", torch.empty(0))
            ends = offsets.flatten().tolist() if offsets.dtype == torch.int64 else []
            fits = ends[:1] == [0] and ends[-1:] == [len(joined)] and ends == sorted(ends)
            if joined.dtype != torch.uint8 or joined.ndim != 1 or not fits:
                raise ValueError("the training images' pictures are damaged")
            whole = joined.numpy().data  # a view of the file's memory, not a copy
            pictures = tuple(whole[a:b] for a, b in pairwise(ends))
        return cls(tuple(names), statistics, pictures)


def _as_jpeg(pixels: Tensor) -> bytes:
    image = Image.fromarray(to_8_bits(pixels).permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=_QUALITY)
    return file.getvalue()


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
