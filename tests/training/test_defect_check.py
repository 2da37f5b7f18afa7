"""Synthetic defects, and choosing an encoder's weights by how well it finds them."""

import time
import warnings

import numpy as np
import pytest
import torch

from patchsvdd_fast import HierarchicalEncoder
from patchsvdd_fast.encoders.levels import DEFAULT_LEVELS
from patchsvdd_fast.images.drawn_defects import DEFECTS, Strength, draw_defects
from patchsvdd_fast.images.light import mean_colour, mean_image
from patchsvdd_fast.images.prepare import load_images
from patchsvdd_fast.training.defect_check import DefectCheck, shared_variance
from patchsvdd_fast.training.record import Quality
from patchsvdd_fast.training.settings import training_settings
from patchsvdd_fast.training.trainer import Trainer


def _images(count=4, side=128):
    """A fine weave, everywhere the same but for where it begins and a little noise."""
    generator = torch.Generator().manual_seed(0)
    begin = 6 * torch.rand(2, count, 1, 1, 1, generator=generator)
    y, x = torch.arange(side)[:, None] / 7.0, torch.arange(side + 8) / 9.0
    weave = torch.sin(y + begin[0]) * torch.cos(x + begin[1])
    images = (120 + 40 * weave).repeat(1, 3, 1, 1)
    return (images + 3 * torch.randn(images.shape, generator=generator)).clamp(0, 255).byte()


@pytest.mark.parametrize("kind", DEFECTS)
def test_defects_change_what_their_mask_says(kind):
    image = _images(1)[0]
    for seed in range(5):
        changed, mask = draw_defects(image, np.random.default_rng(seed), kind=kind)
        assert changed.dtype == torch.uint8
        assert changed.shape == image.shape
        assert 0 < mask.float().mean() < 0.2
        difference = (changed.int() - image.int()).abs().amax(dim=0)
        near = torch.nn.functional.max_pool2d(mask[None].float(), 21, 1, 10)[0].bool()
        assert (difference[~near] == 0).all()  # borders are soft
        assert (difference[mask] > 0).float().mean() > 0.3
        again, _ = draw_defects(image, np.random.default_rng(seed), kind=kind)
        assert torch.equal(again, changed)


@pytest.mark.parametrize("kind", DEFECTS)
def test_stronger_defects_are_larger_and_plainer(kind):
    image = _images(1)[0]
    changes = []
    for strength in (Strength(), Strength(size=2.0, contrast=3.0)):
        changed, mask = draw_defects(image, np.random.default_rng(1), kind=kind, strength=strength)
        difference = (changed.float() - image.float()).abs().mean(dim=0)
        changes.append((int(mask.sum()), float(difference[mask].mean())))
    (size, change), (larger, plainer) = changes
    assert larger > 1.5 * size
    if kind in ("spot", "scratch"):
        assert plainer > 1.5 * change


@pytest.mark.parametrize("kind", ["spot", "scratch", "tint"])
def test_drawn_defects_show_on_black_and_white(kind):
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, :, 32:] = 255
    for seed in range(8):
        changed, mask = draw_defects(image, np.random.default_rng(seed), kind=kind)
        difference = (changed.int() - image.int()).abs().amax(dim=0)[mask]
        assert difference.float().median() >= 3


def test_the_checks_images_are_in_the_light_they_are_scored_in():
    images = _images()
    light = mean_colour(images)
    plain, matched = (
        DefectCheck(images, mean_image(images), DEFAULT_LEVELS, light=light_of)
        for light_of in (None, light)
    )
    assert torch.equal(plain.images[:2], matched.images[:2])
    means = matched.images[2:].float().mean(dim=(2, 3))
    torch.testing.assert_close(means, light.expand_as(means), atol=0.5, rtol=0)
    assert (plain.images[2:].float().mean(dim=(2, 3)) - light).abs().max() > 0.5


def test_several_defects_may_be_drawn():
    _, one = draw_defects(_images(1)[0], np.random.default_rng(0), 1)
    _, three = draw_defects(_images(1)[0], np.random.default_rng(0), 3)
    assert three.sum() > one.sum()
    assert (three | one == three).all()


class _Blind(HierarchicalEncoder):
    """Sees nothing: every patch has the same embedding, but for its place."""

    def dense(self, images, levels=DEFAULT_LEVELS):
        return super().dense(torch.zeros_like(images), levels)


def test_a_check_tells_seeing_from_blind():
    images = _images()
    check = DefectCheck(images, mean_image(images), DEFAULT_LEVELS)
    assert len(check.bank_images) == 2
    assert check.labels.tolist() == [False] * 2 + [True] * 8
    assert not check.masks[:2].any()
    assert check.masks[2:].any(axis=(1, 2)).all()
    torch.manual_seed(0)
    blind = check(_Blind(embedding_dim=8).eval())
    assert blind.detection == blind.segmentation == blind.criterion == 50
    assert Quality(detection=80, segmentation=50).criterion == 70
    encoder = HierarchicalEncoder(embedding_dim=8, initialization="kaiming").eval()
    seeing = check(encoder)
    assert seeing.segmentation > 60
    assert check(encoder) == seeing


def test_a_check_needs_two_images():
    images = _images(1)
    with pytest.raises(ValueError, match="at least two images"):
        DefectCheck(images, mean_image(images), DEFAULT_LEVELS)


