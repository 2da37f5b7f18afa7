"""Losses against the reference implementation, pair sampling, and the training loop."""

import math
import os
import signal
import threading
import warnings

import numpy as np
import pytest
import scipy.stats
import torch

from patchsvdd_fast import HierarchicalEncoder, ops
from patchsvdd_fast.encoders.patch_svdd import from_official_names
from patchsvdd_fast.ops.pair_protocol import COLOUR_SHIFT, DIRECTIONS, PIXEL_NOISE
from patchsvdd_fast.training.objectives import DrawnPairs, PositionClassifier, patch_losses
from patchsvdd_fast.training.record import CollapseWarning, embedding_spread, is_collapsed
from patchsvdd_fast.training.settings import CROPS_PER_IMAGE, TrainingSettings
from patchsvdd_fast.training.trainer import Trainer


@pytest.fixture
def reference_losses(reference_dir):
    return np.load(reference_dir / "losses.npz")


def _reference_models(reference, dtype=torch.float32):
    encoder = HierarchicalEncoder()
    official = {
        key.removeprefix("enc."): torch.from_numpy(reference[key])
        for key in reference.files
        if key.startswith("enc.")
    }
    encoder.load_state_dict(from_official_names(official, encoder))
    classifiers = {}
    for size in (64, 32):
        classifier = PositionClassifier()
        layers = {"fc1": "hidden.0", "fc2": "hidden.2", "fc3": "last"}
        classifier.load_state_dict(
            {
                f"{ours}.{kind}": torch.from_numpy(reference[f"cls{size}.{theirs}.{kind}"])
                for theirs, ours in layers.items()
                for kind in ("weight", "bias")
            }
        )
        classifiers[size] = classifier.to(dtype)
    return encoder.to(dtype), classifiers


def _reference_loss(reference, encoder, classifiers):
    labels = torch.from_numpy(reference["y"])
    dtype = next(encoder.parameters()).dtype
    drawn = {}
    for size in (64, 32):
        first, second, near, jittered = (
            torch.from_numpy(reference[name]).to(dtype)
            for name in (f"pos{size}_a", f"pos{size}_b", f"svdd{size}_a", f"svdd{size}_b")
        )
        drawn[size] = DrawnPairs(first, second, labels, near, jittered)
    losses = patch_losses(encoder, classifiers, drawn, 1e-3)
    metrics = {size: loss.metrics() for size, loss in losses.items()}
    return sum(loss.total for loss in losses.values()), metrics


def test_losses_match_the_reference(reference_losses):
    encoder, classifiers = _reference_models(reference_losses)
    total, metrics = _reference_loss(reference_losses, encoder, classifiers)
    in_float64, _ = _reference_loss(
        reference_losses, *_reference_models(reference_losses, torch.float64)
    )
    # float32 against float64 arithmetic differs by up to 1e-6 of the loss on either side
    total = total.detach()
    assert float(total) == pytest.approx(float(in_float64.detach()), rel=1e-6)
    assert float(total) == pytest.approx(float(reference_losses["loss_total"]), rel=1e-6)
    for size in (64, 32):
        assert metrics[size].loss == pytest.approx(
            float(reference_losses[f"loss_pos{size}"]), rel=1e-6
        )
        # distances of 1e-3 between embeddings of 0.1: rounding enters at 1e-4 of the distance
        assert metrics[size].svdd_loss == pytest.approx(
            float(reference_losses[f"loss_svdd{size}"]), rel=2e-4
        )


def test_gradient_norms_match_the_reference(reference_losses):
    encoder, classifiers = _reference_models(reference_losses)
    total, _ = _reference_loss(reference_losses, encoder, classifiers)
    total.backward()
    modules = {"enc": encoder, "cls64": classifiers[64]}
    convolutions = encoder.small.convolutions()
    names = {f"enc.enc.conv{i}": conv for i, conv in enumerate(convolutions, start=1)}
    names |= {"enc.conv1": encoder.heads[0].join, "enc.conv2": encoder.heads[0].project}
    hidden = modules["cls64"].hidden
    names |= {"cls64.fc1": hidden[0], "cls64.fc2": hidden[2], "cls64.fc3": modules["cls64"].last}
    checked = 0
    for key in reference_losses.files:
        if key.startswith("grad_norm."):
            layer, kind = key.removeprefix("grad_norm.").rsplit(".", 1)
            gradient = getattr(names[layer], kind).grad
            expected = float(reference_losses[key])
            if math.isnan(expected):
                assert gradient is None
            else:
                # gradients of 1e-6 are sums of terms of 1e-3 that cancel: 1 % there
                tolerance = 1e-2 if expected < 1e-5 else 1e-3
                assert float(gradient.norm()) == pytest.approx(expected, rel=tolerance), key
            checked += 1
    assert checked == 26


