"""From images to the embeddings of all their patches, in bounded memory, and to banks of these."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..encoders.patch_encoder import PatchEncoder, device_of
from ..encoders.precision import computing_in
from ..images.light import normalize
from ..ops.backends import byte_limit
from ..search.bank import NormalBank
from .maps import ScoreResult, search_levels


class NotFiniteError(ValueError):
    """An encoder gave NaN or infinity.

    image: the image's number among those that were encoded. place: its patch, in words.
    """

    def __init__(self, image: int, place: str, name: str | None = None) -> None:
        self.image, self.place = image, place
        called = f"image {image}" if name is None else name
        super().__init__(f"{called}: the encoder gives NaN or infinity at {place}")

    def named(self, names: Sequence[str]) -> NotFiniteError:
        """The same error, with the image's name out of those of all images."""
        return NotFiniteError(self.image, self.place, names[self.image])


_encoding_limit: ContextVar[int | None] = ContextVar("encoding_limit", default=None)
# On a CPU few images at once leave more of a layer's input in the caches: measured, 2 of 256x256
# take three quarters of the time per image that 8 do.
_DEFAULT_LIMITS = {"cpu": 1 << 26, "cuda": 1 << 28}
# Of a tile whose patches are seen with their surroundings: its side as a multiple of these. Half of
# each side is then encoded for nothing, and less would cost more.
_TILE_OF_SURROUNDINGS = 4
_SMALL_IMAGE = 1 << 14  # pixels; larger images have over 20,480 values at every layer, see `_dense`


@contextlib.contextmanager
def use_encoding_limit(num_bytes: int) -> Iterator[None]:
    """Within the context, encoding keeps its scratch memory near `num_bytes`.

    The default is 64 MiB on a CPU (2 images of 256x256 at once) and 256 MiB on a GPU (8 images).
    With less, fewer images are encoded at once and large ones in smaller tiles; on a CPU the
    embeddings stay the same to the bit. A tile holds at least one patch of each level. The returned
    embeddings come on top: 4 D bytes a patch.
    """
    with byte_limit(_encoding_limit, num_bytes):
        yield


