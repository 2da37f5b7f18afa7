"""Encoding images of any size: in tiles without seams, in bounded memory. Run as a script, it
encodes one image and prints the memory that it took."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import script_environment, texture
from patchsvdd_fast import HierarchicalEncoder, PatchLevel, PatchSVDD
from patchsvdd_fast.detector.evaluation import evaluate_category
from patchsvdd_fast.encoders.levels import DEFAULT_LEVELS
from patchsvdd_fast.files.categories import Category
from patchsvdd_fast.score.encoding import encode_images, use_encoding_limit

LEVELS = {
    "default": DEFAULT_LEVELS,
    "one": (PatchLevel(32, 2),),
    "large alone": (PatchLevel(64, 6),),
    "coarse": (PatchLevel(64, 32), PatchLevel(32, 32)),
    "odd ratio": (PatchLevel(32, 6), PatchLevel(64, 10)),
    "three": (PatchLevel(128, 32), PatchLevel(64, 16), PatchLevel(32, 8)),
    "deep": (PatchLevel(256, 32), PatchLevel(32, 12)),
}
WHOLE = 1 << 40  # bytes: never a tile


def encoder_for(levels, dim=16):
    torch.manual_seed(1)
    largest = max(level.size for level in levels)
    return HierarchicalEncoder(dim, (largest // 32).bit_length(), "kaiming").eval()


def image_and_mean(height, width, count=1):
    generator = torch.Generator().manual_seed(height * width)
    images = torch.randint(0, 256, (count, 3, height, width), generator=generator)
    return images.byte(), 255 * torch.rand(3, height, width, generator=generator)


def encoded(encoder, images, mean, levels, limit):
    with use_encoding_limit(limit):
        return encode_images(encoder, images, mean, levels)


def assert_equal(some, others):
    assert len(some) == len(others)
    assert all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


# --- seams ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEVELS)
def test_tiles_give_the_bits_of_the_whole(name, request):
    """Odd sizes, down to one patch in a tile; seams inside, and tiles that hold no large patch."""
    rng, levels = random.Random(name), LEVELS[name]
    encoder = encoder_for(levels)
    largest = max(level.size for level in levels)
    strides = math.lcm(*(level.stride for level in levels))
    for _ in range(20 if request.config.getoption("--slow") else 1):
        height, width = (largest + rng.randint(0, strides + 30) for _ in range(2))
        images, mean = image_and_mean(height, width)
        whole = encoded(encoder, images, mean, levels, WHOLE)
        for side in {largest, rng.randint(largest, max(height, width))}:
            limit = (side**2 - 1) * HierarchicalEncoder.scratch_bytes
            assert_equal(encoded(encoder, images, mean, levels, limit), whole)


@pytest.mark.parametrize(("height", "width"), [(1024, 1024), (64, 2500), (2501, 67)])
def test_large_and_long_images(height, width):
    encoder = encoder_for(DEFAULT_LEVELS)
    images, mean = image_and_mean(height, width)
    whole = encoded(encoder, images, mean, DEFAULT_LEVELS, WHOLE)
    limit = (height * width // 4) * HierarchicalEncoder.scratch_bytes
    assert_equal(encoded(encoder, images, mean, DEFAULT_LEVELS, limit), whole)


def test_every_patch_is_that_of_its_pixels():
    """Tiles against patches that are cut out and embedded one by one, up to rounding."""
    levels = LEVELS["three"]
    encoder = encoder_for(levels)
    images, mean = image_and_mean(141, 163)
    for level, found in zip(levels, encoded(encoder, images, mean, levels, 1), strict=True):
        patches = ((images - mean) / 255).unfold(2, level.size, level.stride)
        patches = patches.unfold(3, level.size, level.stride).permute(0, 2, 3, 1, 4, 5)
        alone = encoder.embed(patches.flatten(0, 2)).view(found.shape)
        assert torch.allclose(found, alone, atol=1e-5)
        assert found.std() > 0.01


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 96), (80, 80), (129, 131)])
def test_small_images_do_not_depend_on_their_company(height, width):
    """Alone, by twos, and all at once."""
    encoder = encoder_for(DEFAULT_LEVELS)
    images, mean = image_and_mean(height, width, count=5)
    together = encoded(encoder, images, mean, DEFAULT_LEVELS, WHOLE)
    pairs = encoded(
        encoder,
        images,
        mean,
        DEFAULT_LEVELS,
        2 * height * width * HierarchicalEncoder.scratch_bytes,
    )
    assert_equal(pairs, together)
    for number in range(5):
        alone = encode_images(encoder, images[number : number + 1], mean, DEFAULT_LEVELS)
        assert_equal(alone, [values[number : number + 1] for values in together])


def test_no_images_have_no_embeddings():
    images, mean = image_and_mean(64, 70, count=0)
    found = encode_images(encoder_for(DEFAULT_LEVELS), images, mean, DEFAULT_LEVELS)
    assert [tuple(values.shape) for values in found] == [(0, 1, 1, 16), (0, 9, 10, 16)]


@pytest.mark.parametrize("limit", [1, WHOLE])
def test_what_cannot_be_encoded_is_refused(limit):
    encoder = encoder_for(DEFAULT_LEVELS)
    images, mean = image_and_mean(96, 60)
    for levels, message in [
        (DEFAULT_LEVELS, "at least 64x64 pixels"),
        ((PatchLevel(32, 3),), "even stride"),
        ((PatchLevel(33, 2),), "patch size must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            encoded(encoder, images, mean, levels, limit)
    with pytest.raises(ValueError, match="at least 1 byte, got 0"), use_encoding_limit(0):
        pass


# --- detectors ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_channel():
    rng = np.random.default_rng(0)
    detector = PatchSVDD(
        image_size=None, mean="channel", embedding_dim=16, initialization="kaiming", device="cpu"
    )
    images = np.stack([texture(rng, 96) for _ in range(4)])
    return detector.fit(images, encoder=detector.untrained_encoder())


def test_images_of_other_sizes_are_scored_patch_by_patch_alike(by_channel):
    """A patch has the distance it has in any other image; limits change nothing."""
    large = texture(np.random.default_rng(1), 130)[:, :110]
    cut = np.ascontiguousarray(large[16 : 16 + 90, 32 : 32 + 70])
    result, part = by_channel.score([large]), by_channel.score([cut])
    assert result.anomaly_map.shape == (1, 130, 110)
    for level in by_channel.levels_:
        i, j = 16 // level.stride, 32 // level.stride
        inner = part.distances[str(level)][0]
        rows, columns = inner.shape
        assert torch.equal(result.distances[str(level)][0, i : i + rows, j : j + columns], inner)
    with use_encoding_limit(1):
        assert torch.equal(by_channel.score([large]).anomaly_map, result.anomaly_map)
    sizes = [np.zeros((64, 64, 3), np.uint8), large, np.zeros((70, 200, 3), np.uint8)]
    shapes = [tuple(r.anomaly_map.shape) for r in by_channel.score_stream(sizes)]
    assert shapes == [(64, 64), (130, 110), (70, 200)]


def test_a_stream_keeps_the_limit_it_began_with(by_channel, monkeypatch):
    """In its own threads, and when its results are taken later."""
    image = texture(np.random.default_rng(1), 100)
    expected = by_channel.score([image]).anomaly_map[0]
    seen, dense = [], by_channel.encoder_.dense

    def noting(images, levels):
        seen.append(images.shape[2:])
        return dense(images, levels)

    monkeypatch.setattr(by_channel.encoder_, "dense", noting)
    with use_encoding_limit(1):
        stream = by_channel.score_stream([image])
    (result,) = stream
    assert torch.equal(result.anomaly_map, expected)
    assert len(seen) > 1
    assert max(map(max, seen)) == 80  # one patch of 64 pixels, and a stride


def test_a_mean_image_has_one_size(by_channel):
    rng = np.random.default_rng(0)
    detector = PatchSVDD(image_size=None, embedding_dim=16, device="cpu")
    images = np.stack([texture(rng, 96) for _ in range(2)])
    detector.fit(images, encoder=by_channel.encoder_)
    with pytest.raises(ValueError, match=r"must have 96x96 pixels as in .*mean=\"channel\".*100x9"):
        detector.score(np.zeros((1, 90, 100, 3), np.uint8))


def test_categories_of_another_size_are_evaluated(by_channel, tmp_path):
    rng = np.random.default_rng(2)
    for name, red in (("good/0", 0), ("good/1", 0), ("spot/0", 40), ("spot/1", 40)):
        image, mask = texture(rng, 120)[:90], np.zeros((90, 120), np.uint8)
        image[20 : 20 + red, 30 : 30 + red], mask[20 : 20 + red, 30 : 30 + red] = (250, 20, 20), 255
        for folder, picture in (("test", image), ("ground_truth", mask)):
            path = tmp_path / folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    result = evaluate_category(by_channel, Category(tmp_path))
    assert result.percent["K32"]["detection"] == 100
    assert result.percent["K32"]["segmentation"] > 90
    Image.fromarray(texture(rng, 96)).save(tmp_path / "test/good/2.png")
    with pytest.raises(ValueError, match="must have one size to be evaluated, got 120x90, 96x96"):
        evaluate_category(by_channel, Category(tmp_path))


# --- memory ---------------------------------------------------------------------------------------


def encode_and_print(height, width, limit):
    """Encode a large image; prints the peak of memory above what there was, and the result's."""
    encoder = HierarchicalEncoder().eval()
    small = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    encode_images(encoder, small, torch.zeros(3, 64, 64), DEFAULT_LEVELS)  # loads the libraries
    image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    mean = torch.full((3, 1, 1), 120.0).expand(3, height, width)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
    before = memory("VmRSS")
    result = encoded(encoder, image, mean, DEFAULT_LEVELS, limit)
    size = sum(values.nbytes for values in result)
    print(json.dumps({"peak": memory("VmHWM") - before, "result": size}))


def memory(field):
    """A figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


MIB = 2**20


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
@pytest.mark.parametrize(
    ("height", "width", "limit"),
    [
        (1024, 1024, 32 * MIB),
        pytest.param(3000, 4000, 64 * MIB, marks=pytest.mark.slow),
        pytest.param(3000, 4000, 256 * MIB, marks=pytest.mark.slow),
    ],
)
def test_memory_keeps_to_the_limit(height, width, limit):
    """But for some 64 MiB that the libraries take; at once it would be 512 bytes a pixel."""
    done = subprocess.run(
        [sys.executable, __file__, str(height), str(width), str(limit)],
        capture_output=True,
        text=True,
        check=False,
        env=script_environment(),
    )
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    assert taken["peak"] - taken["result"] < limit + 64 * MIB
    assert limit + 64 * MIB < height * width * HierarchicalEncoder.scratch_bytes / 2


if __name__ == "__main__":
    encode_and_print(*map(int, sys.argv[1:]))
