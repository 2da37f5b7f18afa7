"""Export the dense encoder as an ONNX model, for runtimes other than PyTorch.

The search stays in this library. The runtime embeds images whose light has been matched, and
`PatchSVDD.score_encoded` scores them as the detector would, but for rounding (docs/onnx.md)::

    images = match_illumination(detector.load_images("images/new").pixels, detector.usual_light())
    outputs = runtime.run(None, {"images": images.numpy()})  # uint8 [N, 3, H, W] -> [N, I, J, D]
    embeddings = [torch.from_numpy(output) for output in outputs]
    detector.score_encoded(embeddings, (height, width))
"""

from __future__ import annotations

import copy
import io
import json
import math
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..encoders.levels import PatchLevel
from ..encoders.patch_encoder import PatchEncoder
from ..encoders.patch_svdd import (
    LEAKY_SLOPE,
    SMALL_PATCH,
    TRUNK_STRIDE,
    HierarchicalEncoder,
    QuadrantHead,
)
from ..files.whole import written_whole
from ..images.light import normalize
from ..ops.checks import check_dtype, check_shape
from ..score.encoding import encode_images
from .patch_svdd import PatchSVDD

if TYPE_CHECKING:
    import onnx

TOLERANCE = 10
"""How far onnxruntime's embeddings may be from PyTorch's, in multiples of PyTorch's own rounding.

That rounding is the distance of PyTorch's embeddings from those in float64. Measured: about once.
No absolute bound suits both encoders whose embeddings differ by 1e-6 and those with 0.1.
"""

_LEAST_ROUNDING = 2.0**-24  # float32's step just below 1, for where PyTorch happens to be exact
_OPSET, _IR_VERSION = 13, 7  # the operators need no newer ones, and older runtimes read these
_TO_THE_END = 2**31 - 1


def export_detector(detector: PatchSVDD, path: str | Path) -> float | None:
    """Write a fitted detector's encoder as an ONNX model with `export_onnx`.

    Returns and raises what `export_onnx` does; raises NotFittedError before `fit`, and ValueError
    for banks that were not encoded in float32.
    """
    detector._require_fitted()
    precision = detector.parameters_["encoding_precision"]
    if precision != "float32":
        raise ValueError(
            f"the banks were encoded in {precision}, but ONNX models compute in float32: "
            'fit with encoding_precision="float32"'
        )
    light = detector.usual_light()
    return export_onnx(detector.encoder_, path, detector.levels_, detector.mean_, light)


def export_onnx(
    encoder: PatchEncoder,
    path: str | Path,
    levels: Sequence[PatchLevel],
    mean: Tensor,
    light: Tensor | None = None,
) -> float | None:
    """Write `encoder.dense` of normalised images as an ONNX model, atomically.

    The model's input is "images", uint8 [N, 3, H, W]; it normalises them. Its outputs are "K64",
    "K32", ..., one per level, float32 [N, I, J, D]. N is free. H and W are those of the mean, or
    free for Patch SVDD's encoder if the mean has one value per channel.

    path: file to write.
    levels: patch levels of different sizes, as `encoder.dense` takes them.
    mean: [3, H, W] or [3, 1, 1] float32, in pixel values.
    light: [3] float32, the colour that images are to be matched to before they go into the model
        (`images.light.match_illumination`), in pixel values; None: they stay as they are.

    The model's metadata hold "levels" (JSON: a list of [size, stride]), "illumination" ("matched"
    or "as_is") and "light" (JSON: a list or null).

    Embeddings of random images are compared between onnxruntime and PyTorch. Returns the largest
    difference of a coordinate, which lies in (-1, 1); None, with a warning, if onnxruntime is not
    installed. Raises RuntimeError, and writes nothing, if the difference is more than `TOLERANCE`
    allows; ValueError or TypeError for levels, mean or light that do not fit; ValueError if onnx
    is not installed; OSError if the file cannot be written.
    """
    if find_spec("onnx") is None:
        raise ValueError("onnx is not installed: pip install onnx onnxruntime")
    _check_arguments(levels, mean, light)
    if isinstance(encoder, HierarchicalEncoder) and (mean == mean[:, :1, :1]).all():
        mean = mean[:, :1, :1]
    batches = _random_images(levels, mean)
    embeddings = _encoded(encoder, batches, mean, levels)  # raises for levels it lacks
    if isinstance(encoder, HierarchicalEncoder):
        built = _built(encoder, levels, mean)
    else:
        built = _traced(encoder, levels, mean)
    model = _described(built, levels, light).SerializeToString()
    found = _run(model, batches)
    difference = None
    if found is not None:
        exact = _encoded(copy.deepcopy(encoder).double(), batches, mean.double(), levels)
        difference = _largest_difference(found, embeddings)
        rounding = max(_largest_difference(embeddings, exact), _LEAST_ROUNDING)
        if not difference <= TOLERANCE * rounding:
            raise RuntimeError(
                f"embeddings of onnxruntime must be within {TOLERANCE * rounding:.2g} of PyTorch's "
                f"({TOLERANCE} times its rounding), got {difference:.2g}: no model was written"
            )
    with written_whole(Path(path)) as partial:
        partial.write_bytes(model)
    return difference


