"""What a detector keeps of its training images: in memory, in model files, in damaged ones."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import texture
from patchsvdd_fast import PatchSVDD
from patchsvdd_fast.files import store
from patchsvdd_fast.images.drift import image_statistics
from patchsvdd_fast.images.gallery import Gallery
from patchsvdd_fast.images.prepare import ImageSet

NAMES = ("a.png", 'sub/"b"\n.png', "\udcff ü <script>.png")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(np.stack([texture(rng) for _ in NAMES])).permute(0, 3, 1, 2)
    return ImageSet(NAMES, pixels.contiguous(), ((96, 96), (480, 640), (97, 96)))


@pytest.fixture(scope="module")
def gallery(images):
    return Gallery.of(images)


def assert_equal(one, other):
    assert (one.names, one.pictures) == (other.names, other.pictures)
    assert torch.equal(one.statistics, other.statistics)


@pytest.mark.parametrize("with_pictures", [True, False])
def test_tensors_bring_it_back(images, with_pictures):
    gallery = Gallery.of(images, with_pictures)
    assert_equal(Gallery.from_tensors(gallery.tensors()), gallery)
    assert gallery.names == NAMES
    assert torch.equal(gallery.statistics, image_statistics(images.pixels, images.original_sizes))
    assert (gallery.pictures is not None) == with_pictures


def test_pictures_show_the_images(images, gallery):
    for number in range(3):
        picture = gallery.picture(number, (96, 96))
        assert (picture.mode, picture.size) == ("RGB", (96, 96))
        shown = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
        differences = (shown - images.pixels.float()).abs().mean(dim=(1, 2, 3))
        assert differences[number] < 6
        assert differences.argmin() == number
    assert gallery.picture(0, (50, 80)).size == (80, 50)
    assert Gallery.of(images, False).picture(0, (96, 96)) is None


def test_pictures_of_large_images_are_small():
    pixels = torch.zeros(1, 3, 300, 2400, dtype=torch.uint8)
    gallery = Gallery.of(ImageSet(("wide",), pixels, ((300, 2400),)))
    with Image.open(io.BytesIO(gallery.pictures[0])) as picture:
        assert picture.size == (1024, 128)
    assert gallery.picture(0, (300, 2400)).size == (2400, 300)


def test_parts_and_sums(images, gallery):
    some = gallery.only([2, 0])
    assert some.names == (NAMES[2], NAMES[0])
    assert some.pictures == (gallery.pictures[2], gallery.pictures[0])
    assert torch.equal(some.statistics, gallery.statistics[[2, 0]])
    assert_equal(gallery.only([0]).with_others(gallery.only([1, 2])), gallery)
    plain = Gallery.of(images, with_pictures=False)
    for both in (gallery.with_others(plain), plain.with_others(gallery)):
        assert both.names == NAMES * 2
        assert both.pictures is None


def test_what_does_not_fit_is_refused(gallery):
    with pytest.raises(ValueError, match=r"statistics must have shape \[3, 7\], got \[2, 7\]"):
        Gallery(NAMES, gallery.statistics[:2], None)
    with pytest.raises(ValueError, match="3 training images cannot have 2 pictures"):
        Gallery(NAMES, gallery.statistics, gallery.pictures[:2])


def as_bytes(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"names": None}, "damaged"),
        ({"statistics": None}, "damaged"),
        ({"names": as_bytes("[1")}, "damaged"),
        ({"names": as_bytes('{"a": 1}')}, "list of strings"),
        ({"names": as_bytes('["a", "b", 3]')}, "list of strings"),
        ({"names": as_bytes('["a", "b"]')}, r"shape \[2, 7\]"),
        ({"names": torch.tensor([255, 254], dtype=torch.uint8)}, "damaged"),
        ({"statistics": torch.full((3, 7), torch.nan).double()}, "statistics are damaged"),
        ({"statistics": torch.zeros(3, 7)}, "statistics are damaged"),
        ({"ends": None}, "pictures are damaged"),
        ({"ends": torch.tensor([0, 1])}, "pictures are damaged"),
        ({"ends": torch.tensor(0)}, "pictures are damaged"),
        ({"ends": torch.tensor([0.0, 1.0])}, "pictures are damaged"),
        ({"pictures": torch.zeros(9)}, "pictures are damaged"),
    ],
)
def test_damaged_tensors_are_refused(gallery, changed, message):
    tensors = {k: v for k, v in (gallery.tensors() | changed).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        Gallery.from_tensors(tensors)


def test_order_and_number_of_ends_are_checked(gallery):
    tensors = gallery.tensors()
    ends = tensors["ends"]
    for wrong in (ends.flip(0), ends[[0, 2, 1, 3]], ends - 1):
        with pytest.raises(ValueError, match="pictures are damaged"):
            Gallery.from_tensors(tensors | {"ends": wrong})
    with pytest.raises(ValueError, match="3 training images cannot have 2 pictures"):
        Gallery.from_tensors(tensors | {"ends": ends[[0, 1, 3]]})


def test_pictures_that_are_none_are_refused(gallery):
    """As of a forged file: no picture, half of one, one that unfolds to gigabytes."""
    whole = gallery.pictures[0]
    start = whole.index(b"\xff\xc0")  # the frame header, with height and width
    huge = whole[: start + 5] + struct.pack(">HH", 65_000, 65_000) + whole[start + 9 :]
    large = whole[: start + 5] + struct.pack(">HH", 2000, 96) + whole[start + 9 :]
    for forged in (b"", b"GIF89a", whole[:300], huge, large):
        damaged = Gallery(("x.png",), gallery.statistics[:1], (forged,))
        with pytest.raises(ValueError, match=r"picture of training image x\.png is damaged"):
            damaged.picture(0, (96, 96))


def test_model_files_keep_it(images, tmp_path):
    batch = images.pixels.permute(0, 2, 3, 1).numpy()
    detector = PatchSVDD(image_size=96, embedding_dim=16, device="cpu")
    detector.fit(batch, encoder=detector.untrained_encoder())
    assert detector.gallery_.names == ("image 0", "image 1", "image 2")
    path = tmp_path / "model.safetensors"
    detector.save(path)
    assert_equal(PatchSVDD.load(path).gallery_, detector.gallery_)
    tensors, header = store.load(path)
    fewer = detector.gallery_.only([0, 1]).tensors()
    tensors |= {f"training.{name}": values for name, values in fewer.items()}
    store.save(path, "detector", tensors, header)
    with pytest.raises(ValueError, match="3 training images cannot have 2 names"):
        PatchSVDD.load(path)
