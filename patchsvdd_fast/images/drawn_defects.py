"""Synthetic defects: drawn into good images, where no images with real defects are at hand.

Apart from `draw_defects`, which takes and returns tensors, functions work on float arrays
[H, W, 3] in 0 .. 255 and boolean masks [H, W] (True: defective). `shape` is (height, width) in
pixels, and all randomness comes from `rng`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class Strength(NamedTuple):
    """Size and contrast of a synthetic defect, as multiples of the usual ones."""

    size: float = 1.0
    contrast: float = 1.0
    """Of spots and scratches; the other kinds ignore it."""


USUAL = Strength()


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, int], length: float, deviation: float
) -> Array:
    """A random field [H, W] of this standard deviation that varies over some `length` pixels."""
    field: Array = ndimage.gaussian_filter(rng.normal(size=shape), length / 3, mode="wrap")
    return field * (deviation / field.std())


def blob(rng: np.random.Generator, shape: tuple[int, int], radius: float) -> Mask:
    """A mask of a round region with an uneven border, off the image's edge if there is room.

    radius: of the region, in pixels; the border varies by about a sixth of it.
    """
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    margin = np.minimum(2 * radius, np.array(shape) / 2)
    centre = rng.uniform(margin, np.array(shape) - margin)
    distance = np.hypot(y - centre[0], x - centre[1])
    mask: Mask = distance < radius + smooth_noise(rng, shape, 12, radius / 6)
    return mask


def cut(
    rng: np.random.Generator, shape: tuple[int, int], reach: tuple[float, float], margin: float = 70
) -> Mask:
    """A mask of a thin, gently bent line.

    reach: (lowest, highest) of half its length; margin: of its centre from the image's edge, if
    there is room. Both in pixels.
    """
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    angle, bend = rng.uniform(0, np.pi), rng.normal(0, 0.004)
    low = np.minimum(margin, np.array(shape) / 2)
    centre = rng.uniform(low, np.array(shape) - low)
    u = (x - centre[1]) * np.cos(angle) + (y - centre[0]) * np.sin(angle)
    v = (y - centre[0]) * np.cos(angle) - (x - centre[1]) * np.sin(angle) - bend * u**2
    mask: Mask = (np.abs(v) < 1.6) & (np.abs(u) < rng.uniform(*reach))
    return mask


def blend(image: Array, over: Array, mask: Mask, softness: float) -> Array:
    """`image`, but `over` where the mask is set; softness: sigma of the border's blur, pixels."""
    weight = ndimage.gaussian_filter(mask.astype(float), softness)[..., None]
    blended: Array = image * (1 - weight) + over * weight
    return blended


def _radius(image: Array, rng: np.random.Generator, strength: Strength) -> float:
    return float(rng.uniform(0.03, 0.08) * strength.size * min(image.shape[:2]))


def _change(image: Array, rng: np.random.Generator, strength: Strength) -> float:
    """A change in gray levels, up or down: about the image's standard deviation x contrast."""
    deviation = max(8.0, float(image.std(axis=(0, 1)).mean()))
    return float(rng.choice([-1, 1]) * rng.uniform(0.7, 1.5) * deviation * strength.contrast)


def _spot(image: Array, rng: np.random.Generator, strength: Strength) -> tuple[Array, Mask]:
    """Something of one colour covers the surface."""
    mask = blob(rng, image.shape[:2], 0.6 * _radius(image, rng, strength))
    inside = image[mask].mean(axis=0) if mask.any() else image.mean(axis=(0, 1))
    colour = inside + _change(image, rng, strength)
    return blend(image, np.broadcast_to(colour, image.shape), mask, 1.0), mask


def _tint(image: Array, rng: np.random.Generator, strength: Strength) -> tuple[Array, Mask]:
    """A stain over an intact surface."""
    mask = blob(rng, image.shape[:2], _radius(image, rng, strength))
    return blend(image, image * rng.uniform(0.8, 1.1, size=3), mask, 2.5), mask


def _blurred(image: Array, rng: np.random.Generator, strength: Strength) -> tuple[Array, Mask]:
    """Rubbed flat: the fine structure is gone."""
    mask = blob(rng, image.shape[:2], _radius(image, rng, strength))
    return blend(image, ndimage.gaussian_filter(image, (4, 4, 0)), mask, 2.0), mask


def _scratch(image: Array, rng: np.random.Generator, strength: Strength) -> tuple[Array, Mask]:
    """A thin line, darker or brighter."""
    side = strength.size * min(image.shape[:2])
    mask = cut(rng, image.shape[:2], (0.1 * side, 0.2 * side))
    return blend(image, image + _change(image, rng, strength), mask, 0.6), mask


def _enlarged(image: Array, rng: np.random.Generator, strength: Strength) -> tuple[Array, Mask]:
    """Structure of the wrong size: a part of the image, twice as large and upside down."""
    mask = blob(rng, image.shape[:2], _radius(image, rng, strength))
    height, width = image.shape[:2]
    rows, columns = np.arange(height) // 2, np.arange(width) // 2
    top, left = rng.integers(height - rows[-1]), rng.integers(width - columns[-1])
    foreign = image[top + rows][:, left + columns][::-1, ::-1]
    return blend(image, foreign, mask, 1.0), mask


Draw = Callable[[Array, np.random.Generator, Strength], tuple[Array, Mask]]
DEFECTS: dict[str, Draw] = {
    "spot": _spot,
    "tint": _tint,
    "blurred": _blurred,
    "scratch": _scratch,
    "enlarged": _enlarged,
}


_VISIBLE = 3.0  # gray levels by which at least half of a defect's pixels must differ
_ATTEMPTS = 20  # to draw a visible defect; blurring a flat image never gives one


def draw_defects(
    image: Tensor,
    rng: np.random.Generator,
    count: int = 1,
    kind: str | None = None,
    strength: Strength = USUAL,
) -> tuple[Tensor, Tensor]:
    """A copy of a uint8 image [3, H, W] with `count` defects, and their mask [H, W] (bool).

    kind: a key of `DEFECTS`; None: a random one for each defect.
    """
    pixels = image.permute(1, 2, 0).double().numpy()
    mask = np.zeros(pixels.shape[:2], dtype=bool)
    for _ in range(count):
        draw = DEFECTS[kind or list(DEFECTS)[rng.integers(len(DEFECTS))]]
        pixels, drawn = _visible(draw, pixels, rng, strength)
        mask |= drawn
    changed = torch.from_numpy(pixels.round().astype(np.uint8))
    return changed.permute(2, 0, 1).contiguous(), torch.from_numpy(mask)


def _visible(
    draw: Draw, image: Array, rng: np.random.Generator, strength: Strength
) -> tuple[Array, Mask]:
    """Draw a defect, again if it does not show: darkening a black surface changes nothing."""
    for _ in range(_ATTEMPTS):
        changed, mask = draw(image, rng, strength)
        changed = changed.clip(0, 255)
        difference = np.abs(changed - image).max(axis=2)[mask]
        if difference.size and np.median(difference) >= _VISIBLE:
            break
    return changed, mask
