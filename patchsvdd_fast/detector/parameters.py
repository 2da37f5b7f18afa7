"""A detector's parameters: check them, turn them into settings, write them to a file's header.

Parameters are those of `PatchSVDD` by name, as scikit-learn's `get_params` returns them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..encoders.patch_svdd import SMALL_PATCH, HierarchicalEncoder
from ..images.light import ILLUMINATIONS, MEANS
from ..images.prepare import parse_size
from ..score.maps import combinations_of
from ..training import settings
from ..training.settings import TrainingSettings, training_settings

Parameters = Mapping[str, Any]


def check_parameters(parameters: Parameters) -> None:
    """Raise ValueError for unusable parameters; those of training are checked by `settings_of`."""
    levels = parameters["levels"]
    if not levels:
        raise ValueError("levels must name at least one patch level")
    if parameters["combination"] not in combinations_of(levels):
        raise ValueError(
            f"combination must be one of {combinations_of(levels)}, "
            f"got {parameters['combination']!r}"
        )
    if parameters["illumination"] not in (None, *ILLUMINATIONS):
        raise ValueError(
            f"illumination must be one of {ILLUMINATIONS}, got {parameters['illumination']!r}"
        )
    if parameters["mean"] not in MEANS:
        raise ValueError(f"mean must be one of {tuple(MEANS)}, got {parameters['mean']!r}")
    if not 0 <= parameters["contamination"] < 1:
        raise ValueError(f"contamination must be in [0, 1), got {parameters['contamination']}")
    size, largest = parse_size(parameters["image_size"]), largest_patch(levels)
    if size is not None and min(size) < largest:
        raise ValueError(
            f"image_size must be at least the largest patch, {largest} pixels, "
            f"got {size[0]}x{size[1]}"
        )


def settings_of(parameters: Parameters) -> TrainingSettings:
    """The settings to train with. Raises ValueError as `training_settings` does."""
    names = set(TrainingSettings.__dataclass_fields__) & set(parameters)
    given = {name: parameters[name] for name in names}
    return training_settings(surface=parameters["surface"], **given)


def illumination_of(parameters: Parameters) -> str:
    """The illumination that was asked for, else the mode's own: one of `ILLUMINATIONS`."""
    return parameters.get("illumination") or settings.illumination_of(
        parameters.get("mode", "faithful")
    )


def usual_light(parameters: Parameters, light: Tensor) -> Tensor | None:
    """The colour that images are matched to: `light` [3], or None if they stay as they are."""
    return light if illumination_of(parameters) == "matched" else None


def largest_patch(levels: Iterable[PatchLevel]) -> int:
    """Side of the largest patches, in pixels."""
    return max(level.size for level in levels)


def new_encoder(parameters: Parameters, initialization: str = "default") -> HierarchicalEncoder:
    """A new encoder for these levels and this D, with weights from torch's default generator."""
    depth = (largest_patch(parameters["levels"]) // SMALL_PATCH).bit_length()
    return HierarchicalEncoder(parameters["embedding_dim"], depth, initialization)


def untrained_encoder(parameters: Parameters) -> HierarchicalEncoder:
    """The encoder that training with these parameters starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(parameters["seed"])
        return new_encoder(parameters, settings_of(parameters).initialization).eval()


def to_header(parameters: Parameters) -> dict[str, Any]:
    """The part of a file's header that holds the parameters, as values that JSON has."""
    levels = [(level.size, level.stride) for level in parameters["levels"]]
    # Illumination is written out: a mode's own may be another in later versions.
    return {
        "parameters": {
            **parameters,
            "levels": levels,
            "illumination": illumination_of(parameters),
        }
    }


def from_header(header: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in a file's header, as `to_header` put them there."""
    parameters = dict(header["parameters"])
    parameters["levels"] = tuple(
        PatchLevel(int(size), int(stride)) for size, stride in parameters["levels"]
    )
    if isinstance(parameters.get("image_size"), list):
        parameters["image_size"] = tuple(parameters["image_size"])
    return parameters
