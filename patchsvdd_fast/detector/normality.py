"""Changing what a fitted detector holds to be normal: more images, fewer, or another's as well.

Each function leaves the detector as it is, and gives the banks and the gallery it is to have.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..encoders.levels import PatchLevel
from ..images.gallery import Gallery
from ..images.prepare import parse_size
from ..search.bank import NormalBank

if TYPE_CHECKING:
    from .patch_svdd import PatchSVDD

Normality = tuple[dict[PatchLevel, NormalBank], Gallery | None]


def with_images(detector: PatchSVDD, source: Any) -> Normality:
    """The detector's training images and those of `source`, in what `PatchSVDD.fit` takes."""
    images = detector.load_images(source)
    height, width = detector.image_shape()
    if images.pixels.shape[2:] != (height, width):
        raise ValueError(
            f"images to add must have {width}x{height} pixels as those in the banks, "
            f"got {images.pixels.shape[3]}x{images.pixels.shape[2]}"
        )
    banks = _copies(detector)
    for bank, embeddings in zip(banks.values(), detector.encode(images.pixels), strict=True):
        bank.add(embeddings)
    gallery = detector.gallery_
    if gallery is not None:
        gallery = gallery.with_others(Gallery.of(images, detector.keep_images))
    return banks, gallery


def without_images(detector: PatchSVDD, images: Sequence[str | Path | int]) -> Normality:
    """The detector's training images but for these, given by name or number."""
    if isinstance(images, str | Path):
        raise TypeError(f"images must be a list of names and numbers, got {images!r}")
    gone = {_number_of(detector, image) for image in images}
    banks = _copies(detector)
    for bank in banks.values():
        bank.remove(bank.groups[sorted(gone)])
    gallery = detector.gallery_
    if gallery is not None:
        gallery = gallery.only([i for i in range(len(gallery.names)) if i not in gone])
    return banks, gallery


def merged(detector: PatchSVDD, other: PatchSVDD) -> Normality:
    """The training images of both. Raises ValueError unless they embed a patch alike."""
    differing = _differences(detector, other)
    if differing:
        raise ValueError(
            "detectors can be merged only if they embed alike, but these differ in "
            f"{', '.join(differing)}; refit (patchsvdd update --replace) makes one that can be"
        )
    banks = _copies(detector)
    for level, bank in banks.items():
        theirs = other.banks_[level].to(bank.device)
        first = int(bank.groups.max()) + 1
        bank.merge(theirs, torch.arange(len(theirs.groups), device=bank.device) + first)
    gallery = None
    if detector.gallery_ is not None and other.gallery_ is not None:
        gallery = detector.gallery_.with_others(other.gallery_)
    return banks, gallery


def _copies(detector: PatchSVDD) -> dict[PatchLevel, NormalBank]:
    """Banks to change without changing the detector's; they share their rows till then."""
    return {level: copy.copy(bank) for level, bank in detector.banks_.items()}


def _number_of(detector: PatchSVDD, image: str | Path | int) -> int:
    if not isinstance(image, str | Path):
        number = operator.index(image)
        if not 0 <= number < detector.num_images:
            raise ValueError(
                f"training images have the numbers 0 to {detector.num_images - 1}, got {number}"
            )
        return number
    if detector.gallery_ is None:
        raise ValueError(
            f"the names of the training images are not known, so {str(image)!r} cannot be found: "
            "give a number"
        )
    names = detector.gallery_.names
    found = [i for i, name in enumerate(names) if name == str(image)]
    found = found or [i for i, name in enumerate(names) if Path(name).name == str(image)]
    if not found:
        raise ValueError(f"no training image is named {str(image)!r}")
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} training images are named {str(image)!r}: give one of the numbers "
            f"{', '.join(map(str, found))}"
        )
    return found[0]


def _differences(one: PatchSVDD, other: PatchSVDD) -> list[str]:
    """In what two detectors differ that decides how a patch is embedded."""
    differing = []
    if parse_size(one.image_size) != parse_size(other.image_size):
        differing.append("image_size")
    if tuple(one.levels) != tuple(other.levels) or one.embedding_dim != other.embedding_dim:
        differing.append("levels or embedding_dim")
    else:
        mine, theirs = one.encoder_.state_dict(), other.encoder_.state_dict()
        if not all(torch.equal(mine[name].cpu(), theirs[name].cpu()) for name in mine):
            differing.append("encoder")
    if not torch.equal(one.mean_, other.mean_):
        differing.append("mean")
    if one.usual_light() is None or other.usual_light() is None:
        same_light = one.usual_light() is other.usual_light()
    else:
        same_light = torch.equal(one.light_, other.light_)
    return differing if same_light else [*differing, "light"]
