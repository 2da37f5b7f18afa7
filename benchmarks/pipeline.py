"""End to end on a CPU: from image files to scores, by the library and in the usual way.

    python benchmarks/pipeline.py --data DIR --output benchmarks/results

The usual way is what the paper's implementation does, written afresh. An image is standardised; its
patches are cut out one by one, batched by a DataLoader and encoded each by itself. The nearest
normal patch is found by scikit-learn's KD-tree for K=64 and by NGT's graph (approximate) for K=32.
A pixel's value is the mean distance of the patches that cover it, and the levels' maps are
multiplied. The usual way has the same encoder and threads as ours and takes turns with it in the
same process. Its indexes hold the embeddings of our banks; how far its encoding differs from ours
is measured as well.

Ours is `PatchSVDD.score_stream` over files, as a user would call it. The time to open a model and
the memory it needs are measured in separate processes (Linux only). Files have been read before, so
no time is spent on the disk.

DIR is as for search.py; without it, built-in images and an untrained encoder are used. Writes
pipeline.json and pipeline.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from search import ngt_graph, sklearn_kd_tree
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common import Figure, Prepare, Search, commit, write_results
from patchsvdd_fast import HierarchicalEncoder, NormalBank, PatchLevel, PatchSVDD
from patchsvdd_fast.detector.encoder_file import load_encoder
from patchsvdd_fast.encoders.patch_svdd import SMALL_PATCH
from patchsvdd_fast.files.categories import Category
from patchsvdd_fast.files.folders import find_images
from patchsvdd_fast.images.prepare import read_image
from patchsvdd_fast.images.sample_cloth import write_sample_category
from patchsvdd_fast.ops.backends import describe
from patchsvdd_fast.score.calibration import calibrate

SHAPE = (256, 256)
BATCH = 2_048  # patches encoded together in the usual way
SAME = 1e-3  # relative difference up to which two distances count as the same
STAGES = ("read", "encode", "search", "map")
SEARCHES: dict[int, Prepare] = {64: sklearn_kd_tree, 32: ngt_graph}
"""By patch size, the search that the usual way uses."""

IN_A_FRESH_PROCESS = """
import json, sys, time
from pathlib import Path
from patchsvdd_fast import PatchSVDD

