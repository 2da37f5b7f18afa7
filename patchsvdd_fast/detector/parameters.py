"""A detector's parameters: check them, turn them into settings, write them to a file's header.

Parameters are those of `PatchSVDD` by name, as scikit-learn's `get_params` returns them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..encoders.backbone import BackboneEncoder
from ..encoders.levels import DEFAULT_LEVELS, PatchLevel, as_levels
from ..encoders.patch_encoder import PatchEncoder
from ..encoders.patch_svdd import SMALL_PATCH, HierarchicalEncoder
from ..encoders.precision import PRECISIONS
from ..encoders.pretrained import PATCH_SVDD, pretrained_encoder
from ..images.arrays import CHANNEL_ORDERS
from ..images.light import ILLUMINATIONS, MEANS
from ..images.prepare import ImageSize
from ..images.samples import Samples
from ..ops.checks import check_type, is_of_type
from ..score.maps import check_combination
from ..score.reweighting import check_reweight
from ..training import settings
from ..training.settings import TrainingSettings, training_settings

Parameters = Mapping[str, Any]

_DEFAULT_DIM = 64  # D of the paper's encoder


def ready_encoder(parameters: Parameters, given: nn.Module | None = None) -> PatchEncoder | None:
    """The encoder to use as it is; None: Patch SVDD's is to be trained.

    given: instead of the parameter `encoder`. Raises ValueError for an unknown name, and for
    parameters that do not suit the encoder; TypeError for what is no module.
    """
    chosen = parameters["encoder"] if given is None else given
    projection = {"projection": parameters["projection"], "dim": parameters["embedding_dim"]}
    projection = {name: value for name, value in projection.items() if value is not None}
    if isinstance(chosen, str) and chosen == PATCH_SVDD:
        if parameters["projection"] is not None:
            raise ValueError("projection is for pretrained encoders, not for Patch SVDD's")
        _check_mean(parameters["mean"], None)
        return None
    if "dim" in projection and not isinstance(chosen, PatchEncoder):
        projection.setdefault("projection", "axes")
    if isinstance(chosen, str):
        encoder: PatchEncoder = pretrained_encoder(chosen, **projection)
    elif isinstance(chosen, PatchEncoder):
        encoder = chosen
        _check_made(projection, encoder)
    elif isinstance(chosen, nn.Module):
        encoder = BackboneEncoder(chosen, **projection)
    else:
        raise TypeError(f"encoder must be a name or a module, got {type(chosen).__name__}")
    _check_encoder(resolved(parameters, encoder), encoder)
    return encoder


def resolved(parameters: Parameters, encoder: PatchEncoder | None = None) -> dict[str, Any]:
    """The parameters, with the encoder's own values for those that are None, as plain values.

    encoder: the one in use; None: Patch SVDD's, not made yet. Raises TypeError, naming it, for a
    parameter of a wrong type; ValueError for an unknown mode, and for levels that cannot be.
    """
    fixed = encoder is not None and encoder.pixel_mean is not None
    own = {
        "levels": DEFAULT_LEVELS if encoder is None else encoder.default_levels,
        "embedding_dim": _DEFAULT_DIM if encoder is None else encoder.embedding_dim,
        "mean": "fixed" if fixed else "pixel",
        "illumination": "as_is" if fixed else settings.illumination_of(parameters["mode"]),
    }
    values = {name: _plain(value) for name, value in parameters.items()}
    _check_types(values)
    values |= {name: value for name, value in own.items() if values[name] is None}
    values["levels"] = as_levels(values["levels"])
    values["encoder"] = PATCH_SVDD if encoder is None else encoder.name
    if encoder is not None:
        values["embedding_dim"] = encoder.embedding_dim
        values["projection"] = getattr(encoder, "projection", None)
    return values


def _plain(value: Any) -> Any:
    """A number, an array or a device as Python's own, which a file's header can hold."""
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, np.ndarray):
        return tuple(value.tolist())
    return value.item() if isinstance(value, np.generic) else value


def _check_types(parameters: Parameters) -> None:
    """Raise TypeError for a parameter of a type that no check of its values takes.

    Those of training are checked by `TrainingSettings`.
    """
    for name in ("embedding_dim", "bit_depth"):
        check_type(name, parameters[name], Integral, optional=True)
    check_type("seed", parameters["seed"], Integral)
    check_type("contamination", parameters["contamination"], Real)
    check_type("coreset", parameters["coreset"], Real, optional=True)
    check_type("keep_images", parameters["keep_images"], bool)
    limits = parameters["value_range"]
    is_pair = isinstance(limits, Sequence) and len(limits) == 2
    if limits is not None and not (is_pair and all(isinstance(limit, Real) for limit in limits)):
        raise TypeError(f"value_range must be two numbers, (lowest, highest), got {limits!r}")


def _check_encoder(parameters: Parameters, encoder: PatchEncoder) -> None:
    encoder.check_levels(parameters["levels"])
    _check_mean(parameters["mean"], encoder)


def _check_made(wanted: Mapping[str, Any], encoder: PatchEncoder) -> None:
    """Raise ValueError for another projection or D than an encoder was made with."""
    if isinstance(encoder, BackboneEncoder):
        made = {name: encoder.settings()[name] for name in ("projection", "dim")}
    else:
        made = {"projection": None, "dim": encoder.embedding_dim}
    for name, value in wanted.items():
        if made[name] != value:
            raise ValueError(
                f"the encoder {encoder.name} was made with {name} {made[name]}, "
                f"which {value} cannot change"
            )


def _check_mean(mean: str | None, encoder: PatchEncoder | None) -> None:
    brings_one = encoder is not None and encoder.pixel_mean is not None
    if mean == "fixed" and not brings_one:
        raise ValueError('mean="fixed" is for pretrained encoders, which bring such constants')
    if encoder is not None and brings_one and mean != "fixed":
        raise ValueError(
            f"the encoder {encoder.name} has a mean of its own to subtract, "
            f"it takes no mean={mean!r}"
        )


def check_parameters(parameters: Parameters) -> None:
    """Raise ValueError for unusable resolved parameters; `settings_of` checks those of training."""
    levels = parameters["levels"]
    if not levels:
        raise ValueError("levels must name at least one patch level")
    check_combination(parameters["combination"], levels)
    if parameters["illumination"] not in ILLUMINATIONS:
        raise ValueError(
            f"illumination must be one of {ILLUMINATIONS}, got {parameters['illumination']!r}"
        )
    if parameters["mean"] not in tuple(MEANS):
        raise ValueError(f"mean must be one of {tuple(MEANS)}, got {parameters['mean']!r}")
    if parameters["encoding_precision"] not in PRECISIONS:
        raise ValueError(
            f"encoding_precision must be one of {PRECISIONS}, "
            f"got {parameters['encoding_precision']!r}"
        )
    coreset = parameters["coreset"]
    if coreset is not None and not 0 < coreset <= 1:
        raise ValueError(f"coreset must be a share above 0, up to 1, or None, got {coreset}")
    check_reweight(parameters["reweight"], levels)
    samples_of(parameters)
    channel_order_of(parameters)
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


def parse_size(size: int | tuple[int, int] | None) -> ImageSize:
    """Bring an `image_size` argument to (height, width) or None. One number means a square.

    Raises ValueError for a size below 1, TypeError for what is no size.
    """
    if size is None:
        return None
    sides: Any = (size, size) if isinstance(size, Integral) else size
    is_pair = isinstance(sides, Sequence) and len(sides) == 2
    if not is_pair or not all(is_of_type(side, Integral) for side in sides):
        raise TypeError(f"image_size must be pixels, (height, width) or None, got {size!r}")
    height, width = map(int, sides)
    if height < 1 or width < 1:
        raise ValueError(f"image_size must be positive, got {height}x{width}")
    return height, width


def samples_of(parameters: Parameters) -> Samples:
    """What is given of how samples of more than 8 bits are read. Raises ValueError."""
    return Samples(parameters["bit_depth"], parameters["value_range"])


def channel_order_of(parameters: Parameters) -> str:
    """How the colours of arrays are ordered. Raises ValueError for an unknown order."""
    order = parameters["channel_order"]
    if order not in CHANNEL_ORDERS:
        raise ValueError(f"channel_order must be one of {CHANNEL_ORDERS}, got {order!r}")
    return str(order)


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
    """The encoder that training with these resolved parameters starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(parameters["seed"])
        return new_encoder(parameters, settings_of(parameters).initialization).eval()


def to_header(parameters: Parameters) -> dict[str, Any]:
    """The part of a file's header that holds resolved parameters, as values that JSON has."""
    levels = [(level.size, level.stride) for level in parameters["levels"]]
    # All are resolved, hence written out: an encoder's or mode's own may change in later versions.
    return {"parameters": {**parameters, "levels": levels}}


def from_header(header: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in a file's header, as `to_header` put them there."""
    # Older files have no precision for encoding, coresets, re-weighting, depth, range, order.
    parameters: dict[str, Any] = {
        "encoding_precision": "float32",
        "coreset": None,
        "reweight": None,
        "bit_depth": None,
        "value_range": None,
        "channel_order": "rgb",
        **header["parameters"],
    }
    parameters["levels"] = tuple(
        PatchLevel(int(size), int(stride)) for size, stride in parameters["levels"]
    )
    if isinstance(parameters.get("image_size"), list):
        parameters["image_size"] = tuple(parameters["image_size"])
    if isinstance(parameters["value_range"], list):
        parameters["value_range"] = tuple(parameters["value_range"])
    return parameters
