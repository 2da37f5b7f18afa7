"""How data sets lay out their folders: one list of layouts, and how to tell which one a folder has.

To add a layout, add an entry to `LAYOUTS`.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from .folders import SUFFIXES, Skipped, counted, find_images, is_hidden, some_of, walk_images
from .masks import (
    images_and_masks,
    marks_anything,
    masks_alone,
    masks_beside,
    matched_masks,
    without_masks,
)

GOOD = "good"
"""`LabelledImage.defect` of a normal image, whatever its folder is called."""

_MASKS = "ground_truth"


@dataclass(frozen=True)
class LabelledImage:
    """A test image of a `Category`."""

    path: Path
    """Of its file."""
    defect: str
    """Kind of defect, the name of its folder; "good" for a normal image."""
    masks: tuple[Path, ...] = ()
    """Images of what is anomalous, which are joined; empty if there are none."""

    @property
    def is_anomalous(self) -> bool:
        """Whether the image is of any kind but "good"."""
        return self.defect != GOOD


@dataclass(frozen=True)
class LabelledSet:
    """Test images, and what is odd about their files."""

    images: list[LabelledImage]
    """In the order of their paths."""
    remarks: list[str]
    """Lines for the user: masks that match no image, images without a label."""

    def __repr__(self) -> str:
        return f"LabelledSet({counted(len(self.images), 'image')})"


@dataclass(frozen=True)
class Layout:
    """How a data set lays out a category: how to tell it, and where its images are.

    The functions take the category's folder. `train` and `test` raise ValueError if they find no
    image.
    """

    name: str
    """Of the data set that is known for it."""
    parts: Mapping[str, str]
    """In words: where the "train", "validation" and "test" images and the "masks" are."""
    matches: Callable[[Path], bool]
    """Whether a folder has this layout."""
    train: Callable[[Path], list[Path]]
    """The good images to train on."""
    validation: Callable[[Path], list[Path]]
    """Good images not to train on, to count false alarms with; there may be none."""
    test: Callable[[Path], LabelledSet]
    """The test images with their labels and masks."""


def matching_layouts(folder: Path) -> list[Layout]:
    """The layouts that a folder has: mostly none or one."""
    return [layout for layout in LAYOUTS if layout.matches(folder)]


def labelled(
    normal: Path, anomalous: Path, masks: tuple[Path, ...] = (), normal_name: str = GOOD
) -> LabelledSet:
    """Label the images of two folders, and match the anomalous ones with their masks.

    anomalous: its sub-folders are kinds of defect, but for one of `normal_name`, and those named
        ground_truth or masks, at any depth, which hold masks.
    normal_name: what the folder of good images beside those of defects is called; empty if it lies
        elsewhere. Then images directly in `anomalous` are anomalous, else they have no label.
    masks: folders of masks by the images' paths within `anomalous`: x.png, x_mask.png, x_GT.png and
        x_label.png belong to x, as does all in a folder x. Masks may also lie beside the images.

    Raises ValueError if there are no images at all.
    """
    remarks: list[str] = []
    skipped = {folder: Skipped() for folder in (normal, anomalous, *masks)}
    good = list(images_and_masks(normal, skipped[normal])[0].values()) if normal.is_dir() else []
    beside = masks_beside(good)
    of_good = beside.keys() | masks_alone(good, beside)
    images = [LabelledImage(path, GOOD) for path in good if path not in of_good]

    def note(path: Path, reason: str) -> None:
        if path != normal:  # if that is a link to a folder, it was followed
            skipped[anomalous](path, reason)

    paths, found = images_and_masks(anomalous, note)
    apart = {*masks, *([anomalous / normal_name] if normal_name else [])}
    paths = {inside: path for inside, path in paths.items() if apart.isdisjoint(path.parents)}
    beside = masks_beside(paths.values())
    alone = masks_alone(paths.values(), beside)
    of_bad = beside.keys() | alone
    paths = {inside: path for inside, path in paths.items() if path not in of_bad}
    loose = [name for name in paths if normal_name and len(name.parts) == 1]
    if loose:
        unlabelled = some_of([paths.pop(name) for name in loose])
        remarks.append(f"images in no folder of {anomalous.name}, so without a label: {unlabelled}")
    if not paths and not images:
        raise ValueError(f"{anomalous} holds no images ({', '.join(SUFFIXES)})")
    for folder in masks:
        if folder.is_dir():
            walked = walk_images(folder, skipped[folder])
            found |= {mask.relative_to(folder): mask for mask in walked}
    everything = dict(paths)
    if normal_name:  # they may have masks, too, but need none
        everything |= {PurePath(normal_name, path.relative_to(normal)): path for path in good}
    matched, unmatched = matched_masks(everything, found)
    for mask, image in beside.items():
        matched[image] = (*matched.get(image, ()), mask)
    for name, path in paths.items():
        kind = name.parts[0] if len(name.parts) > 1 else anomalous.name
        kind = "anomalous" if kind in ("", GOOD) else kind
        images.append(LabelledImage(path, kind, matched.get(path, ())))
    if unmatched := [*unmatched, *sorted(alone)]:
        remarks.append(
            f"masks that match no test image: {some_of(unmatched, len(found) + len(of_bad))}"
        )
    without = [image.path for image in images if image.is_anomalous and not image.masks]
    if without and len(without) < len(paths):
        remarks.append(f"anomalous images without a mask: {some_of(without, len(paths))}")
    for folder, of_folder in skipped.items():
        if anomalous not in folder.parents and (line := of_folder.in_words(folder)):
            remarks.append(line)
    return LabelledSet(sorted(images, key=lambda image: image.path), remarks)


# --- layouts of folders ---------------------------------------------------------------------------


def _of_folders(
    name: str,
    matches: Callable[[Path], bool],
    *,
    test: str = "test",
    good: str = GOOD,
    bad: str = "<defect>",
    validation: str = "",
    masks: str = "ground_truth/<defect>/<image>_mask.png",
) -> Layout:
    """A layout of train/good, test/good, test/<defect> and ground_truth/<defect>, or like it."""

    def test_images(root: Path) -> LabelledSet:
        folder = root / test
        if not folder.is_dir():
            folder = root / "test"  # AD 2, renamed
        return labelled(folder / good, folder, (root / _MASKS,), good)

    def validation_images(root: Path) -> list[Path]:
        folder = root / validation
        there = validation and folder.is_dir() and any(walk_images(folder))
        return without_masks(folder, find_images(folder)) if there else []

    def train_images(root: Path) -> list[Path]:
        folder = root / "train" / good
        return without_masks(folder, find_images(folder))

    parts = {
        "train": f"train/{good}",
        "validation": validation,
        "test": f"{test}/{good}, {test}/{bad}",
        "masks": masks,
    }
    return Layout(name, parts, matches, train_images, validation_images, test_images)


def _has(root: Path, *folders: str) -> bool:
    return all((root / folder).is_dir() for folder in folders)


def _is_mvtec_ad(root: Path) -> bool:
    return _is_mvtec(root) and not _has(root, "validation/good")


def _is_mvtec_loco(root: Path) -> bool:
    return _is_mvtec(root) and _has(root, "validation/good")


def _is_mvtec(root: Path) -> bool:
    has_test = _has(root, "test") or not _has(root, "test_public")
    return _has(root, "train/good") and has_test and not _has(root, "test/ground_truth")


def _is_mvtec_ad_2(root: Path) -> bool:
    renamed = _has(root, "test/ground_truth")
    return _has(root, "train/good") and (renamed or _has(root, "test_public"))


def _is_btad(root: Path) -> bool:
    return _has(root, "train/ok")


# --- VisA -----------------------------------------------------------------------------------------

_VISA_SPLIT = "split_csv/1cls.csv"  # at the root of the data set
_VISA_COLUMNS = ("object", "split", "label", "image", "mask")


def _is_visa(root: Path) -> bool:
    return _has(root, "Data/Images/Normal")


def _visa_rows(root: Path, split: str) -> list[dict[str, str]]:
    root = _named(root)
    path = root.parent / _VISA_SPLIT
    if not path.is_file():
        raise ValueError(f"{path} is missing: it says which images of VisA to train and test on")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        reader = csv.DictReader(lines, strict=True)
        columns, rows = reader.fieldnames or (), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a table in UTF-8: {error}") from error
    if not set(_VISA_COLUMNS) <= set(columns):
        raise ValueError(
            f"{path} must have the columns {','.join(_VISA_COLUMNS)}, got {','.join(columns)}"
        )
    rows = [row for row in rows if row["object"] == root.name and row["split"] == split]
    if not rows:
        raise ValueError(f"{path} has no images of {root.name} for split {split}")
    return rows


def _visa_path(root: Path, name: str) -> Path:
    inside = PurePath(name)
    if inside.is_absolute() or ".." in inside.parts or inside.parts[:1] != (_named(root).name,):
        raise ValueError(f"{_VISA_SPLIT} names {name}, which is not in {root}")
    return root.joinpath(*inside.parts[1:])


def _named(root: Path) -> Path:
    """The folder by its own name, where it is "." or ".."."""
    return root.resolve() if root.name in ("", "..") else root


def _visa_train(root: Path) -> list[Path]:
    rows = _visa_rows(root, "train")
    return [_visa_path(root, row["image"]) for row in rows if row["label"] == "normal"]


def _visa_test(root: Path) -> LabelledSet:
    images = []
    for row in _visa_rows(root, "test"):
        masks = (_visa_path(root, row["mask"]),) if row["mask"] else ()
        defect = GOOD if row["label"] == "normal" else row["label"]
        images.append(LabelledImage(_visa_path(root, row["image"]), defect, masks))
    return LabelledSet(sorted(images, key=lambda image: image.path), [])


# --- masks beside images: KolektorSDD2 and KolektorSDD --------------------------------------------


def _is_kolektor_2(root: Path) -> bool:
    return _has_masks_beside(root / "train", "_GT") and _has_masks_beside(root / "test", "_GT")


def _is_kolektor(root: Path) -> bool:
    return any(_has_masks_beside(folder, "_label") for folder in _parts_of_kolektor(root)[:1])


def _has_masks_beside(folder: Path, ending: str) -> bool:
    there = [p for p in folder.iterdir() if not is_hidden(p.name)] if folder.is_dir() else []
    beside = masks_beside(path for path in there if path.suffix.lower() in SUFFIXES)
    return any(mask.stem.endswith(ending) for mask in beside)


def _parts_of_kolektor(root: Path) -> list[Path]:
    there = root.iterdir() if root.is_dir() else ()
    return sorted(p for p in there if p.name[:3].lower() == "kos" and p.is_dir())


def _judged_by_masks(folders: list[Path]) -> LabelledSet:
    """All images of the folders; one whose mask is black is good."""
    images: list[LabelledImage] = []
    without: list[Path] = []
    for folder in folders:
        paths = find_images(folder)
        beside = masks_beside(paths)
        masks = {image: mask for mask, image in beside.items()}
        for path in paths:
            if path in beside:
                continue
            try:
                kind = "defect" if marks_anything([masks[path]]) else GOOD
                images.append(LabelledImage(path, kind, (masks[path],)))
            except (KeyError, ValueError, OSError):
                without.append(path)
    line = f"images left out, as no mask tells whether they are good: {some_of(without)}"
    return LabelledSet(images, [line] if without else [])


def _good_of(folders: list[Path]) -> list[Path]:
    judged = _judged_by_masks(folders)
    for remark in judged.remarks:
        warnings.warn(remark, stacklevel=3)
    good = [image.path for image in judged.images if not image.is_anomalous]
    if not good:
        raise ValueError(f"{folders[0]} holds no images with a black mask, so no good ones")
    return good


def _half(root: Path, second: bool) -> list[Path]:
    parts = _parts_of_kolektor(root)
    middle = (len(parts) + 1) // 2
    return parts[middle:] if second else parts[:middle]


# --- all of them ----------------------------------------------------------------------------------

LAYOUTS: tuple[Layout, ...] = (
    _of_folders("MVTec AD", _is_mvtec_ad),
    _of_folders(
        "MVTec LOCO AD",
        _is_mvtec_loco,
        validation="validation/good",
        masks="ground_truth/<defect>/<image>/000.png, 001.png, ... (joined)",
    ),
    _of_folders(
        "MVTec AD 2",
        _is_mvtec_ad_2,
        test="test_public",
        bad="bad",
        validation="validation/good",
        masks="test_public/ground_truth/bad/<image>_mask.png",
    ),
    _of_folders("BTAD", _is_btad, good="ok", bad="ko", masks="ground_truth/ko/<image>.png"),
    Layout(
        "VisA",
        {
            "train": "Data/Images/Normal, those of ../split_csv/1cls.csv",
            "validation": "",
            "test": "Data/Images/Normal, Data/Images/Anomaly, likewise",
            "masks": "Data/Masks/Anomaly",
        },
        _is_visa,
        _visa_train,
        lambda root: [],
        _visa_test,
    ),
    Layout(
        "KolektorSDD2",
        {
            "train": "train/<image>.png, those whose mask is black",
            "validation": "",
            "test": "test/<image>.png",
            "masks": "<image>_GT.png beside the image; black: good",
        },
        _is_kolektor_2,
        lambda root: _good_of([root / "train"]),
        lambda root: [],
        lambda root: _judged_by_masks([root / "test"]),
    ),
    Layout(
        "KolektorSDD",
        {
            "train": "kos<number>/<image>.jpg of the first half of the folders, black masks",
            "validation": "",
            "test": "the other half, all images",
            "masks": "<image>_label.bmp beside the image; black: good",
        },
        _is_kolektor,
        lambda root: _good_of(_half(root, second=False)),
        lambda root: [],
        lambda root: _judged_by_masks(_half(root, second=True)),
    ),
)
"""Every layout that is understood; a folder must have no more than one of them."""

MVTEC_AD = LAYOUTS[0]
"""What a folder is read as whose layout nothing tells: one with test images alone, say."""
