"""Data sets as they come: noise with brighter squares, in every layout, all kinds of masks."""

import csv
import shutil
import struct
import zlib

import numpy as np
from PIL import Image

SIDE = 128


# --- layouts --------------------------------------------------------------------------------------


def noise_images():
    """Noise: "train", "validation", "good" and "bad" images, and the "masks" of the bad ones."""
    rng = np.random.default_rng(0)

    def noise():
        return rng.integers(60, 120, (SIDE, SIDE, 3)).astype(np.uint8)

    made = {name: [noise() for _ in range(3)] for name in ("train", "validation", "good", "bad")}
    made["masks"] = []
    for number, image in enumerate(made["bad"]):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[20 + 10 * number :][:30, 40:80] = 255
        image[mask > 0] += 25
        made["masks"].append(mask)
    return made


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def mvtec_ad(root, images):
    for i, pixels in enumerate(images["train"]):
        write(root / f"train/good/{i:03}.png", pixels)
    for i, pixels in enumerate(images["good"]):
        write(root / f"test/good/{i:03}.png", pixels)
    for i, (pixels, mask) in enumerate(zip(images["bad"], images["masks"], strict=True)):
        write(root / f"test/spot/{i:03}.png", pixels)
        write(root / f"ground_truth/spot/{i:03}_mask.png", mask)


def mvtec_loco_ad(root, images):
    mvtec_ad(root, images)
    shutil.rmtree(root / "ground_truth")
    for i, pixels in enumerate(images["validation"]):
        write(root / f"validation/good/{i:03}.png", pixels)
    for i, mask in enumerate(images["masks"]):  # in two parts
        upper, lower = (mask > 0).astype(np.uint8) * 236, (mask > 0).astype(np.uint8) * 250
        upper[:, 60:], lower[:, :60] = 0, 0
        write(root / f"ground_truth/spot/{i:03}/000.png", upper)
        write(root / f"ground_truth/spot/{i:03}/001.png", lower)


def mvtec_ad_2(root, images, test="test_public"):
    for part, kind in (("train/good", "train"), ("validation/good", "validation")):
        for i, pixels in enumerate(images[kind]):
            write(root / f"{part}/{i:03}_regular.png", pixels)
    for i in range(3):
        write(root / f"{test}/good/{i:03}_regular.png", images["good"][i])
        write(root / f"{test}/bad/{i:03}_regular.png", images["bad"][i])
        write(root / f"{test}/ground_truth/bad/{i:03}_regular_mask.png", images["masks"][i])


def mvtec_ad_2_renamed(root, images):
    mvtec_ad_2(root, images, "test")


def btad(root, images):
    for i in range(3):
        write(root / f"train/ok/{i:04}.bmp", images["train"][i])
        write(root / f"test/ok/{i:04}.bmp", images["good"][i])
        write(root / f"test/ko/{i:04}.bmp", images["bad"][i])
        write(root / f"ground_truth/ko/{i:04}.png", images["masks"][i])


def visa(root, images):
    rows = []
    for split, kind in (("train", "train"), ("test", "good"), ("test", "bad")):
        for i, pixels in enumerate(images[kind]):
            label, folder = ("normal", "Normal") if kind != "bad" else ("anomaly", "Anomaly")
            name = f"{root.name}/Data/Images/{folder}/{kind}{i:03}.png"  # theirs are JPG
            mask = f"{root.name}/Data/Masks/Anomaly/{i:03}.png" if kind == "bad" else ""
            write(root.parent / name, pixels)
            if mask:
                write(root.parent / mask, (images["masks"][i] > 0).astype(np.uint8))
            rows.append((root.name, split, label, name, mask))
    rows.append(("another", "test", "anomaly", "another/x.JPG", "another/x.png"))
    path = root.parent / "split_csv/1cls.csv"
    path.parent.mkdir()
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("object", "split", "label", "image", "mask"), *rows])


def kolektor_sdd2(root, images):
    black = np.zeros((SIDE, SIDE), np.uint8)
    parts = {"train": [*images["train"], images["bad"][0]], "test": images["good"] + images["bad"]}
    masks = {"train": [black] * 3 + images["masks"][:1], "test": [black] * 3 + images["masks"]}
    for part, of_part in parts.items():
        for i, (pixels, mask) in enumerate(zip(of_part, masks[part], strict=True)):
            write(root / f"{part}/{i + 20000}.png", pixels)
            write(root / f"{part}/{i + 20000}_GT.png", mask)


