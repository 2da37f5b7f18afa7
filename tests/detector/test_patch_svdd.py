"""The detector: fit, score, save, load; scikit-learn's conventions; official AUROC."""

import errno
import json
import os
import signal

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from patchsvdd_fast import HierarchicalEncoder, PatchLevel, PatchSVDD
from patchsvdd_fast.detector.encoder_file import load_encoder
from patchsvdd_fast.detector.evaluation import evaluate_category
from patchsvdd_fast.detector.parameters import illumination_of
from patchsvdd_fast.files import store
from patchsvdd_fast.files.categories import Category
from patchsvdd_fast.images.prepare import load_images
from patchsvdd_fast.images.sample_cloth import woven_cloth
from patchsvdd_fast.ops.backends import resolve_device
from patchsvdd_fast.score.encoding import score_images
from patchsvdd_fast.score.maps import combine
from patchsvdd_fast.search.bank import NormalBank

LEVELS = (PatchLevel(64, 16), PatchLevel(32, 8))
FAST = {
    "image_size": 96,
    "levels": LEVELS,
    "steps": 2,
    "batch_size": 4,
    "embedding_dim": 16,
    "initialization": "kaiming",
}


@pytest.fixture
def fitted(good_folder):
    return PatchSVDD(**FAST).fit(good_folder)


@pytest.mark.parametrize("category", ["hazelnut", "leather"])
def test_official_checkpoints_reach_the_reference_auroc(
    reference_dir, reference_summary, categories_dir, category
):
    encoder = load_encoder(reference_dir / "official_checkpoints" / f"{category}_enchier.pkl")
    detector = PatchSVDD(mean="paper").fit(categories_dir / category, encoder=encoder)
    result = evaluate_category(detector, Category(categories_dir / category))
    for combination, expected in reference_summary[category]["auroc_det_seg"].items():
        percent = result.percent[combination]
        ours = (percent["detection"], percent["segmentation"])
        assert ours == pytest.approx(expected, abs=0.05), combination


