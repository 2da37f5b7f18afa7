"""Patch levels: the patch sizes at which an image is looked at, and the grid each lays over it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PatchLevel:
    """One patch size K with the stride of its scoring grid, both in pixels."""

    size: int
    stride: int

    def __post_init__(self) -> None:
        if self.size < 1 or not 1 <= self.stride <= self.size:
            raise ValueError(f"a patch level needs 1 <= stride <= size, got {self}")

    def grid_shape(self, height: int, width: int) -> tuple[int, int]:
        """Rows I and columns J of patches that fit an image of `height` x `width` pixels."""
        if height < self.size or width < self.size:
            raise ValueError(
                f"images must be at least {self.size}x{self.size} pixels for patches of that size, "
                f"got {width}x{height} (width x height)"
            )
        return (height - self.size) // self.stride + 1, (width - self.size) // self.stride + 1

    def __str__(self) -> str:
        return f"K{self.size}"


DEFAULT_LEVELS = (PatchLevel(size=64, stride=16), PatchLevel(size=32, stride=4))
"""The paper's two levels: 13x13 and 57x57 patches of a 256x256 image."""
