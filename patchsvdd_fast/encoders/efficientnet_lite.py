"""EfficientNet-Lite, as a backbone: images to the maps of its stages (Tan & Le, 2019).

The Lite networks have no squeeze-and-excitation: every value of a map depends on a bounded part of
the image, so that large images can be encoded in tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_STEM_CHANNELS = 32
_EPSILON = 1e-3  # of batch normalisation
_CHANNEL_MULTIPLE = 8
_LAYOUT = torch.channels_last


class _Stage(NamedTuple):
    """Blocks in a row with the same number of channels."""

    repeats: int
    kernel: int
    stride: int
    """Of its first block."""
    expansion: int
    """Channels inside a block, as a multiple of those that enter it."""
    channels: int


_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)
_MAPS = (0, 1, 2, 4, 6)  # stages that end where the stride doubles next: strides 2, 4, 8, 16, 32

VARIANTS: dict[str, tuple[float, float]] = {
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
}
"""The networks by name: factors of their channels and of the blocks of a stage."""


class EfficientNetLite(nn.Module):
    """The stages of an EfficientNet-Lite, without its classifier.

    variant: a key of `VARIANTS`.
    maps: which of its five maps to return, 0 to 4: of strides 2, 4, 8, 16 and 32. Stages behind
        the last of them are left out.

    Batch normalisation is folded into the convolutions (`load_pretrained`). Raises ValueError for
    an unknown variant or map.
    """

    def __init__(self, variant: str = "efficientnet_lite0", maps: Sequence[int] = (1, 2, 3)):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {tuple(VARIANTS)}, got {variant!r}")
        if not maps or sorted({*maps}) != list(maps) or not 0 <= maps[0] <= maps[-1] < len(_MAPS):
            raise ValueError(f"maps must be ascending numbers of 0 to 4, got {list(maps)}")
        self.stem = nn.Conv2d(3, _STEM_CHANNELS, 3, stride=2)
        self.blocks = nn.ModuleList()
        entering, ends = _STEM_CHANNELS, []
        for stage in _stages_of(variant)[: _MAPS[maps[-1]] + 1]:
            for number in range(stage.repeats):
                stride = stage.stride if number == 0 else 1
                self.blocks.append(_Block(entering, stage, stride))
                entering = stage.channels
            ends.append(len(self.blocks) - 1)
        self.to(memory_format=_LAYOUT)  # type: ignore[call-overload]
        self._returned = {ends[_MAPS[number]] for number in maps}

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> the maps, [B, C, ceil(H / stride), ceil(W / stride)] each."""
        # Channels last: with another layout a CPU takes up to four times as long.
        values = F.relu6(_convolved(images.contiguous(memory_format=_LAYOUT), self.stem))
        maps = []
        for number, block in enumerate(self.blocks):
            values = block(values)
            if number in self._returned:
                maps.append(values)
        return maps

    def load_pretrained(self, state: Mapping[str, Tensor]) -> None:
        """Take over published weights, of which those of the stages left out are not needed.

        state: a state dict with the names of the package efficientnet-lite-pytorch. Raises
        ValueError if weights are missing or have another shape.
        """
        layers: list[tuple[nn.Conv2d, str, str]] = [(self.stem, "_conv_stem", "_bn0")]
        for number, block in enumerate(self.blocks):
            assert isinstance(block, _Block)
            prefix = f"_blocks.{number}."
            layers += [(c, prefix + name, prefix + norm) for c, name, norm in block.layers()]
        with torch.no_grad():
            for convolution, name, norm in layers:
                weight = _of_shape(state, f"{name}.weight", convolution.weight.shape)
                gain, bias, mean, variance = (
                    _of_shape(state, f"{norm}.{part}", weight.shape[:1])
                    for part in ("weight", "bias", "running_mean", "running_var")
                )
                scale = gain / (variance + _EPSILON).sqrt()
                assert convolution.bias is not None
                convolution.weight.copy_(weight * scale[:, None, None, None])
                convolution.bias.copy_(bias - mean * scale)


class _Block(nn.Module):
    """A 1x1 convolution that expands, a depthwise one, and a 1x1 one that projects."""

    def __init__(self, entering: int, stage: _Stage, stride: int) -> None:
        super().__init__()
        inside = entering * stage.expansion
        self.expand = nn.Conv2d(entering, inside, 1) if stage.expansion > 1 else None
        self.depthwise = nn.Conv2d(inside, inside, stage.kernel, stride=stride, groups=inside)
        self.project = nn.Conv2d(inside, stage.channels, 1)
        self.has_shortcut = stride == 1 and entering == stage.channels

    def forward(self, values: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', ceil(H / stride), ceil(W / stride)]."""
        inside = values if self.expand is None else F.relu6(self.expand(values))
        projected: Tensor = self.project(F.relu6(_convolved(inside, self.depthwise)))
        return projected + values if self.has_shortcut else projected

    def layers(self) -> Iterator[tuple[nn.Conv2d, str, str]]:
        """Its convolutions, with the published names of each and of the norm behind it."""
        if self.expand is not None:
            yield self.expand, "_expand_conv", "_bn0"
        yield self.depthwise, "_depthwise_conv", "_bn1"
        yield self.project, "_project_conv", "_bn2"


def _stages_of(variant: str) -> list[_Stage]:
    """The stages of a variant; the first and last keep their number of blocks."""
    width, depth = VARIANTS[variant]
    last = len(_STAGES) - 1
    return [
        stage._replace(
            channels=_scaled(stage.channels, width),
            repeats=stage.repeats if i in (0, last) else math.ceil(stage.repeats * depth),
        )
        for i, stage in enumerate(_STAGES)
    ]


def _scaled(channels: int, factor: float) -> int:
    """A multiple of 8 near `channels` x `factor`, at least nine tenths of it."""
    wanted = channels * factor
    rounded = max(8, int(wanted + 4) // _CHANNEL_MULTIPLE * _CHANNEL_MULTIPLE)
    return rounded if rounded >= 0.9 * wanted else rounded + _CHANNEL_MULTIPLE


def _convolved(values: Tensor, layer: nn.Conv2d) -> Tensor:
    """The convolution of [B, C, H, W], padded so that cell i begins at pixel i x stride - low.

    As TensorFlow's "same" padding for even sizes. There, an odd size would move all cells by half
    a stride; here the cells of a part of an image are those of the whole.
    """
    (kernel, _), (stride, _) = layer.kernel_size, layer.stride
    low = (kernel - stride) // 2
    pads = []
    for size in (values.shape[3], values.shape[2]):
        cells = (size + stride - 1) // stride  # of positive numbers alone, as ONNX divides
        pads += [low, (cells - 1) * stride + kernel - size - low]
    return F.conv2d(F.pad(values, pads), layer.weight, layer.bias, stride, groups=layer.groups)


def _of_shape(state: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> Tensor:
    if name not in state:
        raise ValueError(f"the weights lack {name}")
    if state[name].shape != torch.Size(shape):
        raise ValueError(
            f"{name} must have shape {list(shape)}, got {list(state[name].shape)}: these are the "
            "weights of another network"
        )
    return state[name].float()
