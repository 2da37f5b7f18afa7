"""PatchCore's re-weighting of image scores: its equation in float64, maps, thresholds, regions."""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from patchsvdd_fast import NormalBank, PatchLevel
from patchsvdd_fast.score.calibration import Calibration, calibrate
from patchsvdd_fast.score.maps import MapRule, ScoreResult, search_levels
from patchsvdd_fast.score.regions import find_regions
from patchsvdd_fast.score.reweighting import image_weights

LEVEL = PatchLevel(32, stride=16)
SHAPE = (64, 64)
GRID = (3, 3)


def weight_by_definition(patches, rows, count):
    """Equation 7 of Roth et al. for one image's patches [P, D] and bank rows [M, D], in float64."""
    patches, rows = (values.double().numpy() for values in (patches, rows))
    from_bank = np.linalg.norm(patches[:, None] - rows, axis=-1)
    query = patches[from_bank.min(axis=1).argmax()]
    to_query = np.linalg.norm(rows - query, axis=-1)
    nearest = to_query.argmin()
    around = np.linalg.norm(rows - rows[nearest], axis=-1).argsort()[:count]
    assert nearest in around
    return 1 - np.exp(to_query[nearest] - logsumexp(to_query[around]))


def distances_to(bank, embeddings):
    return bank.nearest(embeddings)[0]


@pytest.mark.parametrize("count", [2, 9, 32])
@pytest.mark.parametrize("clusters", [0, 12])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])  # 100: exp overflows, even in float64
def test_it_is_the_papers_equation(count, clusters, scale):
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(400, 6, generator=generator) * scale
    embeddings = torch.randn(5, *GRID, 6, generator=generator) * scale * 3
    bank = NormalBank(rows, clusters=clusters)
    found = image_weights(bank, embeddings, distances_to(bank, embeddings), count)
    expected = [weight_by_definition(image.flatten(0, 1), rows, count) for image in embeddings]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert ((found > 1 - 1 / count - 1e-9) & (found <= 1)).all()


def test_huge_distances_do_not_overflow():
    """Two rows at 1,000,000 and one at 1,000,001: far beyond what exp can hold."""
    bank = NormalBank(torch.tensor([[1e6], [1e6], [1e6 + 1]]))
    found = image_weights(bank, torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1), 3)
    assert float(found) == pytest.approx(1 - 1 / (2 + math.e), rel=1e-9)


def test_by_hand():
    bank = NormalBank(torch.tensor([[1.0], [2.0], [4.0], [-9.0]]))
    patches = torch.tensor([[[[0.0], [1.5]]]])  # [1, 1, 2, 1]; the first is farther from its row
    found = image_weights(bank, patches, distances_to(bank, patches), 3)
    assert float(found) == pytest.approx(1 - math.e / (math.e + math.e**2 + math.e**4), rel=1e-12)


def test_a_small_bank_is_taken_whole():
    bank = NormalBank(torch.tensor([[1.0], [2.0], [7.0]]), groups=torch.tensor([0, 0, 1]))
    query = torch.zeros(1, 1, 1, 1)

    def weight(group):
        return float(image_weights(bank, query, torch.ones(1, 1, 1), 9, torch.tensor([group])))

    assert weight(5) == pytest.approx(1 - 1 / (1 + math.e + math.e**6), rel=1e-12)
    assert weight(1) == pytest.approx(1 - 1 / (1 + math.e), rel=1e-12)
    assert weight(0) == 1  # a single row has nothing to be compared with
    alone = NormalBank(torch.tensor([[1.0]]))
    assert float(image_weights(alone, query, torch.ones(1, 1, 1), 9)) == 1
    assert float(image_weights(alone, query, torch.ones(1, 1, 1), 9, torch.tensor([0]))) == 1


def test_equal_rows_count_each():
    bank = NormalBank(torch.tensor([[3.0]] * 5))
    found = image_weights(bank, torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1), 4)
    assert float(found) == pytest.approx(1 - 1 / 4, rel=1e-12)


