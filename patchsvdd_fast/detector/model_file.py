"""Write and open model files, and describe what is in one.

What a file holds is a plain value, `Model`: `PatchSVDD` makes one to save, and is filled in from
one when loaded. The format itself, with header and checksums, is that of `files.store`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..encoders.backbone import BackboneEncoder
from ..encoders.levels import PatchLevel
from ..encoders.patch_encoder import PatchEncoder
from ..encoders.patch_svdd import load_official_checkpoint
from ..encoders.pretrained import PATCH_SVDD, rebuilt_encoder
from ..files import store
from ..files.store import MappedFile, below, file_of, naming
from ..images.gallery import Gallery
from ..images.samples import AS_STORED, Samples, samples_from_header
from ..score.calibration import Calibration, calibrate
from ..search.bank import NormalBank
from ..training.checkpoints import encoder_tensors
from ..training.record import TrainingRecord, record_of
from .parameters import (
    check_parameters,
    from_header,
    illumination_of,
    new_encoder,
    parse_size,
    resolved,
    to_header,
    usual_light,
)

_CALIBRATION_SCHEMA = 4  # the first with scores of each level; older files are calibrated anew
_FOREIGN_SUFFIXES = (".pkl", ".pt", ".pth")  # of official checkpoints


@dataclass(frozen=True)
class Model:
    """Everything that makes up a fitted detector."""

    parameters: dict[str, Any]
    """The parameters of `PatchSVDD` by name, none of which is left to the encoder."""
    encoder: PatchEncoder
    mean: Tensor
    """[3, H, W] float32: what is subtracted from images of H x W pixels."""
    light: Tensor
    """[3] float32: the training images' mean colour."""
    banks: dict[PatchLevel, NormalBank]
    calibration: Calibration | None
    """None if there is only one training image."""
    gallery: Gallery | None
    """The training images' names, figures and pictures; None if not known, as in files of schema 2
    and 3."""
    record: TrainingRecord
    samples: Samples = AS_STORED
    """How samples of more than 8 bits are read."""
    file: MappedFile | None = None
    """The file whose memory a part of this lies in; None: none."""


def differences(one: Model, other: Model) -> list[str]:
    """What makes two models embed a patch differently, by name; empty if nothing does."""
    differing = []
    mine, theirs = one.parameters, other.parameters
    if parse_size(mine["image_size"]) != parse_size(theirs["image_size"]):
        differing.append("image_size")
    same_levels = tuple(mine["levels"]) == tuple(theirs["levels"])
    if not same_levels or mine["embedding_dim"] != theirs["embedding_dim"]:
        differing.append("levels or embedding_dim")
    else:
        ours, others = one.encoder.state_dict(), other.encoder.state_dict()
        if one.encoder is not other.encoder and (
            one.encoder.settings() != other.encoder.settings()
            or ours.keys() != others.keys()
            or not all(torch.equal(ours[name].cpu(), others[name].cpu()) for name in ours)
        ):
            differing.append("encoder")
    if one.samples.effective() != other.samples.effective():
        differing.append("bit_depth or value_range")
    if mine["encoding_precision"] != theirs["encoding_precision"]:
        differing.append("encoding_precision")
    if not torch.equal(one.mean, other.mean):
        differing.append("mean")
    light, their_light = usual_light(mine, one.light), usual_light(theirs, other.light)
    if light is None or their_light is None:
        same_light = light is their_light
    else:
        same_light = torch.equal(light, their_light)
    return differing if same_light else [*differing, "light"]


def save_model(model: Model, path: str | Path) -> None:
    """Write a model to one file, atomically. Raises OSError."""
    header, tensors = _shared(model)
    store.save(path, "detector", tensors | _own(model, ""), header)


def save_models(models: Mapping[str, Model], path: str | Path) -> None:
    """Write models that share encoder, mean and light to one file, atomically. Raises OSError.

    models: by the names of their categories.
    """
    header, tensors = _shared(next(iter(models.values())))
    for number, model in enumerate(models.values()):
        tensors |= _own(model, prefix_of(number))
    store.save(path, "detectors", tensors, header | {"categories": list(models)})


def _shared(model: Model) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What models of several categories have in common: header and tensors."""
    header = to_header(model.parameters) | {"record": asdict(model.record)}
    header["samples"] = asdict(model.samples)
    if model.parameters["encoder"] != PATCH_SVDD:
        header["encoder"] = model.encoder.settings()
    tensors = encoder_tensors(model.encoder)
    return header, tensors | {"mean": model.mean, "light": model.light}


def _own(model: Model, prefix: str) -> dict[str, Tensor]:
    """What one category's model alone has."""
    tensors: dict[str, Tensor] = {}
    for level, bank in model.banks.items():
        tensors |= {f"bank.{level}.{name}": value for name, value in bank.state_dict().items()}
    if model.calibration is not None:
        tensors |= {f"calibration.{k}": v for k, v in model.calibration.tensors().items()}
    if model.gallery is not None:
        tensors |= {f"training.{k}": v for k, v in model.gallery.tensors().items()}
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def prefix_of(number: int) -> str:
    """What the names of a category's tensors start with, by its place in the header's list."""
    return f"category.{number}."


