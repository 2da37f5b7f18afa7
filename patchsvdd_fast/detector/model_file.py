"""Detectors in files: writing, opening, and saying what is inside; see `store` for the format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..encoders.patch_svdd import SMALL_PATCH, HierarchicalEncoder, load_official_checkpoint
from ..files import store
from ..files.store import below, naming
from ..images.drift import STATISTICS, usual_range
from ..images.gallery import Gallery
from ..images.light import MEANS
from ..images.prepare import parse_size
from ..score.calibration import Calibration, calibrate
from ..search.bank import NormalBank
from ..training import settings as recipes
from ..training.checkpoints import encoder_tensors
from ..training.trainer import record_of

if TYPE_CHECKING:
    from .patch_svdd import PatchSVDD

Detector = TypeVar("Detector", bound="PatchSVDD")

_CALIBRATION_SCHEMA = 4  # files before it lack the levels' scores, and are calibrated anew
_FOREIGN_SUFFIXES = (".pkl", ".pt", ".pth")


def save_detector(detector: PatchSVDD, path: str | Path) -> None:
    """Write a fitted detector to one file, atomically. Raises OSError."""
    tensors = encoder_tensors(detector.encoder_)
    tensors |= {"mean": detector.mean_, "light": detector.light_}
    for level, bank in detector.banks_.items():
        tensors |= {f"bank.{level}.{name}": value for name, value in bank.state_dict().items()}
    if detector.calibration_ is not None:
        tensors |= {f"calibration.{k}": v for k, v in detector.calibration_.tensors().items()}
    if detector.gallery_ is not None:
        tensors |= {f"training.{k}": v for k, v in detector.gallery_.tensors().items()}
    header = detector.header() | {"record": asdict(detector.record_)}
    store.save(path, "detector", tensors, header)


def load_detector(
    cls: type[Detector], path: str | Path, device: str, target: torch.device
) -> Detector:
    """Open a detector's file. Raises ValueError if it holds none, or is damaged."""
    tensors, header = store.load(path)
    if header["kind"] != "detector":
        raise ValueError(
            f"{path} is a training {header['kind']}, not a fitted detector: finish it with "
            f"`patchsvdd train --encoder {path}`"
        )
    with naming(path):
        return _detector_of(cls, tensors, header, device, target)


def _detector_of(
    cls: type[Detector],
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    device: str,
    target: torch.device,
) -> Detector:
    parameters = dict(header["parameters"])
    parameters["levels"] = _levels(parameters)
    if isinstance(parameters["image_size"], list):
        parameters["image_size"] = tuple(parameters["image_size"])
    if header["schema_version"] < _CALIBRATION_SCHEMA and parameters.get("mean") != "channel":
        parameters["mean"] = "paper"  # then the only one
    detector = cls(**{**parameters, "device": device})
    detector.check_parameters()
    detector.encoder_ = encoder_of(tensors, header).to(target)
    detector.mean_ = tensors["mean"]
    # Files of before illumination mattered lack it: then it is as it is.
    detector.light_ = tensors.get("light", detector.mean_.mean(dim=(1, 2)))
    height, width = detector.image_shape()
    _check("mean", detector.mean_, (3, height, width))
    _check("light", detector.light_, (3,))
    if parse_size(detector.image_size) not in (None, (height, width)):
        raise ValueError(
            f"its images are of {detector.image_size} pixels, its mean of {width}x{height}"
        )
    detector.banks_ = {}
    for level in detector.levels:
        bank = NormalBank.from_state_dict(below(tensors, f"bank.{level}."))
        _check_bank(bank, level, (height, width), detector)
        detector.banks_[level] = bank.to(target)
    count = len(next(iter(detector.banks_.values())).groups)
    if header["schema_version"] < _CALIBRATION_SCHEMA:
        detector.calibration_ = calibrate(detector.banks_, (height, width), detector.combination)
    else:
        stored = below(tensors, "calibration.")
        detector.calibration_ = Calibration.from_tensors(stored) if stored else None
        _check_calibration(detector.calibration_, detector.levels, count)
    gallery = below(tensors, "training.")
    detector.gallery_ = Gallery.from_tensors(gallery) if gallery else None
    if detector.gallery_ is not None and len(detector.gallery_.names) != count:
        raise ValueError(
            f"{count} training images cannot have {len(detector.gallery_.names)} names"
        )
    detector.record_ = record_of(header["record"])
    return detector


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.float32 or tensor.shape != shape:
        raise ValueError(
            f"{name} must be float32 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity")


def _check_bank(
    bank: NormalBank, level: PatchLevel, image_shape: tuple[int, int], detector: PatchSVDD
) -> None:
    grid, count = level.grid_shape(*image_shape), len(bank.groups)
    if bank.grid != grid or bank.dim != detector.embedding_dim:
        raise ValueError(
            f"the bank of {level} must have a grid of {list(grid)} and D = "
            f"{detector.embedding_dim}, got {list(bank.grid)} and D = {bank.dim}"
        )
    others = {len(other.groups) for other in detector.banks_.values()}
    if others - {count}:
        raise ValueError("the banks are not of the same images")


