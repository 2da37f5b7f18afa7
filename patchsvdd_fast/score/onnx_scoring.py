"""From embeddings to maps and image scores, as nodes of an ONNX graph.

The twin of `maps.search_levels` for `patchsvdd export`, in standard operators. The search is not
the library's, which is exact: a product in float32 picks candidates among the bank's rows, and
their distances are then computed from differences, as the library does. So a distance is off by
float32's rounding. Which row is nearest is missed where squared distances differ by less than the
product's rounding, about 2^-24 times the bank's squared spread: distances far below 2^-12 of the
spread are upper bounds, those of some row as near as the product can tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..files.onnx_graph import Graph
from ..search.bank import NormalBank
from .border import factors_by_place
from .maps import MapRule, interpolation_weights

CANDIDATES = 16
"""Rows of each chunk of a bank whose distances are computed from differences."""

_PRODUCTS_AT_ONCE = 1 << 24  # of one image's patches with a chunk's rows: 64 MiB
_SMALLEST_CHUNK = 1024  # rows; candidates are few of them even so
_HALF_RANGE = 14  # float16 keeps its precision from 2^-14 on; rows are scaled to 2^14 at the most


@dataclass(frozen=True)
class _Chunk:
    """Some rows of a bank, less its mean: rows [M, D] and -|row|^2 / 2 [1, M]."""

    rows: str
    biases: str
    count: int


class BankNodes:
    """A bank in a graph, and searches in it.

    name: of its tensors in the model.
    patches: of one image; the more, the smaller are the chunks that the bank is searched in.
    half: keep rows in float16, scaled by a power of two and less their mean, at half the size.

    The mean of the bank is subtracted from rows and queries: embeddings that lie close together and
    far from the origin would else leave a product in float32 nothing but rounding errors.
    """

    def __init__(
        self, graph: Graph, name: str, bank: NormalBank, patches: int, half: bool = False
    ) -> None:
        self.graph, self.name, self.dim = graph, name, bank.dim
        rows = bank.embeddings.float().cpu()
        mean = rows.mean(dim=0, dtype=torch.float64).float()
        self.mean = graph.weight(f"{name}.mean", mean)
        rows = rows - mean  # not in place: the rows may be the bank's own
        self.count = len(rows)
        scale = _scale(rows) if half else None
        at_once = max(_SMALLEST_CHUNK, _PRODUCTS_AT_ONCE // max(patches, 1))
        parts = rows.tensor_split(-(-len(rows) // at_once))
        self.chunks = [self._chunk(number, part, scale) for number, part in enumerate(parts)]

    def _chunk(self, number: int, rows: Tensor, scale: float | None) -> _Chunk:
        name = f"{self.name}.rows.{number}"
        if scale is None:
            kept = self.graph.weight(name, rows)
        else:
            halves = (rows / scale).half()
            kept = self.graph.cast(self.graph.weight(name, halves), torch.float32)
            kept = self.graph.add("Mul", kept, self.graph.number(scale))
            rows = halves.float() * scale
        biases = (rows.double().square().sum(dim=1) / -2).float()[None]
        return _Chunk(kept, self.graph.weight(f"{name}.biases", biases), len(rows))

    def centred(self, queries: str) -> str:
        """Queries [Q, D] as the other methods take them: less the bank's mean."""
        return self.graph.add("Sub", queries, self.mean)

    def nearest(self, queries: str) -> str:
        """Distance [Q] of each centred query [Q, D] to its nearest row."""
        nearest = [
            self.graph.add("ReduceMin", squared, axes=[1], keepdims=0)
            for squared, _ in self._candidates(queries, CANDIDATES)
        ]
        return self.graph.add("Sqrt", self.graph.add("Min", *nearest))

    def neighbours(self, queries: str, k: int) -> str:
        """The k nearest rows [Q, k, D] of each centred query [Q, D], centred; for few queries."""
        squared, rows = map(list, zip(*self._candidates(queries, CANDIDATES + k), strict=True))
        joined = self.graph.add("Concat", *squared, axis=1)
        places = self.graph.add_several(
            "TopK", joined, self.graph.number([k]), outputs=["", ""], axis=1, largest=0
        )[1]
        every = self.graph.add("Concat", *rows, axis=1)
        return self.graph.add("GatherND", every, self._last(places), batch_dims=1)

    def _candidates(self, queries: str, count: int) -> list[tuple[str, str]]:
        """Per chunk: squared distances [Q, K] of K candidates for the nearest, and these [Q, K, D].

        The nearest row has the largest product with the query, less half its squared length.
        """
        add = self.graph.add
        apart = add("Unsqueeze", queries, self.graph.number([1]))  # [Q, 1, D]
        found = []
        for chunk in self.chunks:
            products = add("Gemm", queries, chunk.rows, chunk.biases, transB=1)  # [Q, M]
            most = self.graph.number([min(count, chunk.count)])
            places = self.graph.add_several("TopK", products, most, outputs=["", ""], axis=1)[1]
            rows = add("Gather", chunk.rows, places, axis=0)
            differences = add("Sub", apart, rows)
            squares = add("Mul", differences, differences)
            squared = add("ReduceSum", squares, self.graph.number([2]), keepdims=0)
            found.append((squared, rows))
        return found

    def _last(self, places: str) -> str:
        """[Q, k] -> [Q, k, 1], as GatherND takes them."""
        return self.graph.add("Unsqueeze", places, self.graph.number([2]))


