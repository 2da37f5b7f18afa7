"""Banks and whole detectors on a GPU against the CPU, given the same embeddings."""

import numpy as np
import pytest
import torch

from equality import assert_same, to
from patchsvdd_fast import NormalBank, PatchLevel, PatchSVDD, nearest, ops
from patchsvdd_fast.score.encoding import score_images
from patchsvdd_fast.score.reweighting import image_weights
from patchsvdd_fast.search.larger_than_card import nearest_streamed

LEVELS = (PatchLevel(64, 16), PatchLevel(32, 4))
SIDE = 96


def embeddings(count, rows, columns, seed, dim=64):
    """[N, I, J, D] like those of patches: smooth over the grid, of few axes, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(6, dim, generator=torch.Generator().manual_seed(99))
    field = torch.randn(count, 6, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(field, size=(rows, columns), mode="bilinear")
    noise = 0.05 * torch.randn(count, rows, columns, dim, generator=generator)
    return 0.45 + 0.005 * (torch.einsum("nkij,kd->nijd", smooth, basis) + noise)


@pytest.mark.parametrize("storage", [torch.float32, torch.float16])
def test_a_bank_moves_to_the_device_and_back(device, storage):
    bank = NormalBank(embeddings(20, 25, 25, 0), storage=storage)
    queries = embeddings(3, 25, 25, 1)
    moved = bank.to(device)
    assert moved.device == device
    assert_same(moved.embeddings, bank.embeddings, device)
    expected = bank.nearest(queries)
    found = moved.nearest(queries.to(device))
    assert_same(found, expected, device)
    assert_same(moved.source(found[1]), bank.source(expected[1]), device)
    assert_same(moved.to("cpu").nearest(queries), expected, torch.device("cpu"))


def test_a_bank_made_on_the_device(device):
    values, queries = embeddings(12, 25, 25, 2), embeddings(2, 25, 25, 3)
    bank, expected = NormalBank(values.to(device)), NormalBank(values)
    assert_same(bank.nearest(queries.to(device)), expected.nearest(queries), device)
    own = torch.arange(12)[:, None, None].expand(12, 25, 25)
    assert_same(
        bank.nearest(*to(device, (values,)), exclude_same_group=own.to(device)),
        expected.nearest(values, exclude_same_group=own),
        device,
    )
    assert bank.nearest(queries[:0].to(device))[0].shape == (0, 25, 25)


def test_a_bank_changes_on_the_device(device):
    values, queries = embeddings(12, 25, 25, 4), embeddings(2, 25, 25, 5)
    answers = []
    for where in (device, torch.device("cpu")):
        bank = NormalBank(values[:6].to(where))
        bank.add(values[6:8].to(where), groups=torch.tensor([70, 71], device=where))
        bank.remove(torch.tensor([1, 70], device=where))
        bank.merge(NormalBank(values[8:].to(where), groups=torch.arange(80, 84, device=where)))
        answers.append((bank.embeddings, bank.groups, *bank.nearest(queries.to(where))))
    assert_same(*answers, device)


@pytest.mark.parametrize("clusters", [0, 20])
def test_images_are_weighted_on_the_device(device, clusters):
    images, groups = 40 * embeddings(3, 25, 25, 7), torch.tensor([0, 5, 99])
    weights = []
    for where in (device, torch.device("cpu")):
        bank = NormalBank(40 * embeddings(12, 25, 25, 6).to(where), clusters=clusters)
        bank.add(40 * embeddings(1, 25, 25, 8).to(where))
        distances, _ = bank.nearest(images.to(where), exclude_same_group=groups.to(where))
        weights.append(image_weights(bank, images.to(where), distances, 9, groups.to(where)))
    torch.testing.assert_close(*weights, rtol=1e-9, atol=0)
    assert ((weights[0] > 0.88) & (weights[0] < 1)).all()


KINDS = {
    "patches": lambda normal: embeddings(7, 10, 10, 20, dim=normal.shape[1]).flatten(0, 2),
    "normal": lambda normal: normal,
    "duplicates": lambda normal: normal[torch.randint(60, (700,))],
    "far ball": lambda normal: 1 + 1e-6 * normal,
    "two blobs": lambda normal: normal + 1e4 * (torch.arange(700)[:, None] % 2),
    "outlier": lambda normal: torch.where(torch.arange(700)[:, None] == 9, 1e6, normal),
    "all equal": lambda normal: normal * 0 + 1,
    "lattice": lambda normal: normal.round(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clusters", [1, 5, 60])
@pytest.mark.parametrize(("dim", "storage"), [(20, torch.float32), (64, torch.float16)])
def test_small_clustered_banks(device, kind, clusters, dim, storage):
    values = KINDS[kind](torch.randn(700, dim))
    if kind == "outlier":
        storage = torch.float32  # beyond float16
    bank = NormalBank(values, clusters=clusters, storage=storage).to(device)
    queries = torch.cat([values[:270] + 1e-3 * torch.randn(270, dim), values[300:310]])
    expected = nearest(queries, values.to(storage))
    for limit in (1, 1 << 30):
        with ops.use_workspace_limit(limit):
            assert_same(bank.nearest(queries.to(device)), expected, device)
    own = torch.arange(280)
    expected = nearest(queries, values.to(storage), exclude_same_group=(own, torch.arange(700)))
    found = bank.nearest(queries.to(device), exclude_same_group=own.to(device))
    assert_same(found, expected, device)


@pytest.mark.parametrize("rows_at_once", [1, 900, 30_000, 10**6])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_a_bank_that_streams_by(device, rows_at_once, stored):
    rows = 40 if rows_at_once == 1 else 100_000
    queries, bank = torch.rand(500, 24), torch.rand(rows, 24).to(stored)
    bank[rows // 2] = bank[3]
    groups = torch.randint(3, (500,)), torch.randint(3, (rows,))
    banks = [bank, bank.pin_memory()] if device.type == "cuda" else [bank]
    for given in banks:
        found = nearest_streamed(queries.to(device), given, rows_at_once=rows_at_once)
        assert_same(found, nearest(queries, bank), device)
        found = nearest_streamed(
            queries.to(device),
            given,
            rows_at_once=rows_at_once,
            exclude_same_group=(groups[0].to(device), groups[1]),
        )
        assert_same(found, nearest(queries, bank, exclude_same_group=groups), device)


@pytest.mark.parametrize("clusters", [None, 0, 200])
def test_a_larger_bank(device, clusters):
    bank = NormalBank(embeddings(60, 57, 57, 6), clusters=clusters)
    queries = embeddings(4, 57, 57, 7)
    moved = bank.to(device)
    assert clusters is None or (moved.num_clusters > 0) == (clusters > 0)
    assert_same(moved.nearest(queries.to(device)), bank.nearest(queries), device)


@pytest.mark.needs_card
def test_a_bank_names_the_devices(device):
    bank = NormalBank(embeddings(3, 5, 5, 8).to(device))
    with pytest.raises(ValueError, match=rf"{device}.*cpu"):
        bank.nearest(embeddings(1, 5, 5, 9))
    with pytest.raises(ValueError, match=rf"{device}.*cpu"):
        bank.add(embeddings(1, 5, 5, 9))


class FixedEncoder(torch.nn.Module):
    """Knows the embeddings of every batch it will see, by the number of images."""

    def __init__(self, counts):
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(1))
        self.known = {
            count: [
                embeddings(count, *level.grid_shape(SIDE, SIDE), seed=count) for level in LEVELS
            ]
            for count in counts
        }
        self.embedding_dim = self.known[counts[0]][0].shape[-1]

    def dense(self, images, levels):
        assert tuple(levels) == LEVELS
        return [values.to(self.place.device) for values in self.known[len(images)]]


def random_images(count):
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def test_a_detector_scores_as_on_the_cpu(device):
    results = []
    for where in (str(device), "cpu"):
        detector = PatchSVDD(image_size=SIDE, levels=LEVELS, device=where)
        detector.fit(random_images(6), encoder=FixedEncoder((6, 4)))
        assert all(bank.device.type == device.type for bank in detector.banks_.values()) or (
            where == "cpu"
        )
        results.append((detector.threshold_, detector.score(random_images(4))))
    (threshold, result), (expected_threshold, expected) = results
    assert threshold == pytest.approx(expected_threshold, rel=1e-6)
    for name in ("level_maps", "distances", "bank_rows", "matches"):
        for level, values in getattr(expected, name).items():
            assert torch.equal(getattr(result, name)[level], values), (name, level)
    assert torch.equal(result.image_scores, expected.image_scores)


def test_a_detectors_own_encoder_runs_on_the_device(device, monkeypatch):
    """Convolutions sum in another order there: the scores are close, not equal."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    detector = PatchSVDD(image_size=SIDE, levels=LEVELS, initialization="kaiming", device="cpu")
    encoder = detector.untrained_encoder()
    detector.fit(random_images(4), encoder=encoder)
    scores = detector.score(random_images(3)).image_scores
    banks = {level: bank.to(device) for level, bank in detector.banks_.items()}
    images = torch.from_numpy(random_images(3)).permute(0, 3, 1, 2)
    result = score_images(encoder.to(device), banks, images, detector.mean_)
    torch.testing.assert_close(result.image_scores, scores, rtol=0.01, atol=0)
