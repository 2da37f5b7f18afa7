"""The demonstration behind `patchsvdd demo`: a built-in sample, and settings that learn quickly."""

from __future__ import annotations

from pathlib import Path

from .detector import PatchSVDD
from .images import Category, read_image
from .report import heat_map_overlay
from .samples import write_sample_category

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


def write_heat_maps(detector: PatchSVDD, category: Category, folder: Path) -> int:
    """Write an overlay for each test image; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    tests = category.test_images()
    result = detector.score([image.path for image in tests])
    for image, anomaly_map in zip(tests, result.anomaly_map.numpy(), strict=True):
        overlay = heat_map_overlay(read_image(image.path), anomaly_map, detector.calibration_)
        overlay.save(folder / f"{image.defect}_{image.path.stem}.png")
    return len(tests)
