"""Settings that belong together, kept as data: for each mode, for each kind of surface."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from .trainer import TrainingSettings

_RECIPES: dict[str, Any] = json.loads(
    resources.files(__package__).joinpath("recipes.json").read_text()
)

MODES = tuple(_RECIPES["modes"])
SURFACES = tuple(_RECIPES["surfaces"])

_FAITHFUL_ONLY = ("svdd_weight", "train_last_layer", "redraw_clipped")
_LENGTHS = ("epochs", "steps", "minutes")


def illumination_of(mode: str) -> str:
    """How the mode treats light, where nothing else is asked for; see `images.ILLUMINATIONS`."""
    illumination: str = _RECIPES["illumination"][mode]
    return illumination


def training_settings(
    mode: str = "faithful", surface: str | None = None, **given: Any
) -> TrainingSettings:
    """The mode's settings, changed by the kind of surface and then by what is given and not None.

    surface: "texture" or "object", which differ in lambda (mode faithful); None: the mode's own.
    Of epochs, steps and minutes, giving one replaces the mode's length. check_every=0: no checks,
    where the mode has some. Raises ValueError for an unknown mode or surface, for what only mode
    faithful has, and as TrainingSettings does.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
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