def test_last_classifier_layer_is_fixed_unless_asked():
    for train_last_layer in (False, True):
        classifier = PositionClassifier(16, train_last_layer)
        classifier(torch.rand(4, 16), torch.rand(4, 16)).sum().backward()
        assert (classifier.last.weight.grad is not None) == train_last_layer
        assert classifier.last.bias.grad is not None


def _draw_pairs(kind, size, height, width, redraw_clipped=False, steps=20, pairs=1000):
    """First and second corners and labels of `steps * pairs` pairs."""
    images, mean = (
        torch.zeros(1, 1, height, width, dtype=torch.uint8),
        torch.zeros(1, height, width),
    )
    image_of = torch.zeros(pairs, dtype=torch.int64)
    drawn = [
        ops.crop_pairs(images, mean, image_of, size, kind, 1, step, redraw_clipped)[1:]
        for step in range(steps)
    ]
    corners, labels = zip(*drawn, strict=True)
    return *torch.cat(corners, dim=1), torch.cat(labels)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("redraw_clipped", [False, True])
def test_position_pairs_follow_the_protocol(size, redraw_clipped):
    height, width = 256, 200
    first, second, labels = _draw_pairs("position", size, height, width, redraw_clipped)
    limits = torch.tensor([height - size, width - size])
    for corners in (first, second):
        assert (corners >= 0).all()
        assert (corners <= limits).all()
    offset = second - first
    direction = DIRECTIONS[labels]
    inside = ((second > 0) & (second < limits)).all(dim=1)
    unclipped = torch.ones_like(inside) if redraw_clipped else inside
    assert torch.equal(offset.sign()[unclipped], direction[unclipped])
    length = offset[unclipped].abs()[direction[unclipped] != 0]
    lengths = torch.bincount(length - 3 * size // 4)
    assert len(lengths) == size // 4
    if redraw_clipped:
        assert (offset.sign() == direction).all()
    else:
        assert (lengths * len(lengths) / len(length) - 1).abs().max() < 0.15
        assert (torch.bincount(labels, minlength=8) / len(labels) - 1 / 8).abs().max() < 0.012
        for axis, limit in enumerate(limits.tolist()):
            counts = torch.bincount(first[:, axis])
            assert len(counts) == limit + 1
            assert (counts * len(counts) / len(first) - 1).abs().max() < 0.6  # 5 of deviation
        assert 0.05 < (~inside).float().mean() < 0.9  # clipping happens


def test_redrawing_finds_the_only_places_there_are():
    """In an image of 2K - 1 pixels a diagonal pair of the longest offset fits in one place."""
    first, second, labels = _draw_pairs("position", 8, 15, 15, redraw_clipped=True)
    assert torch.equal((second - first).sign(), DIRECTIONS[labels])
    assert (torch.bincount(labels) > 0).all()
    assert (second - first).abs().max() == 7


@pytest.mark.parametrize("size", [32, 64])
def test_neighbour_pairs_follow_the_protocol(size):
    first, second, labels = _draw_pairs("neighbour", size, 256, 256)
    assert (labels == 0).all()
    reach = size // 32
    offset = second - first
    assert offset.abs().max() == reach
    interior = ((first >= reach) & (first <= 256 - size - reach)).all(dim=1)
    cells = (offset[interior] + reach) @ torch.tensor([2 * reach + 1, 1])
    counts = torch.bincount(cells, minlength=(2 * reach + 1) ** 2)
    middle = len(counts) // 2
    assert counts[middle] == 0
    others = torch.cat([counts[:middle], counts[middle + 1 :]]) / counts.sum()
    assert (others * len(others) - 1).abs().max() < 0.15


@pytest.mark.parametrize("size", [1, 32])
def test_views_are_in_one_place(size):
    height, width = 64, 50
    first, second, labels = _draw_pairs("view", size, height, width)
    assert torch.equal(first, second)
    assert (labels == 0).all()
    for axis, limit in enumerate((height - size, width - size)):
        counts = torch.bincount(first[:, axis])
        assert len(counts) == limit + 1
        expected = len(first) / len(counts)
        assert (counts - expected).abs().max() < 5 * math.sqrt(expected)
    correlation = torch.corrcoef(first.T.double())[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(len(first))


def test_crops_are_the_pixels_they_name():
    images = torch.randint(256, (3, 3, 70, 90), dtype=torch.uint8)
    mean = torch.rand(3, 70, 90) * 255
    image_of = torch.tensor([2, 0, 2, 1])
    patches, corners, _ = ops.crop_pairs(images, mean, image_of, 33, "neighbour", 0, 0)
    for pair, n in enumerate(image_of.tolist()):
        for which in (0, 1):
            top, left = corners[which, pair].tolist()
            window = (slice(None), slice(top, top + 33), slice(left, left + 33))
            assert torch.equal(patches[which, pair], (images[n][window] - mean[window]) / 255)


@pytest.mark.parametrize("kind", ["position", "view"])
def test_perturbation_has_the_stated_deviations(kind):
    """Clean patches are zero here, so what is left is a shift per channel and noise per pixel."""
    images, mean = torch.zeros(1, 3, 20, 20, dtype=torch.uint8), torch.zeros(3, 20, 20)
    image_of = torch.zeros(4000, dtype=torch.int64)
    patches, _, _ = ops.crop_pairs(images, mean, image_of, 8, kind, 0, 0)
    shift = patches.mean(dim=(3, 4), dtype=torch.float64)  # [2, B, 3]
    noise = patches - shift[..., None, None]
    assert float(shift.std()) == pytest.approx(math.hypot(COLOUR_SHIFT, PIXEL_NOISE / 8), rel=0.02)
    assert float(noise.std()) == pytest.approx(PIXEL_NOISE * math.sqrt(63 / 64), rel=0.005)
    assert float(shift.mean()) == pytest.approx(0, abs=4 * COLOUR_SHIFT / math.sqrt(shift.numel()))
    # Each patch and channel has its own shift; each pixel its own noise.
    correlations = torch.corrcoef(shift.permute(0, 2, 1).reshape(6, -1)) - torch.eye(6)
    assert correlations.abs().max() < 0.08
    pixels = noise.permute(0, 2, 3, 4, 1).reshape(2 * 3 * 64, -1)
    correlations = torch.corrcoef(pixels) - torch.eye(len(pixels))
    assert correlations.abs().max() < 0.12  # -1/63 within a channel, and 6 deviations of 1/63


def test_noise_is_normal_into_the_tails():
    images, mean = torch.zeros(1, 4, 64, 64, dtype=torch.uint8), torch.zeros(4, 64, 64)
    patches, _, _ = ops.crop_pairs(
        images, mean, torch.zeros(64, dtype=torch.int64), 64, "position", 0, 0
    )
    noise = patches - patches.mean(dim=(3, 4), keepdim=True)
    noise = (noise / noise.std(dim=(3, 4), keepdim=True)).flatten().numpy()  # 2 million
    assert scipy.stats.kstest(noise, "norm").pvalue > 1e-3
    for deviations in (2, 3, 4):
        expected = 2 * scipy.stats.norm.sf(deviations) * len(noise)
        assert abs((np.abs(noise) > deviations).sum() - expected) < 5 * math.sqrt(expected)


def _tiny_trainer(seed=0, **settings):
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (3, 3, 96, 96), dtype=torch.uint8, generator=generator)
    torch.manual_seed(seed)
    encoder = HierarchicalEncoder(embedding_dim=8, initialization="kaiming")
    options = {"steps": 3, "batch_size": 4, "seed": seed} | settings
    return Trainer(encoder, images, images.float().mean(dim=0), TrainingSettings(**options))


def test_training_is_reproducible_and_depends_on_the_seed():
    states = []
    for seed in (0, 0, 1):
        trainer = _tiny_trainer(seed)
        trainer.run()
        states.append(torch.cat([p.detach().flatten() for p in trainer.encoder.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_training_reports_every_step():
    seen = []
    record = _tiny_trainer().run(seen.append)
    assert [step.step for step in seen] == [1, 2, 3]
    assert all(step.total_steps == 3 for step in seen)
    assert set(seen[0].levels) == {32, 64}
    assert record.steps == 3
    assert record.final_loss == seen[-1].loss
    assert not record.collapsed
    parts = seen[0].levels.values()
    assert seen[0].loss == pytest.approx(
        sum(level.loss + 1e-3 * level.svdd_loss for level in parts), rel=1e-5
    )


def test_training_learns_to_tell_positions():
    """A gradient in colour gives position away: a few hundred pairs must be enough to see it."""
    ramp = torch.linspace(0, 255, 128)
    image = torch.stack(
        [ramp.expand(128, 128), ramp[:, None].expand(128, 128), ramp.flip(0).expand(128, 128)]
    )
    torch.manual_seed(0)
    encoder = HierarchicalEncoder(embedding_dim=16, num_levels=1, initialization="kaiming")
    settings = TrainingSettings(
        steps=40, batch_size=24, learning_rate=1e-3, train_last_layer=True, redraw_clipped=True
    )
    steps = []
    Trainer(encoder, image[None].byte(), torch.full((3, 128, 128), 128.0), settings).run(
        steps.append
    )
    late = [step.levels[32].accuracy for step in steps[-8:]]
    assert np.mean(late) > 0.3  # chance is 0.125


def test_epoch_visits_every_image_equally():
    trainer = _tiny_trainer(batch_size=7)
    steps = math.ceil(2 * 3 * CROPS_PER_IMAGE / 7)
    drawn = torch.cat([trainer._images_of(step) for step in range(1, steps + 1)])
    for epoch in drawn.split(3 * CROPS_PER_IMAGE)[:2]:
        assert torch.bincount(epoch).tolist() == [CROPS_PER_IMAGE] * 3
    assert len(drawn) == 7 * steps  # every batch is whole, over the end of an epoch too
    assert TrainingSettings(epochs=2, batch_size=7).total_steps(3) == steps
    assert torch.equal(trainer._images_of(44), drawn[43 * 7 : 44 * 7])  # in any order


def test_collapse_is_noticed():
    trainer = _tiny_trainer(steps=25)
    with torch.no_grad():
        for parameter in trainer.encoder.parameters():
            parameter.zero_()
    with pytest.warns(CollapseWarning, match="collapsed"):
        record = trainer.run()
    assert record.collapsed


def test_small_spread_is_not_collapse():
    point = torch.rand(64)
    useful = point + 1e-6 * torch.randn(500, 64)
    constant = point.repeat(500, 1)
    constant[::2] = torch.nextafter(constant[::2], torch.tensor(2.0))
    assert not is_collapsed(useful)
    assert is_collapsed(constant)
    assert embedding_spread(torch.tensor([[0.0, 2.0], [2.0, 2.0]])) == 0.5


def test_interrupt_takes_effect_between_steps():
    trainer = _tiny_trainer(steps=1000)
    seen = []

    def interrupt_after_two(step):
        seen.append(step.step)
        if step.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(interrupt_after_two)
    assert seen[-1] in (2, 3)
    assert signal.getsignal(signal.SIGINT) is before


def test_trains_outside_the_main_thread():
    records = []
    thread = threading.Thread(target=lambda: records.append(_tiny_trainer().run()))
    thread.start()
    thread.join()
    assert records[0].steps == 3


def test_divergence_is_an_error():
    trainer = _tiny_trainer()
    with torch.no_grad():
        trainer.encoder.small.convolutions()[0].weight.fill_(torch.nan)
    with (
        warnings.catch_warnings(),
        pytest.raises(FloatingPointError, match="step 1"),
    ):
        warnings.simplefilter("ignore")
        trainer.run()


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"steps": 0},
        {"minutes": 0},
        {"batch_size": 0},
        {"learning_rate": 0},
        {"svdd_weight": -1},
        {"mode": "best"},
        {"schedule": "linear"},
        {"initialization": "zeros"},
        {"precision": "float16"},
        {"check_every": 0},
        {"patience": 0, "check_every": 1},
        {"patience": 1},
        {"mode": "dense", "precision": "bfloat16"},
    ],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrainingSettings(**bad)
