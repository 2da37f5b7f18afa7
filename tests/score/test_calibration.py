"""Thresholds and p-values: their definition, and that the false-alarm rate is kept."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsvdd_fast import PatchLevel
from patchsvdd_fast.score import NormalBank, nearest, score_map
from patchsvdd_fast.score.calibration import Calibration, calibrate

LEVEL = PatchLevel(32, stride=16)
SIDE = 64
GRID = (3, 3)


def _calibration(scores, pixels=(0.0,)):
    pixels = torch.tensor(pixels, dtype=torch.float64)
    return Calibration(torch.tensor(scores, dtype=torch.float64).sort().values, pixels)


def test_threshold_and_p_values_by_hand():
    calibration = _calibration(range(1, 20), pixels=(2.0, 21.0))  # 19 images: 1 .. 19
    assert calibration.smallest_rate == 0.05
    assert [calibration.threshold(rate) for rate in (0.05, 0.099, 0.1, 0.5, 0.99)] == [
        *(19, 19, 18, 10, 1)
    ]
    assert calibration.p_values(np.array([0.5, 1, 1.5, 19, 20])).tolist() == [
        *(1, 1, 0.95, 0.1, 0.05)
    ]
    assert calibration.highest == 21  # a pixel; the same unless scores are re-weighted


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (0.0499, r"19 training images can promise a false-alarm rate of 5.00% .* that takes 20"),
        (0.01, "that takes 99"),
        (0.0, "between 0 and 1, got 0"),
        (1.0, "between 0 and 1, got 1"),
        (float("nan"), "between 0 and 1, got nan"),
    ],
)
def test_impossible_rates_are_refused(rate, message):
    calibration = _calibration(range(19))
    for threshold in (calibration.threshold, calibration.pixel_threshold):
        with pytest.raises(ValueError, match=message):
            threshold(rate)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=40),
    st.integers(-1, 10),
    st.integers(1, 99),
)
def test_an_image_is_above_the_threshold_where_its_p_value_is_no_more_than_the_rate(
    scores, score, percent
):
    """Ties among the scores included."""
    calibration = _calibration(scores)
    rate = percent / 100
    if rate < calibration.smallest_rate:
        return
    above = score > calibration.threshold(rate)
    assert above == (calibration.p_values(np.array([score]))[0] <= rate + 1e-12)


def _banks(num_images, generator):
    """Embeddings of images that differ from each other, as a bank, and of one more image."""
    shape = (num_images + 1, *GRID, 4)
    base = torch.randn(num_images + 1, 1, 1, 4, generator=generator)
    values = base + torch.randn(shape, generator=generator)
    return {LEVEL: NormalBank(values[:-1])}, values[-1:]


def test_false_alarms_keep_to_the_rate():
    """Over many draws of 19 good images and one more; binomial bounds of four deviations."""
    generator = torch.Generator().manual_seed(0)
    rates = (0.05, 0.1, 0.3)
    trials = 600
    alarms, pixels = np.zeros(len(rates)), np.zeros(len(rates))
    for _ in range(trials):
        banks, new = _banks(19, generator)
        calibration = calibrate(banks, (SIDE, SIDE), str(LEVEL))
        distances, _ = banks[LEVEL].nearest(new)
        anomaly_map = score_map(distances, LEVEL.size, LEVEL.stride, SIDE, SIDE)
        for index, rate in enumerate(rates):
            alarms[index] += float(anomaly_map.max()) > calibration.threshold(rate)
            above = anomaly_map > calibration.pixel_threshold(rate)
            pixels[index] += float(above.float().mean())
    for index, rate in enumerate(rates):
        margin = 4 * np.sqrt(rate * (1 - rate) / trials)
        assert rate / 3 < alarms[index] / trials < rate + margin
        assert pixels[index] / trials < rate + margin
    assert pixels[-1] / trials > rates[-1] / 3


def test_pixel_values_are_upper_quantiles():
    generator = torch.Generator().manual_seed(1)
    banks, _ = _banks(30, generator)
    calibration = calibrate(banks, (SIDE, SIDE), str(LEVEL))
    maps = []
    for number in range(30):
        mine = banks[LEVEL].embeddings.view(30, *GRID, 4)[number : number + 1]
        own = torch.full((1, *GRID), number)
        distances, _ = banks[LEVEL].nearest(mine, exclude_same_group=own)
        maps.append(score_map(distances, LEVEL.size, LEVEL.stride, SIDE, SIDE))
    maps = torch.cat(maps).double()
    assert calibration.typical == pytest.approx(float(maps.median()), rel=0.02)
    assert calibration.highest == float(calibration.pixel_values[-1]) == float(maps.max())
    for rate in (0.05, 0.2, 0.5):
        allowed = (rate * 31 - 1) / 30
        share = float((maps > calibration.pixel_threshold(rate)).double().mean())
        assert 0.9 * allowed < share <= allowed


def test_exceeded_by_is_a_pixel_value_that_no_more_exceed():
    generator = torch.Generator().manual_seed(3)
    banks, _ = _banks(12, generator)
    calibration = calibrate(banks, (SIDE, SIDE), str(LEVEL))
    own = torch.arange(12)[:, None, None].expand(12, *GRID)
    mine = banks[LEVEL].embeddings.view(12, *GRID, 4)
    distances, _ = banks[LEVEL].nearest(mine, exclude_same_group=own)
    maps = score_map(distances, LEVEL.size, LEVEL.stride, SIDE, SIDE).double()
    shares = [float((maps > calibration.exceeded_by(share)).double().mean()) for share in _SHARES]
    assert all(found <= share for found, share in zip(shares, _SHARES, strict=True))
    # Of 16 x 16 pixels each, the blocks of a map are alike.
    block = 256 / maps.numel()
    assert all(found > 0.9 * share - block for found, share in zip(shares, _SHARES, strict=True))
    assert calibration.exceeded_by(0.0) == calibration.highest
    assert calibration.exceeded_by(1.0) <= float(maps.min())


_SHARES = (0.9, 0.5, 0.1, 0.01, 0.001)
LEVELS = (PatchLevel(64, 32), PatchLevel(32, 16))


@pytest.fixture(scope="module")
def of_two_levels():
    generator = torch.Generator().manual_seed(4)
    shapes = [(9, *level.grid_shape(96, 96), 4) for level in LEVELS]
    banks = {
        level: NormalBank(torch.randn(shape, generator=generator))
        for level, shape in zip(LEVELS, shapes, strict=True)
    }
    return {name: calibrate(banks, (96, 96), name) for name in ("mult", "sum", "K64", "K32")}


def test_levels_have_scores_of_their_own(of_two_levels):
    """Those of a detector that has this level alone, however they are joined."""
    for calibration in of_two_levels.values():
        for level in ("K64", "K32"):
            alone = of_two_levels[level].image_scores
            assert torch.equal(calibration.level_scores[level], alone)
    for level in ("K64", "K32"):
        assert of_two_levels["sum"].level_of_alarm({level: 1.0}) == level


def test_tensors_bring_a_calibration_back(of_two_levels):
    for calibration in of_two_levels.values():
        again = Calibration.from_tensors(calibration.tensors())
        assert again.tensors().keys() == calibration.tensors().keys()
        for name, values in again.tensors().items():
            assert torch.equal(values, calibration.tensors()[name])


@pytest.mark.parametrize("name", ["image_scores", "pixel_values", "level.K32"])
def test_damaged_tensors_are_refused(of_two_levels, name):
    tensors = of_two_levels["mult"].tensors()
    good = tensors[name]
    bad = good.clone()
    bad[3] = torch.nan
    for values in (good.flip(0), good[:-1], good.float(), good[None], bad, good[:0]):
        with pytest.raises(ValueError, match=r"the calibration's .* are damaged"):
            Calibration.from_tensors(tensors | {name: values})
    del tensors[name]
    if name.startswith("level."):
        assert Calibration.from_tensors(tensors).level_scores.keys() == {"K64"}
    else:
        with pytest.raises(ValueError, match="the calibration is incomplete"):
            Calibration.from_tensors(tensors)


def test_progress_is_told_and_one_image_is_not_enough():
    generator = torch.Generator().manual_seed(2)
    banks, _ = _banks(20, generator)
    told = []
    calibrate(banks, (SIDE, SIDE), str(LEVEL), told.append)
    assert told == sorted(told)
    assert told[-1] == 1
    single, _ = _banks(1, generator)
    assert calibrate(single, (SIDE, SIDE), str(LEVEL)) is None


def test_a_coreset_is_calibrated_by_all_patches_of_each_image():
    """Each image against those rows of the coreset that come from the others."""
    images = torch.rand(6, *GRID, 5)
    bank = NormalBank(images).coreset(0.3)
    with pytest.raises(ValueError, match="a coreset lacks some patches of its images"):
        calibrate({LEVEL: bank}, (SIDE, SIDE), "mult")
    found = calibrate({LEVEL: bank}, (SIDE, SIDE), "mult", embeddings=[images])
    image_of = bank.source(torch.arange(len(bank)))[:, 0]
    scores = []
    for number, image in enumerate(images):
        others = bank.embeddings[image_of != number]
        distances, _ = nearest(image.flatten(0, 1), others)
        maps = score_map(distances.view(1, *GRID), LEVEL.size, LEVEL.stride, SIDE, SIDE)
        scores.append(maps.double().amax())
    assert torch.equal(found.image_scores, torch.stack(scores).sort().values)
    whole = calibrate({LEVEL: NormalBank(images)}, (SIDE, SIDE), "mult")
    assert (found.image_scores >= whole.image_scores).all()
