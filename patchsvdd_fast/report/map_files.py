"""Anomaly maps as files, and the names that files made of an image have, which stay inside."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePath

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..files.folders import SUFFIXES
from ..files.whole import written_whole
from ..score.calibration import Calibration

MAP_FORMATS = ("png", "tiff", "npy")

MAP_UNIT = "patchsvdd.map_unit"
"""Name of the text in a PNG map that says what one step of its 16 bits stands for."""

_FULL_SCALE = 16  # times the highest good score: 65,535 in a PNG map
_LONGEST_NAME = 140  # bytes, of a part of a path: there is to be room for what is added to it
_LONGEST_FOLDER = 1_000  # bytes
_ROOT = "root"


def map_unit(calibration: Calibration | None, anomaly_map: npt.NDArray[np.float32]) -> float:
    """What one step of a 16-bit map stands for: 65,535 are 16 times the highest good score.

    So maps of one detector are comparable; higher values are cut off there. Without a calibration
    each map has its own unit, its maximum being 65,535.
    """
    top = float(anomaly_map.max()) if calibration is None else _FULL_SCALE * calibration.highest
    return (top or 1.0) / 65535


def write_map(
    path: Path, anomaly_map: npt.NDArray[np.float32], calibration: Calibration | None
) -> None:
    """Write a map [H, W] as the path's suffix says.

    .tiff and .npy: float32, as it is. .png: 16 bits in units that the file names as text
    (`MAP_UNIT`), see `map_unit`. Raises OSError.
    """
    with written_whole(path) as partial:
        if path.suffix == ".npy":
            with partial.open("wb") as file:
                np.save(file, anomaly_map)
        elif path.suffix == ".tiff":
            Image.fromarray(anomaly_map).save(partial, format="TIFF", compression="tiff_deflate")
        else:
            unit = map_unit(calibration, anomaly_map)
            steps = np.clip(np.round(anomaly_map.astype(np.float64) / unit), 0, 65535)
            text = PngInfo()
            text.add_text(MAP_UNIT, repr(unit))
            Image.fromarray(steps.astype(np.uint16)).save(partial, format="PNG", pnginfo=text)


def inner_path(name: PurePath, suffix: str) -> Path:
    """A relative path for what is made of an image, never outside of where it is put.

    The image's own path with the suffix instead of ".png", or after any other; an absolute one
    begins with "root". Where something had to be left out or changed, or another image's might be
    the same, a hash keeps it apart.
    """
    *folders, file = [_ROOT if part == name.anchor else part for part in name.parts] or [""]
    stem = file.removesuffix(".png")
    kept = [_plain_folder(part) for part in folders if part != ".."]
    plain = _plain(stem)
    if sum(len(os.fsencode(part)) + 1 for part in kept) > _LONGEST_FOLDER:
        kept = []
    is_own = (
        (kept, plain) == (folders, stem)
        and name.anchor in ("", "/")
        and name.parts[:1] != (_ROOT,)
        # So x.png, which becomes x, and x without a suffix are told apart.
        and PurePath(file).suffix.lower() in SUFFIXES
        and (stem == file or PurePath(stem).suffix.lower() not in SUFFIXES)
    )
    if not is_own:
        plain += f"-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return Path(*kept, plain + suffix)


def _plain(part: str) -> str:
    """The part of a path without what file systems or users of theirs stumble over."""
    plain = "".join(c if c.isprintable() and c not in '\\:*?"<>|' else "_" for c in part)
    return plain.encode()[:_LONGEST_NAME].decode(errors="ignore")


def _plain_folder(part: str) -> str:
    """Likewise, and told apart from the files that are written."""
    plain = _plain(part)
    return f"{plain}_" if plain.lower().endswith((*SUFFIXES, ".npy")) else plain
