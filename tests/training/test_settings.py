"""Training settings: given values override the recipes, and checks can be switched off."""

import pytest

from patchsvdd_fast.training.settings import MODES, SURFACES, TrainingSettings, training_settings


@pytest.mark.parametrize(
    ("mode", "surface"),
    [(mode, None) for mode in MODES] + [("faithful", surface) for surface in SURFACES],
)
def test_what_is_given_wins(mode, surface):
    plain = training_settings(mode, surface)
    assert plain.mode == mode
    given = training_settings(mode, surface, learning_rate=0.7, minutes=2.0, seed=None)
    assert (given.learning_rate, given.minutes, given.seed) == (0.7, 2.0, plain.seed)
    assert given.epochs is given.steps is None


def test_the_faithful_recipe_is_the_papers_protocol():
    assert training_settings("faithful") == TrainingSettings()


def test_checks_can_be_switched_off():
    assert training_settings("dense").check_every is not None
    settings = training_settings("dense", check_every=0)
    assert settings.check_every is settings.patience is None
    assert training_settings("dense", check_every=7).check_every == 7
    with pytest.raises(ValueError, match="patience needs check_every"):
        training_settings("dense", check_every=0, patience=3)


@pytest.mark.parametrize(
    "useless",
    [
        {"svdd_weight": 0.5},
        {"svdd_weight": 0.0},
        {"surface": "texture"},
        {"train_last_layer": True},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_the_dense_mode_has_no_use_for_is_refused(useless):
    with pytest.raises(ValueError, match=f"{next(iter(useless))} is for mode faithful"):
        training_settings("dense", **useless)
    assert training_settings("dense", redraw_clipped=False).mode == "dense"


@pytest.mark.parametrize(("mode", "surface"), [("best", None), ("dense", "liquid")])
def test_unknown_names_are_refused(mode, surface):
    with pytest.raises(ValueError, match="must be one of"):
        training_settings(mode, surface)


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
        {"mode": "dense", "precision": "tf32"},
    ],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrainingSettings(**bad)
