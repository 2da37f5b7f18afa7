"""The dense mode: its pairs, their embeddings, the changes of light, and that it learns."""

import pytest
import torch

from patchsvdd_fast import HierarchicalEncoder, PatchLevel
from patchsvdd_fast.dense_pairs import draw_neighbours, draw_positions, embed_cells
from patchsvdd_fast.encoder import TRUNK_STRIDE
from patchsvdd_fast.light import Light
from patchsvdd_fast.objectives import mixed_seed
from patchsvdd_fast.recipes import training_settings
from patchsvdd_fast.sampling import DIRECTIONS
from patchsvdd_fast.training import Trainer

PAIRS = 20_000


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("size", "crop"), [(32, 62), (32, 128), (64, 126), (64, 129), (64, 256)])
def test_position_pairs_follow_the_protocol_to_whole_cells(size, crop):
    pairs = draw_positions(size, crop, PAIRS, _generator())
    last = (crop - size) // TRUNK_STRIDE
    for cells in (pairs.first, pairs.second):
        assert cells.min() == 0
        assert cells.max() == last
    offset = pairs.second - pairs.first
    assert torch.equal(offset.sign(), DIRECTIONS[pairs.labels])
    length = TRUNK_STRIDE * offset.abs()[offset != 0]
    assert length.min() == 3 * size // 4
    assert length.max() == size - TRUNK_STRIDE
    assert (torch.bincount(pairs.labels) / PAIRS - 1 / 8).abs().max() < 0.01
    assert (torch.bincount(pairs.first_view) / PAIRS - 1 / 2).abs().max() < 0.02


@pytest.mark.parametrize(("size", "reach"), [(32, 1), (64, 1), (128, 2)])
def test_neighbours_are_a_jitter_away(size, reach):
    pairs = draw_neighbours(size, 256, PAIRS, _generator())
    offset = (pairs.second - pairs.first).abs()
    assert offset.max() == reach
    last = (256 - size) // TRUNK_STRIDE
    inside = ((pairs.first >= reach) & (pairs.first <= last - reach)).all(dim=1)
    assert (offset[inside].amax(dim=1) > 0).all()
    assert pairs.second.min() == 0
    assert pairs.second.max() == last


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


def test_light_changes_each_view_as_stated():
    views = torch.rand(2, 3, 40, 50)
    torch.testing.assert_close(Light().draw(3, _generator()).apply(views), views)
    changed = Light(brightness=0.1).draw(3, _generator()).apply(views) - views
    assert (changed.std(dim=(1, 2, 3)) < 1e-6).all()
    assert changed[0].mean() != changed[1].mean()
    centred = views - views.mean(dim=(2, 3), keepdim=True)
    stretched = Light(contrast=0.2).draw(3, _generator()).apply(views)
    torch.testing.assert_close(stretched.mean(dim=(2, 3)), views.mean(dim=(2, 3)))
    factor = (stretched - stretched.mean(dim=(2, 3), keepdim=True)) / centred
    assert (factor.std(dim=(1, 2, 3)) < 1e-3).all()
    uneven = Light(unevenness=0.1).draw(3, _generator()).apply(views) - views
    steps = (uneven[..., 1:] - uneven[..., :-1]).abs()
    assert 0 < steps.max() < 0.1  # smooth
    drawn = [Light(brightness=0.1).draw(3, _generator(seed)).brightness for seed in range(2000)]
    assert float(torch.cat(drawn).std()) == pytest.approx(0.1, rel=0.05)


def test_dense_training_learns_to_tell_positions():
    """A gradient in colour gives position away."""
    ramp = torch.linspace(0, 255, 160)
    image = torch.stack(
        [ramp.expand(160, 160), ramp[:, None].expand(160, 160), ramp.flip(0).expand(160, 160)]
    )
    settings = training_settings(
        "dense", steps=25, batch_size=1, learning_rate=1e-3, warmup_steps=5, brightness=0.0
    )
    torch.manual_seed(0)
    encoder = HierarchicalEncoder(embedding_dim=16, initialization="kaiming")
    steps = []
    Trainer(encoder, image[None].byte(), torch.full((3, 160, 160), 128.0), settings).run(
        steps.append
    )
    for size in (32, 64):
        late = [step.levels[size].accuracy for step in steps[-5:]]
        assert sum(late) / len(late) > 0.3  # chance is 0.125


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
    images = torch.zeros(1, 3, 120, 200, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"crop_size must be at least 126.*got 120"):
        Trainer(HierarchicalEncoder(), images, torch.zeros(3, 120, 200), training_settings("dense"))


def test_mixed_seeds_differ_by_every_number():
    seeds = {mixed_seed(a, b) for a in range(40) for b in range(40)}
    assert len(seeds) == 1600
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mixed_seed(-1, 2) != mixed_seed(1, 2)