def load_models(
    path: str | Path,
    device: torch.device,
    defaults: Mapping[str, Any],
    module: nn.Module | None = None,
    only: str | None = None,
) -> dict[str, Model]:
    """Open a model file; encoder and banks go to the device.

    defaults: all parameters of `PatchSVDD` by name, with the values to use where an older file has
        none.
    module: as of `encoder_of`.
    only: the category to open; None: all; "": the file must have none.

    Returns models by category, which share one encoder; {"": model} of a file without categories.

    Raises ValueError if the file holds no fitted detector, is damaged, or of a newer schema, and
    for a category that it does not have; ImportError if its encoder cannot be made here.
    """
    tensors, header = store.load(path)
    _refuse_bank(path, header)
    if header["kind"] == "checkpoint":
        raise ValueError(
            f"{path} is a training {header['kind']}, not a fitted detector: finish it with "
            f"`patchsvdd train --encoder {path}`"
        )
    with naming(path):
        for name in tensors.keys() & {"mean", "light"}:
            tensors[name] = tensors[name].clone()  # small: not the file's memory
        prefixes = prefixes_in(header)
        if only is None:
            chosen = prefixes
        elif only in prefixes:
            chosen = {only: prefixes[only]}
        elif only == "":
            raise ValueError(
                f"{path} holds detectors of several categories, {', '.join(prefixes)}: name one "
                "(category, --category), or open all with CategoryDetectors.load"
            )
        else:
            has = ", ".join(prefixes) if "" not in prefixes else "no categories"
            raise ValueError(f"{path} has {has}, not {only!r}")
        encoder = encoder_of(tensors, header, module).to(device)
        return {
            category: _model_of(tensors, header, prefix, encoder, device, defaults)
            for category, prefix in chosen.items()
        }


def prefixes_in(header: Mapping[str, Any]) -> dict[str, str]:
    """What the names of each category's tensors start with; {"": ""} of a file without categories.

    Raises ValueError.
    """
    if header["kind"] != "detectors":
        return {"": ""}
    names = header["categories"]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError("the categories must be a list of names")
    if len({*names}) < len(names):
        raise ValueError("two categories have one name")
    return {name: prefix_of(number) for number, name in enumerate(names)}


def _model_of(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    prefix: str,
    encoder: PatchEncoder,
    device: torch.device,
    defaults: Mapping[str, Any],
) -> Model:
    """The model of one category, whose own tensors' names start with the prefix."""
    parameters = parameters_in(header)
    unknown = parameters.keys() - defaults.keys()
    if unknown:
        raise ValueError(f"it has parameters that no detector has: {', '.join(sorted(unknown))}")
    parameters = resolved({**defaults, **parameters}, encoder)
    check_parameters(parameters)
    encoder.check_levels(parameters["levels"])
    mean = tensors["mean"]
    # Early files of schema 2 have no light: take the colour of the mean image.
    light = tensors.get("light", mean.mean(dim=(1, 2)))
    height, width = mean.shape[1], mean.shape[2]
    _check("mean", mean, (3, height, width))
    _check("light", light, (3,))
    if parse_size(parameters["image_size"]) not in (None, (height, width)):
        raise ValueError(
            f"its images are of {parameters['image_size']} pixels, its mean of {width}x{height}"
        )
    banks: dict[PatchLevel, NormalBank] = {}
    for level in parameters["levels"]:
        bank = NormalBank.from_state_dict(below(tensors, f"{prefix}bank.{level}."))
        _check_bank(bank, level, (height, width), parameters["embedding_dim"])
        banks[level] = bank.to(device)
    counts = {len(bank.groups) for bank in banks.values()}
    if len(counts) > 1:
        raise ValueError("the banks are not of the same images")
    (count,) = counts
    if header["schema_version"] < _CALIBRATION_SCHEMA:
        calibration = calibrate(
            banks, (height, width), parameters["combination"], reweight=parameters["reweight"]
        )
    else:
        stored = {k: v.clone() for k, v in below(tensors, f"{prefix}calibration.").items()}
        calibration = Calibration.from_tensors(stored) if stored else None
        _check_calibration(
            calibration, {str(level) for level in banks}, count, encoder.surroundings != 0
        )
    kept = below(tensors, f"{prefix}training.")
    if "statistics" in kept:
        kept["statistics"] = kept["statistics"].clone()
    gallery = Gallery.from_tensors(kept) if kept else None
    if gallery is not None and len(gallery.names) != count:
        raise ValueError(f"{count} training images cannot have {len(gallery.names)} names")
    record = record_of(header["record"])
    samples = samples_from_header(header)
    return Model(
        *(parameters, encoder, mean, light, banks, calibration, gallery, record, samples),
        file_of(tensors),
    )


