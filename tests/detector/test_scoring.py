"""Detectors of files with more than 8 bits or that cannot be read, and of OpenCV's arrays."""

import numpy as np
import pytest
import torch
from PIL import Image

from backbones import Plain
from conftest import texture
from patchsvdd_fast import PatchSVDD
from patchsvdd_fast.detector.description import describe
from patchsvdd_fast.detector.evaluation import evaluate_category
from patchsvdd_fast.files import store
from patchsvdd_fast.files.categories import Category
from patchsvdd_fast.images.samples import AS_STORED, UNKNOWN, Samples, to_8_bits

COUNT = 6


def gray(number):
    """A texture in 0 .. 1: training images, then two new ones, the last with a defect."""
    image = texture(np.random.default_rng(number), 96)[..., 0] / 255
    if number == COUNT + 1:
        image[30:50, 40:60] = 0.9
    return image


def write(folder, suffix, convert):
    """The images as files; returns the folder of training images, and the new files."""
    (folder / "good").mkdir(parents=True)
    for number in range(COUNT):
        Image.fromarray(convert(gray(number))).save(folder / f"good/{number}{suffix}")
    new = [folder / f"new{number}{suffix}" for number in (COUNT, COUNT + 1)]
    for number, path in enumerate(new, start=COUNT):
        Image.fromarray(convert(gray(number))).save(path)
    return folder / "good", new


def eight_bits(image):
    return (255 * image).round().astype(np.uint8)


def bits(depth, of=1.0):
    """To samples of so many bits, which round to exactly the 8 bits of `eight_bits`."""
    full = 2**depth - 1
    return lambda image: (eight_bits(of * image) * (full / 255)).round().astype(np.uint16)


def detector(**options):
    return PatchSVDD(encoder=Plain(), image_size=96, device="cpu", **options)


def scores(fitted, new):
    return fitted.score([str(path) for path in new]).anomaly_map


def is_near(found, expected):
    """Whether maps are the same but for what the fractions of `bits` change: 1/8 gray level."""
    return not torch.equal(found, expected) and torch.allclose(found, expected, atol=0.02)


def rounded(fitted, new):
    return to_8_bits(fitted.load_images(new).pixels)


@pytest.fixture
def expected(tmp_path):
    """Scores of the same images in files of 8 bits."""
    good, new = write(tmp_path / "8", ".png", eight_bits)
    return scores(detector().fit(good), new)


@pytest.mark.parametrize(("depth", "suffix"), [(10, ".tif"), (12, ".png"), (14, ".tif")])
def test_deep_files_score_as_files_of_8_bits(tmp_path, expected, depth, suffix):
    assert expected.max() > 0.01
    good, new = write(tmp_path / "deep", suffix, bits(depth))
    fitted = detector().fit(good)
    assert fitted.samples_ == Samples(bit_depth=depth, fractions=True)
    assert fitted.bit_depth is None
    assert is_near(scores(fitted, new), expected)
    with fitted.score_stream(new) as stream:
        results = list(stream)
    assert torch.equal(torch.stack([one.anomaly_map for one in results]), scores(fitted, new))
    assert np.array_equal(np.asarray(results[0].picture)[..., 0], eight_bits(gray(COUNT)))
    assert fitted.gallery_.picture(0, (96, 96)).mode == "RGB"


@pytest.mark.parametrize("options", [{}, {"illumination": "matched"}])
@pytest.mark.parametrize("size", [96, 80])
def test_the_last_bits_reach_the_encoder(tmp_path, options, size):
    """Images that are the same in 8 bits score differently; a detector of 8 bits rounds them."""
    good, new = write(tmp_path / "deep", ".tif", bits(12))
    deep = bits(12)(gray(COUNT)).astype(np.int32)
    noise = np.random.default_rng(0).integers(-7, 8, deep.shape)
    assert np.array_equal(eight_bits((deep + noise).clip(0) / 4095), eight_bits(deep / 4095))
    Image.fromarray((deep + noise).clip(0).astype(np.uint16)).save(new[1])
    fitted = detector(**options).set_params(image_size=size).fit(good)
    before, after = scores(fitted, new)
    assert not torch.equal(before, after)
    assert torch.allclose(before, after, atol=0.1)
    plain, _ = write(tmp_path / "8", ".png", eight_bits)
    of_8_bits = detector(**options, bit_depth=12).set_params(image_size=96).fit(plain)
    assert not of_8_bits.samples_.fractions
    before, after = scores(of_8_bits, new)
    assert torch.equal(before, after)


