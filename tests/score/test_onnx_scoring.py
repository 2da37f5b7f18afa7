"""Search, maps and weights in ONNX against the library's, from the same embeddings."""

import numpy as np
import pytest
import torch

from patchsvdd_fast import NormalBank, PatchLevel
from patchsvdd_fast.files.onnx_graph import Graph
from patchsvdd_fast.score import onnx_scoring
from patchsvdd_fast.score.maps import MapRule, combine, search_levels
from patchsvdd_fast.score.onnx_scoring import (
    BankNodes,
    add_combination,
    add_distances,
    add_map,
    add_weights,
)
from patchsvdd_fast.score.reweighting import image_weights

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def run(graph, outputs, **inputs):
    """The graph's values of these names, for float32 inputs of any size."""
    model = graph.model(
        "test",
        {k: (torch.float32, [f"{k}{i}" for i in range(v.ndim)]) for k, v in inputs.items()},
        {name: (torch.float32, [f"{name}{i}" for i in range(n)]) for name, n in outputs.items()},
        {},
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = session.run(list(outputs), {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(values) for values in found]


def searched(bank, embeddings, half=False):
    graph = Graph()
    nodes = BankNodes(graph, "bank", bank, embeddings[0, ..., 0].numel(), half)
    return run(graph, {add_distances(graph, nodes, "e"): 3}, e=embeddings)[0]


@pytest.mark.parametrize("rows", [1, 5, 16, 700])
@pytest.mark.parametrize("at_once", [1 << 24, 1])
def test_distances_are_those_of_the_bank(monkeypatch, rows, at_once):
    """Whether or not the bank is searched in chunks."""
    monkeypatch.setattr(onnx_scoring, "_PRODUCTS_AT_ONCE", at_once)
    monkeypatch.setattr(onnx_scoring, "_SMALLEST_CHUNK", 100)
    bank, embeddings = NormalBank(torch.randn(rows, 24)), torch.randn(3, 4, 5, 24)
    before = bank.embeddings.clone()
    found = searched(bank, embeddings)
    torch.testing.assert_close(found, bank.nearest(embeddings)[0], rtol=2e-6, atol=0)
    assert torch.equal(bank.embeddings, before)


@pytest.mark.parametrize(("half", "rtol"), [(False, 1e-5), (True, 5e-3)])
def test_embeddings_close_together_and_far_from_the_origin(half, rtol):
    """As those of trained encoders: a product of them as they are would be rounding errors only."""
    place = torch.rand(32) - 0.5
    bank = NormalBank(place + 2e-6 * torch.randn(900, 32))
    embeddings = place + 2e-6 * torch.randn(2, 6, 7, 32)
    expected, _ = bank.nearest(embeddings)
    assert expected.max() < 3e-5
    torch.testing.assert_close(searched(bank, embeddings, half), expected, rtol=rtol, atol=0)


def test_a_bank_of_equal_rows():
    bank = NormalBank(torch.full((40, 8), 0.3))
    embeddings = torch.full((1, 2, 2, 8), 0.3)
    embeddings[0, 0, 0, 0] += 0.5
    for half in (False, True):
        found = searched(bank, embeddings, half)
        torch.testing.assert_close(found, torch.tensor([[[0.5, 0.0], [0.0, 0.0]]]))


@pytest.mark.parametrize("combination", ["mult", "sum", "K32"])
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("shape", [(96, 96), (83, 101)])
def test_maps_of_levels_are_combined(combination, free, shape):
    levels = (PatchLevel(64, 16), PatchLevel(32, 4))
    encoded = [torch.randn(2, *level.grid_shape(*shape), 8) for level in levels]
    banks = {level: NormalBank(torch.randn(50, 8)) for level in levels}
    expected = search_levels(banks, encoded, shape, combination)
    graph = Graph()
    images = torch.zeros(2, 3, *shape)
    maps = {}
    for level, bank in banks.items():
        nodes = BankNodes(graph, str(level), bank, 100)
        distances = add_distances(graph, nodes, f"e{level}")
        size = "images" if free else shape
        _, maps[str(level)] = add_map(graph, distances, level, MapRule(), size)
    joined = add_combination(graph, maps, combination)
    inputs = {f"e{level}": values for level, values in zip(levels, encoded, strict=True)}
    (found,) = run(graph, {joined: 3}, **inputs, **({"images": images} if free else {}))
    torch.testing.assert_close(found, expected.anomaly_map, rtol=1e-5, atol=0)
    torch.testing.assert_close(combine(expected.level_maps, combination), expected.anomaly_map)


def test_interpolated_maps_corrected_at_the_border():
    level, shape = PatchLevel(24, 8), (100, 124)
    factors = torch.tensor([2.0, 1.5, 1.2, 1.1], dtype=torch.float64)
    rule = MapRule(interpolate=True, border={"K24": factors})
    distances = torch.rand(2, *level.grid_shape(*shape))
    graph = Graph()
    values, joined = add_map(graph, "distances", level, rule, shape)
    found = run(graph, {values: 3, joined: 3}, distances=distances)
    torch.testing.assert_close(found[0], rule.values(distances, level))
    torch.testing.assert_close(found[1], rule.map(distances, level, shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "reweight"), [(300, 9), (300, 32), (5, 9), (2, 2)])
@pytest.mark.parametrize("half", [False, True])
def test_weights_of_image_scores(monkeypatch, rows, reweight, half):
    monkeypatch.setattr(onnx_scoring, "_PRODUCTS_AT_ONCE", 1)
    monkeypatch.setattr(onnx_scoring, "_SMALLEST_CHUNK", 90)
    bank, embeddings = NormalBank(torch.randn(rows, 16)), torch.randn(3, 4, 5, 16)
    values = bank.nearest(embeddings)[0] / (1 + torch.rand(4, 5))
    graph = Graph()
    nodes = BankNodes(graph, "bank", bank, 20, half)
    name = add_weights(graph, nodes, "e", "values", reweight)
    (found,) = run(graph, {name: 1}, e=embeddings, values=values)
    expected = image_weights(bank, embeddings, values, reweight).float()
    torch.testing.assert_close(found, expected, rtol=1e-2 if half else 1e-5, atol=1e-6)
    assert np.ptp(expected.numpy()) > 0