@pytest.mark.parametrize("category", ["hazelnut", "leather"])
def test_distances_and_maps_match_the_reference(reference_dir, categories_dir, category):
    """Distances and maps of three test images against float64 distances of the reference."""
    reference = np.load(reference_dir / f"{category}.npz")
    encoder = load_encoder(reference_dir / "official_checkpoints" / f"{category}_enchier.pkl")
    detector = PatchSVDD(mean="paper").fit(categories_dir / category, encoder=encoder)
    mean = torch.from_numpy(reference["mean"]).permute(2, 0, 1)
    assert torch.equal(detector.mean_, mean)
    images = torch.from_numpy(reference["image_uint8"]).permute(0, 3, 1, 2)
    result = detector.score(images)
    for size in (64, 32):
        # An embedding may be off by 4.3e-7 per coordinate in either implementation (rounding of
        # float32 convolutions, measured against float64), a distance by its norm on both sides.
        tolerance = 2 * 4.3e-7 * np.sqrt(64)
        distances = result.distances[f"K{size}"].double().numpy()
        assert np.abs(distances - reference[f"dist{size}"]).max() < tolerance
        maps = result.level_maps[f"K{size}"].double().numpy()
        assert np.abs(maps - reference[f"map{size}"]).max() < tolerance
        same = (result.bank_rows[f"K{size}"].numpy() == reference[f"index{size}"]).mean()
        spread = detector.banks_[PatchLevel(size, size // 4 if size == 64 else 4)].embeddings
        # Leather's embeddings spread by few units in the last place: neighbours change there.
        assert same > (0.99 if spread.std(dim=0).mean() > 1e-3 else 0.3)


def test_result_holds_together(fitted, good_folder):
    result = fitted.score(good_folder)
    assert result.anomaly_map.shape == (4, 96, 96)
    assert result.distances["K32"].shape == (4, 9, 9)
    assert torch.equal(result.anomaly_map, result.map("K64") * result.map("K32"))
    assert torch.equal(result.map("sum"), result.map("K64") + result.map("K32"))
    assert torch.equal(result.image_scores, result.anomaly_map.flatten(1).max(dim=1).values)


@pytest.mark.parametrize("mean", ["channel", "paper"])
def test_training_images_find_themselves(good_folder, mean):
    result = PatchSVDD(**FAST, mean=mean).fit(good_folder).score(good_folder)
    assert result.distances["K32"].max() == 0
    assert torch.equal(result.bank_rows["K64"].flatten(), torch.arange(4 * 9))


@pytest.mark.parametrize(("mean", "low", "high"), [("pixel", 0.45, 0.75), ("paper", 0, 0.35)])
def test_few_training_images_keep_their_promise(mean, low, high):
    """New images' mean p-value is (N + 2) / (2 N + 2) if they are like the training images.

    With one mean image for all it is lower: the training images have a part in it, new ones none.
    """
    generator = np.random.default_rng(0)
    images = np.stack([woven_cloth(generator)[:96, :96].astype(np.uint8) for _ in range(40)])
    detector = PatchSVDD(**FAST | {"mode": "dense", "mean": mean, "embedding_dim": 64})
    encoder = detector.untrained_encoder()
    p_values = [
        detector.fit(images[first : first + 10], encoder=encoder).p_values(
            detector.score(np.delete(images, slice(first, first + 10), axis=0)).image_scores
        )
        for first in range(0, 40, 10)
    ]
    assert low < np.mean(p_values) < high


def test_one_image_has_no_mean_image(good_folder):
    image = sorted(good_folder.rglob("*.png"))[:1]
    for mean in ("pixel", "paper"):
        with pytest.raises(ValueError, match=r'its own mean image.*mean="channel"'):
            PatchSVDD(**FAST, mean=mean).fit(image)
    assert PatchSVDD(**FAST, mean="channel").fit(image).num_images == 1


def test_scores_do_not_depend_on_the_company(fitted, category_folder):
    paths = sorted((category_folder / "test").rglob("*.png"))
    together = fitted.score(paths * 3)
    alone = [fitted.score(path) for path in paths]
    for i, result in enumerate(alone):
        for name, distances in result.distances.items():
            assert torch.equal(distances[0], together.distances[name][i])


def test_outlier_detector_conventions(fitted, category_folder):
    paths = sorted((category_folder / "test").rglob("*.png"))
    scores = fitted.score_samples(paths)
    assert scores.shape == (6,)
    assert np.array_equal(-scores, fitted.score(paths).image_scores.numpy())
    decision = fitted.decision_function(paths)
    assert np.allclose(decision, scores - fitted.offset_)
    assert np.array_equal(fitted.predict(paths), np.where(decision < 0, -1, 1))
    assert fitted.threshold_ == -fitted.offset_ > 0
    assert (scores[3:] < scores[:3].min()).all()  # the red squares


def test_parameters_and_clone():
    detector = PatchSVDD(**FAST)
    assert {key: detector.get_params()[key] for key in FAST} == FAST
    twin = clone(detector).set_params(seed=3)
    assert twin.seed == 3
    assert detector.seed == 0


def test_fit_is_reproducible(good_folder, fitted):
    again = PatchSVDD(**FAST).fit(good_folder)
    for level in LEVELS:
        assert torch.equal(fitted.banks_[level].embeddings, again.banks_[level].embeddings)
    other = PatchSVDD(**FAST | {"seed": 1}).fit(good_folder)
    assert not torch.equal(other.banks_[LEVELS[0]].embeddings, fitted.banks_[LEVELS[0]].embeddings)


def test_calibration_leaves_each_image_out(fitted, good_folder):
    """Against banks rebuilt without the image, by hand."""
    scores = []
    images = fitted.score(good_folder)  # for the shape only
    height, width = images.anomaly_map.shape[1:]
    for left_out in range(4):
        maps = {}
        for level, bank in fitted.banks_.items():
            rows, columns = level.grid_shape(height, width)
            embeddings = bank.embeddings.view(4, rows * columns, -1)
            others = torch.cat([embeddings[i] for i in range(4) if i != left_out])
            found, _ = NormalBank(others).nearest(embeddings[left_out])
            from patchsvdd_fast import score_map

            maps[str(level)] = score_map(
                found.view(1, rows, columns), level.size, level.stride, height, width
            )
        scores.append(float(combine(maps, "mult").max()))
    assert fitted.calibration_.image_scores.tolist() == pytest.approx(sorted(scores))
    assert fitted.false_alarm_rate_ == 1 / 5  # all that four images can promise
    assert fitted.threshold_ == pytest.approx(max(scores))
    with pytest.raises(ValueError, match=r"at the lowest, not of 1.00%: that takes 99"):
        fitted.threshold(0.01)
    assert fitted.p_values(np.array([0.0, 2 * max(scores)])).tolist() == [1.0, 1 / 5]


def test_one_training_image_has_no_threshold(category_folder):
    detector = PatchSVDD(**FAST, mean="channel").fit(category_folder / "train/good/0.png")
    assert detector.calibration_ is None
    assert detector.score(category_folder / "test").image_scores.shape == (6,)
    with pytest.raises(ValueError, match="at least two training images"):
        detector.predict(category_folder / "test")


def test_save_and_load(fitted, tmp_path, category_folder):
    path = tmp_path / "model.safetensors"
    fitted.save(path)
    assert [file.name for file in tmp_path.iterdir() if "model" in file.name] == [path.name]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    loaded = PatchSVDD.load(path)
    before, after = (detector.score(category_folder / "test") for detector in (fitted, loaded))
    assert torch.equal(before.anomaly_map, after.anomaly_map)
    assert loaded.threshold_ == fitted.threshold_
    assert loaded.record_ == fitted.record_
    assert loaded.get_params() == fitted.parameters_
    encoder = load_encoder(path)
    assert encoder.state_dict().keys() == fitted.encoder_.state_dict().keys()


def test_files_of_the_previous_schema_are_calibrated_anew(fitted, tmp_path):
    path = tmp_path / "model.safetensors"
    fitted.save(path)
    tensors, header = store.load(path)
    older = header | {"schema_version": 2, "calibration": {"threshold": 0.0, "typical": 0.0}}
    tensors = {name: value for name, value in tensors.items() if "calibration" not in name}
    safetensors.torch.save_file(tensors, path, metadata={"patchsvdd_fast": json.dumps(older)})
    loaded = PatchSVDD.load(path)
    expected = fitted.calibration_.tensors()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.calibration_.tensors().items())


def test_files_of_another_kind_are_refused(fitted, tmp_path):
    path = tmp_path / "model.safetensors"
    fitted.save(path)
    whole = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.safetensors").write_text("hello")
    safetensors.torch.save_file({"a": torch.rand(2)}, tmp_path / "foreign.safetensors")
    for name in ("cut", "text", "foreign"):
        with pytest.raises(ValueError, match=name):
            PatchSVDD.load(tmp_path / f"{name}.safetensors")
    tensors, header = store.load(path)
    store.save(tmp_path / "checkpoint", "checkpoint", tensors, header)
    with pytest.raises(ValueError, match="not a fitted detector"):
        PatchSVDD.load(tmp_path / "checkpoint")
    text = json.dumps(header | {"schema_version": 99})
    newer = tmp_path / "newer.safetensors"
    safetensors.torch.save_file(tensors, newer, metadata={"patchsvdd_fast": text})
    with pytest.raises(ValueError, match="newer patchsvdd_fast"):
        PatchSVDD.load(newer)
    with pytest.raises(FileNotFoundError):
        PatchSVDD.load(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="folder"):
        PatchSVDD.load(tmp_path)


def test_a_failed_save_loses_nothing(fitted, tmp_path, monkeypatch):
    path = tmp_path / "out" / "model.safetensors"
    path.parent.mkdir()
    fitted.save(path)
    before = path.read_bytes()

    def full_disk(partial, tensors, metadata):
        partial.write_bytes(before[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "_write", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        fitted.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_checkpoint_is_written_on_interrupt(good_folder, tmp_path):
    checkpoint = tmp_path / "encoder.checkpoint"

    def interrupt(step):
        if step.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        PatchSVDD(**FAST | {"steps": 500}).fit(
            good_folder, on_step=interrupt, checkpoint=checkpoint, checkpoint_minutes=60
        )
    encoder = load_encoder(checkpoint)
    trained = PatchSVDD(**FAST).fit(good_folder).encoder_.state_dict()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, trained[name])
    detector = PatchSVDD(**FAST).fit(good_folder, encoder=encoder)
    assert detector.record_.steps == 0


def test_checkpoints_are_written_in_between(good_folder, tmp_path):
    checkpoint = tmp_path / "encoder.checkpoint"
    seen = []

    def on_step(step):  # comes before the checkpoint: what is told of a step is never told twice
        seen.append(store.load(checkpoint)[1]["steps"] if checkpoint.exists() else 0)

    PatchSVDD(**FAST).fit(good_folder, on_step=on_step, checkpoint=checkpoint, checkpoint_minutes=0)
    assert seen == [0, 1]
    assert store.load(checkpoint)[1]["steps"] == 2


def test_a_full_disk_does_not_end_training(good_folder, tmp_path):
    with pytest.warns(RuntimeWarning, match="no checkpoint was written"):
        detector = PatchSVDD(**FAST).fit(
            good_folder, checkpoint=tmp_path / "missing" / "c", checkpoint_minutes=0
        )
    assert detector.record_.steps == 2


def test_not_fitted():
    for call in (
        lambda d: d.score("x"),
        lambda d: d.save("x"),
        lambda d: d.predict("x"),
        lambda d: d.threshold_,
        lambda d: d.encode(torch.zeros(1, 3, 256, 256, dtype=torch.uint8)),
        lambda d: d.image_shape(),
        lambda d: d.levels_,
        lambda d: d.usual_light(),
    ):
        with pytest.raises(NotFittedError):
            call(PatchSVDD())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"combination": "max"}, "combination must be one of"),
        ({"combination": "K128"}, "combination must be one of"),
        ({"contamination": 1.0}, "contamination"),
        ({"image_size": 48}, "at least the largest patch, 64"),
        ({"image_size": (0, 9)}, "image_size must be positive"),
        ({"initialization": "xavier"}, "initialization must be one of"),
        ({"device": "tpu9"}, "device must be"),
        ({"levels": ()}, "at least one patch level"),
        ({"steps": -1}, "steps"),
    ],
)
def test_bad_parameters_are_named(good_folder, parameters, message):
    with pytest.raises(ValueError, match=message):
        PatchSVDD(**FAST | parameters).fit(good_folder)