def kibibytes(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

model, *paths = json.load(sys.stdin)
before = kibibytes("VmRSS")
started = time.perf_counter()
detector = PatchSVDD.load(model, device="cpu")
loaded = time.perf_counter() - started
scored = sum(1 for _ in detector.score_stream(paths))
print(json.dumps({
    "load_seconds": loaded,
    "images": scored,
    "bytes_before": 1024 * before,
    "peak_bytes": 1024 * kibibytes("VmHWM"),
}))
"""


@contextlib.contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Add the seconds that the block takes to `seconds[what]`."""
    started = time.perf_counter()
    yield
    seconds[what] += time.perf_counter() - started


# --- the usual way --------------------------------------------------------------------------------


class CutPatches(Dataset[np.ndarray]):
    """The patches of an image [3, H, W] float32, each cut out when it is asked for."""

    def __init__(self, image: np.ndarray, level: PatchLevel) -> None:
        self.image, self.level = image, level
        self.grid = level.grid_shape(*image.shape[1:])

    def __len__(self) -> int:
        return self.grid[0] * self.grid[1]

    def __getitem__(self, index: int) -> np.ndarray:
        size, stride = self.level.size, self.level.stride
        top, left = (stride * place for place in divmod(index, self.grid[1]))
        return self.image[:, top : top + size, left : left + size].copy()


def embed(encoder: HierarchicalEncoder, patches: Tensor) -> Tensor:
    """Embeddings [B, D] of patches [B, 3, K, K]; larger patches quadrant by quadrant."""
    size = patches.shape[-1]
    if size == SMALL_PATCH:
        for layer in encoder.small:  # layer by layer, without what `forward` does for speed
            patches = layer(patches)
        return patches.flatten(1)
    half = size // 2
    quadrants = [
        embed(encoder, patches[:, :, top : top + half, left : left + half])
        for top in (0, half)
        for left in (0, half)
    ]
    together = torch.stack(quadrants, dim=-1).unflatten(-1, (2, 2))  # [B, D, 2, 2]
    return encoder.head(size)(together).flatten(1)


@torch.no_grad()
def encode_each_patch(encoder: HierarchicalEncoder, image: np.ndarray, level: PatchLevel) -> Tensor:
    """Embeddings [I, J, D] of all patches of an image [3, H, W] float32."""
    patches = CutPatches(image, level)
    batches = [embed(encoder, batch) for batch in DataLoader(patches, BATCH)]
    return torch.cat(batches).unflatten(0, patches.grid)


def spread(distances: np.ndarray, level: PatchLevel, shape: tuple[int, int]) -> np.ndarray:
    """The anomaly map [H, W] float64 of distances [I, J]: per pixel, the mean of its patches."""
    total, covering = np.zeros(shape), np.zeros(shape)
    for (i, j), distance in np.ndenumerate(distances):
        top, left = i * level.stride, j * level.stride
        window = slice(top, top + level.size), slice(left, left + level.size)
        total[window] += distance
        covering[window] += 1
    return total / np.maximum(covering, 1)


@dataclass(frozen=True)
class UsualResult:
    """What the usual way finds in an image, and the seconds of each stage of STAGES."""

    distances: dict[str, np.ndarray]
    maps: dict[str, np.ndarray]
    seconds: dict[str, float]


class UsualWay:
    """The pipeline of the paper's implementation.

    mean: [3, H, W] float32. banks: embeddings [M, D] by level. searches: by patch size.
    """

    def __init__(
        self,
        encoder: HierarchicalEncoder,
        mean: Tensor,
        banks: Mapping[PatchLevel, Tensor],
        searches: Mapping[int, Prepare],
    ) -> None:
        self.encoder, self.mean = encoder, mean.numpy()
        self.searches: dict[PatchLevel, Search] = {}
        self.build_seconds = dict.fromkeys(map(str, banks), 0.0)
        for level, bank in banks.items():
            with timed(self.build_seconds, str(level)):
                self.searches[level] = searches[level.size](bank)

    def standardised(self, path: Path) -> np.ndarray:
        """An image file as [3, H, W] float32, `(pixel - mean) / 255`."""
        pixels = np.asarray(read_image(path).resize(SHAPE[::-1]), dtype=np.float32)
        return (pixels.transpose(2, 0, 1) - self.mean) / np.float32(255)

    def score(self, path: Path) -> UsualResult:
        """Score an image file."""
        seconds = dict.fromkeys(STAGES, 0.0)
        distances, maps = {}, {}
        with timed(seconds, "read"):
            image = self.standardised(path)
        for level, search in self.searches.items():
            name = str(level)
            with timed(seconds, "encode"):
                embeddings = encode_each_patch(self.encoder, image, level)
            with timed(seconds, "search"):
                found, _ = search(embeddings.flatten(0, 1))
            distances[name] = found.view(embeddings.shape[:2]).numpy()
            with timed(seconds, "map"):
                maps[name] = spread(distances[name], level, SHAPE)
        with timed(seconds, "map"):
            maps["mult"] = np.prod(list(maps.values()), axis=0)
        return UsualResult(distances, maps, seconds)


# --- measuring ------------------------------------------------------------------------------------


def agreement(
    detector: PatchSVDD, paths: Sequence[Path], usual: Sequence[UsualResult]
) -> dict[str, dict[str, float]]:
    """By level and for "mult", how the usual way's image scores of some files compare with ours.

    Returns `worst`, the largest relative difference, and `rank_correlation`, Spearman's; for single
    levels also `same_distances`, the share of patches whose distances differ by at most SAME.
    """
    ours = detector.score(list(paths))
    figures = {}
    for combination in (*ours.level_maps, "mult"):
        mine = ours.map(combination).amax(dim=(1, 2)).double().numpy()
        theirs = np.array([result.maps[combination].max() for result in usual])
        figures[combination] = {
            "worst": float(np.max(np.abs(theirs / mine - 1))),
            "rank_correlation": float(spearmanr(mine, theirs).statistic),
        }
        if combination in ours.distances:
            found = np.stack([result.distances[combination] for result in usual])
            same = np.isclose(found, ours.distances[combination].numpy(), rtol=SAME, atol=0)
            figures[combination]["same_distances"] = float(same.mean())
    return figures


def encoding_difference(usual: UsualWay, detector: PatchSVDD, path: Path) -> float:
    """Largest difference of a coordinate between embeddings of the usual way and ours."""
    image = usual.standardised(path)
    ours = detector.encode(detector.load_images([path]).pixels)
    return max(
        float((encode_each_patch(usual.encoder, image, level) - encoded[0]).abs().max())
        for level, encoded in zip(detector.levels_, ours, strict=True)
    )


def in_a_fresh_process(model: Path, paths: Sequence[Path]) -> dict[str, float]:
    """Load a model and stream images in a process of its own: load time and memory."""
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS],
        input=json.dumps([str(model), *map(str, paths)]),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the process that streams failed:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def time_in_turn(
    detector: PatchSVDD,
    usual: UsualWay | None,
    paths: Sequence[Path],
    usual_paths: Sequence[Path],
    repeats: int,
) -> tuple[list[float], list[UsualResult]]:
    """Seconds per image of each stream over `paths`; the usual way's results on `usual_paths`.

    The usual way's images are spread over the repeats, so that a slow spell affects both.
    """
    streams = []
    results: dict[Path, UsualResult] = {}
    for repeat in range(repeats):
        spent = {"stream": 0.0}
        with timed(spent, "stream"):
            scored = sum(1 for _ in detector.score_stream(paths))
        streams.append(spent["stream"] / scored)
        if usual is not None:
            results |= {path: usual.score(path) for path in usual_paths[repeat::repeats]}
    return streams, [results[path] for path in usual_paths if path in results]


