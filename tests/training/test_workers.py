"""Data-parallel training: two processes train the same encoder as one."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from patchsvdd_fast.training.workers import Workers

# One process of two: trains on its share and writes its weights.
TRAIN = """
import contextlib
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch import distributed
from patchsvdd_fast import HierarchicalEncoder
from patchsvdd_fast.training.record import Quality
from patchsvdd_fast.training.settings import training_settings
from patchsvdd_fast.training.trainer import Trainer
from patchsvdd_fast.training.workers import joined_workers

mode, output = sys.argv[1:]
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
images = torch.randint(256, (3, 3, 128, 128), dtype=torch.uint8, generator=generator)
batch = {"faithful": 5, "dense": 3}[mode]
settings = training_settings(
    mode, steps=9, batch_size=batch, initialization="kaiming", check_every=1, patience=1
)
torch.manual_seed(1)
encoder = HierarchicalEncoder(embedding_dim=8, initialization="kaiming")
found = iter([60.0, 70.0, 80.0, 65.0])  # so that the weights of step 2 are kept


def check(encoder):
    assert workers.is_first
    return Quality(50.0, next(found))


with joined_workers(torch.device("cpu")) as workers:
    trainer = Trainer(encoder, images, images.float().mean(dim=0), settings, check, workers)
    record = trainer.run()
    assert (record.steps, record.best_step) == (3, 2)
    save_file(encoder.state_dict(), f"{output}.{workers.rank}")
# What is left of the group would abort the interpreter at its end, now and then.
threads = []
for task in Path("/proc/self/task").glob("*/comm"):
    with contextlib.suppress(OSError):  # one that has just ended
        threads.append(task.read_text())
assert not any("gloo" in name for name in threads), threads
"""


def _torchrun(processes, *command, **options):
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), *map(str, command)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


@pytest.mark.parametrize("mode", ["faithful", "dense"])
def test_two_processes_train_as_one_does(mode, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    alone = subprocess.run(
        [sys.executable, script, mode, tmp_path / "alone"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    both = _torchrun(2, script, mode, tmp_path / "both")
    assert both.returncode == 0, both.stderr
    expected = load_file(tmp_path / "alone.0")
    first, second = (load_file(tmp_path / f"both.{rank}") for rank in (0, 1))
    for name, value in expected.items():
        assert torch.equal(first[name], second[name])
        # Adam's first steps are of the size of the learning rate, 1e-4 or more; only where a
        # gradient is all rounding may their direction depend on the order of additions.
        difference = (first[name] - value).abs()
        assert (difference > 1e-6).float().mean() < 1e-2, name
    assert any((first[name] != value).any() for name, value in expected.items())


def test_the_command_under_torchrun_writes_one_model(category_folder, tmp_path):
    output = tmp_path / "model.safetensors"
    done = _torchrun(
        2,
        "-m",
        "patchsvdd_fast",
        "train",
        category_folder,
        "-o",
        output,
        "--resize",
        "96",
        "--mode",
        "faithful",
        "--batch-size",
        "4",
        "--steps",
        "2",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    assert output.exists()
    assert [path.name for path in tmp_path.glob("model*")] == [output.name]


def test_shares_cover_the_batch():
    for count in (1, 2, 3, 7):
        workers = [Workers() for _ in range(count)]
        covered = []
        for rank, worker in enumerate(workers):
            worker.rank, worker.count = rank, count
            share = worker.share(20)
            covered += range(20)[share]
        assert covered == list(range(20))
    with pytest.raises(ValueError, match="a batch of 2 cannot be divided over 7"):
        workers[0].share(2)