def _check_arguments(levels: Sequence[PatchLevel], mean: Tensor, light: Tensor | None) -> None:
    if not levels:
        raise ValueError("levels must name at least one patch level")
    if len({level.size for level in levels}) < len(levels):
        raise ValueError(f"levels must differ in size, which names the outputs, got {levels}")
    check_shape("mean", mean, "3, H, W")
    check_dtype("mean", mean, torch.float32)
    if mean.shape[0] != 3:
        raise ValueError(f"mean must have shape [3, H, W], got {list(mean.shape)}")
    if light is not None and light.shape != (3,):
        raise ValueError(f"light must have shape [3], got {list(light.shape)}")


def _random_images(levels: Sequence[PatchLevel], mean: Tensor) -> list[Tensor]:
    """Two uint8 batches [N, 3, H, W], of different sizes where the mean leaves them free."""
    largest = max(level.size for level in levels)
    shapes = [(1, 3, largest, largest + 33), (2, 3, largest + 18, largest + 1)]
    if mean.shape[1:] != (1, 1):
        shapes = [(count, *mean.shape) for count, *_ in shapes]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, s, generator=generator, dtype=torch.uint8) for s in shapes]


def _encoded(
    encoder: PatchEncoder,
    batches: Sequence[Tensor],
    mean: Tensor,
    levels: Sequence[PatchLevel],
) -> list[Tensor]:
    """PyTorch's embeddings [N, I, J, D] of each batch and level."""
    return [
        embeddings.cpu()
        for images in batches
        for embeddings in encode_images(encoder, images, mean.expand(images.shape[1:]), levels)
    ]


def _run(model: bytes, batches: Sequence[Tensor]) -> list[Tensor] | None:
    """onnxruntime's embeddings [N, I, J, D] of each batch and level, if it is installed."""
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        warnings.warn(
            "the ONNX model is not checked against PyTorch, since onnxruntime is not installed: "
            "pip install onnxruntime",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    try:
        runtime = InferenceSession(model, providers=["CPUExecutionProvider"])
        return [
            torch.from_numpy(embeddings)
            for images in batches
            for embeddings in runtime.run(None, {"images": images.numpy()})
        ]
    except Exception as error:  # onnxruntime's have no common class
        raise RuntimeError(f"onnxruntime cannot run the model: {error}") from error


def _largest_difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    pairs = zip(some, others, strict=True)
    return float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())  # NaN if any is


def _built(
    encoder: HierarchicalEncoder, levels: Sequence[PatchLevel], mean: Tensor
) -> onnx.ModelProto:
    """The graph of Patch SVDD's encoder, node by node, so that it stays small and H and W free."""
    from onnx import TensorProto, helper

    size = None if mean.shape[1:] == (1, 1) else (mean.shape[1], mean.shape[2])
    graph = _Graph(encoder)
    maps = {PatchLevel(SMALL_PATCH, TRUNK_STRIDE): graph.trunk("images", mean)}
    outputs = []
    for level in levels:
        name = str(level)
        graph.add("Transpose", graph.dense_map(level, maps), output=name, perm=[0, 2, 3, 1])
        grid = (f"I of {name}", f"J of {name}") if size is None else level.grid_shape(*size)
        shape = ("N", *grid, encoder.embedding_dim)
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ("N", 3, *(size or "HW")))
    return helper.make_model(
        helper.make_graph(graph.nodes, "encoder", [images], outputs, list(graph.weights.values())),
        opset_imports=[helper.make_opsetid("", _OPSET)],
    )


class _Encoding(nn.Module):
    """What `encode_images` does of images of one size, as a module."""

    def __init__(self, encoder: PatchEncoder, levels: Sequence[PatchLevel], mean: Tensor) -> None:
        super().__init__()
        self.encoder, self.levels, self.mean = encoder, levels, mean

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        normalized = normalize(images.float(), self.mean, scale=self.encoder.pixel_scale)
        return tuple(self.encoder.dense(normalized, self.levels))


