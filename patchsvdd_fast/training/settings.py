"""The settings of a training run, and their values for each mode and surface (recipes.json)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib import resources
from numbers import Integral, Real
from typing import Any

from ..encoders.patch_svdd import INITIALIZATIONS
from ..encoders.precision import PRECISIONS
from ..ops.checks import check_int, check_type

_RECIPES: dict[str, Any] = json.loads(
    resources.files(__package__).joinpath("recipes.json").read_text()
)

MODES = tuple(_RECIPES["modes"])
"""How to train, see `TrainingSettings.mode`."""
SURFACES = tuple(_RECIPES["surfaces"])
"""Kinds of surface, see `training_settings`."""

SCHEDULES = ("constant", "cosine")
"""Of the learning rate, see `TrainingSettings.schedule`."""

CROPS_PER_IMAGE = 100
"""How many items of batches an epoch draws from each training image."""

_FAITHFUL_ONLY = ("svdd_weight", "train_last_layer", "redraw_clipped")
_LENGTHS = ("epochs", "steps", "minutes")
_COUNTS = ("epochs", "steps", "batch_size", "pairs_per_crop", "check_every", "patience")
_OPTIONAL = ("epochs", "steps", "minutes", "check_every", "patience")
_TYPES: dict[type, tuple[str, ...]] = {
    Integral: (*_COUNTS, "warmup_steps", "crop_size", "seed"),
    Real: ("minutes", "learning_rate", "svdd_weight"),
    bool: ("train_last_layer", "redraw_clipped"),
}
_MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class TrainingSettings:
    """What determines a training run besides the images. The defaults are the paper's protocol.

    See `training_settings` for the values of a mode. Raises ValueError for settings that are out of
    range or exclude each other, TypeError for those of a wrong type.
    """

    mode: str = "faithful"
    """"faithful": position and neighbour pairs, as in the paper; "dense": neighbour pairs alone,
    from dense maps of crops."""
    epochs: int | None = 300
    """Epochs of CROPS_PER_IMAGE items per training image; None: `steps` or `minutes` decide."""
    steps: int | None = None
    """Most steps of the run, whatever `epochs` says."""
    minutes: float | None = None
    """Fit the number of steps to this time, by the speed of the first ten; never more than `epochs`
    and `steps` allow. The result then depends on the machine's speed."""
    batch_size: int = 64
    """Items per step. Mode faithful: pairs of each kind and patch size; mode dense: crops."""
    learning_rate: float = 1e-4
    """Of Adam, at its highest."""
    schedule: str = "constant"
    """Of the learning rate: "constant", or "cosine", which falls to zero over the run."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    svdd_weight: float = 1e-3
    """Mode faithful only: lambda, the weight of SVDD' against the position loss."""
    initialization: str = "default"
    """"default" or "kaiming", see `HierarchicalEncoder`."""
    train_last_layer: bool = False
    """Mode faithful only: train the last layer of the position classifier."""
    redraw_clipped: bool = False
    """Mode faithful only: redraw position pairs whose second patch leaves the image, instead of
    clipping it to the image, which may make the label wrong."""
    crop_size: int = 128
    """Mode dense only: side of a crop in pixels; raised to hold a pair of the largest patches, and
    limited to the image."""
    pairs_per_crop: int = 256
    """Mode dense only: neighbour pairs per crop and patch size."""
    precision: str = "float32"
    """Of convolutions: "float32", "bfloat16", or "tf32" (on a GPU, mode faithful only)."""
    check_every: int | None = None
    """Steps between checks on synthetic defects (see `defect_check`), by which the best weights are
    kept. None: no checks, the last weights are the result."""
    patience: int | None = None
    """Stop after this many checks in a row without improvement; None: train to the end."""
    seed: int = 0
    """Of all that is drawn at random."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("mode", MODES),
            ("schedule", SCHEDULES),
            ("initialization", INITIALIZATIONS),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        _check_numbers(self)
        if self.epochs is None and self.steps is None and self.minutes is None:
            raise ValueError("one of epochs, steps and minutes must say how long to train")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.mode == "dense" and self.precision == "tf32":
            raise ValueError(
                'mode dense needs precision "float32" or "bfloat16": in "tf32", whose last layers '
                "are rounded too, neighbours differ too little"
            )
        if self.patience is not None and self.check_every is None:
            raise ValueError("patience needs check_every: without checks nothing improves")
        for name in ("learning_rate", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("svdd_weight", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def total_steps(self, num_images: int) -> int | None:
        """Steps of a run on N images; None if only `minutes` limits them."""
        limits = [] if self.steps is None else [self.steps]
        if self.epochs is not None:
            crops = self.epochs * num_images * CROPS_PER_IMAGE
            limits.append(math.ceil(crops / self.batch_size))
        return min(limits, default=None)

    def learning_rate_at(self, step: int, total: int | None) -> float:
        """The learning rate of a step, from 1; total: steps of the run, None if not known yet."""
        rate = self.learning_rate
        if self.warmup_steps:
            rate *= min(1.0, step / self.warmup_steps)
        if self.schedule == "cosine" and total is not None:
            rate *= 0.5 * (1 + math.cos(math.pi * (step - 1) / total))
        return rate


def _check_numbers(settings: TrainingSettings) -> None:
    for kind, names in _TYPES.items():
        for name in names:
            check_type(name, getattr(settings, name), kind, name in _OPTIONAL)
    check_int("seed", settings.seed, 0, _MOST_SEED)
    for name in ("learning_rate", "svdd_weight"):
        if math.isinf(getattr(settings, name)):
            raise ValueError(f"{name} must be finite, got {getattr(settings, name)}")


def illumination_of(mode: str) -> str:
    """The mode's default treatment of light, one of `images.light.ILLUMINATIONS`."""
    _check_mode(mode)
    illumination: str = _RECIPES["illumination"][mode]
    return illumination


def training_settings(
    mode: str = "faithful", surface: str | None = None, **given: Any
) -> TrainingSettings:
    """The settings of a mode, then of a surface (recipes.json), then those given that are not None.

    surface: "texture" or "object", which set lambda (mode faithful only); None: the mode's lambda.
    given: fields of `TrainingSettings`. Any of epochs, steps and minutes replaces the length that
    the mode sets; check_every=0 turns off the checks of a mode that has them.

    Raises ValueError for an unknown mode or surface, for settings in mode dense that only mode
    faithful has, and as `TrainingSettings` does.
    """
    _check_mode(mode)
    if surface is not None and surface not in SURFACES:
        raise ValueError(f"surface must be one of {SURFACES}, got {surface!r}")
    given = {name: value for name, value in given.items() if value is not None}
    if mode == "dense":
        useless = [name for name in _FAITHFUL_ONLY if given.get(name, False) is not False]
        if surface is not None:
            useless.append("surface")
        if useless:
            raise ValueError(f"mode dense has no position loss: {useless[0]} is for mode faithful")
    recipe = dict.fromkeys(_LENGTHS) | _RECIPES["modes"][mode]
    if any(name in given for name in _LENGTHS):
        recipe |= dict.fromkeys(_LENGTHS)
    if surface is not None:
        recipe |= _RECIPES["surfaces"][surface]
    if given.get("check_every") == 0:
        given["check_every"] = recipe["patience"] = None
    return TrainingSettings(mode=mode, **{**recipe, **given})


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
