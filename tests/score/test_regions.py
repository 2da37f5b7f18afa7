"""Explanations of anomalies: regions and matches against ones computed another way."""

from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import texture
from patchsvdd_fast import PatchLevel, PatchSVDD
from patchsvdd_fast.images.light import match_illumination, normalize
from patchsvdd_fast.report.side_by_side import side_by_side
from patchsvdd_fast.score import ScoreResult
from patchsvdd_fast.score.calibration import Calibration
from patchsvdd_fast.score.regions import Region, _patch_at, find_regions, highest_place

SIDE = 96
LEVELS = (PatchLevel(64, 16), PatchLevel(32, 8))
FAST = {
    "image_size": SIDE,
    "levels": LEVELS,
    "embedding_dim": 16,
    "initialization": "kaiming",
    "device": "cpu",
}
MODES = {
    "product": {"mean": "paper"},
    "K64": {"combination": "K64"},
    "K32": {"combination": "K32"},
    "matched": {"mode": "dense", "mean": "paper"},
    "channel": {"mode": "dense", "mean": "channel", "combination": "sum", "levels": LEVELS[::-1]},
}


def stained(image, top, left, height, width, colour):
    image = image.copy()
    image[top : top + height, left : left + width] = colour
    return image


@pytest.fixture(scope="module")
def training():
    rng = np.random.default_rng(0)
    return np.stack([texture(rng, SIDE) for _ in range(4)])


@pytest.fixture(scope="module")
def defective():
    """One spot, two, one in a corner, all of it, and none."""
    rng = np.random.default_rng(1)
    plain = [texture(rng, SIDE) for _ in range(5)]
    red, blue = (250, 20, 20), (30, 40, 230)
    return [
        stained(plain[0], 40, 60, 20, 20, red),
        stained(stained(plain[1], 4, 70, 16, 20, blue), 70, 10, 20, 12, red),
        stained(plain[2], SIDE - 10, SIDE - 10, 10, 10, red),
        stained(plain[3], 0, 0, SIDE, SIDE, blue),
        plain[4],
    ]


@pytest.fixture(scope="module", params=MODES)
def fitted(request, training):
    detector = PatchSVDD(**FAST | MODES[request.param])
    return detector.fit(training, encoder=detector.untrained_encoder())


# --- matches --------------------------------------------------------------------------------------


