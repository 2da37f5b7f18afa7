"""The encoder in a model file, a training checkpoint or an official checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..encoders.backbone import BackboneEncoder
from ..encoders.patch_encoder import PatchEncoder
from ..encoders.patch_svdd import load_official_checkpoint
from ..encoders.pretrained import PATCH_SVDD, rebuilt_encoder
from ..files import store
from ..files.shards import first_file
from ..files.store import below, naming
from .parameters import from_header, illumination_of, new_encoder

CALIBRATION_SCHEMA = 4
"""Of files, the first with scores of each level; older files are calibrated anew."""
_FOREIGN_SUFFIXES = (".pkl", ".pt", ".pth")  # of official checkpoints


def load_encoder(path: str | Path) -> PatchEncoder:
    """Read an encoder from a model file, a training checkpoint, or an official checkpoint (.pkl).

    Raises ValueError if the file is none of these; ImportError if its encoder cannot be made here.
    """
    if Path(path).suffix in _FOREIGN_SUFFIXES:
        return load_official_checkpoint(path)
    tensors, header = store.load(first_file(path))
    refuse_bank(path, header)
    with naming(path):
        return encoder_of(tensors, header)


def refuse_bank(path: str | Path, header: Mapping[str, Any]) -> None:
    """Raise ValueError if a file holds a bank alone."""
    if header["kind"] == "bank":
        raise ValueError(f"{path} holds a bank alone, for `NormalBank.open`, and no encoder")


def preparation_of(path: str | Path) -> dict[str, str]:
    """How images were prepared for the encoder in a file: the `illumination` and `mean` to use."""
    if Path(path).suffix in _FOREIGN_SUFFIXES:
        return {"illumination": "as_is", "mean": "paper"}
    _, header = store.load(first_file(path))
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


def parameters_in(header: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in a file's header, under the names and with the values they have today."""
    parameters = from_header(header)
    if header["schema_version"] < CALIBRATION_SCHEMA and parameters.get("mean") != "channel":
        parameters["mean"] = "paper"  # the only mean image that these schemas had
    return parameters