def test_textures_and_objects_are_told_apart():
    """By how much of their variance images have in common; light does not count."""
    textures = _images(8)
    assert shared_variance(textures) < 0.1
    y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    disc = ((y - 64).square() + (x - 64).square() < 40**2).float()
    noise = torch.Generator().manual_seed(0)
    light = torch.tensor([20.0, 60, 100, 140])[:, None, None, None]
    objects = light + 60 * disc + 10 * torch.randn(4, 3, 128, 128, generator=noise)
    assert shared_variance(objects.clamp(0, 255).byte()) > 0.8
    assert shared_variance(torch.full((3, 3, 8, 8), 7, dtype=torch.uint8)) == 0

    def least_gain(images):
        return DefectCheck(images, mean_image(images), DEFAULT_LEVELS).least_gain

    assert least_gain(textures) < least_gain(objects.byte())


TEXTURES, OBJECTS = ("leather", "synth_brick", "synth_gravel"), ("cookie", "hazelnut")


@pytest.mark.parametrize("category", [*TEXTURES, *OBJECTS])
def test_real_textures_and_objects_are_told_apart(categories_dir, category):
    shared = shared_variance(load_images(categories_dir / category, (256, 256), 64))
    assert shared > 0.5 if category in OBJECTS else shared < 0.1


def _trainer(criteria, least_gain=0.0, **options):
    """A trainer whose check finds the given figures in turn; and the weights at each check."""
    images = _images()
    seen = []

    def check(encoder):
        seen.append({name: value.clone() for name, value in encoder.state_dict().items()})
        value = criteria[len(seen) - 1]
        return Quality(value, value)

    settings = training_settings("dense", batch_size=1, check_every=2, **options)
    encoder = HierarchicalEncoder(embedding_dim=8, initialization="kaiming")
    trainer = Trainer(encoder, images, mean_image(images), settings, check, None, least_gain)
    return trainer, seen


def _equal(encoder, state):
    return all(torch.equal(encoder.state_dict()[name], value) for name, value in state.items())


def test_the_best_weights_are_kept():
    trainer, seen = _trainer([50, 70, 60, 65], steps=5)
    steps = []
    record = trainer.run(steps.append)
    assert [s for s, _ in record.qualities] == [0, 2, 4, 5]
    assert record.best_step == 2
    assert _equal(trainer.encoder, seen[1])
    assert not _equal(trainer.encoder, seen[3])
    assert [step.quality for step in steps if step.quality] == [Quality(v, v) for v in (70, 60, 65)]


def test_a_gain_has_to_be_plain():
    """Patience counts any improvement; weights are kept from the least gain on."""
    trainer, seen = _trainer([50, 52, 54, 53, 52], least_gain=5, steps=100, patience=2)
    record = trainer.run()
    assert record.best_step == 0
    assert record.steps == 8
    assert _equal(trainer.encoder, seen[0])
    assert record.least_gain == 5
    trainer, seen = _trainer([50, 54, 55, 60, 58], least_gain=5, steps=8)
    assert trainer.run().best_step == 6
    assert _equal(trainer.encoder, seen[3])


def test_the_time_left_counts_the_checks_to_come(monkeypatch):
    """A step takes a second and a check ten, by a clock of the test's own."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    trainer, _ = _trainer(range(50, 70), steps=10)
    step, check = trainer._step, trainer.check

    def slow_step(number):
        now[0] += 1
        return step(number)

    def slow_check(encoder):
        now[0] += 10
        return check(encoder)

    trainer._step, trainer.check = slow_step, slow_check
    left = []
    trainer.run(lambda report: left.append(report.seconds_left))
    # After step 1 nine steps and the checks of steps 2, 4, 6, 8 and 10 are to come.
    assert left == [59, 48, 47, 36, 35, 24, 23, 12, 11, 0]


def test_the_time_left_follows_the_pace_of_the_last_steps(monkeypatch):
    """The first step takes a minute, the next ones two seconds each, and after step 30 one."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    trainer, _ = _trainer(range(100), steps=100)
    step = trainer._step

    def timed_step(number):
        now[0] += 60 if number == 1 else 2 if number <= 30 else 1
        return step(number)

    trainer._step = timed_step
    left = {}
    trainer.run(lambda report: left.update({report.step: report.seconds_left}))
    assert left[1] == 99 * 60  # nothing else is known yet
    assert left[2] == 98 * 2
    assert left[30] == 70 * 2
    assert left[60] == 40 * 1


def test_patience_ends_training():
    trainer, seen = _trainer([50, 70, 60, 65, 80], steps=100, patience=2)
    record = trainer.run()
    assert record.steps == 6
    assert record.best_step == 2
    assert len(seen) == 4


def test_a_collapse_ends_training_and_is_no_alarm():
    trainer, seen = _trainer([50, 70] + 50 * [60], steps=100, patience=90)

    def collapse_after_step_3(step):
        if step.step == 3:
            with torch.no_grad():
                for parameter in trainer.encoder.parameters():
                    parameter.zero_()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = trainer.run(collapse_after_step_3)
    assert record.collapsed
    assert record.steps == 3 + 20
    assert record.best_step == 2
    assert _equal(trainer.encoder, seen[1])


def test_older_checkpoints_do_not_lower_the_gain_that_is_needed():
    trainer, _ = _trainer([50, 52], least_gain=5, steps=2)
    trainer.run()
    tensors, values = trainer.state()
    del values["record"]["least_gain"]
    again, _ = _trainer([50, 52], least_gain=5, steps=2)
    again.load_state(tensors, values)
    assert again.record.least_gain == 5
