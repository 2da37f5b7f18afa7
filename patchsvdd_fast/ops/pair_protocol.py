"""The protocol of the random pairs of patches for training, which `ops.crop_pairs` draws.

The first patch of a pair is uniform over the image. In a position pair the second lies in one of
eight directions, per axis the direction times (3K/4 + U{0 .. K/4 - 1}) pixels away; in a neighbour
pair it is jittered by up to K/32 pixels per axis, never by (0, 0). Second patches are clipped to
the image, after which a label may be wrong: that is the paper's protocol. Beyond the paper, the
patches of a view pair lie in the same place: two views of one crop. Each patch of a position or a
view pair has a colour shift per channel and noise per pixel of its own; neighbours have neither.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

PairKind = Literal["position", "neighbour", "view"]


class Draw(NamedTuple):
    """Which pairs are drawn, besides the images they are from: the options of `ops.crop_pairs`."""

    size: int
    """K, the side of a patch in pixels."""
    kind: PairKind
    seed: int
    step: int
    redraw_clipped: bool = False
    """Whether position pairs that would be clipped are drawn again, up to `MAX_REDRAWS` times."""
    first_pair: int = 0
    """Number in the whole batch of the first pair given."""


DIRECTIONS = torch.tensor([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)])
"""[8, 2]: the direction (down, right) that each position label stands for."""

COLOUR_SHIFT = 0.02
"""Deviation of the shift of each patch and channel, not of neighbours; patches span 1."""
PIXEL_NOISE = 0.02
"""Deviation of the noise of each pixel, not of neighbours."""
MAX_REDRAWS = 10_000
"""Of a pair that would be clipped, where such pairs are drawn again; the last one is clipped."""