@pytest.fixture
def images():
    """Embeddings of images that differ from each other, [8, 3, 3, 5]."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 1, 1, 5, generator=generator)
    return base + torch.randn(8, *GRID, 5, generator=generator)


def test_scores_are_the_maximum_times_the_weight_and_maps_stay(images):
    banks = {LEVEL: NormalBank(images[:6])}
    plain = search_levels(banks, [images[6:]], SHAPE)
    found = search_levels(banks, [images[6:]], SHAPE, reweight=4)
    assert plain.weights is None
    assert torch.equal(found.anomaly_map, plain.anomaly_map)
    rows = banks[LEVEL].embeddings
    weights = [weight_by_definition(image.flatten(0, 1), rows, 4) for image in images[6:]]
    expected = plain.image_scores.double() * torch.tensor(weights)
    assert torch.allclose(found.image_scores.double(), expected, rtol=1e-6)
    assert (found.image_scores < plain.image_scores).all()
    for number in range(2):
        one = found.image(number)
        assert torch.equal(one.image_scores, found.image_scores[number : number + 1])


def test_the_patch_is_the_one_that_the_map_shows_as_the_highest():
    """After the border's correction, which lowers a larger distance of the first ring here."""
    level = PatchLevel(24, 8)
    embeddings = torch.zeros(1, 9, 9, 1)
    embeddings[0, 0, 4], embeddings[0, 4, 4] = -3.0, 12.0
    banks = {level: NormalBank(torch.tensor([[0.0], [1.0], [10.0], [10.5]]))}
    rule = MapRule(True, {"K24": torch.tensor([3.0, 1.0, 1.0, 1.0], dtype=torch.float64)})
    found = search_levels(banks, [embeddings], (88, 88), rule=rule, reweight=2)
    # From -3 the two rows are 3 and 4 away, from 12 they are 1.5 and 2.
    assert float(found.weights) == pytest.approx(1 - 1 / (1 + math.sqrt(math.e)), rel=1e-9)
    plain = search_levels(banks, [embeddings], (88, 88), reweight=2)
    assert float(plain.weights) == pytest.approx(1 - 1 / (1 + math.e), rel=1e-9)


@pytest.mark.parametrize("sees_surroundings", [False, True])
@pytest.mark.parametrize("clusters", [0, 4])
def test_each_training_image_is_weighted_as_if_it_were_new(images, sees_surroundings, clusters):
    """By a bank that never held it; its own rows would be its nearest, and in N(m)."""
    banks = {LEVEL: NormalBank(images, clusters=clusters)}
    found = calibrate(banks, SHAPE, "mult", sees_surroundings=sees_surroundings, reweight=4)
    rule = MapRule(sees_surroundings)  # the grid is too small to have a border
    scores, highest = [], []
    for number in range(len(images)):
        others = torch.cat([images[:number], images[number + 1 :]])
        result = search_levels(
            {LEVEL: NormalBank(others)}, [images[number : number + 1]], SHAPE, rule=rule, reweight=4
        )
        scores.append(float(result.image_scores))
        highest.append(float(result.anomaly_map.max()))
    assert found.image_scores.tolist() == sorted(scores)
    assert found.level_scores["K32"].tolist() == sorted(highest)
    plain = calibrate(banks, SHAPE, "mult", sees_surroundings=sees_surroundings)
    assert torch.equal(found.pixel_values, plain.pixel_values)
    assert found.highest == plain.highest == max(highest)
    assert (found.image_scores < plain.image_scores).all()
    # As search_levels does with groups.
    grouped = search_levels(
        banks, [images], SHAPE, groups=banks[LEVEL].groups, rule=rule, reweight=4
    )
    assert found.image_scores.tolist() == sorted(grouped.image_scores.tolist())