def test_training_on_more_than_8_bits(tmp_path):
    """Crops are cut out of 8 bits, so weights are those of the same images in 8 bits."""
    options = {"image_size": 96, "steps": 2, "mode": "dense", "device": "cpu"}
    good, new = write(tmp_path / "deep", ".tif", bits(12))
    plain, new_8 = write(tmp_path / "8", ".png", eight_bits)
    # The mean image keeps its fractions, which has a part in all weights.
    fitted, other = (PatchSVDD(**options).fit(folder) for folder in (good, plain))
    assert torch.allclose(fitted.mean_, other.mean_, atol=0.1)
    assert not torch.equal(fitted.mean_, other.mean_)
    assert fitted.record_.steps == 2
    found, expected = scores(fitted, new), scores(other, new_8)
    assert not torch.equal(found, expected)
    assert torch.allclose(found, expected, rtol=0.2, atol=0.05 * float(expected.max()))


def test_arrays_of_more_than_8_bits(tmp_path, expected):
    good, new = write(tmp_path / "files", ".png", eight_bits)
    as_8 = [np.asarray(Image.open(path)) for path in sorted(good.iterdir())]
    new_8 = [np.asarray(Image.open(path)) for path in new]
    for convert in (lambda one: one.astype(np.float32) / 255, lambda one: one * np.uint16(257)):
        fitted = detector().fit([convert(one) for one in as_8])
        assert not fitted.samples_.fractions  # they have 8 bits
        assert torch.equal(fitted.score([convert(one) for one in new_8]).anomaly_map, expected)
    finer = [one.astype(np.float32) / 255 * 0.999 for one in as_8]
    fitted = detector().fit(finer)
    assert fitted.samples_ == Samples(fractions=True)
    assert fitted.load_images(as_8).pixels.dtype == torch.float32


def test_a_depth_is_kept_in_the_file_and_applied_to_dark_images(tmp_path, expected):
    good, new = write(tmp_path / "deep", ".tif", bits(12))
    path = tmp_path / "model.safetensors"
    detector().fit(good).save(path)
    again = PatchSVDD.load(path, device="cpu", encoder=Plain())
    found = scores(again, new)
    assert is_near(found, expected)
    assert describe(path)["samples"] == "16-bit files hold 12 bits"
    _, dark = write(tmp_path / "dark", ".tif", bits(12, of=0.05))
    _, dark_8 = write(tmp_path / "dark8", ".png", lambda image: eight_bits(0.05 * image))
    assert torch.equal(rounded(again, dark), rounded(again, dark_8))
    again.add(dark[:1]).remove([COUNT])
    assert torch.equal(scores(again, new), found)
    assert torch.equal(scores(again.refit(good), new), found)


def test_an_image_of_more_bits_is_an_error_and_the_others_are_scored(tmp_path):
    good, new = write(tmp_path / "deep", ".tif", bits(10))
    fitted = detector().fit(good)
    Image.fromarray(bits(12)(gray(0))).save(new[0])
    failed = []
    with fitted.score_stream(new, on_error=lambda *failure: failed.append(failure)) as stream:
        assert [result.source for result in stream] == new[1:]
    ((path, error),) = failed
    assert path == new[0]
    assert "more than the 10 bits of the training images allow" in str(error)


def test_a_depth_that_is_given_is_used(tmp_path, expected):
    """Of images that are too dark to show it."""
    good, new = write(tmp_path / "deep", ".tif", bits(12, of=0.2))
    _, new_8 = write(tmp_path / "8 dark", ".png", lambda image: eight_bits(0.2 * image))
    fitted = detector(bit_depth=12).fit(good)
    assert fitted.samples_.bit_depth == 12
    assert torch.equal(rounded(fitted, new), rounded(fitted, new_8))
    assert detector().fit(good).samples_.bit_depth == 10


