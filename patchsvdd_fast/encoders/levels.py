"""Patch levels: the patch sizes at which an image is scored, and the grid of patches of each."""

from __future__ import annotations

from dataclasses import dataclass

from ..ops.checks import check_patch, grid_shape


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


DEFAULT_LEVELS = (PatchLevel(size=64, stride=16), PatchLevel(size=32, stride=4))
"""The paper's two levels: 13x13 and 57x57 patches of a 256x256 image."""
