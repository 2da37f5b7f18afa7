"""Adding, removing and merging images: the same as a fresh fit, and a failure changes nothing."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from conftest import texture
from patchsvdd_fast import NormalBank, PatchLevel, PatchSVDD
from patchsvdd_fast.detector import filling, scoring
from patchsvdd_fast.files import store
from patchsvdd_fast.search.index import Index

LEVELS = (PatchLevel(64, 16), PatchLevel(32, 8))
FAST = {
    "image_size": 96,
    "levels": LEVELS,
    "embedding_dim": 16,
    "initialization": "kaiming",
    "device": "cpu",
    "mean": "paper",  # a refit then is a fresh fit, whatever the images
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Ten good images."""
    rng = np.random.default_rng(5)
    folder = tmp_path_factory.mktemp("images")
    for number in range(10):
        Image.fromarray(texture(rng)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def new_images():
    rng = np.random.default_rng(6)
    return np.stack([texture(rng) for _ in range(2)])


@pytest.fixture(scope="module")
def original(paths):
    """Fitted on the first four images; not to be changed."""
    return fit(paths[:4])


@pytest.fixture
def fitted(original, paths):
    return original.refit(paths[:4])


def fit(given, **parameters):
    made = PatchSVDD(**FAST | parameters)
    made.fit(given, encoder=made.untrained_encoder())
    return made


def clustered(made, count=20):
    """With banks in clusters, which so small ones are not by themselves."""
    made.banks_ = {
        level: NormalBank(
            bank.embeddings.view(-1, *bank.grid, bank.dim), groups=bank.groups, clusters=count
        )
        for level, bank in made.banks_.items()
    }
    return made


def assert_alike(one, other, images):
    """The same answers and calibration, to the bit; the same is known of the training images."""
    ours, theirs = one.score(images), other.score(images)
    for name in map(str, one.levels_):
        assert torch.equal(ours.distances[name], theirs.distances[name])
        assert torch.equal(ours.bank_rows[name], theirs.bank_rows[name])
        assert torch.equal(ours.matches[name], theirs.matches[name])
    for level, bank in one.banks_.items():
        assert torch.equal(bank.embeddings, other.banks_[level].embeddings)
    if one.calibration_ is None:
        assert other.calibration_ is None
    else:
        expected = other.calibration_.tensors()
        assert one.calibration_.tensors().keys() == expected.keys()
        assert all(torch.equal(v, expected[k]) for k, v in one.calibration_.tensors().items())
    assert one.gallery_.names == other.gallery_.names
    assert torch.equal(one.gallery_.statistics, other.gallery_.statistics)
    assert one.gallery_.pictures == other.gallery_.pictures


# --- as if fitted afresh --------------------------------------------------------------------------


@pytest.mark.parametrize("mean", ["channel", "paper"])
def test_refit_on_the_same_images_is_the_detector_itself(paths, new_images, mean):
    original = fit(paths[:4], mean=mean)
    fitted = original.refit(paths[:4])
    assert fitted is not original
    assert_alike(fitted, original, new_images)


def test_only_the_images_of_the_fit_are_less_the_mean_of_the_others(paths):
    """Only they have a part in the mean image."""
    changed = fit(paths[:4], mean="pixel")
    changed.add(paths[4:6]).remove([1]).merge(changed.refit(paths[6:8]))
    scales = [4 / 3, 4 / 3, 4 / 3, 1, 1, 1, 1]
    level = LEVELS[1]
    pixels = changed.load_images([paths[i] for i in (0, 2, 3, 4, 5, 6, 7)]).pixels
    normalized = (pixels - changed.mean_) / 255 * torch.tensor(scales)[:, None, None, None]
    (expected,) = changed.encoder_.dense(normalized, [level])
    found = changed.banks_[level].embeddings
    torch.testing.assert_close(found, expected.flatten(0, 2), rtol=0, atol=1e-5)


def test_images_of_the_fit_are_noticed_when_they_come_again(paths):
    """Even though they are embedded in another way then."""
    detector = fit(paths[:4], mean="pixel")
    with pytest.warns(UserWarning, match="2 of the images are training images .*--remove"):
        detector.refit(paths[2:6])
    with pytest.warns(UserWarning, match="4 training images look exactly like others"):
        detector.add(paths[2:4])
    assert detector.calibration_.image_scores[0] > 0


@pytest.mark.parametrize("clusters", [0, 20])
def test_add_remove_and_merge_equal_a_fresh_fit(original, fitted, paths, new_images, clusters):
    if clusters:
        clustered(fitted, clusters)
    assert fitted.add(paths[4:6]) is fitted
    assert_alike(fitted, original.refit(paths[:6]), new_images)
    assert fitted.remove(["2.png", 0]) is fitted
    kept = [paths[i] for i in (1, 3, 4, 5)]
    assert_alike(fitted, original.refit(kept), new_images)
    other = original.refit(paths[6:])
    before = other.score(new_images).image_scores
    assert fitted.merge(other) is fitted
    assert_alike(fitted, original.refit([*kept, *paths[6:]]), new_images)
    assert torch.equal(other.score(new_images).image_scores, before)
    assert fitted.num_images == 8
    assert original.num_images == 4


@pytest.mark.parametrize("seed", [0, 1])
def test_any_order_of_changes(original, fitted, paths, new_images, seed):
    """What is there is the list of what was done, and its groups are never confused."""
    rng = random.Random(seed)
    there = paths[:4]
    for _ in range(8):
        absent = [path for path in paths if path not in there]
        kind = rng.choice(["add", "merge", "remove"])
        if kind == "remove" and len(there) > 1:
            gone = rng.sample(range(len(there)), rng.randint(1, len(there) - 1))
            fitted.remove(gone)
            there = [path for i, path in enumerate(there) if i not in gone]
        elif kind != "remove" and absent:
            more = rng.sample(absent, rng.randint(1, len(absent)))
            fitted.add(more) if kind == "add" else fitted.merge(original.refit(more))
            there += more
    assert_alike(fitted, original.refit(there), new_images)


def test_images_are_named_in_many_ways(fitted, paths, new_images):
    fitted.remove([paths[0], str(paths[1]), np.int64(2)])
    assert fitted.gallery_.names == (str(paths[3]),)
    assert_alike(fitted, fitted.refit(paths[3:4]), new_images)


def test_one_image_more_or_less_makes_the_calibration_come_and_go(original, paths, new_images):
    single = original.refit(paths[0])
    assert single.calibration_ is None
    single.add(paths[1])
    assert single.calibration_.num_images == 2
    single.remove([1])
    assert_alike(single, original.refit(paths[:1]), new_images)


def test_a_stream_scores_with_what_was_normal_when_it_began(fitted, paths, new_images):
    expected = fitted.score(new_images).image_scores.tolist()

    def images():
        yield new_images[0]
        fitted.add(paths[4:])
        yield new_images[1]

    with fitted.score_stream(images()) as stream:
        assert [result.score for result in stream] == expected
    assert fitted.score(new_images).image_scores.tolist() != expected


def test_images_of_another_size(paths, new_images):
    """With one mean per channel, a detector can be refitted to another size, but not mixed."""
    by_channel = fit(paths[:4], image_size=None, mean="channel")
    wide = [np.concatenate([np.asarray(Image.open(path))] * 2, axis=1) for path in paths[:3]]
    refitted = by_channel.refit(wide)
    assert refitted.image_shape() == (96, 192)
    assert refitted.calibration_.num_images == 3
    level = LEVELS[1]
    ours = refitted.banks_[level].embeddings.view(3, *level.grid_shape(96, 192), 16)
    theirs = by_channel.banks_[level].embeddings.view(4, *level.grid_shape(96, 96), 16)
    assert torch.equal(ours[:, :, :9], theirs[:3])
    assert refitted.score(new_images).anomaly_map.shape == (2, 96, 96)
    with pytest.raises(ValueError, match="must have 96x96 pixels as those in the banks, got 192x"):
        by_channel.add(wide)
    with pytest.raises(ValueError, match="differ in mean"):
        by_channel.merge(refitted)
    by_pixel = fit(paths[:4], image_size=None)
    with pytest.raises(ValueError, match="must have 96x96 pixels as in training"):
        by_pixel.refit(wide)


def test_images_that_are_there_twice_are_noticed(fitted, paths):
    with pytest.warns(UserWarning, match="4 training images look exactly like others"):
        fitted.add(paths[2:4])
    assert fitted.num_images == 6
    with pytest.raises(ValueError, match=r"2 training images are named '3.png': .* numbers 3, 5"):
        fitted.remove(["3.png"])
    fitted.remove([4, 5])
    assert fitted.calibration_.image_scores[0] > 0


# --- failures -------------------------------------------------------------------------------------


def failures(fitted, paths):
    """Ways to fail, each with what is said."""
    damaged = paths[0].parent.parent / "damaged.png"
    damaged.write_bytes(paths[0].read_bytes()[:500])
    small = np.zeros((1, 40, 40, 3), np.uint8)
    other_seed = fit(paths[:3], seed=1)
    return [
        (lambda: fitted.add([paths[4], damaged]), "cannot read image .*damaged"),
        (lambda: fitted.add(small), "less than one patch"),
        (lambda: fitted.add([]), "no images given"),
        (lambda: fitted.remove(["0.png", "9.png"]), "no training image is named '9.png'"),
        (lambda: fitted.remove([0, 4]), "have the numbers 0 to 3, got 4"),
        (lambda: fitted.remove([-1]), "have the numbers 0 to 3, got -1"),
        (lambda: fitted.remove(range(4)), "leave the bank empty"),
        (lambda: fitted.merge(other_seed), "differ in encoder"),
        (lambda: fitted.merge(fit(paths[4:])), "differ in mean; refit"),
    ]


def test_a_failure_changes_nothing(fitted, paths, new_images):
    before = dict(vars(fitted))
    result = fitted.score(new_images)
    for attempt, message in failures(fitted, paths):
        with pytest.raises(ValueError, match=message):
            attempt()
        assert vars(fitted) == before
    for images in ("0.png", 0):
        with pytest.raises(TypeError, match="a list of names and numbers, got"):
            fitted.remove(images)
    with pytest.raises(TypeError, match="only a detector can be merged, got str: use add"):
        fitted.merge("images")
    with pytest.raises(TypeError, match="a false-alarm rate must be a number, got '1 %'"):
        fitted.threshold("1 %")
    with pytest.raises(TypeError, match="integer"):
        fitted.remove([0.0])
    assert vars(fitted) == before
    assert torch.equal(fitted.score(new_images).anomaly_map, result.anomaly_map)


@pytest.mark.parametrize("clusters", [0, 20])
@pytest.mark.parametrize("moment", ["encode", "bank", "calibrate"])
def test_an_interruption_changes_nothing(
    fitted, original, paths, new_images, monkeypatch, moment, clusters
):
    """Ctrl-C while images are encoded, when one bank is changed and one is not, at the end."""
    if clusters:
        clustered(fitted, clusters)
    other = original.refit(paths[4:])
    result = fitted.score(new_images)
    before = dict(vars(fitted))

    def interrupt(*_):
        raise KeyboardInterrupt

    calls = []

    def interrupting_the_second(change):
        def interrupted(index, *arguments):
            calls.append(index)
            if len(calls) % 2 == 0:
                raise KeyboardInterrupt
            return change(index, *arguments)

        return interrupted

    if moment == "encode":
        monkeypatch.setattr(scoring, "encode_images", interrupt)
    elif moment == "bank":
        for name in ("append", "without"):
            change = interrupting_the_second(getattr(Index, name))
            monkeypatch.setattr(Index, name, change)
    else:
        monkeypatch.setattr(filling, "calibrate", interrupt)
    attempts = [lambda: fitted.add(paths[4:])]
    if moment != "encode":
        attempts += [lambda: fitted.remove([1]), lambda: fitted.merge(other)]
    for attempt in attempts:
        with pytest.raises(KeyboardInterrupt):
            attempt()
        assert vars(fitted) == before
    if moment == "bank":
        assert len(calls) == 2 * len(attempts)
    monkeypatch.undo()
    assert torch.equal(fitted.score(new_images).anomaly_map, result.anomaly_map)
    assert_alike(fitted.add(paths[4:]), original.refit(paths), new_images)


def test_only_detectors_that_embed_alike_are_merged(original, paths):
    """What does not matter to that may differ."""
    given = {"encoder": original.encoder_}
    shorter = PatchSVDD(**FAST | {"levels": LEVELS[:1], "combination": "K64"}).fit(
        paths[:4], **given
    )
    same = PatchSVDD(
        **FAST | {"levels": list(LEVELS), "image_size": (96, 96), "combination": "sum"}
    ).fit(paths[:4], **given)
    matched = PatchSVDD(**FAST | {"illumination": "matched"}).fit(paths[:4], **given)
    larger = PatchSVDD(**FAST | {"image_size": 128}).fit(paths[:4], **given)
    with pytest.warns(UserWarning, match="look exactly like others"):  # they are the same images
        assert original.refit(paths[:4]).merge(same).combination == "mult"
    for other, what in [
        (shorter, "levels or embedding_dim"),
        (larger, "image_size, mean"),
        (matched, "light"),
    ]:
        for one, another in [(original, other), (other, original)]:
            with pytest.raises(ValueError, match=f"these differ in {what}; refit"):
                one.merge(another)


# --- files ----------------------------------------------------------------------------------------


def test_changed_detectors_are_saved_and_loaded(original, fitted, paths, new_images, tmp_path):
    """Also over the file that the detector itself lies in."""
    path = tmp_path / "model.safetensors"
    clustered(fitted).save(path)
    loaded = PatchSVDD.load(path, device="cpu")
    loaded.add(paths[4:]).remove([0, 1])
    loaded.save(path)
    again = PatchSVDD.load(path, device="cpu")
    for one in (loaded, again):
        assert_alike(one, original.refit(paths[2:]), new_images)
    assert again.banks_[LEVELS[0]].num_clusters > 0
    again.merge(original.refit(paths[:2]))  # the encoder from a file is the same
    assert again.num_images == 10
    assert again.record_ == original.record_


def older(path, schema):
    """Make a file one of an earlier schema: without names, figures, levels' scores, checksums."""
    tensors, header = store.load(path)
    header |= {"schema_version": schema}
    kept = {
        name: tensor.clone()
        for name, tensor in tensors.items()
        if not name.startswith(("training.", "calibration.level."))
        and not (schema == 2 and name.startswith("calibration."))
    }
    if schema == 2:
        header |= {"calibration": {"threshold": 0.0, "typical": 0.0}}
    safetensors.torch.save_file(kept, path, metadata={"patchsvdd_fast": json.dumps(header)})


@pytest.mark.parametrize("schema", [2, 3])
def test_earlier_files_can_be_changed(original, paths, new_images, tmp_path, schema):
    path = tmp_path / "model.safetensors"
    original.save(path)
    older(path, schema)
    loaded = PatchSVDD.load(path, device="cpu")
    assert loaded.gallery_ is None
    with pytest.raises(ValueError, match=r"names of the training images are not known.*a number"):
        loaded.remove(["0.png"])
    loaded.add(paths[4:6]).remove([0])
    fresh = original.refit(paths[1:6])
    assert torch.equal(loaded.score(new_images).anomaly_map, fresh.score(new_images).anomaly_map)
    assert torch.equal(loaded.calibration_.image_scores, fresh.calibration_.image_scores)
    loaded.merge(original.refit(paths[6:]))
    assert loaded.gallery_ is None  # it would name some of its images only
    loaded.save(path)
    assert PatchSVDD.load(path, device="cpu").num_images == 9
    assert fresh.merge(loaded.refit(paths[:1])).gallery_.names[-1] == str(Path(paths[0]))


def test_pictures_are_kept_if_all_have_them(original, paths):
    without = original.refit(paths[:4]).set_params(keep_images=False)
    assert without.gallery_.pictures is not None
    without.add(paths[4:5])
    assert without.gallery_.pictures is None
    assert len(without.gallery_.names) == 5
