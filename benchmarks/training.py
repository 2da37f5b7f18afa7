"""Speed of training: the faithful mode against the usual way, and where a step's time goes.

    python benchmarks/training.py --output benchmarks/results

The usual way, written afresh after the paper's description: each patch is cut out of a float image
in NumPy by one of two DataLoader workers, batched, augmented in the training process, and encoded
patch size by patch size by a plain model under PyTorch's defaults (on a GPU, TF32 convolutions).
Both train on batches of the same size (64 pairs of each kind and patch size) from the same
initialisation. Their steps are timed in turn, and the median is kept. The dense mode's steps are
timed too; they learn from other data, so no ratio is given.

A step's operations are counted, and the speed of a large matrix product is measured between the
rounds. It bounds the speed that direct convolutions can reach, and so every ratio.

Images are the built-in sample. Writes training.json and training.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from common import commit, write_results
from patchsvdd_fast import HierarchicalEncoder
from patchsvdd_fast.images.light import mean_image
from patchsvdd_fast.images.prepare import load_images
from patchsvdd_fast.images.sample_cloth import write_sample_category
from patchsvdd_fast.ops.backends import describe
from patchsvdd_fast.ops.pair_protocol import COLOUR_SHIFT, DIRECTIONS, PIXEL_NOISE
from patchsvdd_fast.training.objectives import PositionClassifier, position_loss, svdd_loss
from patchsvdd_fast.training.settings import CROPS_PER_IMAGE, training_settings
from patchsvdd_fast.training.trainer import Trainer

SIZES = (64, 32)
WORKERS = 2
BATCH = 64
WARM_UP = 2  # steps
MATRIX_SIDE = 2048

Patches = dict[str, Tensor]


class CutPatches(Dataset[Patches]):
    """One pair of each kind and patch size, cut out in NumPy; images: [N, H, W, 3] float32."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return CROPS_PER_IMAGE * len(self.images)

    def __getitem__(self, index: int) -> Patches:
        image = self.images[index % len(self.images)]
        item: Patches = {}
        for size in SIZES:
            limit = np.array(image.shape[:2]) - size
            first = np.random.randint(limit + 1)
            label = np.random.randint(8)
            length = 3 * size // 4 + np.random.randint(size // 4, size=2)
            second = np.clip(first + DIRECTIONS[label].numpy() * length, 0, limit)
            item |= _cut(image, size, f"position{size}", first, second)
            item[f"label{size}"] = torch.tensor(label)
            reach = size // 32
            jitter = np.zeros(2, dtype=int)
            while not jitter.any():
                jitter = np.random.randint(-reach, reach + 1, size=2)
            first = np.random.randint(limit + 1)
            item |= _cut(image, size, f"neighbour{size}", first, np.clip(first + jitter, 0, limit))
        return item


def _cut(image: np.ndarray, size: int, name: str, first: np.ndarray, second: np.ndarray) -> Patches:
    patches = {}
    for which, (top, left) in (("a", first), ("b", second)):
        patch = image[top : top + size, left : left + size].copy()
        patches[f"{name}{which}"] = torch.from_numpy(patch.transpose(2, 0, 1).copy())
    return patches


def _perturbed(patches: Tensor) -> Tensor:
    shift = COLOUR_SHIFT * torch.randn(*patches.shape[:2], 1, 1, device=patches.device)
    return patches + shift + PIXEL_NOISE * torch.randn_like(patches)


class UsualWay:
    """Training in the usual way, with a DataLoader."""

    def __init__(self, images: Tensor, mean: Tensor, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.encoder = HierarchicalEncoder().to(device)
        self.classifiers = nn.ModuleDict({str(size): PositionClassifier() for size in SIZES}).to(
            device
        )
        parameters = [*self.encoder.parameters(), *self.classifiers.parameters()]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=1e-4)
        floats = ((images - mean) / 255).permute(0, 2, 3, 1).contiguous().numpy()
        self.loader = DataLoader(
            CutPatches(floats),
            BATCH,
            shuffle=True,
            num_workers=WORKERS,
            drop_last=True,
            pin_memory=device.type == "cuda",
        )
        self.batches = self._batches()

    def _batches(self) -> Iterator[Patches]:
        while True:
            yield from self.loader

    def __call__(self) -> None:
        """Make a step."""
        batch = {k: v.to(self.device) for k, v in next(self.batches).items()}
        loss = torch.zeros((), device=self.device)
        for size in SIZES:
            first, second = (
                self.encoder(_perturbed(batch[f"position{size}{which}"])) for which in "ab"
            )
            logits = self.classifiers[str(size)](first, second)
            near = [self.encoder(batch[f"neighbour{size}{which}"]) for which in "ab"]
            loss = loss + position_loss(logits, batch[f"label{size}"]) + 1e-3 * svdd_loss(*near)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        float(loss)  # as if it were printed: waits for a GPU


