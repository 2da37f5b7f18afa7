"""The demonstration behind `patchsvdd demo`: a built-in sample, and settings that learn quickly."""

from __future__ import annotations

from pathlib import Path

from .detector import PatchSVDD
from .images import Category, read_image
from .report import write_heat_map
from .samples import write_sample_category
from .score import ScoreResult

STEPS = 60


def make_category(output: Path, seed: int) -> Category:
    """Write the sample images below `output`."""
    return write_sample_category(output / "sample", seed=seed)


def make_detector(steps: int, seed: int, device: str) -> PatchSVDD:
    """A detector set to learn within minutes: not the paper's protocol, which takes a day."""
    return PatchSVDD(
        steps=steps,
        batch_size=32,
        learning_rate=3e-4,
        svdd_weight=1.0,  # textures like a large one
        initialization="kaiming",
        train_last_layer=True,
        seed=seed,
        device=device,
    )


def untrained(detector: PatchSVDD, category: Category) -> PatchSVDD:
    """The same detector with the encoder that training starts from."""
    twin = PatchSVDD(**detector.get_params())
    return twin.fit(category.root, encoder=twin.untrained_encoder())


def write_heat_maps(
    detector: PatchSVDD, category: Category, result: ScoreResult, folder: Path
) -> int:
    """Write an overlay for each test image, scored in `result`; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    tests = category.test_images()
    for image, anomaly_map in zip(tests, result.anomaly_map.numpy(), strict=True):
        path = folder / f"{image.defect}_{image.path.stem}.png"
        write_heat_map(path, read_image(image.path), anomaly_map, detector.calibration_)
    return len(tests)
