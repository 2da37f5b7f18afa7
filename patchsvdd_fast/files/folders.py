"""Finding images: below a folder, and in data sets in MVTec layout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

SUFFIXES = {
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    ".webp": "WebP",
    ".gif": "GIF",
    ".avif": "AVIF",
    **dict.fromkeys((".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c"), "JPEG 2000"),
    **dict.fromkeys((".pgm", ".ppm", ".pbm", ".pnm", ".pfm"), "PNM"),
}
"""Of the files that count as images, in any case, each with the name of its format."""


@dataclass(frozen=True)
class LabelledImage:
    """A test image of a `Category`."""

    path: Path
    """Of its file."""
    defect: str
    """Kind of defect, the name of its folder below test; "good" for a normal image."""
    mask: Path | None
    """Image whose pixels above 128 are anomalous; None if there is none."""

    @property
    def is_anomalous(self) -> bool:
        """Whether the image lies in any folder but "good"."""
        return self.defect != "good"


@dataclass(frozen=True)
class Category:
    """A data set in MVTec layout: train/good, test/good, test/<defect>, ground_truth/<defect>."""

    root: Path
    """The folder that has all of them."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.resolve().name

    def train_paths(self) -> list[Path]:
        """Good training images. Raises ValueError if there are none."""
        return find_images(self.root / "train" / "good")

    def test_images(self) -> list[LabelledImage]:
        """Test images in the order of their paths. Raises ValueError if there are none."""
        paths = find_images(self.root / "test")
        return [
            LabelledImage(path, path.relative_to(self.root / "test").parts[0], self._mask(path))
            for path in paths
        ]

    def _mask(self, path: Path) -> Path | None:
        inside = path.relative_to(self.root / "test").with_suffix("")
        for ending in ("_mask.png", ".png", "_mask.bmp", ".bmp", "_mask.tif", ".tif"):
            mask = self.root / "ground_truth" / f"{inside}{ending}"
            if mask.is_file():
                return mask
        return None


def is_category(folder: Path) -> bool:
    """Whether the folder has MVTec's train/good."""
    return (folder / "train" / "good").is_dir()


def find_categories(folder: Path) -> list[Category]:
    """The folder itself if it is a category, else the categories directly inside it."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    candidates = [folder] if is_category(folder) else sorted(folder.iterdir())
    categories = [Category(path) for path in candidates if is_category(path)]
    if not categories:
        raise ValueError(f"{folder} holds no category in MVTec layout (train/good inside)")
    return categories


def find_images(folder: Path) -> list[Path]:
    """All images below a folder, in the order of their paths.

    Raises ValueError if the folder is missing or holds no image.
    """
    paths = list(walk_images(folder))
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    return paths


def walk_images(folder: Path) -> Iterator[Path]:
    """The images below a folder in the order of their paths, one folder in memory at a time.

    Links to folders are not followed. A folder that may not be opened, or a link that leads
    nowhere, is yielded as if it were an image, so that reading it reports the error. Raises
    ValueError if `folder` is not a folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    yield from _walk(folder)


def _walk(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            found = sorted(
                (entry.name, entry.is_dir(follow_symlinks=False))
                for entry in entries
                if entry.is_dir(follow_symlinks=False) or _is_image(entry)
            )
    except OSError:
        yield folder
        return
    for name, is_folder in found:
        if is_folder:
            yield from _walk(folder / name)
        else:
            yield folder / name


def _is_image(entry: os.DirEntry[str]) -> bool:
    if PurePath(entry.name).suffix.lower() not in SUFFIXES:
        return False
    try:
        return entry.is_file() or not Path(entry.path).exists()
    except OSError:  # a link to itself
        return True


def training_paths(folder: Path) -> list[Path]:
    """The good images of a category, or all images below any other folder."""
    return Category(folder).train_paths() if is_category(folder) else find_images(folder)
