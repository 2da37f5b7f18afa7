"""Write anomaly maps to files; name files made from an image so that they stay in a folder."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePath

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..files.folders import SUFFIXES
from ..files.whole import written_whole
from ..score.calibration import Calibration

MAP_FORMATS = ("png", "tiff", "npy")
"""Suffixes of the files that `write_map` writes, without the dot."""

MAP_UNIT = "patchsvdd.map_unit"
"""Key of the text in a PNG map that says which map value one step of its 16 bits stands for."""

MAP_THRESHOLD = "patchsvdd.map_threshold"
"""Key of the text in a heat map or PNG map that says the map value from which on a pixel is
anomalous."""

_FULL_SCALE = 16  # times the highest good pixel: what 65,535 in a PNG map stands for
_LONGEST_NAME = 140  # bytes of one part of a path, which leaves room for what is added to it
_LONGEST_FOLDER = 1_000  # bytes of all folders of a path
_ROOT = "root"  # takes the place of "/"


def map_unit(calibration: Calibration | None, anomaly_map: npt.NDArray[np.float32]) -> float:
    """Map value of one step of a 16-bit map: 65,535 steps are 16 times the highest good pixel.

    So the maps of one detector can be compared; higher values are cut off. Without a calibration
    each map has a unit of its own, in which its maximum is 65,535.
    """
    top = float(anomaly_map.max()) if calibration is None else _FULL_SCALE * calibration.highest
    return (top or 1.0) / 65535


def write_map(
    path: Path,
    anomaly_map: npt.NDArray[np.float32],
    calibration: Calibration | None,
    threshold: float | None = None,
) -> None:
    """Write a map [H, W] in the format that the path's suffix names.

    .tiff and .npy hold float32 as it is. .png holds 16 bits in steps of `map_unit`, which the file
    states as text under the key `MAP_UNIT`; the threshold, if given, under `MAP_THRESHOLD`. Raises
    OSError.
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
            if threshold is not None:
                text.add_text(MAP_THRESHOLD, repr(threshold))
            Image.fromarray(steps.astype(np.uint16)).save(partial, format="PNG", pnginfo=text)


def png_bytes(pixels: npt.NDArray[np.uint8], text: Mapping[str, str]) -> bytes:
    """An RGB picture [H, W, 3] as a PNG file, in less than half of Pillow's time.

    Pillow tries each of PNG's filters on each row; here all rows are differences from the row above
    (filter 2). text: values by their keys, in Latin-1.
    """
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, 3 * width)
    filtered = np.full((height, 1 + 3 * width), 2, np.uint8)
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    chunks += [(b"tEXt", f"{key}\0{value}".encode("latin-1")) for key, value in text.items()]
    chunks += [(b"IDAT", zlib.compress(filtered.tobytes(), 1)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def inner_path(name: PurePath, suffix: str) -> Path:
    """A relative path for a file made from an image, which never leads out of the folder it is in.

    name: path of the image. suffix: of the file, such as ".png".

    The image's own path with `suffix` in place of ".png", or after any other ending: for ".png",
    a.png stays a.png, and a.jpg becomes a.jpg.png. An absolute path begins with "root". Where a
    part was left out or changed, or another image could get the same path, a hash is added.
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
    """A part of a path, shortened, and with "_" for characters that some file systems refuse."""
    plain = "".join(c if c.isprintable() and c not in '\\:*?"<>|' else "_" for c in part)
    return plain.encode()[:_LONGEST_NAME].decode(errors="ignore")


def _plain_folder(part: str) -> str:
    """As `_plain`; "_" is added to a folder that is named like a file that might be written."""
    plain = _plain(part)
    return f"{plain}_" if plain.lower().endswith((*SUFFIXES, ".npy")) else plain
