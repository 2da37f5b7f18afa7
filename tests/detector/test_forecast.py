"""How long a fit will still take: by phase, from its own pace and from a trial."""

import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from backbones import Plain
from conftest import texture
from patchsvdd_fast import PatchSVDD
from patchsvdd_fast.detector import forecast
from patchsvdd_fast.detector.forecast import Progress
from patchsvdd_fast.detector.progress_bars import AFTER_TRAINING, PHASES
from patchsvdd_fast.ops.backends import search_method
from patchsvdd_fast.search.bank import NormalBank
from patchsvdd_fast.training.record import TrainingStep
from processes import Clock


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(0.0)
    monkeypatch.setattr(forecast, "time", clock)
    return clock


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return np.stack([texture(rng, 96) for _ in range(17)])


def test_a_phase_tells_by_its_pace_and_adds_what_follows(clock):
    told = []
    progress = Progress(lambda *report: told.append(report))
    reading = progress.phase("reading")
    clock.now = 1.0
    reading(0.5)
    assert told == [("reading", 0.0, None), ("reading", 0.5, None)]  # nothing is known of the rest
    progress.expected = {"filling banks": 5.0, "calibrating": 16.0, "setting thresholds": 4.0}
    encoding = progress.phase("encoding")
    clock.now = 3.0
    encoding(0.25)
    assert told[-1] == ("encoding", 0.25, 6 + 25)
    progress.phase("filling banks")
    assert told[-1] == ("filling banks", 0.0, 25)  # as expected, while it has no pace of its own
    calibrating = progress.phase("calibrating")
    clock.now = 7.0
    calibrating(1.0)
    assert told[-1] == ("calibrating", 1.0, 4)


def test_a_check_moves_the_end_by_what_it_takes_longer_than_the_last(clock):
    told = []
    progress = Progress(lambda *report: told.append(report))
    rest = ("estimating", "encoding", "filling banks", "calibrating", "setting thresholds")
    progress.expected = dict.fromkeys(rest, 1.0)
    progress.trains = True
    progress.check(0.0)
    clock.now = 10.0
    progress.check(1.0)
    assert told == [("checking", 0.0, None), ("checking", 1.0, None)]  # no step was timed yet
    progress.step(_step(seconds_left=50.0))
    assert told[-1] == ("training", 0.5, 55)
    clock.now = 20.0
    progress.check(0.0)
    assert told[-1] == ("checking", 0.0, 45)
    clock.now = 24.0
    progress.check(0.4)  # as the one before: ten seconds
    assert told[-1] == ("checking", 0.4, 41)
    clock.now = 28.0
    progress.check(0.5)  # six longer
    assert told[-1] == ("checking", 0.5, 32 + 6 + 5)


def test_nothing_is_promised_before_training_was_timed(images):
    told = []
    detector = PatchSVDD(image_size=96, mode="dense", steps=2, check_every=2, device="cpu")
    detector.fit(images[:8], on_progress=lambda *report: told.append(report))
    before = [left for _, _, left in told[: [name for name, _, _ in told].index("training")]]
    assert before and not any(left is not None for left in before)


def _step(seconds_left):
    return TrainingStep(5, 10, 1.0, 1e-4, 9.0, seconds_left, {})


def test_nobody_listens():
    progress = Progress()
    assert progress.phase("reading") is None
    progress.forecast({}, None, None, None, torch.zeros(99, 3, 8, 8))  # tries nothing


def test_searches_grow_with_the_bank(monkeypatch):
    embeddings = torch.randn(8, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    few, bank = NormalBank(embeddings[:2].contiguous()), NormalBank(embeddings)
    monkeypatch.setattr(forecast, "_timed", lambda _, some: 1.0 + len(some) / 32)
    # 8 rows: 1.25 s, 32 rows: 2 s, hence 1 s and 1/8 s for each image
    assert forecast._seconds_of_search(embeddings, few, bank, 100) == pytest.approx(1 + 100 / 8)
    clustered = NormalBank(embeddings, clusters=2)
    assert clustered.num_clusters
    sixteenth = forecast._seconds_of_search(embeddings, few, clustered, 8)
    assert sixteenth == pytest.approx(2.0)
    assert 2.0 < forecast._seconds_of_search(embeddings, few, clustered, 100) < 1 + 100 / 8


@pytest.mark.parametrize(("few", "many", "expected"), [(1.0, 16.0, 625), (1, 4, 25), (1, 64, 2500)])
def test_the_choice_of_a_coreset_grows_as_it_did_in_the_trial(
    clock, monkeypatch, few, many, expected
):
    """Between the number of images and its square; searches take what such a bank's take."""
    embeddings = torch.randn(8, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    methods = []

    def banks(levels, encoded, seed, share):
        methods.append(search_method.get())
        clock.now += few if len(encoded[0]) == 2 else many
        return {}

    monkeypatch.setattr(forecast, "banks_of", banks)
    monkeypatch.setattr(forecast, "_timed", lambda _, bank: float(len(bank)))
    given = {"seed": 0, "coreset": 0.1}
    filling, searching = forecast._seconds_of_coreset(None, embeddings, given, 50)
    assert filling == pytest.approx(expected)
    assert searching == pytest.approx(45)  # rows: a tenth of 50 x 9
    _, searching = forecast._seconds_of_coreset(None, embeddings, given, 1000)
    assert searching == pytest.approx(900)  # as 72 rows of the trial take, in proportion
    assert set(methods) == {"auto"}
    forecast._seconds_of_coreset(None, embeddings, given, 200_000)
    assert methods[-1] == "screened"  # as the choice of so many will be


@pytest.mark.parametrize("trained", [False, True])
def test_every_phase_of_a_fit_is_told(images, trained):
    told = []
    detector = PatchSVDD(
        encoder="patch-svdd" if trained else Plain(),
        image_size=96,
        mode="dense",
        steps=3,
        check_every=2,
        device="cpu",
    )
    began = time.perf_counter()
    detector.fit(images, on_progress=lambda *report: told.append(report))
    seconds = time.perf_counter() - began
    phases = list(dict.fromkeys(phase for phase, _, _ in told))
    of_training = ("training", "checking")
    assert set(phases) == {phase for phase in PHASES if trained or phase not in of_training}
    for phase in phases:
        shares = [share for name, share, _ in told if name == phase]
        assert shares[-1] == 1
        begun = [number for number, share in enumerate(shares) if share == 0] + [len(shares)]
        for first, end in pairwise(begun):  # checks and estimates are made more than once
            assert shares[first:end] == sorted(shares[first:end])
    assert all(left is None for phase, _, left in told if phase == "reading")
    known = [left for phase, _, left in told if phase in AFTER_TRAINING[1:]]
    assert all(0 <= left < 100 * seconds for left in known)
    assert known[-1] == 0


def test_few_images_are_not_worth_a_trial(images, monkeypatch):
    monkeypatch.setattr(forecast, "_timed", None)  # would fail
    told = []
    detector = PatchSVDD(encoder=Plain(), image_size=96)
    detector.fit(images[:3], on_progress=lambda *report: told.append(report))
    assert all(left is None for phase, _, left in told if phase == "encoding")
    assert told[-1] == ("setting thresholds", 1.0, 0)


def test_a_trial_of_bad_images_leaves_the_error_to_encoding(images):
    class Breaks(Plain):
        def forward(self, images):
            return [values + torch.nan for values in super().forward(images)]

    encoder = PatchSVDD(encoder=Breaks(), image_size=96)
    with pytest.raises(ValueError, match="image 0: the encoder gives NaN"):
        encoder.fit(images, on_progress=lambda *_: None)
