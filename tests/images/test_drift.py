"""Drift: figures of images, their usual range, and streams that leave it."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from conftest import texture
from patchsvdd_fast.images import drift
from patchsvdd_fast.images.drift import (
    STATISTICS,
    StreamDrift,
    image_statistics,
    unusual,
    usual_range,
)
from patchsvdd_fast.images.prepare import load_image_set

SIZE = (256, 256)


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def figures(images, original_sizes=None):
    tensors = [as_tensor(image) for image in images]
    return image_statistics(tensors, original_sizes or [SIZE] * len(tensors))


@pytest.fixture(scope="module")
def good():
    """Forty good images."""
    rng = np.random.default_rng(3)
    return [texture(rng) for _ in range(40)]


# --- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (33, 70), (71, 40)])
@pytest.mark.parametrize("pixels_at_once", [1 << 20, 100, 1])
def test_figures_are_those_of_the_formulas(shape, pixels_at_once, monkeypatch):
    """In float64, pixel by pixel; also where an image is looked at row by row."""
    monkeypatch.setattr(drift, "_PIXELS_AT_ONCE", pixels_at_once)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    luma = image.astype(float) @ [0.299, 0.587, 0.114]
    laplacian = [
        abs(
            luma[y - 1, x] + luma[y + 1, x] + luma[y, x - 1] + luma[y, x + 1] - 4 * luma[y, x],
        )
        for y in range(1, shape[0] - 1)
        for x in range(1, shape[1] - 1)
    ]
    expected = [
        luma.mean(),
        luma.std(),
        100 * np.mean(laplacian) / luma.mean(),
        image[..., 0].mean() / image.mean(),
        image[..., 2].mean() / image.mean(),
        *(90, 50),
    ]
    (found,) = figures([image], [(50, 90)])
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_images_without_contrast_or_light_have_figures():
    black, gray = (np.full((40, 40, 3), value, np.uint8) for value in (0, 100))
    assert figures([black])[0].tolist() == [0, 0, 0, 0, 0, 256, 256]
    assert figures([gray])[0].tolist() == pytest.approx([100, 0, 0, 1, 1, 256, 256], abs=1e-4)
    assert figures([]).shape == (0, len(STATISTICS))


# --- the usual range ------------------------------------------------------------------------------


def statistics_of(brightness):
    """Figures that differ in the brightness alone."""
    usual = torch.tensor([0, 20.0, 5, 1, 1, 640, 480], dtype=torch.float64).repeat(
        len(brightness), 1
    )
    usual[:, 0] = torch.tensor(brightness, dtype=torch.float64)
    return usual


@pytest.mark.parametrize(
    ("brightness", "expected"),
    [
        (np.linspace(80, 120, 24), (70, 130)),  # a quarter of 40 on either side
        (np.linspace(80, 120, 300), (70, 130)),
        (np.linspace(80, 120, 12), (60, 140)),  # 6 / 12
        (np.linspace(80, 120, 4), (20, 180)),
        (np.linspace(10, 110, 4), (0, 260)),  # not below zero
        ([100.0] * 40, (98, 102)),
        ([90.0, 110, 100], (0, np.inf)),
    ],
)
def test_usual_range_by_hand(brightness, expected):
    low, high = usual_range(statistics_of(brightness))
    assert (float(low[0]), float(high[0])) == pytest.approx(expected)
    if len(brightness) > 3:
        assert low[1:].tolist() == pytest.approx([19.6, 4.9, 0.98, 0.98, 640, 480])
        assert high[1:].tolist() == pytest.approx([20.4, 5.1, 1.02, 1.02, 640, 480])
    assert (low[5:].tolist(), high[5:].tolist()) == ([640, 480], [640, 480])


@pytest.mark.parametrize("count", [4, 8, 16, 30, 100])
def test_few_training_images_do_not_make_others_unusual(count):
    """One more of the same kind, normally distributed, is called unusual once in ten at most."""
    rng = np.random.default_rng(count)
    alarms = [
        bool(unusual(all_of[0], all_of[1:]))
        for all_of in (statistics_of(rng.normal(100, 5, count + 1)) for _ in range(1000))
    ]
    assert np.mean(alarms) < (0.1 if count < 8 else 0.04)


def test_departures_in_words(good):
    training = figures(good[:30])
    image = good[35]
    assert unusual(figures([image])[0], training) == ()
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)))
    noise = np.random.default_rng(0).normal(0, 15, image.shape)
    changes = {
        "darker": image * 0.7,
        "brighter": image * 1.2,
        "flatter": 100 + 0.6 * (image - 100.0),
        "richer in contrast": 100 + 1.3 * (image - 100.0),
        "less sharp": blurred,
        "sharper or noisier": image + noise,
        "redder": image * [1.1, 1, 1],
        "less red": image * [0.9, 1, 1],
        "bluer": image * [1, 1, 1.1],
        "less blue": image * [1, 1, 0.9],
    }
    for word, values in changes.items():
        (found,) = figures([np.clip(values, 0, 255).astype(np.uint8)])
        notes = unusual(found, training)
        assert any(note.startswith(f"{word} than the training images (") for note in notes), word
    sizes = unusual(figures([image], [(200, 300)])[0], training)
    assert sizes == (
        "wider than the training images (width 300, usual 256)",
        "shorter than the training images (height 200, usual 256)",
    )
    (darker,) = unusual(torch.tensor([50.0, *training[0, 1:]]), training)
    low, high = (float(limit[0]) for limit in usual_range(training))
    assert darker == (
        f"darker than the training images (brightness 50.0, usual {low:.1f} to {high:.1f})"
    )


def test_a_single_training_image_has_a_size_alone(good):
    training = figures(good[:1])
    assert unusual(figures(good[1:2])[0] * 0 + 5, training) == (
        "narrower than the training images (width 5, usual 256)",
        "shorter than the training images (height 5, usual 256)",
    )


# --- streams --------------------------------------------------------------------------------------


def run(stream, many):
    """What is said, each with the number of images so far."""
    said = []
    for number, one in enumerate(many, start=1):
        said += [(number, text) for text in stream.update(one)]
    return said


def around(brightness, count, seed, spread=5):
    return statistics_of(np.random.default_rng(seed).normal(brightness, spread, count))


def test_a_stream_like_the_training_images_has_not_drifted():
    training = around(100, 30, 0)
    for seed in range(1, 11):
        assert run(StreamDrift(training), around(100, 300, seed)) == []


def test_drift_is_said_once_and_again_when_it_comes_back():
    """Though no image by itself is unusual, but for very few."""
    training = around(100, 30, 0)
    parts = [around(100, 100, 1), around(107, 100, 2), around(100, 100, 3), around(93, 100, 4)]
    stream = torch.cat(parts)
    assert np.mean([bool(unusual(one, training)) for one in stream]) < 0.1
    said = run(StreamDrift(training), stream)
    assert [text.partition(" than")[0] for _, text in said] == [
        "the last 50 images are brighter",
        "the last 50 images are darker",
    ]
    (first, text), (second, _) = said
    assert 120 <= first <= 160
    assert 320 <= second <= 360
    middle = stream[first - 50 : first, 0].median()
    assert text == (
        "the last 50 images are brighter than the training images (median brightness "
        f"{float(middle):.1f}, theirs {float(training[:, 0].median()):.1f})"
    )


def test_a_change_that_does_not_matter_is_no_drift():
    """Gray images saved as JPEG are not gray to the last digit."""
    training = around(100, 40, 0)
    stream = around(100, 60, 1)
    stream[:, 3] += 1e-3
    assert run(StreamDrift(training), stream) == []
    assert run(StreamDrift(around(100, 40, 0, spread=0.1)), around(101, 60, 1, spread=0.1)) == []


def test_streams_of_another_size_and_too_few_training_images():
    stream = around(100, 60, 1)
    stream[:, 5] = 641
    assert run(StreamDrift(around(100, 40, 0)), stream) == [
        (50, "the last 50 images are wider than the training images (median width 641, theirs 640)")
    ]
    far = around(200, 60, 1)
    for count in range(1, 5):
        assert run(StreamDrift(around(100, count, 0)), far) == []
    assert len(run(StreamDrift(around(100, 5, 0)), far)) == 1


# --- real images ----------------------------------------------------------------------------------


def changed(pixels, change):
    """Pixels [N, 3, H, W] after a change of each image [H, W, 3]."""
    return [
        np.clip(np.round(change(image.permute(1, 2, 0).numpy())), 0, 255).astype(np.uint8)
        for image in pixels
    ]


def blurred(image):
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)), float)


@pytest.mark.parametrize("category", ["hazelnut", "cookie", "synth_gravel"])
def test_real_images(categories_dir, category):
    """Good images are usual; the same darker, blurred or tinted are not."""
    training, test = (
        load_image_set(categories_dir / category / part, SIZE, 64)
        for part in ("train/good", "test/good")
    )
    usual = image_statistics(training.pixels, training.original_sizes)

    def share(images):
        return np.mean([bool(unusual(one, usual)) for one in figures(images)])

    assert share(changed(test.pixels, lambda image: image)) == 0
    assert share(changed(test.pixels, lambda image: image * 0.7)) == 1
    assert share(changed(test.pixels, blurred)) == 1
    assert share(changed(test.pixels, lambda image: image * [1.1, 1, 0.9])) > 0.8
