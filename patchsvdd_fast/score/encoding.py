"""From images to the embeddings of all their patches, in bounded memory, and to banks of these."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..encoders.patch_svdd import HierarchicalEncoder
from ..encoders.precision import computing_in
from ..images.light import normalize
from ..ops.backends import byte_limit
from ..search.bank import NormalBank
from .maps import ScoreResult, search_levels

_encoding_limit: ContextVar[int | None] = ContextVar("encoding_limit", default=None)
# On a CPU few images at once leave more of a layer's input in the caches: measured, 2 of 256x256
# take three quarters of the time per image that 8 do.
_DEFAULT_LIMITS = {"cpu": 1 << 26, "cuda": 1 << 28}
_BYTES_PER_PIXEL = 512  # of scratch; measured: 450 to 600, whatever the levels
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
    encoder: HierarchicalEncoder,
    images: Tensor,
    mean: Tensor,
    levels: Sequence[PatchLevel],
    num_in_mean: int | None = None,
) -> list[Tensor]:
    """Embed every patch of every level: uint8 [N, 3, H, W] -> one [N, I, J, D] per level.

    mean: [3, H, W] float32, subtracted from each image. num_in_mean: N, if these images are among
    the N that the mean was taken from, see `images.light.normalize`.

    Small images go through the encoder several at once and large ones in tiles, so that memory is
    bounded (see `use_encoding_limit`); on a CPU that changes no bit of the embeddings. These lie on
    the encoder's device. Raises ValueError if images and mean differ in size.
    """
    if images.shape[1:] != mean.shape:
        raise ValueError(
            f"images must have shape [N, {', '.join(map(str, mean.shape))}] as in training, "
            f"got {list(images.shape)}"
        )
    device = next(encoder.parameters()).device
    mean = mean.to(device)
    dense = partial(_dense, encoder, num_in_mean)
    height, width = images.shape[-2:]
    shapes = [
        (len(images), *level.grid_shape(height, width), encoder.embedding_dim) for level in levels
    ]
    whole = [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
    limit = _encoding_limit.get() or _DEFAULT_LIMITS[device.type]
    at_once = max(1, limit // _BYTES_PER_PIXEL)
    with computing_in("float32", device):
        if height * width > at_once:
            for number in range(len(images)):
                one = slice(number, number + 1)
                _encode_in_tiles(
                    dense, images[one], mean, levels, at_once, [values[one] for values in whole]
                )
        else:
            count = at_once // (height * width)
            for first in range(0, len(images), count):
                some = slice(first, first + count)
                encoded = dense(images[some], mean, levels)
                for values, found in zip(whole, encoded, strict=True):
                    values[some] = found
    return whole


def _encode_in_tiles(
    dense: Callable[[Tensor, Tensor, Sequence[PatchLevel]], list[Tensor]],
    image: Tensor,
    mean: Tensor,
    levels: Sequence[PatchLevel],
    at_once: int,
    whole: Sequence[Tensor],
) -> None:
    """Write the embeddings of one image [1, 3, H, W] into `whole`, one [1, I, J, D] per level.

    A tile holds every patch that begins in its first `step` rows and columns. As `step` is a
    multiple of all strides, each patch is encoded once, from the pixels it has in the whole image.
    at_once: how many pixels a tile should have at most.
    """
    height, width = image.shape[-2:]
    strides = math.lcm(*(level.stride for level in levels))
    smallest, overlap = min(level.size for level in levels), max(level.size for level in levels)
    step = max(1, (math.isqrt(at_once) - overlap) // strides) * strides
    for top in range(0, height - smallest + 1, step):
        for left in range(0, width - smallest + 1, step):
            rows, columns = slice(top, top + step + overlap), slice(left, left + step + overlap)
            tile = image[:, :, rows, columns]
            inside = [level for level in levels if level.size <= min(tile.shape[2:])]
            encoded = dense(tile, mean[:, rows, columns], inside)
            for level, found in zip(inside, encoded, strict=True):
                cells = step // level.stride
                target = whole[levels.index(level)]
                i, j = top // level.stride, left // level.stride
                target[:, i : i + cells, j : j + cells] = found[:, :cells, :cells]


def _dense(
    encoder: HierarchicalEncoder,
    num_in_mean: int | None,
    images: Tensor,
    mean: Tensor,
    levels: Sequence[PatchLevel],
) -> list[Tensor]:
    """Embeddings of uint8 images [N, 3, H, W], the same bits whatever else is encoded with them.

    On a CPU, PyTorch uses another library, which sums in another order, for a layer whose input is
    of a single image and has at most 20,480 values. So a small image is encoded as a batch of two.
    """
    count, _, height, width = images.shape
    normalized = normalize(images.to(mean.device), mean, num_in_mean)
    if count == 1 and height * width < _SMALL_IMAGE and mean.device.type == "cpu":
        normalized = normalized.repeat(2, 1, 1, 1)
    return [found[:count] for found in encoder.dense(normalized, levels)]


def fill_banks(
    encoder: HierarchicalEncoder,
    images: Tensor,
    mean: Tensor,
    levels: Sequence[PatchLevel],
    seed: int = 0,
) -> dict[PatchLevel, NormalBank]:
    """A bank per level with all patches of uint8 images [N, 3, H, W]; mean: [3, H, W] float32.

    seed: of the banks' clustering; search results do not depend on it.
    """
    return banks_of(levels, encode_images(encoder, images, mean, levels), seed)


def banks_of(
    levels: Sequence[PatchLevel], encoded: Sequence[Tensor], seed: int = 0
) -> dict[PatchLevel, NormalBank]:
    """A bank per level, from one tensor of embeddings [N, I, J, D] each; seed: see `fill_banks`."""
    return {
        level: NormalBank(values, seed=seed) for level, values in zip(levels, encoded, strict=True)
    }


def score_images(
    encoder: HierarchicalEncoder,
    banks: Mapping[PatchLevel, NormalBank],
    images: Tensor,
    mean: Tensor,
    combination: str = "mult",
) -> ScoreResult:
    """Score uint8 images [N, 3, H, W] against a bank per level; results lie on the CPU."""
    encoded = encode_images(encoder, images, mean, list(banks))
    return search_levels(banks, encoded, (images.shape[2], images.shape[3]), combination)