def _traced(encoder: PatchEncoder, levels: Sequence[PatchLevel], mean: Tensor) -> onnx.ModelProto:
    """The graph that PyTorch records of any encoder at work, for images of the mean's size."""
    import onnx

    names = [str(level) for level in levels]
    images = torch.zeros(1, *mean.shape, dtype=torch.uint8)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the recording makes a constant, such as sizes
        torch.onnx.export(
            _Encoding(copy.deepcopy(encoder).cpu(), levels, mean.cpu()).eval(),
            (images,),
            file,  # type: ignore[arg-type]
            input_names=["images"],
            output_names=names,
            dynamic_axes={name: {0: "N"} for name in ("images", *names)},
            opset_version=_OPSET,
            dynamo=False,
        )
    return onnx.load_from_string(file.getvalue())


def _described(
    model: onnx.ModelProto, levels: Sequence[PatchLevel], light: Tensor | None
) -> onnx.ModelProto:
    """The model with its metadata, checked."""
    from onnx import checker, helper

    from .. import __version__

    model.ir_version = _IR_VERSION
    model.producer_name, model.producer_version = "patchsvdd_fast", __version__
    metadata = {
        "levels": json.dumps([(level.size, level.stride) for level in levels]),
        "illumination": "as_is" if light is None else "matched",
        "light": json.dumps(None if light is None else light.tolist()),
    }
    helper.set_model_props(model, metadata)
    checker.check_model(model, full_check=True)
    return model


class _Graph:
    """Collects nodes and weights of `HierarchicalEncoder.dense`; maps [N, D, I, J] are names."""

    def __init__(self, encoder: HierarchicalEncoder) -> None:
        self.encoder = encoder
        self.layer_names = {layer: name for name, layer in encoder.named_modules()}
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}

    def trunk(self, images: str, mean: Tensor) -> str:
        """The small encoder's dense map of uint8 images."""
        from onnx import TensorProto

        # A patch's last row and column do not enter its embedding. Without those of the image, the
        # map has exactly the rows and columns of its grid, and so have all maps built on it.
        used = self.sliced(images, end=-1)
        mean = mean[:, :-1, :-1] if mean.shape[1:] != (1, 1) else mean
        pixels = self.add("Cast", used, to=TensorProto.FLOAT)
        centred = self.add("Sub", pixels, self.weight("mean", mean))
        maps = self.add("Div", centred, self.weight("pixel_range", torch.tensor(255.0)))
        for layer in self.encoder.small:
            if isinstance(layer, nn.Conv2d):
                maps = self.convolved(maps, layer, strides=list(layer.stride))
            elif isinstance(layer, nn.LeakyReLU):
                maps = self.add("LeakyRelu", maps, alpha=LEAKY_SLOPE)
            else:
                maps = self.add("Tanh", maps)
        return maps

    def dense_map(self, level: PatchLevel, maps: dict[PatchLevel, str]) -> str:
        """The level's embeddings, built on the maps of the levels below it as in the encoder."""
        if level not in maps:
            if level.size == SMALL_PATCH:
                trunk = maps[PatchLevel(SMALL_PATCH, TRUNK_STRIDE)]
                maps[level] = self.sliced(trunk, step=level.stride // TRUNK_STRIDE)
            else:
                half = level.size // 2
                below = PatchLevel(half, math.gcd(half, level.stride))
                head = self.encoder.head(level.size)
                assert isinstance(head, QuadrantHead)
                # Quadrants need no gathering: a dilated convolution adds up the same products.
                joined = self.convolved(
                    self.dense_map(below, maps),
                    head.join,
                    strides=[level.stride // below.stride] * 2,
                    dilations=[half // below.stride] * 2,
                )
                active = self.add("LeakyRelu", joined, alpha=LEAKY_SLOPE)
                maps[level] = self.add("Tanh", self.convolved(active, head.project))
        return maps[level]

    def convolved(self, maps: str, layer: nn.Conv2d, **attributes: Any) -> str:
        """A convolution by the layer's weights, with strides and dilations as given."""
        assert layer.bias is not None
        name = self.layer_names[layer]
        weight = self.weight(f"{name}.weight", layer.weight)
        return self.add("Conv", maps, weight, self.weight(f"{name}.bias", layer.bias), **attributes)

    def sliced(self, maps: str, end: int = _TO_THE_END, step: int = 1) -> str:
        """Every `step`-th row and column before `end`."""
        bounds = {"starts": [0, 0], "ends": [end, end], "axes": [2, 3], "steps": [step, step]}
        name = f"Slice_{len(self.nodes)}"
        inputs = [self.weight(f"{name}.{key}", torch.tensor(v)) for key, v in bounds.items()]
        return self.add("Slice", maps, *inputs)

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Append a node and return the name of its output."""
        from onnx import helper

        name = output or f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def weight(self, name: str, values: Tensor) -> str:
        """Keep a tensor in the model and return its name."""
        from onnx import numpy_helper

        self.weights[name] = numpy_helper.from_array(values.detach().cpu().numpy(), name)
        return name
