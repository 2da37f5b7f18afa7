"""Categories: data sets with good images to train on and labelled ones to test with."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

from .folders import SUFFIXES, counted, find_images, is_hidden, some_of, walk_images
from .layouts import (
    GOOD,
    LAYOUTS,
    MVTEC_AD,
    LabelledImage,
    LabelledSet,
    Layout,
    labelled,
    matching_layouts,
)
from .masks import marks_anything, masks_beside, without_masks

# Names of folders, in any case: of good images, and what tells of others, not to train on.
_OF_GOOD = (GOOD, "ok", "normal")
_OF_DATA_SETS = ("train", "test", "test_public", "ground_truth", "masks")
_OF_DEFECTS = (
    *("bad", "ko", "ng", "nok", "not_ok", "defect", "defects", "defective", "reject", "rejects"),
    *("anomaly", "anomalies", "anomalous", "abnormal"),
)


@dataclass(frozen=True)
class Category:
    """A folder in one of the layouts that data sets have (`layouts.LAYOUTS`)."""

    root: Path
    """The folder that has all images."""
    given: Layout | None = None
    """Its layout, if that is not to be told from the folder."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.resolve().name

    @property
    def layout(self) -> Layout:
        """Its layout; MVTec AD's if nothing tells it. Raises ValueError if it may be two."""
        if self.given is not None:
            return self.given
        found = matching_layouts(self.root)
        if len(found) > 1:
            names = " and ".join(layout.name for layout in found)
            raise ValueError(f"{self.root} may be {names}: remove the folders of one of them")
        return found[0] if found else MVTEC_AD

    def train_paths(self) -> list[Path]:
        """Good training images. Raises ValueError if there are none."""
        return self.layout.train(self.root)

    def validation_paths(self) -> list[Path]:
        """Good images set apart from those to train on and to test with; mostly there are none."""
        return self.layout.validation(self.root)

    def test_images(self) -> list[LabelledImage]:
        """Test images in the order of their paths. Raises ValueError if there are none."""
        return self.test_set().images

    def test_set(self) -> LabelledSet:
        """The test images, and what is odd about their files. Raises as `test_images`."""
        return self.layout.test(self.root)


def own_category(
    normal: Path, anomalous: Path, masks: Path | None = None, train: Path | None = None
) -> Category:
    """A category of folders of one's own.

    normal: folder of good test images.
    anomalous: folder of anomalous ones; its sub-folders, if any, are kinds of defect, of which none
        may be called good, ok or normal.
    masks: folder of masks by the images' paths within `anomalous`. None: beside the images, as
        x_mask.png, x_GT.png or x_label.png, or none at all.
    train: folder of good images to train on; None if a trained model is to be evaluated.

    Raises ValueError if one of them is no folder, or if images lie in two of them. Its test set
    does if there are not both good and anomalous images.
    """
    folders = {"normal": normal, "anomalous": anomalous, "masks": masks, "train": train}
    given = {name: folder for name, folder in folders.items() if folder is not None}
    for name, folder in given.items():
        if not folder.is_dir():
            raise ValueError(f"the folder of {name} images is not there: {folder}")
    for tested in (normal, anomalous):
        if train is not None and _overlap(tested, train):
            raise ValueError(f"{tested} is tested with, but trained on too: {train}")
    if _overlap(normal, anomalous):
        raise ValueError(
            "normal and anomalous images must lie in two folders, neither of them in the other, "
            f"got {normal} and {anomalous}"
        )

    def train_images(_: Path) -> list[Path]:
        if train is None:
            raise ValueError("no folder to train on was given: --train names one")
        return training_paths(train)

    apart = () if masks is None else (masks,)
    if masks is not None and masks.resolve().is_relative_to(anomalous.resolve()):
        inside = masks.resolve().relative_to(anomalous.resolve())
        apart = (anomalous / inside,) if inside.parts else ()  # (): they lie beside the images

    def test_images(_: Path) -> LabelledSet:
        tests = labelled(normal, anomalous, apart, normal_name="")
        for folder, is_anomalous in ((normal, False), (anomalous, True)):
            if not any(image.is_anomalous == is_anomalous for image in tests.images):
                raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
        for image in tests.images:
            inside = image.path.relative_to(anomalous).parts[:-1] if image.is_anomalous else ()
            if good := [part for part in inside if part.lower() in _OF_GOOD]:
                raise ValueError(
                    f"{image.path} lies in a folder {good[0]}, but was given as anomalous: name "
                    "the folder of anomalous images alone"
                )
        return tests

    layout = Layout(
        "folders of one's own",
        {name: str(folder) for name, folder in given.items()},
        lambda _: False,
        train_images,
        lambda _: [],
        test_images,
    )
    return Category(anomalous, layout)


def _overlap(one: Path, other: Path) -> bool:
    """Whether two folders are the same, or one lies in the other."""
    first, second = one.resolve(), other.resolve()
    return first.is_relative_to(second) or second.is_relative_to(first)


def is_category(folder: Path) -> bool:
    """Whether the folder has one of the layouts, or may have two."""
    return bool(matching_layouts(folder))


