"""The banks of training images, which several processes may embed, and their calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..encoders.patch_encoder import PatchEncoder
from ..files.folders import report_unreadable
from ..images.gallery import Gallery
from ..images.prepare import ImageSet
from ..score.calibration import Calibration, calibrate
from ..search.bank import NormalBank
from ..search.rounds import AnyBank
from ..search.sharded import ShardedBank
from ..training.record import have_collapsed, moments, warn_of_collapse
from ..training.workers import Workers
from . import normality
from .forecast import Progress
from .normality import Normality
from .parameters import Parameters
from .progress_bars import CALIBRATING, ENCODING, FILLING, THRESHOLDS
from .scoring import encode


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
    """New banks and a gallery of these images, and their calibration; arguments as of `encode`.

    category: of these images, for warnings. workers: processes, of which each has some of the
    images, one after another. shard_bytes: as of `PatchSVDD.fit`.

    Returns None in all but the first process, unless banks are in shards.
    """
    progress, workers = progress or Progress(), workers or Workers()
    shape = mean.shape[1], mean.shape[2]
    encoding = progress.phase(ENCODING)
    with workers.together():
        gallery = Gallery.of(images, given["keep_images"])

    def encoded_of(some: slice) -> list[Tensor]:
        def tell(share: float) -> None:
            if encoding is not None:
                here = some.start + share * (some.stop - some.start)
                encoding(here / len(images.names))

        pixels, names = images.pixels[some], images.names[some]
        return encode(encoder, mean, light, given, pixels, num_in_mean, tell, names)

    if shard_bytes is not None:
        banks, collapsed = _sharded_banks(
            *(given, shape, len(images.names), encoded_of, shard_bytes, workers)
        )
        for level in collapsed:
            warn_of_collapse(f"at {level}")
        normal = Normality(banks, Gallery.joined(workers.processes.told(gallery)))
        how = given, encoder, normal, shape, progress, None, category
        return normal, calibrated(*how)
    with workers.together():
        encoded = encoded_of(slice(0, len(images.names)))
    encoded = [workers.rows_in_first(values) for values in encoded]
    gallery = Gallery.joined(workers.in_first(gallery))
    if not workers.is_first:
        return None
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
    given: Parameters,
    shape: tuple[int, int],
    num_images: int,
    encode: Callable[[slice], Sequence[Tensor]],
    shard_bytes: int,
    workers: Workers,
) -> tuple[dict[PatchLevel, AnyBank], list[str]]:
    """A bank per level of the images of all processes; and the levels that have collapsed.

    given: resolved parameters. shape: (height, width) of images. num_images: of this process, in
    the order of ranks. encode: gives the embeddings of some, one [n, I, J, D] float32 per level.
    shard_bytes: of the embeddings in a part, at most, but for those of one image.
    """
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
            for number, (level, values) in enumerate(zip(levels, encode(some), strict=True)):
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
        yield slice(count * number // pieces, count * (number + 1) // pieces)
