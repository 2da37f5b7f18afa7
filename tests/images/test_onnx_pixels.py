"""Resizing and matching of light in ONNX: Pillow's pixels, and those of `match_illumination`."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from patchsvdd_fast.files.onnx_graph import Graph
from patchsvdd_fast.images.light import match_illumination
from patchsvdd_fast.images.onnx_pixels import add_matching, add_resizing

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def run(build, images):
    """What nodes make of uint8 images [N, 3, H, W]; build: from a graph and pixels to a value."""
    graph = Graph()
    graph.add("Identity", build(graph, graph.cast("images", torch.float32)), output="found")
    model = graph.model(
        "test",
        {"images": (torch.uint8, ["N", 3, "H", "W"])},
        {"found": (torch.float32, ["N", 3, "height", "width"])},
        {},
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"images": images})[0]


@settings(max_examples=30, deadline=None)
@given(
    old=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    new=st.tuples(st.integers(1, 100), st.integers(1, 100)),
)
def test_images_are_resized_as_pillow_does(old, new):
    taller, wider = old[0] - new[0], old[1] - new[1]
    assume(taller <= 0 or taller <= 2 * wider)  # else Pillow does columns first, from 13 on
    images = np.random.default_rng(0).integers(256, size=(2, 3, *old), dtype=np.uint8)
    found = run(lambda graph, pixels: add_resizing(graph, pixels, *new), images)
    for image, ours in zip(images, found, strict=True):
        picture = Image.fromarray(image.transpose(1, 2, 0)).resize((new[1], new[0]))
        difference = np.abs(np.asarray(picture).transpose(2, 0, 1) - ours)
        # Sums in another order fall to the other side of a half now and then.
        assert difference.max() <= 1
        assert (difference > 0).sum() <= 3 + 0.001 * difference.size
    if old == new:
        assert (found == images).all()


def test_large_images_too():
    image = np.random.default_rng(0).integers(256, size=(3, 2000, 3111), dtype=np.uint8)
    found = run(lambda graph, pixels: add_resizing(graph, pixels, 256, 250), image[None])[0]
    picture = Image.fromarray(image.transpose(1, 2, 0)).resize((250, 256))
    difference = np.abs(np.asarray(picture).transpose(2, 0, 1) - found)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.001


def test_light_is_matched():
    generator = np.random.default_rng(0)
    ranges = (
        [3, 3, 3],
        [256, 120, 30],
        [1, 256, 5],
    )  # of the colours; the third has a channel of 0
    images = np.stack(
        [[generator.integers(top, size=(61, 73)) for top in tops] for tops in ranges]
    ).astype(np.uint8)
    colour = torch.tensor([110.3, 90.7, 130.2])
    found = run(lambda graph, pixels: add_matching(graph, pixels, colour), images)
    expected = match_illumination(torch.from_numpy(images), colour).numpy()
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() <= 1e-4
    assert (run(lambda graph, pixels: add_matching(graph, pixels, None), images) == images).all()
