"""Losses against the reference implementation, pair sampling, and the training loop."""

import math
import os
import signal
import threading
import warnings

import numpy as np
import pytest
import torch

from patchsvdd_fast import HierarchicalEncoder
from patchsvdd_fast.encoders.patch_svdd import from_official_names
from patchsvdd_fast.training.objectives import DrawnPairs, PositionClassifier, patch_losses
from patchsvdd_fast.training.record import (
    CollapseWarning,
    embedding_spread,
    have_collapsed,
    is_collapsed,
    moments,
)
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
    parts = [constant, constant + 1]  # each alike, but not both together
    assert not have_collapsed(sum(map(moments, parts)))
    assert have_collapsed(sum(map(moments, [constant, constant])))
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