def _scale(rows: Tensor) -> float:
    """The power of two that brings the largest coordinate to the upper end of float16."""
    largest = float(rows.abs().max())
    if largest == 0:
        return 1.0
    return 2.0 ** max(math.frexp(largest)[1] - _HALF_RANGE, -126)


def add_distances(graph: Graph, bank: BankNodes, embeddings: str) -> str:
    """Distances [N, I, J] of embeddings [N, I, J, D] to their nearest rows of a bank."""
    flat = graph.add("Reshape", embeddings, graph.number([-1, bank.dim]))
    grid = graph.add("Slice", graph.add("Shape", embeddings), *map(graph.number, ([0], [3], [0])))
    return graph.add("Reshape", bank.nearest(bank.centred(flat)), grid)


def add_map(
    graph: Graph,
    distances: str,
    level: PatchLevel,
    rule: MapRule,
    size: tuple[int, int] | str,
) -> tuple[str, str]:
    """A level's values [N, I, J] and map [N, H, W], of its distances [N, I, J].

    size: (height, width) in pixels; or, where they are free, the images [N, 3, H, W]. That needs a
    rule that neither interpolates nor corrects.
    """
    values = distances
    if isinstance(size, str):
        assert not rule.interpolate and not rule.border
        down, across = (_covering_weights(graph, size, axis, level) for axis in (2, 3))
    else:
        grid = level.grid_shape(*size)
        factors = rule.border.get(str(level))
        if factors is not None:
            by_place = graph.weight(f"{level}.border", factors_by_place(factors.float(), *grid))
            values = graph.add("Div", distances, by_place)
        down, across = (
            graph.weight(f"{level}.{name}", _axis_weights(pixels, count, level, rule))
            for name, pixels, count in zip(("down", "across"), size, grid, strict=True)
        )
    rows = graph.add("MatMul", down, values)
    return values, graph.add("MatMul", rows, graph.add("Transpose", across, perm=[1, 0]))


def _axis_weights(pixels: int, count: int, level: PatchLevel, rule: MapRule) -> Tensor:
    """What each of `count` patches along an axis has to say to each pixel: [pixels, count]."""
    if rule.interpolate:
        return interpolation_weights(pixels, count, level).float()
    first = level.stride * torch.arange(count)
    # A margin that no patch reaches repeats the last covered pixel.
    pixel = torch.arange(pixels).clamp(max=(count - 1) * level.stride + level.size - 1)[:, None]
    covers = ((first <= pixel) & (pixel < first + level.size)).double()
    return (covers / covers.sum(dim=1, keepdim=True)).float()


def _covering_weights(graph: Graph, images: str, axis: int, level: PatchLevel) -> str:
    """What `_axis_weights` does without interpolation, for an axis of free size."""
    add, number = graph.add, graph.number
    pixels = add("Gather", add("Shape", images), number(axis), axis=0)
    size, stride, one = map(number, (level.size, level.stride, 1))
    last = add("Div", add("Sub", pixels, size), stride)  # of the patches' numbers; rounded down
    first = add("Mul", add("Range", number(0), add("Add", last, one), one), stride)  # [count]
    covered = add("Sub", add("Add", add("Mul", last, stride), size), one)
    pixel = add("Min", add("Range", number(0), pixels, one), covered)
    pixel = add("Unsqueeze", pixel, number([1]))  # [pixels, 1]
    covers = add(
        "And", add("LessOrEqual", first, pixel), add("Less", pixel, add("Add", first, size))
    )
    covers = graph.cast(covers, torch.float32)
    return add("Div", covers, add("ReduceSum", covers, number([1])))


def add_combination(graph: Graph, level_maps: Mapping[str, str], combination: str) -> str:
    """The map [N, H, W] of the levels' maps, as `maps.combine` makes it."""
    if combination in level_maps:
        return level_maps[combination]
    operator = {"mult": "Mul", "sum": "Add"}[combination]
    joined, *others = level_maps.values()
    for other in others:
        joined = graph.add(operator, joined, other)
    return joined


def add_weights(graph: Graph, bank: BankNodes, embeddings: str, values: str, reweight: int) -> str:
    """The factor of each image's score [N], as `reweighting.image_weights` computes it.

    For a bank of two rows or more. embeddings: [N, I, J, D]. values: [N, I, J], what the map shows.
    """
    add, number = graph.add, graph.number
    highest = add("ArgMax", add("Reshape", values, number([0, -1])), axis=1)  # [N, 1]
    patches = add("Reshape", embeddings, number([0, -1, bank.dim]))
    query = bank.centred(add("GatherND", patches, highest, batch_dims=1))  # [N, D]
    matched = bank.neighbours(query, 1)  # [N, 1, D]
    around = bank.neighbours(add("Squeeze", matched, number([1])), min(reweight, bank.count))
    apart = add("Unsqueeze", query, number([1]))
    own, distances = (
        add("ReduceL2", add("Sub", apart, rows), axes=[2], keepdims=0) for rows in (matched, around)
    )  # [N, 1] and [N, k]
    largest = add("ReduceMax", distances, axes=[1])
    total = add("ReduceSum", add("Exp", add("Sub", distances, largest)), number([1]))
    share = add("Div", add("Exp", add("Sub", own, largest)), total)
    return add("Squeeze", add("Sub", number(1.0), share), number([1]))
