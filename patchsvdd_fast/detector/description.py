"""Describe model files and training checkpoints in words, as `patchsvdd info` prints it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..encoders.pretrained import PATCH_SVDD
from ..files import store
from ..files.folders import counted
from ..files.shards import first_file
from ..files.store import below, naming
from ..images.drift import STATISTICS, usual_range
from ..images.gallery import Gallery
from ..images.light import MEANS
from ..images.samples import samples_from_header
from ..score.calibration import Calibration
from ..training.record import record_of
from .encoder_file import parameters_in
from .model_file import prefixes_in


def describe(path: str | Path) -> dict[str, str]:
    """What `patchsvdd info FILE` prints of a model file or checkpoint: values in words, by name.

    Raises ValueError as `files.store.load` does.
    """
    first = first_file(path)
    tensors, header = store.load(first)
    with naming(path):
        return _facts(tensors, header, first.stat().st_size)


def _bank_in_words(bank: Mapping[str, Tensor], stride: str) -> str:
    rows, dim, images = *bank["data"].shape, counted(len(bank["groups"]), "image")
    clusters = f", {counted(len(bank['centroids']), 'cluster')}" if "centroids" in bank else ""
    coreset = f", covering radius {float(bank['radius']):.4g}" if "radius" in bank else ""
    return f"{rows:,} x {dim}, {images}{stride}{clusters}{coreset}"


def _facts(tensors: Mapping[str, Tensor], header: Mapping[str, Any], size: int) -> dict[str, str]:
    facts = {
        "file": f"{header['kind']}, schema {header['schema_version']}, {size / 2**20:,.1f} MiB",
        "written by": ", ".join(f"{k} {v}" for k, v in header.get("versions", {}).items()),
    }
    if header["kind"] == "bank":
        return facts | {"bank": _bank_in_words(tensors, "")}
    parameters, record = parameters_in(header), record_of(header.get("record", {}))
    facts |= {
        "encoder": parameters.get("encoder", PATCH_SVDD),
        "mode": str(parameters.get("mode")),
        "steps": f"{record.steps or header.get('steps', 0):,}",
        "images": f"{_sides(tensors['mean'])}, light {parameters.get('illumination')}",
        "subtracted": MEANS[parameters.get("mean", "pixel")],
        "joined by": str(parameters.get("combination")),
    }
    if parameters["reweight"] is not None:
        facts["re-weighted"] = f"image scores, by {counted(parameters['reweight'], 'neighbour')}"
    samples = samples_from_header(header).in_words()
    if samples and "samples" in header:
        facts["samples"] = samples
    if parameters["encoding_precision"] != "float32":
        facts["encoder"] += f", computing in {parameters['encoding_precision']}"
    if parameters.get("encoder", PATCH_SVDD) != PATCH_SVDD:
        del facts["mode"], facts["steps"]  # nothing was trained
    if record.best_step is not None:
        facts["steps"] += f", weights of step {record.best_step:,} kept"
    if "images_of_shards" in header:
        images = header["images_of_shards"]
        facts["banks"] = f"{counted(sum(images), 'image')} in {counted(len(images), 'shard')}"
    for category, prefix in prefixes_in(header).items():
        own = _own_facts(below(tensors, prefix), parameters)
        facts |= {f"{category}: {name}" if category else name: own[name] for name in own}
    return facts


def _own_facts(tensors: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> dict[str, str]:
    """What is told of one category; tensors: its own, by their names within it."""
    facts: dict[str, str] = {}
    for level in parameters["levels"]:
        bank = below(tensors, f"bank.{level}.")
        if bank:
            facts[f"bank {level}"] = _bank_in_words(bank, f", stride {level.stride}")
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