def find_categories(folder: Path) -> list[Category]:
    """The folder itself if it is a category, else the categories directly inside it.

    Raises ValueError if there are none. Warns of folders beside categories that are none, but have
    folders such as train or bad.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if is_category(folder):
        return [Category(folder)]
    inside = [path for path in sorted(folder.iterdir()) if not is_hidden(path.name)]
    categories = [Category(path) for path in inside if is_category(path)]
    if not categories:
        names = ", ".join(layout.name for layout in LAYOUTS)
        raise ValueError(
            f"{folder} holds no category in a layout that is known ({names}; "
            "patchsvdd info --layouts); two folders of any name: evaluate --normal, --anomalous"
        )
    others = [path for path in inside if path.is_dir() and not is_category(path)]
    unknown = [path.name for path in others if any(map(_tells, _folders_in(path)))]
    if unknown:
        warnings.warn(
            f"left out, as they are in no layout that is known: {', '.join(unknown)}", stacklevel=2
        )
    return categories


def folders_of_categories(folder: Path) -> dict[str, Path]:
    """The folders of good images to train together on, by name: categories, or plain folders.

    Raises ValueError unless there are at least two, and if a folder's name tells of other images.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    inside = [path for path in sorted(folder.iterdir()) if not is_hidden(path.name)]
    if is_category(folder):
        inside = []
    found = {path.name: path for path in inside if path.is_dir() and any(walk_images(path))}
    if telling := [name for name in found if _tells(name)]:
        raise ValueError(
            f"{folder} holds a folder {telling[0]}, which would be trained on as a category of "
            "good images: name a folder that holds good images alone, or categories"
        )
    _require_none_beside_good(folder, map(PurePath, found))
    if len(found) < 2:
        raise ValueError(
            f"{folder} must hold at least two categories, or folders of good images, to train "
            f"together on, found {', '.join(found) or 'none'}"
        )
    return found


def training_paths(folder: Path) -> list[Path]:
    """The good images of a category, or all images below any other folder.

    Masks beside images (x_GT, x_mask or x_label, and an x) are not taken, nor images in which they
    mark something; a warning says so, and names what else was skipped. Raises ValueError if there
    are no images, and for a folder in no known layout that holds defects, too: with a folder such
    as train, test, ground_truth or bad, or one called good, ok or normal beside others.
    """
    if is_category(folder):
        return Category(folder).train_paths()
    if folder.is_dir():
        inside: set[PurePath] = set()
        for path in walk_images(folder):
            parts = path.relative_to(folder).parts[:-1]
            if telling := [part for part in parts if _tells(part)]:
                raise ValueError(
                    f"{folder} holds a folder {telling[0]} ({path.relative_to(folder)}), but is in "
                    "no layout that is known (patchsvdd info --layouts): name its folder of good "
                    "images, or a single category"
                )
            inside |= {PurePath(*parts[: depth + 1]) for depth in range(len(parts))}
        _require_none_beside_good(folder, inside)
    paths = find_images(folder)
    marked = {image for mask, image in masks_beside(paths).items() if _marks(mask)}
    images = without_masks(folder, paths)
    if marked:
        warnings.warn(
            "left out, as the masks beside them mark something: "
            f"{some_of(sorted(marked), len(images))}",
            stacklevel=2,
        )
    if len(marked) == len(images):
        raise ValueError(f"{folder} holds no good images: the masks of all mark something")
    return [path for path in images if path not in marked]


def scored_paths(folder: Path) -> list[Path]:
    """The images of a folder to score, good or not: of a category those of `training_paths`.

    Masks beside images are left out. Raises ValueError if there are no images.
    """
    if is_category(folder):
        return Category(folder).train_paths()
    return without_masks(folder, find_images(folder))


def _marks(mask: Path) -> bool:
    """Whether it is a mask that marks something; what cannot be read as one may be a picture."""
    try:
        return marks_anything([mask])
    except (ValueError, OSError):
        return False


def _require_none_beside_good(root: Path, folders: Iterable[PurePath]) -> None:
    """Raise ValueError if a folder of good images lies beside one of another name.

    folders: those that hold images, by their paths within `root`.
    """
    by_parent: dict[PurePath, list[str]] = {}
    for folder in folders:
        by_parent.setdefault(folder.parent, []).append(folder.name)
    for parent, names in by_parent.items():
        good = [name for name in names if name.lower() in _OF_GOOD]
        others = sorted({*names} - {*good})
        if good and others:
            raise ValueError(
                f"{root / parent} holds a folder {others[0]} beside {good[0]}, so not all images "
                "in it may be good: name the folder of good images"
            )


def _tells(name: str) -> bool:
    """Whether a folder of this name tells of images that are not good ones to train on."""
    return name.lower() in (*_OF_DATA_SETS, *_OF_DEFECTS)


def _folders_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_dir()]


def in_words(category: Category, tests: LabelledSet | None = None) -> str:
    """A line that says what was recognised.

    tests: what `Category.test_set` gave; None: it says what there is to train on.
    """
    begin = f"{category.name}: layout {category.layout.name}"
    aside = len(category.validation_paths())
    if tests is None:
        rest = f", {aside:,} of validation kept aside" if aside else ""
        return f"{begin}, {counted(len(category.train_paths()), 'image')} to train on{rest}"
    bad = [image for image in tests.images if image.is_anomalous]
    masked = sum(bool(image.masks) for image in bad)
    return (
        f"{begin}, tested with {len(tests.images) - len(bad):,} good and {len(bad):,} anomalous "
        f"images, {masked:,} of them with masks"
        + (f", and {aside:,} good ones of validation for false alarms" if aside else "")
    )
