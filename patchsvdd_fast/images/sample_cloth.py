"""A small built-in data set: woven cloth with synthetic defects, generated from a seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from ..files.categories import Category
from .drawn_defects import Array, Mask, blend, blob, cut, smooth_noise

SIDE = 256
_SHAPE = (SIDE, SIDE)
_THREAD = 8.0  # pixels between threads


def write_sample_category(
    root: Path, train: int = 20, test_good: int = 10, per_defect: int = 5, seed: int = 0
) -> Category:
    """Write a category "cloth" in MVTec layout below `root`: PNG images of 256x256 and masks.

    train, test_good: numbers of good images; per_defect: images of each kind in `DEFECTS`.
    """
    rng = np.random.default_rng(seed)
    category = Category(root / "cloth")
    for i in range(train):
        _write(category.root / "train" / "good" / f"{i:03}.png", woven_cloth(rng))
    for i in range(test_good):
        _write(category.root / "test" / "good" / f"{i:03}.png", woven_cloth(rng))
    for name, draw in DEFECTS.items():
        for i in range(per_defect):
            image, mask = draw(woven_cloth(rng), rng)
            _write(category.root / "test" / name / f"{i:03}.png", image)
            mask_path = category.root / "ground_truth" / name / f"{i:03}_mask.png"
            _write(mask_path, np.where(mask, 255.0, 0.0))
    return category


def woven_cloth(rng: np.random.Generator) -> Array:
    """A plain weave, [256, 256, 3] in 0 .. 255: uneven threads, soft folds, camera noise."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    y += smooth_noise(rng, _SHAPE, 60, 2.0) + rng.uniform(0, 2 * _THREAD)
    x += smooth_noise(rng, _SHAPE, 60, 2.0) + rng.uniform(0, 2 * _THREAD)
    column, row = np.floor(x / _THREAD).astype(int), np.floor(y / _THREAD).astype(int)
    across = np.abs(np.sin(np.pi * x / _THREAD))  # profile of the vertical threads
    along = np.abs(np.sin(np.pi * y / _THREAD))
    tone = rng.normal(1.0, 0.06, size=(2, 80))
    warp = across * (0.75 + 0.25 * along) * tone[0, column % 80]
    weft = along * (0.75 + 0.25 * across) * tone[1, row % 80]
    cloth = np.where((column + row) % 2 == 0, warp, weft)
    shade = 1 + smooth_noise(rng, _SHAPE, 60, 0.06)
    colour = np.array([150.0, 135.0, 110.0])
    image = 40 + colour * (cloth * shade)[..., None]
    return image + rng.normal(0, 4, size=image.shape)


def _hole(image: Array, rng: np.random.Generator) -> tuple[Array, Mask]:
    """Threads missing in an irregular spot, where the dark ground shows."""
    mask = blob(rng, _SHAPE, rng.uniform(6, 10))
    ground = 45 + rng.normal(0, 4, size=image.shape)
    return blend(image, ground, mask, 1.0), mask


def _stain(image: Array, rng: np.random.Generator) -> tuple[Array, Mask]:
    """Something spilled: a tint over an intact weave."""
    mask = blob(rng, _SHAPE, rng.uniform(14, 24))
    tint = image * np.array([0.85, 0.72, 0.55])
    return blend(image, tint, mask, 2.5), mask


def _worn(image: Array, rng: np.random.Generator) -> tuple[Array, Mask]:
    """Rubbed flat: the weave blurred away."""
    mask = blob(rng, _SHAPE, rng.uniform(14, 22))
    flat = ndimage.gaussian_filter(image, (4, 4, 0)) + rng.normal(0, 4, size=image.shape)
    return blend(image, flat, mask, 2.0), mask


def _scratch(image: Array, rng: np.random.Generator) -> tuple[Array, Mask]:
    """A thin bright cut in a gently bent line."""
    mask = cut(rng, _SHAPE, (25, 50))
    return blend(image, image + 90, mask, 0.6), mask


DEFECTS: dict[str, Callable[[Array, np.random.Generator], tuple[Array, Mask]]] = {
    "hole": _hole,
    "scratch": _scratch,
    "stain": _stain,
    "worn": _worn,
}


def _write(path: Path, image: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(image, 0, 255).round().astype(np.uint8)).save(path)
