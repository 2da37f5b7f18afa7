"""Synthetic defects, and choosing an encoder's weights by how well it finds them."""

import warnings

import numpy as np
import pytest
import torch

from patchsvdd_fast import HierarchicalEncoder
from patchsvdd_fast.encoders.levels import DEFAULT_LEVELS
from patchsvdd_fast.images.drawn_defects import DEFECTS, Strength, draw_defects
from patchsvdd_fast.images.light import mean_colour, mean_image
from patchsvdd_fast.training.defect_check import DefectCheck
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


def _trainer(criteria, **options):
    """A trainer whose check finds the given figures in turn; and the weights at each check."""
    images = _images()
    seen = []

    def check(encoder):
        seen.append({name: value.clone() for name, value in encoder.state_dict().items()})
        value = criteria[len(seen) - 1]
        return Quality(value, value)

    settings = training_settings("dense", batch_size=1, check_every=2, **options)
    encoder = HierarchicalEncoder(embedding_dim=8, initialization="kaiming")
    return Trainer(encoder, images, mean_image(images), settings, check), seen


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