class Ours:
    """Training in a mode of the library."""

    def __init__(self, mode: str, images: Tensor, mean: Tensor, device: torch.device) -> None:
        settings = training_settings(mode, steps=1_000_000)
        torch.manual_seed(0)
        encoder = HierarchicalEncoder(initialization=settings.initialization).to(device)
        self.trainer = Trainer(encoder, images, mean, settings)

    def __call__(self, steps: int) -> None:
        """Make `steps` steps."""
        self.trainer.total = self.trainer.record.steps + steps
        self.trainer.run()


def seconds_per_step(run: Callable[[int], None], steps: int, device: torch.device) -> float:
    """Seconds per step, over `steps` steps in a row, until the device is done."""
    started = time.perf_counter()
    run(steps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / steps


def share_of_convolutions(run: Callable[[int], None], device: torch.device) -> float:
    """The share of all operators' time that convolutions take, forward and backward."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        run(2)
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        times[event.key] = own
    convolutions = sum(value for name, value in times.items() if "conv" in name.lower())
    return convolutions / sum(times.values())


def gigaflops_of(run: Callable[[int], None]) -> float:
    """Floating-point operations of a step, forward and backward, in billions."""
    with FlopCounterMode(display=False) as counter:
        run(1)
    return counter.get_total_flops() / 1e9


def matrix_gigaflops(device: torch.device) -> float:
    """Speed of a large float32 matrix product, in billions of operations per second."""
    matrix = torch.rand(MATRIX_SIDE, MATRIX_SIDE, device=device)

    def run(count: int) -> None:
        for _ in range(count):
            matrix @ matrix

    run(1)
    return 2e-9 * MATRIX_SIDE**3 / seconds_per_step(run, 4, device)


def measure(
    images: Tensor, device: torch.device, rounds: int, steps: int, warm_up: int
) -> tuple[dict[str, Any], float]:
    """Seconds per step of each way, timed in turn, and the speed of a matrix product."""
    mean = mean_image(images)
    usual = UsualWay(images, mean, device)

    def run_usual(count: int) -> None:
        for _ in range(count):
            usual()

    ways: dict[str, Callable[[int], None]] = {"usual way": run_usual}
    ways |= {mode: Ours(mode, images, mean, device) for mode in ("faithful", "dense")}
    for run in ways.values():
        run(warm_up)
    times: dict[str, list[float]] = {name: [] for name in ways}
    products = []
    for _ in range(rounds):
        products.append(matrix_gigaflops(device))
        for name, run in ways.items():
            times[name].append(seconds_per_step(run, steps, device))
    return {
        name: {
            "seconds_per_step": statistics.median(times[name]),
            "all": times[name],
            "convolutions": share_of_convolutions(run, device),
            "gigaflops_per_step": gigaflops_of(run),
        }
        for name, run in ways.items()
    }, statistics.median(products)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    usual = result["ways"]["usual way"]["seconds_per_step"]
    lines = [
        "| way | seconds a step | steps/s over the usual way's | not convolution | GFLOP a step "
        "| of a matrix product's speed |",
        "|---|---|---|---|---|---|",
    ]
    for name, way in result["ways"].items():
        ratio = f"{usual / way['seconds_per_step']:.2f}" if name == "faithful" else ""
        rest = 1 - way["convolutions"]
        speed = way["gigaflops_per_step"] / way["seconds_per_step"] / result["matrix_gigaflops"]
        lines.append(
            f"| {name} | {way['seconds_per_step']:.3f} | {ratio} | {rest:.0%} "
            f"| {way['gigaflops_per_step']:.0f} | {speed:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print a table, and write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for training.json and .md")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="in a row, of each way")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="steps of each way, untimed")
    options = parser.parse_args()
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        category = write_sample_category(Path(folder), train=20, test_good=1, per_defect=1)
        images = load_images(category.root, (256, 256), 64)
    ways, products = measure(images, device, options.rounds, options.steps, options.warm_up)
    result = {
        "commit": commit(),
        "machine": describe(),
        "threads": torch.get_num_threads(),
        "warm_up_steps": options.warm_up,
        "matrix_gigaflops": products,
        "ways": ways,
    }
    print(table(result))
    if options.output:
        write_results(options.output, "training", result, table(result))


if __name__ == "__main__":
    main()
