"""Run exported ONNX models in onnxruntime, and compare them with the library."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..encoders.patch_encoder import PatchEncoder
from ..images.gallery import evenly_spread
from ..images.light import match_illumination
from ..score.encoding import encode_images
from ..search.bank import NormalBank
from . import scoring
from .patch_svdd import PatchSVDD

TOLERANCE = 10
"""How far onnxruntime's embeddings may be from PyTorch's, in multiples of PyTorch's own rounding.

That rounding is the distance of PyTorch's embeddings from those in float64. Measured: about once.
No absolute bound suits both encoders whose embeddings differ by 1e-6 and those with 0.1.
"""

SEARCH_TOLERANCE = 1e-3
"""How far a model's image scores may be from the library's for the same embeddings, relative.

It is not asked of rows in float16. Measured: see docs/export.md.
"""

_MOST_PICTURES = 3  # of training images, that a whole detector is checked with
_LEAST_ROUNDING = 2.0**-24  # float32's step just below 1, for where PyTorch happens to be exact


def random_images(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """A uint8 tensor of each shape, always the same."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, s, generator=generator, dtype=torch.uint8) for s in shapes]


def outputs_of(model: bytes, batches: Sequence[Tensor]) -> list[list[Tensor]] | None:
    """The model's outputs for each batch of images in onnxruntime; None, with a warning, if it is
    not installed. Raises RuntimeError if onnxruntime cannot run it."""
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        warnings.warn(
            "the ONNX model is not checked against PyTorch, since onnxruntime is not installed: "
            "pip install onnxruntime",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    try:
        runtime = InferenceSession(model, providers=["CPUExecutionProvider"])
        return [
            [torch.from_numpy(output) for output in runtime.run(None, {"images": images.numpy()})]
            for images in batches
        ]
    except Exception as error:  # onnxruntime's have no common class
        raise RuntimeError(f"onnxruntime cannot run the model: {error}") from error


def check_embeddings(
    found: Sequence[Sequence[Tensor]],
    encoder: PatchEncoder,
    batches: Sequence[Tensor],
    mean: Tensor,
    levels: Sequence[PatchLevel],
) -> float:
    """The largest difference between a coordinate of embeddings and PyTorch's.

    found: [N, I, J, D] of each batch and level. batches: uint8 [N, 3, H, W], their light matched.
    mean: [3, H, W] or [3, 1, 1] float32. Raises RuntimeError if it is more than `TOLERANCE` allows.
    """
    embeddings = _encoded(encoder, batches, mean, levels)
    exact = _encoded(copy.deepcopy(encoder).double(), batches, mean.double(), levels)
    difference = _largest_difference([e for batch in found for e in batch], embeddings)
    rounding = max(_largest_difference(embeddings, exact), _LEAST_ROUNDING)
    if not difference <= TOLERANCE * rounding:
        raise RuntimeError(
            f"embeddings of onnxruntime must be within {TOLERANCE * rounding:.2g} of PyTorch's "
            f"({TOLERANCE} times its rounding), got {difference:.2g}: no model was written"
        )
    return difference


def _encoded(
    encoder: PatchEncoder, batches: Sequence[Tensor], mean: Tensor, levels: Sequence[PatchLevel]
) -> list[Tensor]:
    """PyTorch's embeddings [N, I, J, D] of each batch and level."""
    return [
        embeddings.cpu()
        for images in batches
        for embeddings in encode_images(encoder, images, mean.expand(images.shape[1:]), levels)
    ]


def _largest_difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    pairs = zip(some, others, strict=True)
    return float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())  # NaN if any is


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest |found - expected| / expected, of values that are not negative."""
    difference = (found - expected).abs().double()
    relative = difference / expected.double()
    return float(relative.where(difference != 0, difference).max())  # 0 / 0 is no difference


def check_scores(
    detector: PatchSVDD,
    model: bytes,
    num_outputs: int,
    banks: Mapping[PatchLevel, NormalBank],
    storage: str,
) -> float | None:
    """The largest relative difference of image scores, in onnxruntime and here; None: not checked.

    model: of a whole detector, whose outputs are `num_outputs`, the first of them the image scores,
        and then the embeddings of each level in use.
    banks: of the levels in use. storage: of their rows in the model.

    Raises RuntimeError if embeddings differ by more than `TOLERANCE` allows, or scores of the same
    embeddings by more than `SEARCH_TOLERANCE`.
    """
    images = _pictures(detector)
    found = outputs_of(model, [images])
    if found is None:
        return None
    ours, embeddings = found[0][0], found[0][num_outputs:]
    matched = match_illumination(images, detector.usual_light())
    check_embeddings([embeddings], detector.encoder_, [matched], detector.mean_, list(banks))
    shape = detector.image_shape()
    embeddings = [e.to(b.device) for e, b in zip(embeddings, banks.values(), strict=True)]
    of_same = scoring.score_encoded(detector.model(), embeddings, shape, banks).image_scores
    difference = relative_difference(ours, of_same)
    if storage == "float32" and not difference <= SEARCH_TOLERANCE:
        raise RuntimeError(
            f"image scores of onnxruntime must be within {SEARCH_TOLERANCE:.0e} of the library's "
            f"for the same embeddings, got {difference:.1e}: no model was written"
        )
    expected = detector.score_encoded(detector.encode(images), shape).image_scores
    return relative_difference(ours, expected)


def _pictures(detector: PatchSVDD) -> Tensor:
    """Some training images as they are scored, uint8 [N, 3, H, W]; random ones if none are kept."""
    height, width = detector.image_shape()
    gallery = detector.gallery_
    if gallery is None or gallery.pictures is None:
        return random_images([(2, 3, height, width)])[0]
    count = len(gallery.names)
    chosen = [
        gallery.picture(int(number), (height, width))
        for number in evenly_spread(count, min(count, _MOST_PICTURES))
    ]
    return (
        torch.from_numpy(np.stack([np.asarray(picture) for picture in chosen]))
        .permute(0, 3, 1, 2)
        .contiguous()
    )