def test_a_coreset_is_weighted_by_its_own_rows(images):
    bank = NormalBank(images).coreset(0.3)
    found = calibrate({LEVEL: bank}, SHAPE, "mult", embeddings=[images], reweight=4)
    image_of = bank.source(torch.arange(len(bank)))[:, 0]
    scores = []
    for number, image in enumerate(images):
        others = NormalBank(bank.embeddings[image_of != number])
        result = search_levels({LEVEL: others}, [image[None]], SHAPE, reweight=4)
        scores.append(float(result.image_scores))
    assert found.image_scores.tolist() == sorted(scores)


def test_false_alarms_keep_to_the_rate():
    """Over many draws of 19 good images and one more; binomial bounds of four deviations."""
    generator = torch.Generator().manual_seed(0)
    trials, rate, alarms = 120, 0.1, 0
    for _ in range(trials):
        base = torch.randn(20, 1, 1, 4, generator=generator)
        values = base + torch.randn(20, *GRID, 4, generator=generator)
        banks = {LEVEL: NormalBank(values[:-1])}
        threshold = calibrate(banks, SHAPE, "mult", reweight=5).threshold(rate)
        new = search_levels(banks, [values[-1:]], SHAPE, reweight=5)
        alarms += float(new.image_scores) > threshold
    assert rate / 3 < alarms / trials < rate + 4 * math.sqrt(rate * (1 - rate) / trials)


def test_there_are_regions_exactly_if_the_weighted_score_exceeds_the_threshold():
    scores = torch.tensor([1.0, 2.0], dtype=torch.float64)
    calibration = Calibration(scores, torch.zeros(302, dtype=torch.float64), {"K32": scores})
    anomaly_map = torch.zeros(1, *SHAPE)
    anomaly_map[0, 10:14, 20:24] = 3.0
    anomaly_map[0, 50, 50] = 2.0
    grids = torch.zeros(1, *GRID), torch.zeros(1, *GRID, dtype=torch.int64)
    matches = torch.zeros(1, *GRID, 3, dtype=torch.int64)

    def peaks(weight, threshold):
        weights = torch.tensor([weight], dtype=torch.float64)
        result = ScoreResult(
            *("mult", {"K32": anomaly_map}, {"K32": grids[0]}, {"K32": grids[1]}),
            *({"K32": matches}, weights),
        )
        regions = find_regions(result, [LEVEL], calibration, threshold, ["a"])
        assert bool(regions) == (float(result.image_scores) > threshold)
        return [region.peak for region in regions]

    assert peaks(1.0, 1.5) == [3.0, 2.0]
    assert peaks(0.7, 1.5) == [3.0]
    assert peaks(0.5, 1.5) == []
    third = float(torch.tensor(3.0) * torch.tensor(0.7, dtype=torch.float64).float())
    assert peaks(0.7, third) == []  # rounded to float32, as the score is
    assert peaks(0.7, math.nextafter(third, 0)) == [3.0]


@pytest.mark.parametrize(
    ("reweight", "error", "message"),
    [
        (1, ValueError, r"reweight must be in \[2, 32\], got 1"),
        (33, ValueError, r"reweight must be in \[2, 32\], got 33"),
        (9.0, TypeError, "reweight must be an integer, got 9.0"),
        (True, TypeError, "reweight must be an integer, got True"),
    ],
)
def test_what_is_no_number_of_neighbours_is_refused(images, reweight, error, message):
    banks = {LEVEL: NormalBank(images)}
    with pytest.raises(error, match=message):
        search_levels(banks, [images], SHAPE, reweight=reweight)
    with pytest.raises(error, match=message):
        calibrate(banks, SHAPE, "mult", reweight=reweight)


def test_several_levels_are_refused(images):
    banks = {LEVEL: NormalBank(images), PatchLevel(16, 16): NormalBank(images)}
    with pytest.raises(ValueError, match=r"for a single patch level, .* got K32, K16"):
        search_levels(banks, [images, images], SHAPE, reweight=9)