@torch.no_grad()
def encode_images(
    encoder: PatchEncoder,
    images: Tensor,
    mean: Tensor,
    levels: Sequence[PatchLevel],
    num_in_mean: int | None = None,
    progress: Callable[[float], None] | None = None,
    precision: str = "float32",
) -> list[Tensor]:
    """Embed every patch of every level: [N, 3, H, W] -> one [N, I, J, D] per level.

    images: uint8, or float32 in 0 to 255, which may have fractions.
    mean: [3, H, W] float32, subtracted from each image. num_in_mean: N, if these images are among
    the N that the mean was taken from, see `images.light.normalize`. progress: called now and then
    with the share done, 0 to 1. precision: of the encoder's convolutions, see `computing_in`; the
    embeddings are float32 in any case.

    Small images go through the encoder several at once and large ones in tiles, so that memory is
    bounded (see `use_encoding_limit`); on a CPU that changes no bit of the embeddings. These lie on
    the encoder's device. Raises ValueError if images and mean differ in size, and NotFiniteError
    for NaN or infinity in an embedding.
    """
    if images.shape[1:] != mean.shape:
        raise ValueError(
            f"images must have shape [N, {', '.join(map(str, mean.shape))}] as in training, "
            f"got {list(images.shape)}"
        )
    device = device_of(encoder)
    mean = mean.to(device)
    height, width = images.shape[-2:]
    shapes = [
        (len(images), *level.grid_shape(height, width), encoder.embedding_dim) for level in levels
    ]
    whole = [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
    at_once = _pixels_at_once(encoder, device, height * width)
    count = max(1, at_once // (height * width))
    with computing_in(precision, device):
        for first in range(0, len(images), count):
            some = slice(first, first + count)
            into = [values[some] for values in whole]
            if height * width > at_once:
                _encode_in_tiles(encoder, images[some], mean, levels, num_in_mean, at_once, into)
            else:
                encoded = _dense(encoder, images[some], mean, levels, num_in_mean)
                for values, found in zip(into, encoded, strict=True):
                    values.copy_(found)
            for level, values in zip(levels, into, strict=True):
                _check_finite(values, level, first)
            if progress is not None:
                progress(min(1.0, (first + count) / len(images)))
    return whole


def _check_finite(embeddings: Tensor, level: PatchLevel, first: int) -> None:
    """Raise NotFiniteError for a bad value in [N, I, J, D]; first: number of the first image."""
    if not bool(embeddings.isfinite().all()):
        bad = ~embeddings.isfinite().all(dim=-1)
        image, row, column = (int(index) for index in bad.nonzero()[0])
        raise NotFiniteError(first + image, f"patch {row}, {column} of {level}")


def _pixels_at_once(encoder: PatchEncoder, device: torch.device, of_image: int) -> int:
    """How many pixels to encode at once, of images with so many pixels each."""
    if encoder.surroundings is None:
        return max(1, of_image)  # it has to see whole images
    limit = _encoding_limit.get()
    at_once = max(1, (limit or _DEFAULT_LIMITS[device.type]) // encoder.scratch_bytes)
    if limit is None:
        at_once = max(at_once, (_TILE_OF_SURROUNDINGS * encoder.surroundings) ** 2)
    return at_once


def _encode_in_tiles(
    encoder: PatchEncoder,
    image: Tensor,
    mean: Tensor,
    levels: Sequence[PatchLevel],
    num_in_mean: int | None,
    at_once: int,
    whole: Sequence[Tensor],
) -> None:
    """Write the embeddings of one image [1, 3, H, W] into `whole`, one [1, I, J, D] per level.

    A tile is for every patch that begins in `step` rows and columns. It holds these patches, and
    around them the pixels that have a part in their embeddings. As `step` is a multiple of all
    strides, each patch is encoded once, from the pixels it has in the whole image.
    at_once: how many pixels a tile should have at most.
    """
    height, width = image.shape[-2:]
    multiple = math.lcm(encoder.tile_step, *(level.stride for level in levels))
    around = -(-(encoder.surroundings or 0) // multiple) * multiple
    smallest, overlap = min(level.size for level in levels), max(level.size for level in levels)
    step = max(1, (math.isqrt(at_once) - overlap - 2 * around) // multiple) * multiple
    for top in range(0, height - smallest + 1, step):
        for left in range(0, width - smallest + 1, step):
            begin = max(0, top - around), max(0, left - around)
            rows = slice(begin[0], top + step + overlap + around)
            columns = slice(begin[1], left + step + overlap + around)
            tile = image[:, :, rows, columns]
            inside = [level for level in levels if level.size <= min(tile.shape[2:])]
            encoded = _dense(encoder, tile, mean[:, rows, columns], inside, num_in_mean)
            for level, found in zip(inside, encoded, strict=True):
                cells = step // level.stride
                target = whole[levels.index(level)]
                i, j = top // level.stride, left // level.stride
                up, aside = ((top - begin[0]) // level.stride, (left - begin[1]) // level.stride)
                target[:, i : i + cells, j : j + cells] = found[
                    :, up : up + cells, aside : aside + cells
                ]


def _dense(
    encoder: PatchEncoder,
    images: Tensor,
    mean: Tensor,
    levels: Sequence[PatchLevel],
    num_in_mean: int | None,
) -> list[Tensor]:
    """Embeddings of images [N, 3, H, W], the same bits whatever else is encoded with them.

    On a CPU, PyTorch uses another library, which sums in another order, for a layer whose input is
    of a single image and has at most 20,480 values. So a small image is encoded as a batch of two.
    """
    count, _, height, width = images.shape
    normalized = normalize(images.to(mean.device), mean, num_in_mean, encoder.pixel_scale)
    if count == 1 and height * width < _SMALL_IMAGE and mean.device.type == "cpu":
        normalized = normalized.repeat(2, 1, 1, 1)
    return [found[:count] for found in encoder.dense(normalized, levels)]


def fill_banks(
    encoder: PatchEncoder,
    images: Tensor,
    mean: Tensor,
    levels: Sequence[PatchLevel],
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[PatchLevel, NormalBank]:
    """A bank per level with all patches of images [N, 3, H, W], as of `encode_images`.

    mean: [3, H, W] float32. seed: of the banks' clustering; search results do not depend on it.
    progress: called now and then with the share of the images that is encoded.
    """
    encoded = encode_images(encoder, images, mean, levels, progress=progress)
    return banks_of(levels, encoded, seed)


def banks_of(
    levels: Sequence[PatchLevel],
    encoded: Sequence[Tensor],
    seed: int = 0,
    coreset: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[PatchLevel, NormalBank]:
    """A bank per level, from one tensor of embeddings [N, I, J, D] each; seed: see `fill_banks`.

    coreset: share of the rows to keep, see `NormalBank.coreset`; None: all. progress: called now
    and then with the share of it that is done.
    """
    if coreset is None:
        pairs = zip(levels, encoded, strict=True)
        return {level: NormalBank(values, seed=seed) for level, values in pairs}
    banks = {}
    for number, (level, values) in enumerate(zip(levels, encoded, strict=True)):

        def report(share: float, number: int = number) -> None:
            if progress is not None:
                progress((number + share) / len(encoded))

        whole = NormalBank(values, clusters=0, keep_codes=False)  # it is never searched
        banks[level] = whole.coreset(float(coreset), seed=seed, keep_codes=True, progress=report)
    return banks


def score_images(
    encoder: PatchEncoder,
    banks: Mapping[PatchLevel, NormalBank],
    images: Tensor,
    mean: Tensor,
    combination: str = "mult",
    progress: Callable[[float], None] | None = None,
) -> ScoreResult:
    """Score images [N, 3, H, W], as of `encode_images`, against a bank per level, to the CPU.

    progress: called now and then with the share of the images that is encoded.
    """
    encoded = encode_images(encoder, images, mean, list(banks), progress=progress)
    return search_levels(banks, encoded, (images.shape[2], images.shape[3]), combination)