def _check_calibration(
    calibration: Calibration | None, levels: Sequence[PatchLevel], num_images: int
) -> None:
    calibrated = 1 if calibration is None else calibration.num_images
    if calibrated != num_images:
        raise ValueError(f"{num_images} training images cannot have {calibrated} scores")
    if calibration is not None and set(calibration.level_scores) != set(map(str, levels)):
        raise ValueError(f"the calibration must have scores of {', '.join(map(str, levels))}")


def load_encoder(path: str | Path) -> HierarchicalEncoder:
    """Read the encoder of a detector, a training checkpoint, or an official checkpoint (.pkl, .pt).

    Raises ValueError if the file is none of these.
    """
    if Path(path).suffix in _FOREIGN_SUFFIXES:
        return load_official_checkpoint(path)
    tensors, header = store.load(path)
    with naming(path):
        return encoder_of(tensors, header)


def preparation_of(path: str | Path) -> dict[str, str]:
    """How images were prepared for the encoder of a file: `illumination` and `mean`."""
    if Path(path).suffix in _FOREIGN_SUFFIXES:
        return {"illumination": "as_is", "mean": "paper"}
    _, header = store.load(path)
    parameters = header["parameters"]
    with naming(path):
        mode = parameters.get("mode", "faithful")
        return {
            "illumination": parameters.get("illumination") or recipes.illumination_of(mode),
            "mean": parameters.get("mean", "pixel"),
        }


def encoder_of(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> HierarchicalEncoder:
    """The encoder in a file's tensors; of a training run with checks, the best so far.

    Raises ValueError if they hold none, or one of other levels than the header says.
    """
    stored = below(tensors, "training.best.") or below(tensors, "encoder.")
    dim = header["parameters"]["embedding_dim"]
    largest = max(level.size for level in _levels(header["parameters"]))
    depth = (largest // SMALL_PATCH).bit_length()
    with torch.device("meta"):  # takes no memory, however large a header says it is
        encoder = HierarchicalEncoder(dim, depth)
    wanted = {name: value.shape for name, value in encoder.state_dict().items()}
    found = {name: value.shape for name, value in stored.items()}
    sizes = {level.size for level in _levels(header["parameters"])}
    if (
        found != wanted
        or sizes - {*encoder.patch_sizes}
        or any(value.dtype != torch.float32 for value in stored.values())
    ):
        raise ValueError(f"its encoder is not one for patches of {largest} pixels and D = {dim}")
    encoder.load_state_dict(stored, assign=True)
    return encoder.eval()


def describe(path: str | Path) -> dict[str, str]:
    """What a model file or checkpoint holds, by name, in words. Raises ValueError as `load`."""
    tensors, header = store.load(path)
    with naming(path):
        return _facts(tensors, header, Path(path).stat().st_size)


def _facts(tensors: Mapping[str, Tensor], header: Mapping[str, Any], size: int) -> dict[str, str]:
    parameters, record = header["parameters"], record_of(header.get("record", {}))
    facts = {
        "file": f"{header['kind']}, schema {header['schema_version']}, {size / 2**20:,.1f} MiB",
        "written by": ", ".join(f"{k} {v}" for k, v in header.get("versions", {}).items()),
        "mode": str(parameters.get("mode")),
        "steps": f"{record.steps or header.get('steps', 0):,}",
        "images": f"{_sides(tensors['mean'])}, light {parameters.get('illumination')}",
        "subtracted": MEANS[parameters.get("mean", "pixel")],
        "joined by": str(parameters.get("combination")),
    }
    if record.best_step is not None:
        facts["steps"] += f", weights of step {record.best_step:,} kept"
    for level in _levels(parameters):
        bank = below(tensors, f"bank.{level}.")
        if bank:
            rows, dim = bank["data"].shape
            clusters = f", {len(bank['centroids']):,} clusters" if "centroids" in bank else ""
            facts[f"bank {level}"] = (
                f"{rows:,} x {dim}, {len(bank['groups']):,} images, stride {level.stride}{clusters}"
            )
    stored = below(tensors, "calibration.")
    if stored:
        calibration = Calibration.from_tensors(stored)
        rate = max(parameters["contamination"], calibration.smallest_rate)
        facts["threshold"] = (
            f"{calibration.threshold(rate):.6g}, exceeded by at most {rate:.2g} of good images"
        )
    if below(tensors, "training.names"):
        gallery = Gallery.from_tensors(below(tensors, "training."))
        low, high = usual_range(gallery.statistics)
        facts["usual"] = ", ".join(
            f"{name} {a:.4g} to {b:.4g}"
            for name, a, b in zip(STATISTICS, low.tolist(), high.tolist(), strict=True)
            if b < math.inf
        )
        kept = "names" if gallery.pictures is None else "names and pictures"
        facts["training images"] = f"{kept} of {len(gallery.names):,}"
    return facts


def _sides(mean: Tensor) -> str:
    return f"{mean.shape[2]}x{mean.shape[1]} pixels"


def _levels(parameters: Mapping[str, Any]) -> tuple[PatchLevel, ...]:
    return tuple(PatchLevel(int(size), int(stride)) for size, stride in parameters["levels"])
