"""How the random pairs of patches for training are drawn (by `ops.crop_pairs`).

The first patch of a pair, K x K pixels, lies anywhere in the image with equal probability. The
second patch lies

- in a position pair: in one of eight directions from the first. Its offset along each axis is the
  direction (-1, 0 or 1) times 3K/4 + r pixels, with r a random integer in 0 .. K/4 - 1;
- in a neighbour pair: up to K/32 pixels away along each axis, never in the same place;
- in a view pair: in the same place, so that the pair shows two views of one crop.

A second patch that leaves the image is moved back to its edge, after which the label of its
direction may be wrong. Each patch of a position or a view pair gets a random colour shift per
channel and noise per pixel; neighbours get neither. View pairs are not in the paper; all else
follows it (Yi & Yoon, 2020, sections 3.1 and 3.2).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

PairKind = Literal["position", "neighbour", "view"]
"""How the second patch of a pair lies to the first, see above."""


class Draw(NamedTuple):
    """The options of `ops.crop_pairs`: which pairs to draw from given images."""

    size: int
    """K, the side of a patch in pixels."""
    kind: PairKind
    seed: int
    step: int
    """Number of the training step; each draws other pairs from the seed."""
    redraw_clipped: bool = False
    """Whether to draw position pairs that leave the image again, up to `MAX_REDRAWS` times."""
    first_pair: int = 0
    """Number of the first of these pairs in the whole batch, which may be split."""


DIRECTIONS = torch.tensor([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)])
"""[8, 2]: by position label, the direction from first to second patch (down, right)."""

COLOUR_SHIFT = 0.02
"""Standard deviation of the shift per patch and channel; pixels from 0 to 255 span 1."""
PIXEL_NOISE = 0.02
"""Standard deviation of the noise per pixel, in the same unit."""
MAX_REDRAWS = 10_000
"""How often a position pair may be drawn again; the last one is clipped if need be."""
