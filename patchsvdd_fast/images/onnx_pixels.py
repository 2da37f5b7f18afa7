"""What images go through before they are encoded, as nodes of an ONNX graph.

The twin of `prepare` (resizing) and `light` for `patchsvdd export`. Pixels are
float32 with whole values of 0 to 255.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..files.onnx_graph import Graph


def add_resizing(graph: Graph, pixels: str, height: int, width: int) -> str:
    """Resize pixels [N, 3, H, W], H and W free, as Pillow's bicubic filter does on 8 bits.

    ONNX has an operator for that, Resize with `antialias`. OpenVINO ignores that attribute, and
    onnxruntime's results are those of Pillow for some sizes only. So an axis is resized by a matrix
    product with weights, which the graph computes from the image's size: first along rows, then
    along columns, each rounded to whole pixel values. (Pillow from 13 on does columns first where
    the height is reduced by more than twice as many pixels as the width.)
    """
    across = _weights(graph, pixels, 3, width)  # [width, W]
    transposed = graph.add("Transpose", across, perm=[1, 0])
    rows = _rounded(graph, graph.add("MatMul", pixels, transposed))
    down = _weights(graph, pixels, 2, height)  # [height, H]
    return _rounded(graph, graph.add("MatMul", down, rows))


def _rounded(graph: Graph, pixels: str) -> str:
    """Halves upwards, as Pillow does, and within 0 to 255."""
    half_up = graph.add("Floor", graph.add("Add", pixels, graph.number(0.5)))
    return graph.add("Clip", half_up, graph.number(0.0), graph.number(255.0))


def _weights(graph: Graph, pixels: str, axis: int, count: int) -> str:
    """What each pixel along an axis of size L has to say to each of `count`: [count, L].

    Pixel x lies t = ((2 x + 1) count - (2 o + 1) L) / (2 max(count, L)) from the centre of output
    o, in pixels of the coarser of both. The numerator is computed in whole numbers, so that nothing
    is lost where images are large.
    """
    whole, one = graph.number(count), graph.number(1)
    length = graph.add("Gather", graph.add("Shape", pixels), graph.number(axis), axis=0)
    numbers = graph.add("Range", graph.number(0), length, one)  # [L]
    centres = graph.add("Add", graph.add("Mul", numbers, graph.number(2)), one)
    of_output = graph.weight(f"centres.{count}", 2 * torch.arange(count)[:, None] + 1)
    numerator = graph.add(
        "Sub", graph.add("Mul", centres, whole), graph.add("Mul", of_output, length)
    )
    coarser = graph.add("Max", whole, length)
    denominator = graph.cast(graph.add("Mul", coarser, graph.number(2)), torch.float32)
    distance = graph.add("Abs", graph.add("Div", graph.cast(numerator, torch.float32), denominator))
    weights = _bicubic(graph, distance)
    return graph.add("Div", weights, graph.add("ReduceSum", weights, graph.number([1])))


def _bicubic(graph: Graph, t: str) -> str:
    """Keys' cubic convolution of t >= 0 with a = -1/2: (1.5 t - 2.5) t^2 + 1 up to 1, then to 2
    ((2.5 - 0.5 t) t - 4) t + 2, then 0."""

    def polynomial(*coefficients: float) -> str:
        value = graph.number(coefficients[0])
        for coefficient in coefficients[1:]:
            value = graph.add("Add", graph.add("Mul", value, t), graph.number(coefficient))
        return value

    near, far = polynomial(1.5, -2.5, 0.0, 1.0), polynomial(-0.5, 2.5, -4.0, 2.0)
    outside = graph.add("Less", t, graph.number(2.0))
    beyond = graph.add("Where", outside, far, graph.number(0.0))
    return graph.add("Where", graph.add("Less", t, graph.number(1.0)), near, beyond)


def add_matching(graph: Graph, pixels: str, colour: Tensor | None) -> str:
    """Scale each channel of pixels [N, 3, H, W] so that its mean is that of `colour` [3], as
    `match_illumination` does; None: leave them as they are."""
    if colour is None:
        return pixels
    own = graph.add("ReduceMean", graph.add("ReduceMean", pixels, axes=[3]), axes=[2])
    own = graph.add("Max", own, graph.number(1e-6))
    factor = graph.add("Div", graph.weight("light", colour.float()[:, None, None]), own)
    factor = graph.add("Clip", factor, graph.number(0.5), graph.number(2.0))
    matched = graph.add("Round", graph.add("Mul", pixels, factor))
    return graph.add("Clip", matched, graph.number(0.0), graph.number(255.0))


def add_normalizing(graph: Graph, pixels: str, mean: Tensor, scale: Sequence[float]) -> str:
    """`(pixel - mean) / scale` of pixels [N, 3, H, W], as `normalize` computes it.

    mean: [3, H, W] or [3, 1, 1] float32. scale: one per channel.
    """
    centred = graph.add("Sub", pixels, graph.weight("pixel_mean", mean))
    divisors = graph.weight("pixel_scale", torch.tensor(scale, dtype=torch.float32)[:, None, None])
    return graph.add("Div", centred, divisors)
