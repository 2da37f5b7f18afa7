"""Patches and maps as torch ops: extract_patches, score_map, crop_pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native, backends
from .backends import define_op
from .checks import (
    FloatArray,
    as_tensor,
    check_dtype,
    check_indices,
    check_pairs,
    check_same_device,
    check_shape,
    grid_shape,
    like_input,
)
from .pair_protocol import COLOUR_SHIFT, MAX_REDRAWS, PIXEL_NOISE, Draw, PairKind

_PIXEL_TYPES = {
    torch.uint8: _native.PixelType.UINT8,
    torch.float16: _native.PixelType.FLOAT16,
    torch.float32: _native.PixelType.FLOAT32,
}
_COPY_DTYPES = (*_PIXEL_TYPES, torch.bfloat16, torch.float64)


# --- extract_patches ------------------------------------------------------------------------------


def _native_grid(
    images: int, channels: int, pixels: tuple[int, int], cells: tuple[int, int], *patch: int
) -> _native.PatchGrid:
    return _native.PatchGrid(images, channels, *pixels, *cells, *patch)


def _check_extract_patches(images: Tensor, mean: Tensor | None) -> None:
    check_shape("images", images, "N, C, H, W")
    if mean is None:
        check_dtype("images", images, *_COPY_DTYPES)
        return
    check_dtype("images", images, *_PIXEL_TYPES)
    check_dtype("mean", mean, torch.float32)
    check_same_device("mean", mean, "images", images)
    if mean.shape != images.shape[1:]:
        raise ValueError(
            f"mean must have shape {list(images.shape[1:])} to match the images, "
            f"got {list(mean.shape)}"
        )


def _extract_patches_fake(
    images: Tensor, size: int, stride: int, mean: Tensor | None = None
) -> Tensor:
    _check_extract_patches(images, mean)
    rows, columns = grid_shape(size, stride, *images.shape[-2:])
    shape = (images.shape[0], rows, columns, images.shape[1], size, size)
    return images.new_empty(shape, dtype=images.dtype if mean is None else torch.float32)


def _extract_patches(images: Tensor, size: int, stride: int, mean: Tensor | None = None) -> Tensor:
    patches = _extract_patches_fake(images, size, stride, mean)
    images = images.contiguous()
    mean = None if mean is None else mean.contiguous()
    count, channels, height, width = images.shape
    cells = grid_shape(size, stride, height, width)
    with backends.backend_of(images) as (backend, context):
        backend.extract_patches(
            grid=_native_grid(count, channels, (height, width), cells, size, stride),
            images=images.data_ptr(),
            mean=0 if mean is None else mean.data_ptr(),
            patches=patches.data_ptr(),
            element_size=images.element_size(),
            pixel_type=_PIXEL_TYPES.get(images.dtype, _native.PixelType.FLOAT32),
            context=context,
        )
    return patches


def _extract_patches_backward_fake(
    patch_gradients: Tensor, stride: int, height: int, width: int
) -> Tensor:
    check_shape("patch_gradients", patch_gradients, "N, I, J, C, K, K")
    check_dtype("patch_gradients", patch_gradients, torch.float32, torch.float64)
    count, channels = patch_gradients.shape[0], patch_gradients.shape[3]
    return patch_gradients.new_empty(count, channels, height, width)


def _extract_patches_backward(
    patch_gradients: Tensor, stride: int, height: int, width: int
) -> Tensor:
    image_gradients = _extract_patches_backward_fake(patch_gradients, stride, height, width)
    patch_gradients = patch_gradients.contiguous()
    count, rows, columns, channels, size, _ = patch_gradients.shape
    with backends.backend_of(patch_gradients) as (backend, context):
        backend.extract_patches_backward(
            grid=_native_grid(count, channels, (height, width), (rows, columns), size, stride),
            patch_gradients=patch_gradients.data_ptr(),
            image_gradients=image_gradients.data_ptr(),
            is_double=patch_gradients.dtype == torch.float64,
            context=context,
        )
    return image_gradients


def _extract_patches_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, _, stride, mean = inputs
    ctx.stride = stride
    ctx.pixels = images.shape[-2:]
    ctx.dtype = images.dtype
    ctx.normalized = mean is not None


def _extract_patches_autograd(ctx: Any, patch_gradients: Tensor) -> tuple[Tensor | None, ...]:
    if patch_gradients.dtype not in (torch.float32, torch.float64):
        patch_gradients = patch_gradients.float()  # halves are summed in float32
    gradients = torch.ops.patchsvdd_fast.extract_patches_backward(
        patch_gradients, ctx.stride, *ctx.pixels
    )
    mean_gradients = None
    if ctx.normalized:
        gradients = gradients / 255
        mean_gradients = -gradients.sum(dim=0)
    image_gradients = gradients.to(ctx.dtype) if ctx.dtype.is_floating_point else None
    return image_gradients, None, None, mean_gradients


define_op(
    "extract_patches(Tensor images, int size, int stride, Tensor? mean=None) -> Tensor",
    _extract_patches,
    _extract_patches_fake,
)
define_op(
    "extract_patches_backward(Tensor patch_gradients, int stride, int height, int width) -> Tensor",
    _extract_patches_backward,
    _extract_patches_backward_fake,
)
torch.library.register_autograd(
    "patchsvdd_fast::extract_patches",
    _extract_patches_autograd,
    setup_context=_extract_patches_setup,
    lib=backends.library,
)


def extract_patches(images: Tensor, size: int, stride: int, mean: Tensor | None = None) -> Tensor:
    """Cut every patch of a regular grid out of each image.

    images: [N, C, H, W], uint8, float16 or float32 (bfloat16, float64 too without `mean`).
    size, stride: side K of a patch and distance between patches, pixels, 1 <= stride <= size.
    mean: [C, H, W] float32; if given, the patches hold `(pixel - mean) / 255` in float32.

    Returns [N, I, J, C, K, K], I = (H - K) // stride + 1 and J = (W - K) // stride + 1.
    Differentiable with respect to images and mean. Raises ValueError for a wrong shape, TypeError
    for a wrong dtype.
    """
    patches: Tensor = torch.ops.patchsvdd_fast.extract_patches(images, size, stride, mean)
    return patches


# --- score_map ------------------------------------------------------------------------------------


def _score_map_fake(distances: Tensor, size: int, stride: int, height: int, width: int) -> Tensor:
    check_shape("distances", distances, "N, I, J")
    check_dtype("distances", distances, torch.float32)
    expected = grid_shape(size, stride, height, width)
    if tuple(distances.shape[1:]) != expected:
        raise ValueError(
            f"distances must have shape [N, {expected[0]}, {expected[1]}] for patches of {size} "
            f"pixels at stride {stride} over {height}x{width} pixels, got {list(distances.shape)}"
        )
    return distances.new_empty(distances.shape[0], height, width)


def _score_map(distances: Tensor, size: int, stride: int, height: int, width: int) -> Tensor:
    maps = _score_map_fake(distances, size, stride, height, width)
    distances = distances.contiguous()
    count, rows, columns = distances.shape
    row_sums = distances.new_empty(count, rows, width, dtype=torch.float64)
    with backends.backend_of(distances) as (backend, context):
        backend.score_map(
            grid=_native_grid(count, 1, (height, width), (rows, columns), size, stride),
            distances=distances.data_ptr(),
            row_sums=row_sums.data_ptr(),
            maps=maps.data_ptr(),
            context=context,
        )
    return maps


define_op(
    "score_map(Tensor distances, int size, int stride, int height, int width) -> Tensor",
    _score_map,
    _score_map_fake,
)


def score_map(
    distances: Tensor | FloatArray, size: int, stride: int, height: int, width: int
) -> Tensor:
    """Anomaly maps of images: each pixel's value is the mean distance of the patches covering it.

    distances: [N, I, J] float32, the distance of each patch of each image to its nearest bank row;
        a tensor, a NumPy array, or an array of another library with DLPack (CuPy).
    size, stride: side of a patch and distance between neighbouring patches, pixels.
    height, width: of the images, pixels.

    Returns [N, height, width] float32, a NumPy array if `distances` is one, else a tensor. Sums are
    taken in float64. Pixels of a margin that no patch covers repeat the nearest covered pixel.
    Raises ValueError for a wrong shape, TypeError for a wrong dtype. Yi & Yoon (2020), section 3.4.
    """
    maps: Tensor = torch.ops.patchsvdd_fast.score_map(
        as_tensor("distances", distances), size, stride, height, width
    )
    return like_input(distances, maps)[0]


# --- crop_pairs -----------------------------------------------------------------------------------


def _crop_pairs_fake(
    images: Tensor, mean: Tensor, image_of: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    draw = Draw(*options)
    _check_extract_patches(images, mean)
    check_dtype("images", images, torch.uint8)
    check_pairs(images, image_of, draw)
    pairs, channels = image_of.shape[0], images.shape[1]
    return (
        mean.new_empty(2, pairs, channels, draw.size, draw.size),
        image_of.new_empty(2, pairs, 2),
        image_of.new_empty(pairs),
    )


def _crop_pairs(
    images: Tensor, mean: Tensor, image_of: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    draw = Draw(*options)
    patches, corners, labels = _crop_pairs_fake(images, mean, image_of, *draw)
    count, channels, height, width = images.shape
    if image_of.device.type == "cpu":  # on a GPU, reading the answer would wait for it
        check_indices("image_of", image_of, count)
    images, mean, image_of = images.contiguous(), mean.contiguous(), image_of.contiguous()
    with backends.backend_of(images) as (backend, context):
        backend.crop_pairs(
            images=count,
            channels=channels,
            height=height,
            width=width,
            pairs=image_of.shape[0],
            size=draw.size,
            kind=getattr(_native.PairKind, draw.kind.upper()),
            first_pair=draw.first_pair,
            max_redraws=MAX_REDRAWS if draw.redraw_clipped else 0,
            seed=draw.seed % 2**64,
            step=draw.step,
            colour_shift=COLOUR_SHIFT,
            pixel_noise=PIXEL_NOISE,
            pixels=images.data_ptr(),
            mean=mean.data_ptr(),
            image_of=image_of.data_ptr(),
            patches=patches.data_ptr(),
            corners=corners.data_ptr(),
            labels=labels.data_ptr(),
            context=context,
        )
    return patches, corners, labels


define_op(
    "crop_pairs(Tensor images, Tensor mean, Tensor image_of, int size, str kind, int seed, "
    "int step, bool redraw_clipped=False, int first_pair=0) -> (Tensor, Tensor, Tensor)",
    _crop_pairs,
    _crop_pairs_fake,
)


def crop_pairs(
    images: Tensor,
    mean: Tensor,
    image_of: Tensor,
    size: int,
    kind: PairKind,
    seed: int,
    step: int,
    redraw_clipped: bool = False,
    first_pair: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw random pairs of patches to train on; `ops.pair_protocol` describes the kinds of pairs.

    images: [N, C, H, W] uint8, N >= 1.
    mean: [C, H, W] float32.
    image_of: [B] int64, the number of the image that each pair is cut from; images, mean and
        image_of are on one device.
    size: K, side of a patch in pixels; at least 4 for position, 32 for neighbour, 1 for view pairs.
    kind: "position", "neighbour" or "view".
    seed, step: 64 bits, and 0 .. 2^32 - 1; together they choose the random numbers.
    redraw_clipped: draw position pairs that leave the image again, up to `MAX_REDRAWS` times.
    first_pair: number of the first pair in the whole batch, so that a batch split over processes
        has the same pairs; first_pair + B < 2^32.

    Returns the pairs' first and second patches [2, B, C, K, K] float32, `(pixel - mean) / 255` with
    the protocol's colour shifts and noise; their corners [2, B, 2] int64 (top and left, pixels);
    and labels [B] int64: for position pairs the direction before clipping, as an index into
    `DIRECTIONS`, else 0. Not differentiable.

    A pair depends only on its image, the seed, the step, its number in the whole batch, the size,
    the kind and `redraw_clipped`, and is the same to the bit on every backend. Raises ValueError
    for wrong shapes and values, TypeError for a wrong dtype. An image number out of range is an
    error on the CPU; on a GPU the nearest valid number is used. Yi & Yoon (2020), sections 3.1 and
    3.2; view pairs are not in the paper.
    """
    signed = seed - 2**64 if seed >= 2**63 else seed  # torch ops take signed 64-bit integers
    patches, corners, labels = torch.ops.patchsvdd_fast.crop_pairs(
        images, mean, image_of, size, kind, signed, step, redraw_clipped, first_pair
    )
    return patches, corners, labels