def test_cuda_is_refused_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="torch finds no GPU"):
        resolve_device("cuda")


def test_a_gpu_beyond_the_last_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="'cuda:2' was asked for, but torch finds 2 GPUs"):
        resolve_device("cuda:2")


def test_images_unlike_training_are_refused(good_folder):
    detector = PatchSVDD(**FAST | {"image_size": None}).fit(good_folder)
    with pytest.raises(ValueError, match="must have 96x96 pixels as in training"):
        detector.score(np.zeros((1, 100, 96, 3), np.uint8))


def test_score_images_checks_the_combination(fitted):
    images = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    with pytest.raises(ValueError, match="combination"):
        score_images(fitted.encoder_, fitted.banks_, images, fitted.mean_, "nope")


def test_bank_validates():
    with pytest.raises(ValueError, match="row 3"):
        NormalBank(torch.tensor([[0.0], [1], [2], [torch.nan]]))
    with pytest.raises(ValueError, match="at least one"):
        NormalBank(torch.empty(0, 4))
    with pytest.raises(TypeError, match="real numbers"):
        NormalBank(torch.rand(3, 4) > 0)
    bank = NormalBank(torch.rand(10, 4))
    assert len(bank) == 10
    distances, rows = bank.nearest(bank.embeddings.view(2, 5, 4))
    assert torch.equal(rows, torch.arange(10).view(2, 5))
    assert distances.max() == 0
    with pytest.raises(ValueError, match=r"\[..., 4\]"):
        bank.nearest(torch.rand(3, 5))