def kolektor_sdd(root, images):
    black = np.zeros((SIDE, SIDE), np.uint8)
    folders = {
        "kos01": zip(images["train"], [black] * 3, strict=True),
        "kos02": zip(images["good"], [black] * 3, strict=True),
        "kos03": zip(images["bad"], images["masks"], strict=True),
    }
    folders["kos01b"] = [(images["bad"][0], images["masks"][0])]
    for name, pairs in folders.items():
        for i, (pixels, mask) in enumerate(pairs):
            write(root / f"{name}/Part{i}.png", pixels)  # theirs are JPG
            write(root / f"{name}/Part{i}_label.bmp", mask)


WRITERS = {
    "MVTec AD": mvtec_ad,
    "MVTec LOCO AD": mvtec_loco_ad,
    "MVTec AD 2": mvtec_ad_2,
    "BTAD": btad,
    "VisA": visa,
    "KolektorSDD2": kolektor_sdd2,
    "KolektorSDD": kolektor_sdd,
}
"""By the layout's name: what writes images as `noise_images` gives them to a folder."""


# --- masks ----------------------------------------------------------------------------------------


def gray(value, dtype=np.uint8):
    """Makes a mask: this value in what is marked, 0 elsewhere."""
    return lambda marked: Image.fromarray(np.where(marked, value, 0).astype(dtype))


def colour(inside, outside, mode="RGB"):
    """As `gray`, of two colours."""

    def make(marked):
        return Image.fromarray(np.where(marked[..., None], inside, outside).astype(np.uint8), mode)

    return make


def voc(*colours):
    """As `gray`, of a palette: its second colour in what is marked, the first elsewhere."""

    def make(marked):
        palette = Image.fromarray(marked.astype(np.uint8), "P")
        palette.putpalette([value for each in colours for value in each])
        return palette

    return make


def two_classes(marked):
    """Classes 1 and 2, one beside the other."""
    classes = marked.astype(np.uint8)
    classes[:, 60:] *= 2
    return Image.fromarray(classes)


def converted(mode):
    """As `gray(255)`, in another of Pillow's modes."""
    return lambda marked: gray(255)(marked).convert(mode)


MASKS = {
    "0 and 1": ("png", gray(1)),
    "class numbers": ("png", two_classes),
    "127": ("png", gray(127)),
    "128": ("png", gray(128)),
    "236": ("png", gray(236)),
    "one bit": ("png", converted("1")),
    "16 bits, 1": ("png", gray(1, np.uint16)),
    "16 bits, 255": ("png", gray(255, np.uint16)),
    "16 bits, 65535": ("png", gray(65535, np.uint16)),
    "16 bits, TIFF": ("tiff", gray(1, np.uint16)),
    "float, 1": ("tiff", gray(1, np.float32)),
    "float, 255": ("tiff", gray(255, np.float32)),
    "VOC": ("png", voc((0, 0, 0), (128, 0, 0))),
    "VOC, dark": ("png", voc((0, 0, 0), (64, 0, 0))),
    "gray palette": ("png", converted("P")),
    "palette with white first": ("png", voc((0, 0, 0), (255, 255, 255))),
    "red on black": ("png", colour((255, 0, 0), (0, 0, 0))),
    "blue on white": ("png", colour((0, 0, 255), (255, 255, 255))),
    "RGB of 0 and 1": ("png", colour((1, 1, 1), (0, 0, 0))),
    "RGBA, colour": ("png", colour((255, 0, 0, 255), (0, 0, 0, 255), "RGBA")),
    "RGBA, alpha": ("png", colour((0, 0, 0, 255), (0, 0, 0, 0), "RGBA")),
    "RGBA, faint alpha": ("png", colour((9, 9, 9, 100), (9, 9, 9, 0), "RGBA")),
    "RGBA, both": ("png", colour((255, 0, 0, 255), (0, 0, 0, 0), "RGBA")),
    "gray and alpha": ("png", colour((0, 255), (0, 0), "LA")),
    "BMP": ("bmp", gray(255)),
}
"""By kind: the suffix of its file, and what makes it from what is marked, bool [H, W]."""


# --- files ----------------------------------------------------------------------------------------


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png_of(samples, *chunks):
    """A PNG file of 16-bit gray or colour, which Pillow does not write."""
    kinds = {1: 0, 2: 4, 3: 2, 4: 6}  # by channels
    kind = kinds[1 if samples.ndim == 2 else samples.shape[2]]
    head = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