def parameters_in(header: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in a file's header, under the names and with the values they have today."""
    parameters = from_header(header)
    if header["schema_version"] < _CALIBRATION_SCHEMA and parameters.get("mean") != "channel":
        parameters["mean"] = "paper"  # the only mean image that these schemas had
    return parameters


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.float32 or tensor.shape != shape:
        raise ValueError(
            f"{name} must be float32 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity")


def _check_bank(
    bank: NormalBank, level: PatchLevel, image_shape: tuple[int, int], dim: int
) -> None:
    grid = level.grid_shape(*image_shape)
    if bank.grid != grid or bank.dim != dim:
        raise ValueError(
            f"the bank of {level} must have a grid of {list(grid)} and D = {dim}, "
            f"got {list(bank.grid)} and D = {bank.dim}"
        )


def _check_calibration(
    calibration: Calibration | None, levels: set[str], num_images: int, has_border: bool
) -> None:
    calibrated = 1 if calibration is None else calibration.num_images
    if calibrated != num_images:
        raise ValueError(f"{num_images} training images cannot have {calibrated} scores")
    if calibration is not None and set(calibration.level_scores) != levels:
        raise ValueError(f"the calibration must have scores of {', '.join(sorted(levels))}")
    if calibration is not None and set(calibration.border) != (levels if has_border else set()):
        raise ValueError("the calibration's factors of the border do not suit the encoder")


def load_encoder(path: str | Path) -> PatchEncoder:
    """Read an encoder from a model file, a training checkpoint, or an official checkpoint (.pkl).

    Raises ValueError if the file is none of these; ImportError if its encoder cannot be made here.
    """
    if Path(path).suffix in _FOREIGN_SUFFIXES:
        return load_official_checkpoint(path)
    tensors, header = store.load(path)
    _refuse_bank(path, header)
    with naming(path):
        return encoder_of(tensors, header)


def _refuse_bank(path: str | Path, header: Mapping[str, Any]) -> None:
    if header["kind"] == "bank":
        raise ValueError(f"{path} holds a bank alone, for `NormalBank.open`, and no encoder")


def preparation_of(path: str | Path) -> dict[str, str]:
    """How images were prepared for the encoder in a file: the `illumination` and `mean` to use."""
    if Path(path).suffix in _FOREIGN_SUFFIXES:
        return {"illumination": "as_is", "mean": "paper"}
    _, header = store.load(path)
    with naming(path):
        parameters = parameters_in(header)
        return {
            "illumination": illumination_of(parameters),
            "mean": parameters.get("mean", "pixel"),
        }


def encoder_of(
    tensors: Mapping[str, Tensor], header: Mapping[str, Any], module: nn.Module | None = None
) -> PatchEncoder:
    """The encoder in a file's tensors; in a checkpoint of a training with checks, the best so far.

    module: of the architecture, for an encoder that has no name; the weights are the file's.

    Raises ValueError if there is none, or if it does not fit the levels in the header; ImportError
    if it cannot be made here.
    """
    stored = below(tensors, "training.best.") or below(tensors, "encoder.")
    parameters = from_header(header)
    name = parameters.get("encoder", PATCH_SVDD)
    if name == PATCH_SVDD:
        return _patch_svdd_of(stored, parameters)
    settings = header["encoder"]
    if module is None:
        encoder: PatchEncoder = rebuilt_encoder(name, settings, below(stored, "backbone."))
    elif isinstance(module, PatchEncoder):
        encoder = copy.deepcopy(module)
        made = json.loads(json.dumps(encoder.settings()))
        differing = [k for k in {**settings, **made} if settings.get(k) != made.get(k)]
        if differing:
            raise ValueError(f"the encoder given differs from the file's in {', '.join(differing)}")
    else:
        encoder = BackboneEncoder(copy.deepcopy(module), name=name, **settings)
    ours = encoder.state_dict()
    stored = {  # files hold no bool, of which a forged one may have values that are none
        key: value.bool() if key in ours and ours[key].dtype == torch.bool else value
        for key, value in stored.items()
    }
    if _shapes(stored) != _shapes(ours):
        raise ValueError(f"its weights are not those of the encoder {name}")
    encoder.load_state_dict(stored)
    return encoder.eval()


def _patch_svdd_of(stored: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> PatchEncoder:
    with torch.device("meta"):  # takes no memory, however large a header says it is
        encoder = new_encoder(parameters)
    sizes = {level.size for level in parameters["levels"]}
    if _shapes(stored) != _shapes(encoder.state_dict()) or sizes - {*encoder.patch_sizes}:
        raise ValueError(
            f"its encoder is not one for patches of {max(sizes)} pixels and "
            f"D = {parameters['embedding_dim']}"
        )
    own = {name: value.clone() for name, value in stored.items()}  # not the file's memory
    encoder.load_state_dict(own, assign=True)
    return encoder.eval()


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in state.items()}
