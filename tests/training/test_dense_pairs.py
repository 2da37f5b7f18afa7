"""Training in the dense mode: its pairs, their embeddings, and that the encoder improves."""

import pytest
import torch
from torch.nn import functional as F

from patchsvdd_fast import HierarchicalEncoder, PatchLevel
from patchsvdd_fast.encoders.patch_svdd import TRUNK_STRIDE
from patchsvdd_fast.training.dense_pairs import draw_neighbours, embed_cells
from patchsvdd_fast.training.objectives import mixed_seed
from patchsvdd_fast.training.settings import training_settings
from patchsvdd_fast.training.trainer import Trainer

PAIRS = 20_000


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("size", "reach"), [(32, 1), (64, 1), (128, 2)])
def test_neighbours_are_a_jitter_away(size, reach):
    first, second = draw_neighbours(size, 256, PAIRS, _generator())
    offset = (second - first).abs()
    assert offset.max() == reach
    last = (256 - size) // TRUNK_STRIDE
    inside = ((first >= reach) & (first <= last - reach)).all(dim=1)
    assert (offset[inside].amax(dim=1) > 0).all()
    for cells in (first, second):
        assert cells.min() == 0
        assert cells.max() == last


def test_cells_are_embedded_as_the_encoder_does():
    torch.manual_seed(0)
    encoder = HierarchicalEncoder(embedding_dim=8, num_levels=3, initialization="kaiming").eval()
    images = torch.randn(2, 3, 140, 150)
    with torch.no_grad():
        trunk = encoder.small(images).permute(0, 2, 3, 1)
        for size in encoder.patch_sizes:
            (expected,) = encoder.dense(images, [PatchLevel(size, 2)])
            rows, columns = expected.shape[1:3]
            cells = torch.cartesian_prod(*map(torch.arange, (2, rows, columns)))
            found = embed_cells(encoder, size, trunk, cells)
            torch.testing.assert_close(found, expected.flatten(0, 2), rtol=0, atol=1e-6)


def test_dense_training_draws_neighbours_together():
    """Measured by the spread of all patches."""
    coarse = torch.rand(2, 3, 20, 20, generator=_generator())
    smooth = F.interpolate(coarse, size=(160, 160), mode="bilinear")
    images = (255 * (smooth + torch.rand(2, 3, 160, 160, generator=_generator(1))) / 2).byte()
    settings = training_settings("dense", steps=15, learning_rate=3e-4, check_every=0)
    torch.manual_seed(0)
    steps = []
    Trainer(
        HierarchicalEncoder(embedding_dim=16), images, torch.full((3, 160, 160), 127.5), settings
    ).run(steps.append)
    for size in (32, 64):
        ratios = [step.levels[size].svdd_loss / step.levels[size].spread for step in steps]
        assert sum(ratios[-3:]) / 3 < 0.95 * ratios[0]


def test_several_threads_add_up_gradients_in_one_order():
    """Patches that many pairs share; enough of them that PyTorch divides the work."""
    images = torch.randint(256, (4, 3, 128, 128), generator=_generator(), dtype=torch.uint8)
    settings = training_settings("dense", steps=3, check_every=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        weights = []
        for _ in range(2):
            torch.manual_seed(0)
            encoder = HierarchicalEncoder()
            Trainer(encoder, images, images.float().mean(dim=0), settings).run()
            weights.append(torch.cat([p.detach().flatten() for p in encoder.parameters()]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*weights)


@pytest.mark.parametrize("mode", ["faithful", "dense"])
def test_shares_of_a_batch_add_up_to_its_gradient(mode):
    """Images of unequal contrast: nothing may be measured over a share and used for the batch."""
    contrast = torch.tensor([5.0, 20, 60, 100])[:, None, None, None]
    noise = torch.rand(4, 3, 130, 130, generator=_generator())
    images = (100 + contrast * noise).byte()
    settings = training_settings(mode, steps=1, batch_size=3)
    torch.manual_seed(0)
    encoder = HierarchicalEncoder(embedding_dim=8, initialization="kaiming")
    trainer = Trainer(encoder, images, images.float().mean(dim=0), settings)
    numbers = torch.tensor([0, 3, 1])

    def gradient(share):
        encoder.zero_grad()
        losses = trainer._objective.losses(numbers, 7, share)
        weight = (share.stop - share.start) / 3
        (weight * sum(level.total for level in losses.values())).backward()
        return torch.cat([p.grad.flatten() for p in encoder.parameters()])

    whole = gradient(slice(0, 3))
    parts = gradient(slice(0, 1)) + gradient(slice(1, 3))
    assert (parts - whole).norm() < 1e-4 * whole.norm()


def test_too_small_images_are_refused():
    images = torch.zeros(1, 3, 65, 200, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"at least 66x66 pixels for patches of 64, got 200x65"):
        Trainer(HierarchicalEncoder(), images, torch.zeros(3, 65, 200), training_settings("dense"))


def test_mixed_seeds_differ_by_every_number():
    seeds = {mixed_seed(a, b) for a in range(40) for b in range(40)}
    assert len(seeds) == 1600
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mixed_seed(-1, 2) != mixed_seed(1, 2)
