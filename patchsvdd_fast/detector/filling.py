"""The banks of training images, which several processes may embed, and their calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..encoders.patch_encoder import PatchEncoder
from ..files.folders import report_unreadable
from ..images.gallery import Gallery
from ..images.prepare import ImageSet
from ..images.samples import Samples
from ..score.calibration import Calibration, calibrate
from ..search.bank import NormalBank
from ..search.processes import share_of
from ..search.rounds import AnyBank
from ..search.sharded import ShardedBank
from ..training.record import have_collapsed, moments, warn_of_collapse
from ..training.workers import Workers
from . import normality
from .forecast import Progress
from .model_file import Model
from .normality import Normality
from .parameters import Parameters
from .progress_bars import CALIBRATING, ENCODING, FILLING, THRESHOLDS
from .scoring import encode, load


def check_shares(
    sets: Mapping[str, ImageSet], workers: Workers, skip_unreadable: bool = False
) -> None:
    """What `load_image_set` says of all images, here of those that each process has a share of.

    sets: each category's images of this process. Raises ValueError in the first process, ToldError
    in the others, as `load_image_set`; the first one warns of what is left out.
    """
    own = {
        name: (one.left_out, one.names[0], len(one.names), one.pixels.shape[2:])
        for name, one in sets.items()
    }
    told = workers.processes.told(own)
    with workers.together():
        failed: list[str] = []
        for category in sets:
            left_out, names, counts, shapes = zip(*(one[category] for one in told), strict=True)
            begin = f"{category}: " if category else ""
            unreadable = [why for theirs in left_out for why in theirs]
            try:
                report_unreadable(unreadable, sum(counts) + len(unreadable), skip_unreadable)
            except ValueError as error:
                failed.append(f"{begin}{error}")
            for name, (height, width) in zip(names, shapes, strict=True):
                if (height, width) != shapes[0]:
                    failed.append(
                        f"{begin}images must all have one size unless they are resized: {names[0]} "
                        f"has {shapes[0][1]}x{shapes[0][0]} pixels, {name} has {width}x{height}"
                    )
                    break
        if failed:
            raise ValueError("\n".join(failed))


def own_share(images: ImageSet, workers: Workers) -> ImageSet:
    """The images that this process embeds."""
    if workers.count == 1:
        return images
    own = workers.share_of_images(len(images.names))
    return replace(
        images,
        names=images.names[own],
        pixels=images.pixels[own],
        original_sizes=images.original_sizes[own],
    )


def load_share(
    source: Any,
    given: Parameters,
    progress: Callable[[float], None] | None,
    samples: Samples | None,
    skip_unreadable: bool,
    pages: str,
    workers: Workers,
) -> ImageSet:
    """Load the images that this process embeds; what is wrong in one process is so in all."""
    with workers.together():
        how = progress, samples, skip_unreadable, pages, workers.share_of_images
        images = load(source, given, *how)
    check_shares({"": images}, workers, skip_unreadable)
    return images


def load_to_add(
    source: Any,
    model: Model,
    skip_unreadable: bool,
    progress: Callable[[float], None] | None,
    pages: str,
    workers: Workers,
) -> ImageSet:
    """Load images to add to a model. Raises ValueError if they are of another size than its own."""
    how = progress, model.samples, skip_unreadable, pages, workers
    images = load_share(source, model.parameters, *how)
    (height, width), found = model.mean.shape[1:], images.pixels.shape
    if found[2:] != (height, width):
        raise ValueError(
            f"images to add must have {width}x{height} pixels as those in the banks, "
            f"got {found[3]}x{found[2]}"
        )
    return images


class Embedder:
    """Embeds this process's share of images, with a detector's encoder, mean, light and parameters.

    num_in_mean: see `encode`. workers: processes, of which each has some of the images, one after
    another.
    """

    def __init__(
        self,
        given: Parameters,
        encoder: PatchEncoder,
        mean: Tensor,
        light: Tensor,
        images: ImageSet,
        num_in_mean: int | None,
        progress: Callable[[float], None] | None,
        workers: Workers,
    ) -> None:
        self.given, self.images, self.workers = given, images, workers
        self._how = encoder, mean, light, given
        self._num_in_mean, self._progress = num_in_mean, progress
        with workers.together():
            self.gallery = Gallery.of(images, given["keep_images"])

    def __len__(self) -> int:
        return len(self.images.names)

    def some(self, some: slice) -> list[Tensor]:
        """The embeddings of some of this process's images, one [n, I, J, D] per level."""

        def tell(share: float) -> None:
            if self._progress is not None:
                self._progress((some.start + share * (some.stop - some.start)) / len(self))

        pixels, names = self.images.pixels[some], self.images.names[some]
        return encode(*self._how, pixels, self._num_in_mean, tell, names)

    def in_first(self) -> tuple[Gallery, list[Tensor]] | None:
        """In the first process gallery and embeddings of all images; None in the others."""
        with self.workers.together():
            encoded = self.some(slice(0, len(self)))
        encoded = [self.workers.rows_in_first(values) for values in encoded]
        galleries = self.workers.in_first(self.gallery)
        return (Gallery.joined(galleries), encoded) if self.workers.is_first else None


