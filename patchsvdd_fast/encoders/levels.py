"""Patch levels: the patch sizes at which an image is scored, and the grid of patches of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..ops.checks import check_int, check_patch, grid_shape


@dataclass(frozen=True)
class PatchLevel:
    """One patch size K with the stride of its scoring grid, both in pixels."""

    size: int
    """K, the side of a patch."""
    stride: int
    """From one patch to the next, at most the size."""

    def __post_init__(self) -> None:
        check_patch(self.size, self.stride)

    def grid_shape(self, height: int, width: int) -> tuple[int, int]:
        """Rows I and columns J of patches that fit an image of `height` x `width` pixels.

        Raises ValueError for an image smaller than a patch.
        """
        return grid_shape(self.size, self.stride, height, width)

    def __str__(self) -> str:
        return f"K{self.size}"


def as_levels(given: Any) -> tuple[PatchLevel, ...]:
    """Levels, each given as a `PatchLevel` or as a pair (size, stride).

    Raises TypeError for anything else; ValueError for sizes and strides that no level has, and for
    two levels of one size, which would have one name.
    """
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"levels must be a sequence of levels, got {given!r}")
    levels = tuple(map(_as_level, given))
    if len({level.size for level in levels}) < len(levels):
        raise ValueError(f"levels must have different sizes, got {', '.join(map(str, levels))}")
    return levels


def _as_level(given: Any) -> PatchLevel:
    if isinstance(given, PatchLevel):
        return given
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != 2:
        raise TypeError(f"a level must be a PatchLevel or a pair (size, stride), got {given!r}")
    size, stride = (check_int(n, v, 1, _LARGEST) for n, v in zip(_NAMES, given, strict=True))
    return PatchLevel(size, stride)


_LARGEST = 1 << 20  # pixels of a patch's side: more than any image has
_NAMES = ("a level's size", "a level's stride")

DEFAULT_LEVELS = (PatchLevel(size=64, stride=16), PatchLevel(size=32, stride=4))
"""The paper's two levels: 13x13 and 57x57 patches of a 256x256 image."""
