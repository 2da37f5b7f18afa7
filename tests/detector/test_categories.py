"""Detectors of several categories with one encoder: each is what it would be alone."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from backbones import Plain
from conftest import texture
from forging import packed
from patchsvdd_fast import PatchSVDD
from patchsvdd_fast.detector.categories import CategoryDetectors, open_detectors
from patchsvdd_fast.detector.description import describe
from patchsvdd_fast.detector.forecast import Progress
from patchsvdd_fast.encoders.backbone import BackboneEncoder
from patchsvdd_fast.files import store

RNG = np.random.default_rng(0)
FINE = np.stack([texture(RNG) for _ in range(5)])
COARSE = np.kron(np.stack([texture(RNG, 32) for _ in range(4)]), np.ones((1, 3, 3, 1), np.uint8))
TRAINED = {"image_size": 96, "mode": "dense", "steps": 2, "check_every": 0, "device": "cpu"}
FROZEN = {"encoder": Plain(), "image_size": 96, "device": "cpu"}


def new_images(kind):
    image = kind[0].copy()
    image[40:60, 20:50] = 250, 20, 20
    return [kind[1], image]


@pytest.fixture(params=[TRAINED, FROZEN], ids=["trained", "frozen"])
def detectors(request):
    return CategoryDetectors.fit(PatchSVDD(**request.param), {"fine": FINE, "coarse": COARSE})


@pytest.fixture
def frozen():
    return CategoryDetectors.fit(PatchSVDD(**FROZEN), {"fine": FINE, "coarse": COARSE})


def scores_of(stream):
    return [(result.score, result.threshold, result.p_value) for result in stream]


def assert_same(detector, other):
    for level, bank in detector.banks_.items():
        assert torch.equal(bank.embeddings, other.banks_[level].embeddings)
    for kind in (FINE, COARSE):
        images = new_images(kind)
        assert scores_of(detector.score_stream(images)) == scores_of(other.score_stream(images))


def test_a_frozen_encoder_gives_what_each_category_has_alone(frozen):
    for name, images in {"fine": FINE, "coarse": COARSE}.items():
        assert_same(frozen[name], PatchSVDD(**FROZEN).fit(images))


def test_a_trained_encoder_mean_and_light_are_shared():
    given = PatchSVDD(**TRAINED, mean="paper")  # a refit then is a fresh fit, whatever the images
    detectors = CategoryDetectors.fit(given, {"fine": FINE, "coarse": COARSE})
    fine, coarse = detectors["fine"], detectors["coarse"]
    assert fine.record_.steps == 2
    assert fine.encoder_ is coarse.encoder_
    both = np.concatenate([FINE, COARSE])
    alone = PatchSVDD(**TRAINED, mean="paper").fit(both)
    assert torch.equal(alone.mean_, coarse.mean_) and torch.equal(alone.light_, coarse.light_)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            alone.encoder_.state_dict().values(), fine.encoder_.state_dict().values(), strict=True
        )
    )
    assert_same(fine, alone.refit(FINE))
    assert_same(coarse, fine.refit(COARSE))


def test_training_images_have_their_own_part_taken_out_of_the_mean():
    mean = {name: PatchSVDD(**TRAINED, mean=name) for name in ("pixel", "paper")}
    made = {
        name: CategoryDetectors.fit(one, {"a": FINE, "b": COARSE}) for name, one in mean.items()
    }
    alone = PatchSVDD(**TRAINED).fit(np.concatenate([FINE, COARSE]))
    for level, bank in made["pixel"]["b"].banks_.items():
        expected = alone.banks_[level].embeddings[-len(bank) :]
        assert torch.equal(bank.embeddings, expected)
        assert not torch.equal(bank.embeddings, made["paper"]["b"].banks_[level].embeddings)


def test_a_projection_is_fitted_once_to_all():
    encoder = BackboneEncoder(Plain(), name="mine", projection="axes", dim=5)
    given = PatchSVDD(encoder=encoder, image_size=96, device="cpu")
    detectors = CategoryDetectors.fit(given, {"fine": FINE, "coarse": COARSE})
    assert encoder.needs_fit  # the one given stays as it is
    one, other = (made.encoder_ for made in detectors.values())
    assert one is other and not one.needs_fit
    alone = PatchSVDD(encoder=encoder, image_size=96, device="cpu").fit([*FINE, *COARSE])
    for value, expected in zip(
        one.state_dict().values(), alone.encoder_.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected)


def test_each_image_is_compared_with_its_category(detectors, tmp_path):
    mixed = [*new_images(FINE), *new_images(COARSE)]
    names = ["fine", "fine", "coarse", "coarse"]
    nearest = list(detectors.score_stream(mixed))
    assert [result.category for result in nearest] == names
    alone = [
        result
        for name, kind in {"fine": FINE, "coarse": COARSE}.items()
        for result in detectors[name].score_stream(new_images(kind))
    ]
    assert scores_of(nearest) == scores_of(alone)
    for result, expected in zip(nearest, alone, strict=True):
        assert torch.equal(result.anomaly_map, expected.anomaly_map)
    assert repr(nearest[1]).startswith("ImageResult('image 1', fine: anomalous, ")

    chosen = detectors.score_stream(mixed, category="coarse")
    assert [result.category for result in chosen] == ["coarse"] * 4
    assert scores_of(detectors.score_stream(mixed, category="coarse")) == scores_of(
        detectors["coarse"].score_stream(mixed)
    )
    paths = []
    for folder in ("coarse", "fine/new", "fine/coarse", "other"):
        (tmp_path / folder).mkdir(parents=True)
        paths.append(tmp_path / folder / "0.png")
        Image.fromarray(mixed[1]).save(paths[-1])
    found = [result.category for result in detectors.score_stream(paths)]
    assert found == ["coarse", "fine", "coarse", "fine"]  # the last by its looks
    found = [result.category for result in detectors.score_stream(paths, category="nearest")]
    assert found == ["fine"] * 4
    by_caller = detectors.score_stream(
        paths, category=lambda path: None if "new" in str(path) else "coarse"
    )
    assert [result.category for result in by_caller] == ["coarse", "fine", "coarse", "coarse"]


def test_a_category_that_is_not_here_is_named(frozen):
    with pytest.raises(ValueError, match="no category 'third', only fine, coarse"):
        frozen.score_stream(FINE, category="third")
    with pytest.raises(ValueError, match="no category 'third', only fine, coarse"):
        list(frozen.score_stream(FINE, category=lambda image: "third"))


def test_a_category_may_be_called_nearest():
    made = CategoryDetectors.fit(PatchSVDD(**FROZEN), {"nearest": COARSE, "fine": FINE})
    found = made.score_stream(FINE[:2], category="nearest")
    assert [result.category for result in found] == ["nearest"] * 2


def test_a_file_has_the_encoder_once_and_all_else_of_each(detectors, tmp_path):
    path = tmp_path / "both.safetensors"
    detectors.save(path)
    is_frozen = detectors["fine"].encoder_.name != "patch-svdd"
    module = Plain(seed=1) if is_frozen else None  # of which only the architecture counts
    opened = CategoryDetectors.load(path, "cpu", module)
    assert list(opened) == ["fine", "coarse"]
    assert opened["fine"].encoder_ is opened["coarse"].encoder_
    for name, detector in opened.items():
        assert_same(detector, detectors[name])
        assert_same(PatchSVDD.load(path, "cpu", module, category=name), detectors[name])
    result = next(opened.score_stream(new_images(COARSE)[1:]))
    (region, *_) = opened["coarse"].explain(result)
    assert opened["coarse"].match_picture(region) is not None
    tensors, header = store.load(path)
    encoder = detectors["fine"].encoder_.state_dict()
    assert sum(name.startswith("encoder.") for name in tensors) == len(encoder)
    assert header["kind"] == "detectors"
    facts = describe(path)
    assert facts["coarse: training images"] == "names and pictures of 4"
    assert (
        facts["fine: threshold"] == describe(path)["fine: threshold"] != facts["coarse: threshold"]
    )


def test_the_two_kinds_of_files_are_told_apart(frozen, tmp_path):
    path, single = tmp_path / "both.safetensors", tmp_path / "single.safetensors"
    frozen.save(path)
    frozen["fine"].save(single)
    with pytest.raises(ValueError, match="holds detectors of several categories, fine, coarse:"):
        PatchSVDD.load(path, "cpu", Plain())
    with pytest.raises(ValueError, match="has fine, coarse, not 'third'"):
        PatchSVDD.load(path, "cpu", Plain(), category="third")
    with pytest.raises(ValueError, match="has no categories, not 'fine'"):
        PatchSVDD.load(single, "cpu", Plain(), category="fine")
    with pytest.raises(ValueError, match=r"single\.safetensors holds a single detector"):
        CategoryDetectors.load(single, "cpu", Plain())
    assert isinstance(open_detectors(single, "cpu", Plain()), PatchSVDD)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        (None, "damaged"),
        ([], "must be a list of names"),
        ("fine", "damaged|one name|no bank"),
        (["fine", 3], "must be a list of names"),
        (["fine", "fine"], "two categories have one name"),
        (["fine", "a/b"], "without slashes"),
        (["fine", ".."], "must be that of a folder"),
        (["fine", "coarse", "third"], "damaged"),
    ],
)
def test_a_forged_list_of_categories_is_refused(frozen, tmp_path, categories, message):
    path = tmp_path / "both.safetensors"
    frozen.save(path)
    tensors, header = store.load(path)
    path.write_bytes(packed(tensors, header | {"categories": categories}))
    with pytest.raises(ValueError, match=message) as error:
        open_detectors(path, "cpu", Plain())
    assert str(path) in str(error.value)


def test_more_tensors_than_a_file_takes_are_refused(frozen, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_MOST_TENSORS", 30)
    with pytest.raises(ValueError, match="tensors are more than the 30 of a file"):
        frozen.save(tmp_path / "many.safetensors")
    assert not list(tmp_path.iterdir())


def test_categories_are_replaced_and_added(frozen):
    before = len(frozen["fine"].gallery_.names)
    frozen["fine"].add(COARSE[:1])
    frozen["third"] = frozen["fine"].refit(COARSE)
    assert list(frozen) == ["fine", "coarse", "third"]
    assert [one.num_images for one in frozen.values()] == [before + 1, 4, 4]
    images = "fine: 6 images, coarse: 4 images, third: 4 images"
    assert repr(frozen) == f"CategoryDetectors(own, {images})"
    with pytest.raises(ValueError, match=r"those of other differ in encoder; `refit`"):
        frozen["other"] = PatchSVDD(**FROZEN | {"encoder": Plain(seed=1)}).fit(FINE)
    for name in ("", "a/b", " a", 3, "..", ".", "a\\b", "a\nb", "index.html"):
        with pytest.raises(ValueError, match="a category's name must be that of a folder"):
            frozen[name] = frozen["fine"]
    with pytest.raises(ValueError, match="no categories given"):
        CategoryDetectors({})


def test_a_copy_has_categories_of_its_own(frozen):
    other = copy.copy(frozen)
    other["third"] = other["fine"].refit(COARSE)
    assert list(frozen) == ["fine", "coarse"]
    assert other["fine"] is frozen["fine"]


def test_time_is_told_where_the_first_category_is_small():
    told = []
    CategoryDetectors.fit(
        PatchSVDD(**FROZEN),
        {"few": COARSE[:2], "fine": FINE},
        on_progress=lambda name, share, left: told.append((name, left)),
    )
    assert all(left is not None for name, left in told if name == "encoding")


def test_bad_images_are_refused_in_words():
    for images, got in (({}, "none"), ("a folder", "str"), ([FINE], "list")):
        with pytest.raises(TypeError, match=f"map at least one category's name .* got {got}"):
            CategoryDetectors.fit(PatchSVDD(**FROZEN), images)


def test_a_category_added_while_streaming_is_named(frozen):
    def choose(_):
        frozen["late"] = frozen["fine"]
        return "late"

    stream = frozen.score_stream(FINE[:1], category=choose)
    with stream, pytest.raises(ValueError, match="'late' was added after the stream began"):
        next(stream)


def test_a_table_in_pandas_has_the_category(frozen):
    pytest.importorskip("pandas")
    (result,) = frozen.score_stream(FINE[:1], category="fine")
    assert result.to_pandas()["category"].tolist() == ["fine"]
    (alone,) = frozen["fine"].score_stream(FINE[:1])
    assert "category" not in alone.to_pandas()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda one: one.set_params(contamination=0.5), "contamination"),
        (lambda one: one.set_params(channel_order="bgr"), "channel_order"),
        (lambda one: one.set_params(encoder=Plain(seed=1)).fit(COARSE), "encoder"),
    ],
)
def test_a_category_that_has_become_another_is_refused(frozen, tmp_path, change, named):
    """What is shared is that of the first: others would be scored, and saved, with it silently."""
    change(frozen["coarse"])
    for use in (lambda: frozen.score_stream(FINE), lambda: frozen.save(tmp_path / "model")):
        with pytest.raises(ValueError, match=f"those of coarse differ in .*{named}"):
            use()
    assert not list(tmp_path.iterdir())


def test_images_of_two_sizes_are_refused_unless_resized():
    small = [image[:80] for image in COARSE]
    given = PatchSVDD(**FROZEN | {"image_size": None})
    with pytest.raises(ValueError, match="of one size: fine 96x96, coarse 96x80"):
        CategoryDetectors.fit(given, {"fine": FINE, "coarse": small})
    resized = CategoryDetectors.fit(PatchSVDD(**FROZEN), {"fine": FINE, "coarse": small})
    assert resized["coarse"].gallery_.statistics.shape == (4, 7)


def test_errors_name_the_category():
    with pytest.raises(ValueError, match=r"^coarse: image 0 has 12x12 pixels, less than one patch"):
        CategoryDetectors.fit(PatchSVDD(**FROZEN), {"fine": FINE, "coarse": COARSE[:, :12, :12]})
    faulty = {"fine": FINE[:, :12, :12], "coarse": COARSE[:, :12, :12]}
    with pytest.raises(ValueError, match=r"(?s)^fine: image 0 .*\ncoarse: image 0 "):
        CategoryDetectors.fit(PatchSVDD(**FROZEN), faulty)
    with pytest.raises(TypeError, match=r"^coarse: "):
        CategoryDetectors.fit(PatchSVDD(**FROZEN), {"fine": FINE, "coarse": 5})
    with pytest.raises(FileNotFoundError, match=r"^coarse: .*nowhere"):
        CategoryDetectors.fit(PatchSVDD(**FROZEN), {"fine": FINE, "coarse": "nowhere"})
    twins = [*COARSE, COARSE[0]]
    with pytest.warns(UserWarning, match=r"^coarse: 2 training images look exactly like others"):
        CategoryDetectors.fit(PatchSVDD(**FROZEN), {"fine": FINE, "coarse": twins})


def test_categories_are_taken_out(frozen):
    both = copy.copy(frozen)
    with pytest.raises(ValueError, match="no category 'third', only fine, coarse"):
        del both["third"]
    del both["fine"]
    assert [*both] == ["coarse"]
    with pytest.raises(ValueError, match="coarse is the only category"):
        del both["coarse"]


def test_a_category_of_another_size_is_told_so(frozen):
    larger = PatchSVDD(**FROZEN | {"image_size": 128}).fit(FINE)
    with pytest.raises(
        ValueError, match="96x96 pixels, but those of new have 128x128: resize them"
    ):
        copy.copy(frozen)["new"] = larger


def test_merged_categories_must_fit(frozen):
    other = CategoryDetectors({"fine": PatchSVDD(**FROZEN | {"seed": 7}).fit(FINE)})
    before = {name: one.num_images for name, one in frozen.items()}
    with pytest.raises(ValueError, match="fine differ in seed"):
        frozen.merge(other)
    assert {name: one.num_images for name, one in frozen.items()} == before


def test_samples_are_read_alike_in_all_categories(tmp_path):
    (tmp_path / "deep").mkdir()
    for number, image in enumerate(COARSE):
        deep = image[..., 0].astype(np.uint16) * 16  # 12 bits
        Image.fromarray(deep).save(tmp_path / f"deep/{number}.png")
    made = CategoryDetectors.fit(PatchSVDD(**FROZEN), {"fine": FINE, "deep": tmp_path / "deep"})
    assert {one.samples_.bit_depth for one in made.values()} == {12}
    assert all(one.samples_.fractions for one in made.values())


def test_time_left_is_that_of_all_categories():
    told = []
    progress = Progress(lambda *report: told.append(report))
    encoder = BackboneEncoder(Plain()).eval()
    given = PatchSVDD(**FROZEN).set_params(levels=encoder.default_levels).parameters_
    images = torch.from_numpy(FINE).permute(0, 3, 1, 2).contiguous()
    mean, light = torch.zeros(3, 96, 96), torch.zeros(3)
    progress.forecast(given, encoder, mean, light, images, of=20)  # and 15 of others
    progress.begin_category(5)
    expected = progress.expected
    of_one = sum(seconds for name, seconds in expected.items() if name != "estimating")
    progress.phase("encoding")
    assert told[-1][2] == pytest.approx(4 * of_one)
    progress.end_category()
    progress.begin_category(15)
    assert progress.expected["encoding"] == pytest.approx(3 * expected["encoding"])
    progress.phase("encoding")
    assert told[-1][2] == pytest.approx(3 * of_one)


def test_an_encoder_may_be_given():
    given = PatchSVDD(image_size=96, device="cpu")
    encoder = given.untrained_encoder()
    made = CategoryDetectors.fit(given, {"fine": FINE, "coarse": COARSE}, encoder=encoder)
    assert isinstance(made["fine"].encoder_, nn.Module)
    assert made["fine"].record_.steps == 0
    assert json.dumps(made["fine"].model().parameters["encoder"]) == '"patch-svdd"'