def filled(
    given: Parameters,
    encoder: PatchEncoder,
    mean: Tensor,
    light: Tensor,
    images: ImageSet,
    num_in_mean: int | None = None,
    progress: Progress | None = None,
    category: str = "",
    workers: Workers | None = None,
    shard_bytes: int | None = None,
) -> tuple[Normality, Calibration | None] | None:
    """New banks and a gallery of these images, and their calibration; arguments as of `Embedder`.

    category: of these images, for warnings. shard_bytes: as of `PatchSVDD.fit`.

    Returns None in all but the first process, unless banks are in shards.
    """
    progress, workers = progress or Progress(), workers or Workers()
    shape = mean.shape[1], mean.shape[2]
    how = given, encoder, mean, light, images, num_in_mean, progress.phase(ENCODING), workers
    embedder = Embedder(*how)
    if shard_bytes is not None:
        banks, collapsed = _sharded_banks(embedder, shape, shard_bytes)
        for level in collapsed:
            warn_of_collapse(f"at {level}")
        gallery = Gallery.joined(workers.processes.told(embedder.gallery))
        normal = Normality(banks, gallery)
        return normal, calibrated(given, encoder, normal, shape, progress, None, category)
    embedded = embedder.in_first()
    if embedded is None:
        return None
    gallery, encoded = embedded
    filling = progress.phase(FILLING)
    normal = normality.normality_of(
        given["levels"], gallery, encoded, given["seed"], given["coreset"], filling
    )
    if filling is not None:
        filling(1.0)
    return normal, calibrated(given, encoder, normal, shape, progress, encoded, category)


def calibrated(
    given: Parameters,
    encoder: PatchEncoder,
    normal: Normality,
    image_shape: tuple[int, int],
    progress: Progress | None = None,
    embeddings: Sequence[Tensor] | None = None,
    category: str = "",
) -> Calibration | None:
    """The calibration of banks; warns of training images that are there twice.

    embeddings: of all their patches, see `calibrate`; None: the banks hold them.
    category: of these images, for the warning.
    """
    progress = progress or Progress()
    calibrating = progress.phase(CALIBRATING)
    calibration = calibrate(
        normal.banks,
        image_shape,
        given["combination"],
        calibrating,
        encoder.surroundings != 0,
        embeddings,
        given["reweight"],
        lambda: progress.phase(THRESHOLDS),
    )
    normality.warn_of_twins(normal.gallery, calibration, category)
    return calibration


def _sharded_banks(
    embedder: Embedder, shape: tuple[int, int], shard_bytes: int
) -> tuple[dict[PatchLevel, AnyBank], list[str]]:
    """A bank per level of the images of all processes; and the levels that have collapsed.

    shape: (height, width) of images. shard_bytes: of the embeddings in a part, at most, but for
    those of one image.
    """
    given, workers, num_images = embedder.given, embedder.workers, len(embedder)
    levels = given["levels"]
    patches = sum(math.prod(level.grid_shape(*shape)) for level in levels)
    at_once = max(1, shard_bytes // (4 * patches * given["embedding_dim"]))
    counts = workers.processes.told(num_images)
    begin = sum(counts[: workers.rank])
    parts: dict[PatchLevel, list[NormalBank]] = {level: [] for level in levels}
    spreads = torch.zeros(len(levels), 3, given["embedding_dim"], dtype=torch.float64)
    with workers.together():
        for some in _slices(num_images, at_once):
            groups = torch.arange(begin + some.start, begin + some.stop)
            for number, (level, values) in enumerate(zip(levels, embedder.some(some), strict=True)):
                own = groups.to(values.device)
                parts[level].append(NormalBank(values, groups=own, seed=given["seed"]))
                spreads[number] += moments(values)
    of_all = torch.stack(workers.processes.told(spreads)).sum(dim=0)
    collapsed = [
        str(level) for level, one in zip(levels, of_all, strict=True) if have_collapsed(one)
    ]
    return {level: ShardedBank.of(parts[level]) for level in levels}, collapsed


def _slices(count: int, at_once: int) -> Iterator[slice]:
    """Cuts so many things into as few slices of at most `at_once` as there must be, all alike."""
    pieces = -(-count // at_once)
    for number in range(pieces):
        yield share_of(count, number, pieces)