def measure(
    train: Sequence[Path],
    tests: Sequence[Path],
    encoder: HierarchicalEncoder,
    searches: Mapping[int, Prepare],
    usual_images: int,
    repeats: int,
) -> dict[str, Any]:
    """All measurements: the bank, ours, the usual way (or why it is missing), their agreement."""
    detector = PatchSVDD(image_size=SHAPE, mean="paper", device="cpu")
    spent = dict.fromkeys(("fit", "calibrate"), 0.0)
    with timed(spent, "fit"):
        detector.fit(list(train), encoder=encoder)
    with timed(spent, "calibrate"):
        calibrate(detector.banks_, detector.image_shape(), detector.combination)
    embeddings = {level: bank.embeddings for level, bank in detector.banks_.items()}
    build_seconds = dict.fromkeys(map(str, embeddings), 0.0)
    for level, values in embeddings.items():
        with timed(build_seconds, str(level)):
            NormalBank(values)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.safetensors"
        detector.save(model)
        fresh = [in_a_fresh_process(model, tests) for _ in range(repeats)]
        file_bytes = model.stat().st_size

    usual_paths = tests[:: max(1, len(tests) // usual_images)][:usual_images]
    usual, reason, difference = None, None, None
    try:
        usual = UsualWay(encoder, detector.mean_, embeddings, searches)
    except ImportError as error:
        print(f"left out: the usual way ({error})", file=sys.stderr)
        reason = f"{type(error).__name__}: {error}"
    else:
        difference = encoding_difference(usual, detector, usual_paths[0])
        usual.score(usual_paths[0])
    streams, results = time_in_turn(detector, usual, tests, usual_paths, repeats)

    result: dict[str, Any] = {
        "bank": {
            "images": len(train),
            "rows": {str(level): len(values) for level, values in embeddings.items()},
            "bytes": sum(values.nbytes for values in embeddings.values()),
        },
        "ours": {
            "images": len(tests),
            "seconds_per_image": statistics.median(streams),
            "all_seconds": streams,
            "build_seconds": build_seconds,
            "calibrate_seconds": spent["calibrate"],
            "fit_seconds": spent["fit"],
            "file_bytes": file_bytes,
            "load_seconds": statistics.median(process["load_seconds"] for process in fresh),
            "peak_bytes": max(process["peak_bytes"] for process in fresh),
            "fresh_processes": fresh,
        },
        "usual": {"reason": reason},
        "agreement": None,
    }
    if usual is not None:
        totals = [sum(one.seconds.values()) for one in results]
        result["usual"] = {
            "images": len(results),
            "seconds_per_image": statistics.median(totals),
            "all_seconds": totals,
            "stages": {
                stage: statistics.median(one.seconds[stage] for one in results) for stage in STAGES
            },
            "build_seconds": usual.build_seconds,
            "encoding_difference": difference,
        }
        result["agreement"] = agreement(detector, usual_paths, results)
    return result


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """The figures to reach on two cores with a bank of 300 images of 256x256."""
    ours, usual, bank = result["ours"], result["usual"], result["bank"]
    ratio = (
        usual["seconds_per_image"] / ours["seconds_per_image"]
        if "seconds_per_image" in usual
        else None
    )
    return [
        Figure("stream", "ms an image", 100, 1e3 * ours["seconds_per_image"], at_most=True),
        Figure("stream", "times as fast as the usual way", 30, ratio),
        Figure(
            "memory",
            "GiB at the most beyond the banks' embeddings",
            1,
            (ours["peak_bytes"] - bank["bytes"]) / 2**30,
            at_most=True,
        ),
        Figure("calibration", "s for all images", 120, ours["calibrate_seconds"], at_most=True),
        Figure("loading", "s", 1, ours["load_seconds"], at_most=True),
    ]


# --- showing --------------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    bank, ours, usual = result["bank"], result["ours"], result["usual"]
    rows = " and ".join(f"{count:,} ({name})" for name, count in bank["rows"].items())
    lines = [
        f"{result['workload']}; banks of {bank['images']} images, {rows} embeddings; "
        f"{result['machine']['threads']} threads, commit {result['commit']}",
        "",
        "| figure to reach | measured | reached |",
        "|---|---|---|",
    ]
    for figure in result["figures"]:
        measured, reached = figure["measured"], figure["reached"]
        lines.append(
            f"| {figure['workload']}: {'≤' if figure['at_most'] else '≥'} {figure['target']:g} "
            f"{figure['what']} | {'' if measured is None else f'{measured:.3g}'} "
            f"| {'' if reached is None else 'yes' if reached else 'no'} |"
        )
    lines += ["", "| | ours | the usual way |", "|---|---|---|"]
    missing = "reason" in usual
    cells = [("an image, ms", _times(ours), "" if missing else _times(usual))]
    for stage in STAGES:
        theirs = "" if missing else f"{1e3 * usual['stages'][stage]:.1f}"
        cells.append((f"of which {stage}, ms", "overlapped", theirs))
    for name, seconds in ours["build_seconds"].items():
        theirs = "" if missing else f"{usual['build_seconds'][name]:.1f}"
        cells.append((f"index of {name} built, s", f"{seconds:.1f}", theirs))
    whole = "" if missing else f"{bank['images'] * usual['stages']['encode']:.0f} (computed)"
    cells += [
        ("training images encoded, s", "", whole),
        ("fit with a given encoder (read, encode, build, calibrate), s", _s(ours, "fit"), ""),
        ("of which calibrate, s", _s(ours, "calibrate"), ""),
        ("model loaded, s", f"{ours['load_seconds']:.3f}", ""),
        ("memory at the most, MiB", f"{ours['peak_bytes'] / 2**20:.0f}", ""),
        ("of which before loading, MiB", f"{_before(ours) / 2**20:.0f}", ""),
        ("embeddings of the banks, MiB", f"{bank['bytes'] / 2**20:.0f}", ""),
        ("model file, MiB", f"{ours['file_bytes'] / 2**20:.0f}", ""),
    ]
    lines += [f"| {' | '.join(cell)} |" for cell in cells]
    if missing:
        return "\n".join([*lines, "", f"The usual way is missing: {usual['reason']}"]) + "\n"
    lines += [
        "",
        f"Image scores of the usual way's {usual['images']} images; encoded patch by patch, "
        f"coordinates of an embedding differ by at most {usual['encoding_difference']:.0e}:",
        "",
        f"| map | worst difference to ours | rank correlation | distances within {SAME:.1%} |",
        "|---|---|---|---|",
    ]
    for name, figure in result["agreement"].items():
        same = f"{figure['same_distances']:.1%}" if "same_distances" in figure else ""
        lines.append(
            f"| {name} | {figure['worst']:.1e} | {figure['rank_correlation']:.3f} | {same} |"
        )
    return "\n".join(lines) + "\n"


def _times(way: Mapping[str, Any]) -> str:
    """Milliseconds per image: the median, the range, and the number of images."""
    low, high = (1e3 * end(way["all_seconds"]) for end in (min, max))
    return f"{1e3 * way['seconds_per_image']:.1f} ({low:.1f} .. {high:.1f}, {way['images']} images)"


def _s(ours: Mapping[str, Any], what: str) -> str:
    return f"{ours[f'{what}_seconds']:.1f}"


def _before(ours: Mapping[str, Any]) -> float:
    return max(process["bytes_before"] for process in ours["fresh_processes"])


def main() -> None:
    """Measure, print a table, and write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named = os.environ.get("PATCHSVDD_TEST_DATA")
    parser.add_argument("--data", type=Path, default=named and Path(named))
    parser.add_argument("--output", type=Path, help="folder for pipeline.json and .md")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--usual-images", type=int, default=10, help="images given to the usual way"
    )
    parser.add_argument("--quick", action="store_true", help="small inputs, to try the script")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            workload = "built-in cloth, untrained encoder"
            encoder = HierarchicalEncoder(initialization="kaiming").eval()
            category = write_sample_category(Path(folder), train=6 if options.quick else 300)
        else:
            workload = "magnetic tile images, hazelnut encoder"
            checkpoint = "reference/official_checkpoints/hazelnut_enchier.pkl"
            encoder = load_encoder(options.data / checkpoint)
            category = Category(options.data / "data/magnetic_tile")
        measured = measure(
            category.train_paths()[: 6 if options.quick else None],
            find_images(category.root / "test")[:: 10 if options.quick else 1],
            encoder,
            SEARCHES,
            2 if options.quick else options.usual_images,
            1 if options.quick else options.repeats,
        )
    result: dict[str, Any] = {
        "commit": commit(),
        "machine": describe(),
        "quick": options.quick,
        "workload": workload,
        **measured,
    }
    result["figures"] = [asdict(one) | {"reached": one.reached} for one in figures(measured)]
    print(table(result))
    if options.output:
        write_results(options.output, "pipeline", result, table(result))


if __name__ == "__main__":
    main()