def embedded(detector, images, size, places, among=None):
    """Embeddings of patches cut from images [N, H, W, 3] at (image, left, top)."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    pixels = match_illumination(pixels, detector.usual_light())
    normalized = normalize(pixels, detector.mean_, among)
    patches = torch.stack(
        [normalized[i, :, top : top + size, left : left + size] for i, left, top in places]
    )
    return detector.encoder_.embed(patches).double()


def test_matches_are_the_nearest_normal_patches(fitted, training, defective):
    """Every patch of the training images is cut out, embedded by itself, and compared."""
    normal = {}
    for level in fitted.levels_:
        rows, columns = level.grid_shape(SIDE, SIDE)
        places = [
            (i, column * level.stride, row * level.stride)
            for i in range(len(training))
            for row in range(rows)
            for column in range(columns)
        ]
        among = len(training) if fitted.parameters_["mean"] == "pixel" else None
        normal[str(level)] = places, embedded(fitted, training, level.size, places, among)
    with fitted.score_stream(defective) as stream:
        for image, result in zip(defective, stream, strict=True):
            for region in [*fitted.explain(result), fitted.highest_place(result)]:
                left, top, size = region.patch
                assert size == int(region.level.removeprefix("K"))
                places, embeddings = normal[region.level]
                own = embedded(fitted, [image], size, [(0, left, top)])
                distances = (embeddings - own).norm(dim=1)
                match = places.index((region.match_image, *region.match[:2]))
                assert region.match[2] == size
                assert float(distances[match]) <= float(distances.min()) * (1 + 1e-3)
                assert region.distance == pytest.approx(float(distances[match]), rel=1e-3)
                assert region.match_name == f"image {region.match_image}"


def test_the_match_picture_is_the_training_image(fitted, training, defective):
    (result, *_) = fitted.score_stream(defective[:1])
    (region, *_) = fitted.explain(result)
    shown = np.asarray(fitted.match_picture(region)).astype(int)
    differences = np.abs(shown - training).mean(axis=(1, 2, 3))
    assert differences.argmin() == region.match_image


def test_a_training_image_matches_itself(fitted, training):
    (result,) = fitted.score_stream([training[3]])
    region = fitted.highest_place(result)
    assert (region.match_image, region.match) == (3, region.patch)
    if fitted.parameters_["mean"] != "pixel":  # else the bank holds it less the mean of the others
        assert region.distance == 0
        assert fitted.explain(result) == []


def test_what_is_no_result_is_named(fitted, defective):
    scored = fitted.score(defective[:1])
    for ask in (fitted.explain, fitted.highest_place):
        with pytest.raises(TypeError, match=r"result must be one image's .* got ScoredImages"):
            ask(scored)
    with pytest.raises(TypeError, match=r"region must be a region, such as explain .* got list"):
        fitted.match_picture(fitted.explain(scored[0]))


# --- regions --------------------------------------------------------------------------------------


def connected(above):
    """Sets of pixels that touch, corners included: by flooding."""
    left = {(int(y), int(x)) for y, x in np.argwhere(above)}
    parts = []
    while left:
        part, waiting = set(), deque([left.pop()])
        while waiting:
            y, x = waiting.popleft()
            part.add((y, x))
            for place in ((y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
                if place in left:
                    left.remove(place)
                    waiting.append(place)
        parts.append(part)
    return parts


@pytest.mark.parametrize("rate", [None, 0.2, 0.5, 0.9])
def test_regions_are_connected_parts_that_exceed_the_threshold(fitted, defective, rate):
    threshold = fitted.threshold_or_none(rate)
    low = min(fitted.calibration_.exceeded_by(0.001), threshold)
    for result in fitted.score_stream(defective, false_alarm_rate=rate):
        regions = fitted.explain(result, rate)
        assert bool(regions) == result.anomalous
        values = result.anomaly_map.double().numpy()
        expected = {}
        for part in connected(values > low):
            peak = max(values[place] for place in part)
            if peak > threshold:
                ys, xs = zip(*part, strict=True)
                box = min(xs), min(ys), max(xs) + 1 - min(xs), max(ys) + 1 - min(ys)
                expected[box] = len(part), peak
        found = {(r.left, r.top, r.width, r.height): (r.area, r.peak) for r in regions}
        assert found == expected
        peaks = [region.peak for region in regions]
        assert peaks == sorted(peaks, reverse=True)
        if regions:
            assert peaks[0] == result.score


def test_defects_have_regions_of_their_own(fitted, defective):
    one, _, _, everything, none = fitted.score_stream(defective)
    (region,) = fitted.explain(one)
    left, top, size = region.patch
    assert left < 80
    assert left + size > 60
    assert top < 60
    assert top + size > 40
    assert fitted.explain(everything)[0].area > SIDE * SIDE // 2
    highest = fitted.highest_place(none)
    assert (highest.width, highest.height, highest.area) == (1, 1, 1)
    assert highest.peak == none.score


# --- places and levels by hand --------------------------------------------------------------------


def flat_result(distances, side, level, combination="K32"):
    """A result whose map has its peak wherever it is put; distances [I, J]."""
    rows, columns = distances.shape
    numbers = torch.arange(rows * columns).view(1, rows, columns)
    matches = torch.stack([numbers % 3, numbers // columns, numbers % columns], dim=-1)
    return ScoreResult(
        combination,
        {str(level): torch.zeros(1, side, side)},
        {str(level): torch.as_tensor(distances)[None].float()},
        {str(level): numbers},
        {str(level): matches},
    )


@settings(deadline=None)
@given(st.integers(32, 90), st.integers(1, 32), st.data())
def test_the_patch_shown_is_the_farthest_of_those_that_cover_the_pixel(side, stride, data):
    level = PatchLevel(32, stride)
    shape = level.grid_shape(side, side)
    pixel = data.draw(st.tuples(*[st.integers(0, side - 1)] * 2))
    distances = np.random.default_rng(0).random(shape).astype(np.float32)
    i, j = _patch_at(pixel, level, distances)
    # A pixel of the margin that no patch reaches has the value of the nearest one that is covered.
    y, x = (
        min(place, (count - 1) * stride + 31) for place, count in zip(pixel, shape, strict=True)
    )
    covering = [
        (row, column)
        for row in range(shape[0])
        for column in range(shape[1])
        if 0 <= y - row * stride < 32 and 0 <= x - column * stride < 32
    ]
    assert (i, j) in covering
    assert distances[i, j] == max(distances[place] for place in covering)


def test_positions_are_in_pixels():
    level = PatchLevel(32, 4)
    distances = np.zeros((9, 9))
    distances[4, 5], distances[8, 8] = 1.0, 2.0  # the second lies elsewhere
    result = flat_result(distances, 64, level)
    result.level_maps["K32"][0, 20, 44] = 2.0
    region = highest_place(result, [level], None, ["a", "b", "c"])
    assert region == Region(
        *(44, 20, 1, 1, 1, 2.0, "K32", 1.0),
        *((20, 16, 32), 2, "c", (20, 16, 32)),
    )
    result.matches["K32"][..., 0] = 7
    assert highest_place(result, [level], None, ["a", "b", "c"]).match_name == "image 7"


def test_the_level_that_raised_the_alarm_stands_out_most():
    """Compared with what its own map reaches on good images, whatever their units."""
    scores = torch.tensor([1.0, 2.0]).double()
    pixels = torch.zeros(302).double()
    calibration = Calibration(scores, pixels, {"K64": scores, "K32": scores * 100})
    assert calibration.level_of_alarm({"K64": 6.0, "K32": 500.0}) == "K64"
    assert calibration.level_of_alarm({"K64": 4.0, "K32": 500.0}) == "K32"
    levels = [PatchLevel(64, 16), PatchLevel(32, 8)]
    parts = [flat_result(np.ones(level.grid_shape(96, 96)), 96, level) for level in levels]
    both = ScoreResult(
        "mult",
        *(
            {**getattr(parts[0], name), **getattr(parts[1], name)}
            for name in ("level_maps", "distances", "bank_rows", "matches")
        ),
    )
    both.level_maps["K64"][0, 50, 50], both.level_maps["K32"][0, 50, 50] = 6.0, 500.0
    (region,) = find_regions(both, levels, calibration, 100.0, [])
    assert (region.level, region.peak, region.area) == ("K64", 3000.0, 1)
    both.level_maps["K64"][0, 50, 50] = 4.0
    (region,) = find_regions(both, levels, calibration, 100.0, [])
    assert (region.level, region.patch[2]) == ("K32", 32)


def test_without_a_calibration_there_is_only_the_highest_place(training, defective):
    detector = PatchSVDD(**FAST | {"mean": "channel"})
    detector.fit(training[:1], encoder=detector.untrained_encoder())
    (result,) = detector.score_stream(defective[:1])
    assert result.anomalous is None
    assert detector.explain(result) == []
    assert detector.highest_place(result).match_name == "image 0"
    with pytest.raises(ValueError, match="at least two training images"):
        detector.explain(result, 0.1)


def test_images_of_another_size_are_explained(training, defective):
    """Positions in the image are its own, those of the match the training image's."""
    detector = PatchSVDD(**FAST | {"image_size": None, "mean": "channel"})
    detector.fit(training, encoder=detector.untrained_encoder())
    wide = np.concatenate([defective[4], defective[4], defective[0]], axis=1)
    (result,) = detector.score_stream([wide])
    (region, *_) = detector.explain(result)
    left, _, size = region.patch
    assert left + size > 2 * SIDE + 60
    assert region.match[0] + size <= SIDE
    assert detector.match_picture(region).size == (SIDE, SIDE)
    assert result.unusual[-1] == "wider than the training images (width 288, usual 96)"
    picture = side_by_side(result.picture, region, detector.match_picture(region))
    assert picture.size == (4 * 384 + 5 * 8, 384 + 2 * 8 + 38)  # words above


# --- pictures -------------------------------------------------------------------------------------


def test_an_image_is_explained_by_the_rate_its_stream_was_asked_for(fitted):
    rng = np.random.default_rng(3)
    images = [texture(rng, SIDE) for _ in range(12)]
    threshold = fitted.threshold(0.8)  # lower than that of the default rate
    results = list(fitted.score_stream(images, false_alarm_rate=0.8))
    assert [result.threshold for result in results] == [threshold] * 12
    assert all(result.source is image for result, image in zip(results, images, strict=True))
    for result in results:
        regions = fitted.explain(result)
        assert bool(regions) == result.anomalous == (result.score > threshold)
        if regions:
            assert regions[0].peak == pytest.approx(result.score)
    between = [result for result in results if threshold < result.score <= fitted.threshold_]
    assert between
    for result in between:
        assert fitted.explain(result, fitted.false_alarm_rate_) == []
