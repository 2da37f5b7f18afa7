"""The training images that a detector takes as normal: add, remove and merge them.

No function changes what it is given: each returns new banks and a new gallery.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..images.gallery import Gallery
from ..score.calibration import Calibration
from ..score.encoding import banks_of
from ..search.bank import NormalBank
from ..search.rounds import AnyBank
from ..training.record import is_collapsed, warn_of_collapse


class Normality(NamedTuple):
    """The training images as a detector keeps them."""

    banks: dict[PatchLevel, AnyBank]
    """Per level: the embeddings of all patches of the images; each image is a group of its own."""
    gallery: Gallery | None
    """Their names, figures and pictures; None if not known, as in files of schema 2 and 3."""

    @property
    def num_images(self) -> int:
        """How many training images there are."""
        return len(next(iter(self.banks.values())).groups)


def normality_of(
    levels: Sequence[PatchLevel],
    gallery: Gallery,
    encoded: Sequence[Tensor],
    seed: int,
    coreset: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> Normality:
    """New banks of the images of a gallery alone.

    encoded: the images' embeddings, one [N, I, J, D] float32 per level.
    seed: of the banks' clustering.
    coreset: share of each bank's patches to keep, see `NormalBank.coreset`; None: all.
    progress: called now and then with the share of the selection that is done.

    Warns (CollapseWarning) if all embeddings of a level are (nearly) the same.
    """
    banks = banks_of(levels, encoded, seed, coreset, progress)
    for level, bank in banks.items():
        if is_collapsed(bank.embeddings):
            warn_of_collapse(f"at {level}")
    return Normality(dict(banks), gallery)


def with_images(before: Normality, added: Gallery, encoded: Sequence[Tensor]) -> Normality:
    """The training images and those added. encoded: of these, one [N, I, J, D] per level."""
    banks = whole_banks(before)
    for bank, embeddings in zip(banks.values(), encoded, strict=True):
        bank.add(embeddings)
    gallery = before.gallery
    if gallery is not None:
        gallery = gallery.with_others(added)
    return Normality(dict(banks), gallery)


def without_images(before: Normality, images: Sequence[str | Path | int]) -> Normality:
    """All training images but these, which are given by name or number.

    Raises ValueError for an image that is not there, for a name that several images have, and if
    no image would be left.
    """
    if isinstance(images, str | Path) or not isinstance(images, Iterable):
        raise TypeError(f"images must be a list of names and numbers, got {images!r}")
    gone = {_number_of(before, image) for image in images}
    banks = whole_banks(before)
    for bank in banks.values():
        bank.remove(bank.groups[sorted(gone)])
    gallery = before.gallery
    if gallery is not None:
        gallery = gallery.only([i for i in range(len(gallery.names)) if i not in gone])
    return Normality(dict(banks), gallery)


def merged(one: Normality, other: Normality) -> Normality:
    """The images of both, which must have been embedded in the same way (`differences`)."""
    banks = whole_banks(one)
    for level, bank in banks.items():
        theirs = whole_bank(other.banks[level]).to(bank.device)
        first = int(bank.groups.max()) + 1
        bank.merge(theirs, torch.arange(len(theirs.groups), device=bank.device) + first)
    gallery = None
    if one.gallery is not None and other.gallery is not None:
        gallery = one.gallery.with_others(other.gallery)
    return Normality(dict(banks), gallery)


def warn_of_twins(
    gallery: Gallery | None, calibration: Calibration | None, category: str = ""
) -> None:
    """Warn of training images that are there twice, which makes thresholds too low."""
    # The embeddings of twins may differ: with mean="pixel" an image of `fit` had the mean of the
    # others subtracted, but not one that was added later. So figures are compared as well.
    twice = 0 if gallery is None else gallery.num_alike()
    if calibration is not None:
        twice = max(twice, int((calibration.image_scores == 0).sum()))
    if twice:
        whose = category and f"{category}: "
        warnings.warn(
            f"{whose}{twice} training images look exactly like others, as if they were there "
            "twice: they score next to nothing, and thresholds are too low for new images",
            stacklevel=4,
        )


def warn_of_repeats(gallery: Gallery | None, earlier: Gallery | None) -> None:
    """Warn of images that are among the earlier ones, and so may be part of the mean image."""
    again = 0 if gallery is None or earlier is None else gallery.num_alike(earlier)
    if again:
        warnings.warn(
            f"{again} of the images are training images of the detector, and may have a part "
            "in its mean image, which makes thresholds too low: leave images out with "
            "`remove` (patchsvdd update --remove) instead",
            stacklevel=4,
        )


def whole_banks(before: Normality) -> dict[PatchLevel, NormalBank]:
    """Copies of the banks that can be changed by themselves; rows are shared until they are.

    Raises ValueError for coresets, which cannot be calibrated anew after a change, and for banks in
    shards.
    """
    banks = {level: whole_bank(bank) for level, bank in before.banks.items()}
    if any(bank.is_coreset for bank in banks.values()):
        raise ValueError(
            "its banks are coresets, which lack patches that new thresholds would take: fit it "
            "again with all images instead"
        )
    return {level: copy.copy(bank) for level, bank in banks.items()}


def whole_bank(bank: AnyBank) -> NormalBank:
    """The bank, if this process has all its rows. Raises ValueError if it is one in shards."""
    if not isinstance(bank, NormalBank):
        raise ValueError(
            "its banks lie in shards, which can be searched, but neither changed nor exported: fit "
            "it again instead"
        )
    return bank


def _number_of(before: Normality, image: str | Path | int) -> int:
    if not isinstance(image, str | Path):
        number = operator.index(image)
        if not 0 <= number < before.num_images:
            raise ValueError(
                f"training images have the numbers 0 to {before.num_images - 1}, got {number}"
            )
        return number
    if before.gallery is None:
        raise ValueError(
            f"the names of the training images are not known, so {str(image)!r} cannot be found: "
            "give a number"
        )
    names = before.gallery.names
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
