"""Levels as users give them."""

import numpy as np
import pytest

from patchsvdd_fast.encoders.levels import DEFAULT_LEVELS, PatchLevel, as_levels


def test_pairs_are_levels():
    for given in ([(64, 16), (32, 4)], ((64, 16), [32, 4]), DEFAULT_LEVELS):
        assert as_levels(given) == DEFAULT_LEVELS
    (level,) = as_levels([(np.int64(32), np.int32(4))])
    assert level == PatchLevel(32, 4)
    assert type(level.size) is int


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (5, TypeError, "levels must be a sequence of levels, got 5"),
        (iter(DEFAULT_LEVELS), TypeError, "levels must be a sequence of levels, got <"),
        ("K64", TypeError, "levels must be a sequence of levels, got 'K64'"),
        ((64, 16), TypeError, r"a level must be a PatchLevel or a pair \(size, stride\), got 64"),
        ([(64,)], TypeError, r"a level must be a PatchLevel or a pair .* got \(64,\)"),
        (["64"], TypeError, "a level must be a PatchLevel or a pair .* got '64'"),
        ([(64, 16.0)], TypeError, "a level's stride must be an integer, got 16.0"),
        ([(0, 16)], ValueError, "a level's size must be in"),
        ([(64, 16), (64, 8)], ValueError, "levels must have different sizes, got K64, K64"),
    ],
)
def test_what_is_no_level_is_named(given, kind, message):
    with pytest.raises(kind, match=message):
        as_levels(given)
