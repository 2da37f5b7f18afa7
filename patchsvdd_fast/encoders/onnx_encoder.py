"""Encoders as nodes of an ONNX graph: the twin of `PatchEncoder.dense` for `patchsvdd export`."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..files.onnx_graph import OPSET, Graph
from .levels import PatchLevel
from .patch_encoder import PatchEncoder
from .patch_svdd import LEAKY_SLOPE, SMALL_PATCH, TRUNK_STRIDE, HierarchicalEncoder, QuadrantHead

_TO_THE_END = 2**31 - 1


def add_encoder(
    graph: Graph,
    encoder: PatchEncoder,
    levels: Sequence[PatchLevel],
    images: str,
    size: tuple[int, int] | None,
) -> list[str]:
    """Embed the patches of normalised images [N, 3, H, W]: [N, I, J, D] per level.

    size: (height, width) in pixels; None: any, which Patch SVDD's encoder alone can do.
    """
    if isinstance(encoder, HierarchicalEncoder):
        nodes = _PatchSVDDNodes(graph, encoder, images)
        return [graph.add("Transpose", nodes.maps_of(level), perm=[0, 2, 3, 1]) for level in levels]
    assert size is not None
    return _add_traced(graph, encoder, levels, images, size)


class _PatchSVDDNodes:
    """Patch SVDD's encoder, node by node, so that the model stays small and H and W free.

    Maps are [N, D, I, J].
    """

    def __init__(self, graph: Graph, encoder: HierarchicalEncoder, images: str) -> None:
        self.graph, self.encoder = graph, encoder
        self.layer_names = {layer: name for name, layer in encoder.named_modules()}
        self.maps = {PatchLevel(SMALL_PATCH, TRUNK_STRIDE): self.trunk(images)}

    def trunk(self, images: str) -> str:
        """The small encoder's dense map."""
        # A patch's last row and column do not enter its embedding. Without those of the image, the
        # map has exactly the rows and columns of its grid, and so have all maps built on it.
        maps = self.sliced(images, end=-1)
        for layer in self.encoder.small:
            if isinstance(layer, nn.Conv2d):
                maps = self.convolved(maps, layer, strides=list(layer.stride))
            elif isinstance(layer, nn.LeakyReLU):
                maps = self.graph.add("LeakyRelu", maps, alpha=LEAKY_SLOPE)
            else:
                maps = self.graph.add("Tanh", maps)
        return maps

    def maps_of(self, level: PatchLevel) -> str:
        """The level's embeddings, built on the maps of the levels below it as in the encoder."""
        if level not in self.maps:
            self.maps[level] = self.built_on_below(level)
        return self.maps[level]

    def built_on_below(self, level: PatchLevel) -> str:
        """Those of the trunk at larger strides, or of a head on the maps of half the size."""
        if level.size == SMALL_PATCH:
            trunk = self.maps[PatchLevel(SMALL_PATCH, TRUNK_STRIDE)]
            return self.sliced(trunk, step=level.stride // TRUNK_STRIDE)
        half = level.size // 2
        below = PatchLevel(half, math.gcd(half, level.stride))
        head = self.encoder.head(level.size)
        assert isinstance(head, QuadrantHead)
        # Quadrants need no gathering: a dilated convolution adds up the same products.
        joined = self.convolved(
            self.maps_of(below),
            head.join,
            strides=[level.stride // below.stride] * 2,
            dilations=[half // below.stride] * 2,
        )
        active = self.graph.add("LeakyRelu", joined, alpha=LEAKY_SLOPE)
        return self.graph.add("Tanh", self.convolved(active, head.project))

    def convolved(self, maps: str, layer: nn.Conv2d, **attributes: Any) -> str:
        """A convolution by the layer's weights, with strides and dilations as given."""
        assert layer.bias is not None
        name = self.layer_names[layer]
        weight = self.graph.weight(f"{name}.weight", layer.weight)
        bias = self.graph.weight(f"{name}.bias", layer.bias)
        return self.graph.add("Conv", maps, weight, bias, **attributes)

    def sliced(self, maps: str, end: int = _TO_THE_END, step: int = 1) -> str:
        """Every `step`-th row and column before `end`."""
        bounds = ([0, 0], [end, end], [2, 3], [step, step])
        return self.graph.add("Slice", maps, *map(self.graph.number, bounds))


class _Dense(nn.Module):
    """An encoder's `dense` at some levels, as a module."""

    def __init__(self, encoder: PatchEncoder, levels: Sequence[PatchLevel]) -> None:
        super().__init__()
        self.encoder, self.levels = encoder, levels

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.encoder.dense(images, self.levels))


def _add_traced(
    graph: Graph,
    encoder: PatchEncoder,
    levels: Sequence[PatchLevel],
    images: str,
    size: tuple[int, int],
) -> list[str]:
    """What PyTorch records of any encoder at work, for images of one size."""
    import onnx

    names = [str(level) for level in levels]
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the recording makes a constant, such as sizes
        torch.onnx.export(
            _Dense(copy.deepcopy(encoder).cpu(), levels).eval(),
            (torch.zeros(1, 3, *size),),
            file,  # type: ignore[arg-type]
            input_names=["images"],
            output_names=names,
            dynamic_axes={name: {0: "N"} for name in ("images", *names)},
            opset_version=OPSET,
            dynamo=False,
        )
    recorded = onnx.load_from_string(file.getvalue())
    return graph.include(recorded, "encoder.", {"images": images})
