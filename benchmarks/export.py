"""How near exported detectors come to the library, how large their files are and how fast they run.

    python benchmarks/export.py --data DIR --output benchmarks/results [--checkpoints DIR]

For leather and hazelnut of DIR (MVTec layout): the detector is exported in float32 and float16, and
some test images are scored one by one by the library, onnxruntime and OpenVINO (where installed),
each with all cores. Encoders: EfficientNet-Lite0; Patch SVDD's with the weights that training
starts from, and with the official checkpoints if their folder is given. Without DIR, a built-in
category is used. Seconds are the median over images, in which the three take turns. Writes
export.json and export.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blas
import numpy as np
import numpy.typing as npt

from common import origin, write_results
from patchsvdd_fast import PatchSVDD, load_official_checkpoint
from patchsvdd_fast.detector.onnx import STORAGES, export_detector
from patchsvdd_fast.images.sample_cloth import write_sample_category

CATEGORIES = ("leather", "hazelnut")
IMAGES = 10
CORESETS = (None, 0.1)
Pixels = npt.NDArray[np.uint8]
Outputs = dict[str, npt.NDArray[Any]]
Run = Callable[[Pixels], Outputs]
NAMES = ("score", "anomaly_map", "anomalous")


def in_onnxruntime(path: Path) -> Run:
    """The model's outputs of images [N, 3, H, W] in onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixels: dict(
        zip(NAMES, session.run(list(NAMES), {"images": pixels}), strict=True)
    )


def in_openvino(path: Path) -> Run:
    """The same in OpenVINO, in float32."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", options)

    def run(pixels: Pixels) -> Outputs:
        found = compiled({"images": pixels})
        return {name: found[name].copy() for name in NAMES}

    return run


def in_the_library(detector: PatchSVDD) -> Run:
    """What the detector says, as the models' outputs."""

    def run(pixels: Pixels) -> Outputs:
        result = detector.score(pixels.transpose(0, 2, 3, 1))
        scores = result.image_scores.numpy()
        anomalous = scores > detector.threshold_
        return dict(zip(NAMES, (scores, result.anomaly_map.numpy(), anomalous), strict=True))

    return run


def detectors(root: Path, checkpoints: Path | None) -> Iterator[tuple[str, PatchSVDD]]:
    """Fitted detectors of a category, each with its name."""
    for coreset in CORESETS:
        suffix = "" if coreset is None else f", coreset {coreset}"
        pretrained = PatchSVDD(encoder="efficientnet_lite0", coreset=coreset, device="cpu")
        yield f"EfficientNet-Lite0{suffix}", pretrained.fit(root)
        made = PatchSVDD(coreset=coreset, device="cpu")
        yield f"Patch SVDD, untrained{suffix}", made.fit(root, encoder=made.untrained_encoder())
        file = None if checkpoints is None else checkpoints / f"{root.name}_enchier.pkl"
        if file is not None and file.is_file():
            trained = PatchSVDD(mean="paper", coreset=coreset, device="cpu")
            encoder = load_official_checkpoint(file)
            yield f"Patch SVDD, official weights{suffix}", trained.fit(root, encoder=encoder)


def compared(name: str, detector: PatchSVDD, images: list[Pixels]) -> list[dict[str, Any]]:
    """Per storage and runtime: size, differences and times of one detector."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for storage in STORAGES:
            path = Path(folder) / f"{storage}.onnx"
            export_detector(detector, path, storage=storage)
            runs = {"library": in_the_library(detector), "onnxruntime": in_onnxruntime(path)}
            try:
                runs["OpenVINO"] = in_openvino(path)
            except ImportError as error:
                print(f"no OpenVINO: {error}")
            found: dict[str, list[Outputs]] = {runtime: [] for runtime in runs}
            seconds: dict[str, list[float]] = {runtime: [] for runtime in runs}
            for pixels in [images[0], *images]:  # the first once more, to warm up
                for runtime, run in runs.items():
                    begin = time.perf_counter()
                    found[runtime].append(run(pixels))
                    seconds[runtime].append(time.perf_counter() - begin)
            for runtime in list(runs)[1:]:
                records.append(
                    {
                        "detector": name,
                        "storage": storage,
                        "megabytes": path.stat().st_size / 1e6,
                        "runtime": runtime,
                        **differences(found[runtime][1:], found["library"][1:]),
                        "seconds": statistics.median(seconds[runtime][1:]),
                        "library_seconds": statistics.median(seconds["library"][1:]),
                    }
                )
    return records


def differences(found: list[Outputs], expected: list[Outputs]) -> dict[str, Any]:
    """The largest over images: of scores, relative; of maps, relative to the map's maximum."""
    pairs = list(zip(found, expected, strict=True))
    return {
        "score": max(float(abs(a["score"] / b["score"] - 1).max()) for a, b in pairs),
        "map": max(
            float(abs(a["anomaly_map"] - b["anomaly_map"]).max() / b["anomaly_map"].max())
            for a, b in pairs
        ),
        "other_verdicts": sum(int((a["anomalous"] != b["anomalous"]).sum()) for a, b in pairs),
        "images": len(pairs),
    }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line per category, detector, storage and runtime."""
    lines = [
        "Largest differences from the library; milliseconds an image, and the library's beside it.",
        "",
        "| category | detector | rows | MB | runtime | score | map | other verdicts | ms "
        "| library |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['category']} | {r['detector']} | {r['storage']} | {r['megabytes']:.1f} "
        f"| {r['runtime']} | {r['score']:.0e} | {r['map']:.0e} "
        f"| {r['other_verdicts']} of {r['images']} "
        f"| {1e3 * r['seconds']:.0f} | {1e3 * r['library_seconds']:.0f} |"
        for r in records
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            roots = [write_sample_category(Path(folder) / "cloth").root]
        else:
            roots = [options.data / name for name in CATEGORIES]
        for root in roots:
            paths = sorted((root / "test").rglob("*.png"))
            paths = paths[:: max(1, len(paths) // IMAGES)][:IMAGES]
            for name, detector in detectors(root, options.checkpoints):
                loaded = detector.load_images(paths).pixels.numpy()
                for record in compared(name, detector, [image[None] for image in loaded]):
                    records.append({"category": root.name, **record})
                    print(table(records[-1:]).splitlines()[-1], flush=True)
    write_results(options.output, "export", {**origin(), "records": records}, table(records))


if __name__ == "__main__":
    blas.restart_with_best_kernels()
    main()