@pytest.mark.parametrize("scale", [1, 4000])
def test_floating_point_files(tmp_path, expected, scale):
    def values(image):
        return (scale * (eight_bits(image) / 255)).astype(np.float32)

    good, new = write(tmp_path / "float", ".tif", values)
    given = {"value_range": (0, scale)} if scale > 1 else {}
    fitted = detector(**given).fit(good)
    assert fitted.samples_ == Samples(value_range=(0, scale), fractions=True)
    path = tmp_path / "model.safetensors"
    fitted.save(path)
    again = PatchSVDD.load(path, device="cpu", encoder=Plain())
    for one in (fitted, again):
        assert torch.allclose(scores(one, new), expected, atol=1e-4)
    assert describe(path)["samples"] == f"floating-point samples from 0 to {scale}"


def test_older_models_take_16_bits(tmp_path):
    """And round them to 8, as they did when they were made."""
    good, new = write(tmp_path / "8", ".png", eight_bits)
    path = tmp_path / "model.safetensors"
    fitted = detector(bit_depth=16).fit(good)
    fitted.save(path)
    assert describe(path)["samples"] == "16-bit files hold 16 bits, rounded to 8 bits"
    _, new = write(tmp_path / "16", ".tif", bits(16))
    tensors, header = store.load(path)
    del header["samples"], header["parameters"]["bit_depth"], header["parameters"]["value_range"]
    store.save(path, "detector", {name: tensor.clone() for name, tensor in tensors.items()}, header)
    older = PatchSVDD.load(path, device="cpu", encoder=Plain())
    assert older.samples_ == AS_STORED
    assert torch.equal(scores(older, new), scores(fitted, new))
    assert "samples" not in describe(path)


def test_detectors_of_other_depths_are_not_merged(tmp_path):
    deep, _ = write(tmp_path / "12", ".tif", bits(12))
    plain, _ = write(tmp_path / "8", ".png", eight_bits)
    one, other = detector().fit(deep), detector().fit(plain)
    assert other.samples_ == UNKNOWN
    with pytest.raises(ValueError, match="differ in bit_depth or value_range"):
        one.merge(other)


def test_bad_parameters_are_refused(tmp_path):
    good, _ = write(tmp_path / "8", ".png", eight_bits)
    with pytest.raises(ValueError, match="bit_depth must be 8 to 16, or None, got 24"):
        detector(bit_depth=24).fit(good)
    with pytest.raises(ValueError, match=r"value_range must be .* got \(1, 0\)"):
        detector(value_range=(1, 0)).fit(good)


def test_training_images_that_cannot_be_read(tmp_path, expected):
    good, new = write(tmp_path / "some", ".png", eight_bits)
    (good / "a.png").write_text("hello")
    (good / "b.png").write_bytes((good / "0.png").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"2 of 8 images cannot be read .*a\.png.*b\.png"):
        detector().fit(good)
    with pytest.warns(UserWarning, match=r"left out 2 of 8 images, .*a\.png.*b\.png"):
        fitted = detector().fit(good, skip_unreadable=True)
    assert fitted.num_images == COUNT
    assert torch.equal(scores(fitted, new), expected)


def test_test_images_that_cannot_be_read(category_folder):
    category = Category(category_folder)
    fitted = detector().fit(category_folder)
    whole = evaluate_category(fitted, category)
    seen = []
    for name in ("good/a.png", "spot/0a.png", "spot/z.png"):
        (category_folder / "test" / name).write_text("hello")
    listed = r"3 of 9 images cannot be read .*good/a\.png.*spot/0a\.png.*spot/z\.png"
    with pytest.raises(ValueError, match=listed):
        evaluate_category(fitted, category)
    with pytest.warns(UserWarning, match="left out 3 of 9 images"):
        result = evaluate_category(
            fitted, category, lambda *one: seen.append(one), skip_unreadable=True
        )
    assert result == whole
    assert all(image.path == one.source for image, one in seen)
    for number in range(3):
        (category_folder / f"test/spot/{number}.png").write_text("hello")
    with (
        pytest.warns(UserWarning, match="left out 6 of 9 images"),
        pytest.raises(ValueError, match="needs good and anomalous test images"),
    ):
        evaluate_category(fitted, category, skip_unreadable=True)