def test_deeper_levels(good_folder):
    levels = (PatchLevel(128, 32), PatchLevel(64, 16), PatchLevel(32, 8))
    detector = PatchSVDD(**FAST | {"levels": levels, "image_size": 160, "combination": "K128"})
    with pytest.raises(ValueError, match="less than one patch of 128x128"):
        detector.fit(good_folder)
    images = np.random.default_rng(0).integers(256, size=(2, 160, 160, 3), dtype=np.uint8)
    detector.fit(images)
    assert isinstance(detector.encoder_, HierarchicalEncoder)
    assert detector.encoder_.patch_sizes == (32, 64, 128)
    assert detector.score(images).map("mult").shape == (2, 160, 160)


def test_matched_light_makes_scores_indifferent_to_brightness(good_folder, tmp_path):
    images = load_images(good_folder, (96, 96), 64).clamp(40, 200)
    brighter = (images * 1.15).round().byte()
    changes = {}
    for illumination in ("as_is", "matched"):
        detector = PatchSVDD(
            illumination=illumination, image_size=None, initialization="kaiming", seed=1
        )
        detector.fit(images, encoder=detector.untrained_encoder())
        usual, bright = (detector.score(given).image_scores for given in (images, brighter))
        unseen = detector.score(images.flip(3)).image_scores.mean()
        changes[illumination] = float((bright - usual).abs().max() / unseen)
        detector.save(tmp_path / "model")
        again = PatchSVDD.load(tmp_path / "model")
        assert torch.equal(again.score(brighter).image_scores, bright)
    assert changes["matched"] < 0.2 * changes["as_is"]
    with pytest.raises(ValueError, match="illumination must be one of"):
        PatchSVDD(illumination="dark").fit(images)
    with pytest.raises(ValueError, match="mean must be one of"):
        PatchSVDD(mean="image").fit(images)
    assert illumination_of(PatchSVDD(mode="dense").get_params()) == "matched"
    assert illumination_of(PatchSVDD().get_params()) == "as_is"
