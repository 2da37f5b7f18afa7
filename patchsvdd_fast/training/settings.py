"""What determines a training run: its settings, and those that belong together (recipes.json)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ..encoders.patch_svdd import INITIALIZATIONS
from ..encoders.precision import PRECISIONS

_RECIPES: dict[str, Any] = json.loads(
    resources.files(__package__).joinpath("recipes.json").read_text()
)

MODES = tuple(_RECIPES["modes"])
SURFACES = tuple(_RECIPES["surfaces"])

SCHEDULES = ("constant", "cosine")

CROPS_PER_IMAGE = 100
"""How often an epoch visits each training image."""

_FAITHFUL_ONLY = ("svdd_weight", "train_last_layer", "redraw_clipped")
_LENGTHS = ("epochs", "steps", "minutes")


@dataclass(frozen=True)
class TrainingSettings:
    """What determines a training run besides the images. The defaults are the paper's protocol."""

    mode: str = "faithful"
    """"faithful": pairs of patches as in the paper; "dense": neighbours alone, from dense maps."""
    epochs: int | None = 300
    """Passes over CROPS_PER_IMAGE x the number of images; None: as many as `steps` take."""
    steps: int | None = None
    """Stop after this many steps, whatever `epochs` says."""
    minutes: float | None = None
    """Fit the number of steps to this time, measured in the first ten; never more than the above.
    The other settings determine the result, this one leaves it to the machine."""
    batch_size: int = 64
    """Of a step. Faithful: pairs of each kind and patch size; dense: crops."""
    learning_rate: float = 1e-4
    schedule: str = "constant"
    """"constant", or "cosine": down to zero over the run."""
    warmup_steps: int = 0
    """Over which the learning rate rises from zero."""
    svdd_weight: float = 1e-3
    """Faithful only: lambda, the weight of SVDD' against the position loss."""
    initialization: str = "default"
    """See `HierarchicalEncoder`."""
    train_last_layer: bool = False
    """Faithful only: of the position classifier."""
    redraw_clipped: bool = False
    """Faithful only: draw clipped position pairs again."""
    crop_size: int = 128
    """Dense only: side of a crop, pixels; enough for a pair of the largest patches, and no more
    than the image."""
    pairs_per_crop: int = 256
    """Dense only: pairs of neighbours per patch size."""
    precision: str = "float32"
    """Of convolutions on a GPU: "float32", "tf32" or "bfloat16"; dense: "float32" alone."""
    check_every: int | None = None
    """Steps between checks of what has been learned, see `selection`; the best weights are kept.
    None: never, the last weights are the result."""
    patience: int | None = None
    """Stop after so many checks without an improvement; None: go on to the end."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("mode", MODES),
            ("schedule", SCHEDULES),
            ("initialization", INITIALIZATIONS),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.epochs is None and self.steps is None and self.minutes is None:
            raise ValueError("one of epochs, steps and minutes must say how long to train")
        for name in ("epochs", "steps", "batch_size", "pairs_per_crop", "check_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.mode == "dense" and self.precision != "float32":
            raise ValueError(
                f'mode dense needs precision "float32", in which alone neighbours differ, '
                f"got {self.precision!r}"
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
        """Steps of the whole run; None where only `minutes` limits them."""
        limits = [] if self.steps is None else [self.steps]
        if self.epochs is not None:
            crops = self.epochs * num_images * CROPS_PER_IMAGE
            limits.append(math.ceil(crops / self.batch_size))
        return min(limits, default=None)

    def learning_rate_at(self, step: int, total: int | None) -> float:
        """Of step 1 .. total; None: the end is not in sight."""
        rate = self.learning_rate
        if self.warmup_steps:
            rate *= min(1.0, step / self.warmup_steps)
        if self.schedule == "cosine" and total is not None:
            rate *= 0.5 * (1 + math.cos(math.pi * (step - 1) / total))
        return rate


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
