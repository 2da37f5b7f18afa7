"""Write and open model files.

What a file holds is a plain value, `Model`: `PatchSVDD` makes one to save, and is filled in from
one when loaded. The format itself, with header and checksums, is that of `files.store`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..encoders.levels import PatchLevel
from ..encoders.patch_encoder import PatchEncoder
from ..encoders.pretrained import PATCH_SVDD
from ..files import shards, store
from ..files.store import MappedFile, below, file_of, naming
from ..images.gallery import Gallery
from ..images.samples import AS_STORED, Samples, samples_from_header
from ..score.calibration import Calibration, calibrate
from ..search.bank import NormalBank
from ..search.processes import Processes
from ..search.rounds import AnyBank
from ..training.checkpoints import encoder_tensors
from ..training.record import TrainingRecord, record_of
from .encoder_file import CALIBRATION_SCHEMA, encoder_of, parameters_in, refuse_bank
from .parameters import check_parameters, parse_size, resolved, to_header, usual_light
from .shards import banks_of_parts, is_sharded, load_main, parts_in, save_in_shards


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
    banks: dict[PatchLevel, AnyBank]
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
    """Write a model to one file, atomically; one whose banks lie in shards to several.

    Raises OSError; ValueError for a name that does not suit it.
    """
    header, tensors = _shared(model)
    tensors |= _own(model, "")
    if is_sharded(model.banks):
        save_in_shards(path, header, tensors, model.banks)
    elif shards.is_index(path):
        raise ValueError(
            f"{path} would be a model in shards, which this one is not (fit with shard_bytes, "
            "train --shard-bank)"
        )
    else:
        store.save(path, "detector", tensors, header)


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
        state = bank.state_dict() if isinstance(bank, NormalBank) else {}  # shards have their own
        tensors |= {f"bank.{level}.{name}": value for name, value in state.items()}
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
    if shards.is_index(path):
        return {"": _load_shards(path, device, defaults, module, only)}
    tensors, header = store.load(path)
    refuse_bank(path, header)
    if header["kind"] in ("sharded", "shard"):
        raise ValueError(f"{path} is a part of a model: open its index, NAME{shards.SUFFIX}")
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
        parameters = _checked_parameters(header, encoder, defaults)
        return {
            category: _model_of(
                *(tensors, header, prefix, encoder, parameters),
                _banks_of(tensors, prefix, parameters["levels"], device),
            )
            for category, prefix in chosen.items()
        }


def _load_shards(
    path: str | Path,
    device: torch.device,
    defaults: Mapping[str, Any],
    module: nn.Module | None,
    only: str | None,
) -> Model:
    """As `load_models`, a model in shards, which all processes open at once."""
    processes = Processes()
    with processes.together():
        if only:
            raise ValueError(f"{path} has no categories, not {only!r}")
        index = shards.read_index(path)
        tensors, header = load_main(index)
        with naming(path):
            encoder = encoder_of(tensors, header, module).to(device)
            parameters = _checked_parameters(header, encoder, defaults)
        parts = parts_in(index, parameters["levels"], device, processes)
    banks = banks_of_parts(parts)
    with processes.together(), naming(path):
        return _model_of(tensors, header, "", encoder, parameters, banks)


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


def _checked_parameters(
    header: Mapping[str, Any], encoder: PatchEncoder, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    parameters = parameters_in(header)
    unknown = parameters.keys() - defaults.keys()
    if unknown:
        raise ValueError(f"it has parameters that no detector has: {', '.join(sorted(unknown))}")
    parameters = resolved({**defaults, **parameters}, encoder)
    check_parameters(parameters)
    encoder.check_levels(parameters["levels"])
    return parameters


def _banks_of(
    tensors: Mapping[str, Tensor],
    prefix: str,
    levels: Sequence[PatchLevel],
    device: torch.device,
) -> dict[PatchLevel, AnyBank]:
    """The banks of one category, whose own tensors' names start with the prefix."""
    return {
        level: NormalBank.from_state_dict(below(tensors, f"{prefix}bank.{level}.")).to(device)
        for level in levels
    }


def _model_of(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    prefix: str,
    encoder: PatchEncoder,
    parameters: dict[str, Any],
    banks: dict[PatchLevel, AnyBank],
) -> Model:
    """The model of one category, whose own tensors' names start with the prefix."""
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
    for level, bank in banks.items():
        _check_bank(bank, level, (height, width), parameters["embedding_dim"])
    counts = {len(bank.groups) for bank in banks.values()}
    if len(counts) > 1:
        raise ValueError("the banks are not of the same images")
    (count,) = counts
    if header["schema_version"] < CALIBRATION_SCHEMA:
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
        *(dict(parameters), encoder, mean, light, banks, calibration, gallery, record, samples),
        file_of(tensors),
    )


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.float32 or tensor.shape != shape:
        raise ValueError(
            f"{name} must be float32 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity")


def _check_bank(bank: AnyBank, level: PatchLevel, image_shape: tuple[int, int], dim: int) -> None:
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