def test_a_relative_score_is_a_multiple_of_the_threshold():
    images = [texture(np.random.default_rng(number), 96) for number in range(6)]
    fitted = detector().fit(images[:5])
    (result,) = fitted.score_stream(images[5:])
    assert result.relative_score == result.score / fitted.threshold_
    assert result.map_threshold == fitted.threshold_
    (single,) = detector().fit(images[:1]).score_stream(images[5:])
    assert single.relative_score is single.map_threshold is None
    twins = detector().fit([images[0]] * 2)
    assert twins.threshold_ == 0
    (result,) = twins.score_stream(images[5:])
    assert result.anomalous and result.relative_score is None


def test_arrays_of_opencv_score_as_their_colours(tmp_path):
    rng = np.random.default_rng(0)
    images = [np.ascontiguousarray(texture(rng, 96) // (1, 2, 3)).astype(np.uint8) for _ in "0123"]
    bgr = [np.ascontiguousarray(image[..., ::-1]) for image in images]
    expected = detector(illumination="matched").fit(images[:3])
    fitted = detector(illumination="matched", channel_order="bgr").fit(bgr[:3])
    fitted.save(tmp_path / "model.safetensors")
    expected.save(tmp_path / "expected.safetensors")
    loaded = PatchSVDD.load(tmp_path / "model.safetensors", "cpu", encoder=Plain())
    other = PatchSVDD.load(tmp_path / "expected.safetensors", "cpu", encoder=Plain())
    other.set_params(channel_order="bgr")
    Image.fromarray(images[3]).save(tmp_path / "3.png")
    right = expected.score(images)
    for each in (fitted, loaded, other, fitted.refit(bgr[:3])):
        assert torch.equal(each.light_, expected.light_)
        found = each.score(bgr)
        assert torch.equal(found.anomaly_map, right.anomaly_map)
        assert torch.equal(found.image_scores, right.image_scores)
        assert torch.equal(each.score(np.stack(bgr)).anomaly_map, right.anomaly_map)
        streamed = [result.anomaly_map for result in each.score_stream(bgr)]
        assert torch.equal(torch.stack(streamed), right.anomaly_map)
        for as_it_is in (tmp_path / "3.png", [Image.fromarray(images[3])]):
            assert torch.equal(each.score(as_it_is).anomaly_map[0], right.anomaly_map[3])
    assert torch.equal(fitted.add(bgr[3:]).mean_, expected.add(images[3:]).mean_)
    assert np.array_equal(fitted.predict(bgr), expected.predict(images))


def test_channel_orders_that_cannot_be(tmp_path):
    images = [texture(np.random.default_rng(number), 96) for number in range(3)]
    with pytest.raises(
        ValueError, match=r"channel_order must be one of \('rgb', 'bgr'\), got 'BGR'"
    ):
        detector(channel_order="BGR").fit(images)
    fitted = detector().fit(images).set_params(channel_order="gbr")
    for score in (fitted.score, fitted.score_stream, fitted.add):
        with pytest.raises(ValueError, match=r"channel_order must be one of .* got 'gbr'"):
            score(images)
    fitted.set_params(channel_order="bgr")
    with pytest.raises(ValueError, match="image 0 is gray and has no colours"):
        fitted.predict([images[0][..., 0]])


def test_a_stream_of_one_image_or_a_batch(tmp_path):
    images = np.stack([texture(np.random.default_rng(number), 96) for number in range(3)])
    fitted = detector().fit(images)
    expected = fitted.score(images).image_scores.tolist()

    def streamed(sources):
        return [result.score for result in fitted.score_stream(sources)]

    assert streamed(images) == streamed(torch.from_numpy(images).permute(0, 3, 1, 2)) == expected
    assert streamed(images[0]) == expected[:1]
    with pytest.raises(ValueError, match="its channels seem to be last"):
        fitted.score_stream(torch.from_numpy(images))
    picture = Image.fromarray(images[0])
    picture.save(tmp_path / "0.png")
    assert streamed([picture, tmp_path / "0.png"]) == expected[:1] * 2
    for alone in (picture, tmp_path / "0.png", str(tmp_path)):
        with pytest.raises(TypeError, match=f"got one {type(alone).__name__} alone"):
            fitted.score_stream(alone)
