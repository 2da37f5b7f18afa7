"""Checkpoints: all of a training run's state in one file, from which it goes on to the bit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encoders.patch_svdd import HierarchicalEncoder
from ..files import store
from .record import TrainingRecord, TrainingStep
from .trainer import Trainer, all_float32


def run_with_checkpoints(
    trainer: Trainer,
    mean: Tensor,
    header: Mapping[str, Any],
    path: str | Path | None,
    minutes: float,
    resume: bool,
    on_step: Callable[[TrainingStep], None] | None = None,
) -> TrainingRecord:
    """Train to the end, with the state of training in a file meanwhile.

    path, header, minutes: as of `CheckpointKeeper`; the state is also written when training ends,
    by Ctrl-C, SIGTERM or an error too. resume: go on from the file if there is one. mean:
    [3, H, W], what is subtracted from the images. Raises as `Trainer.run` and `resume_from` do.
    """
    found = path is not None and Path(path).exists()
    if resume and path is not None and trainer.workers.agreed(found):
        resume_from(trainer, mean, path)
    keeper = CheckpointKeeper(trainer, mean, header, path, minutes)

    def after_step(step: TrainingStep) -> None:
        if on_step is not None:
            on_step(step)
        keeper.after_step()

    try:
        record = trainer.run(after_step)
    except FloatingPointError:
        raise  # the weights are spoilt: the last checkpoint stands
    except BaseException:
        keeper.write()
        raise
    keeper.write()
    return record


class CheckpointKeeper:
    """Writes a trainer's state to a file every so often, and reads it back.

    path: None: keep nothing. header: of the detector, for those who only want the encoder.
    """

    def __init__(
        self,
        trainer: Trainer,
        mean: Tensor,
        header: Mapping[str, Any],
        path: str | Path | None,
        minutes: float,
    ) -> None:
        if not minutes >= 0:
            raise ValueError(f"checkpoint_minutes must not be negative, got {minutes}")
        self.trainer, self.mean, self.header = trainer, mean, header
        self.path = path if trainer.workers.is_first else None
        self.seconds = 60 * minutes
        self.written = time.monotonic()

    def after_step(self) -> None:
        """Write if it is time."""
        if time.monotonic() - self.written >= self.seconds:
            self.write()

    def write(self) -> None:
        """Write the checkpoint; a disk that is full by now must not end the training."""
        trainer = self.trainer
        if self.path is None or trainer.record.steps == 0 or not trainer.is_between_steps:
            return
        tensors, values = self.trainer.state()
        tensors = {f"training.{name}": value for name, value in tensors.items()}
        tensors |= encoder_tensors(self.trainer.encoder) | {"mean": self.mean}
        header = {**self.header, "steps": self.trainer.record.steps, "training": values}
        try:
            store.save(self.path, "checkpoint", tensors, header)
        except OSError as error:
            warnings.warn(f"no checkpoint was written: {error}", RuntimeWarning, stacklevel=3)
        self.written = time.monotonic()


def resume_from(trainer: Trainer, mean: Tensor, path: str | Path) -> None:
    """Bring a trainer to the state in a checkpoint.

    Raises ValueError if the file is no checkpoint, or one of other settings, mean or images.
    """
    tensors, header = store.load(path)
    with store.naming(path):
        _resume(trainer, mean, path, tensors, header)


def _resume(
    trainer: Trainer,
    mean: Tensor,
    path: str | Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
) -> None:
    if header["kind"] != "checkpoint":
        raise ValueError(f"{path} is a {header['kind']}, not a checkpoint of a training run")
    if "training" not in header:
        raise ValueError(
            f"{path} is of an earlier version and holds only an encoder: use --encoder"
        )
    try:
        trainer.load_state(store.below(tensors, "training."), header["training"])
        if not torch.equal(tensors["mean"], mean):
            raise ValueError("another mean was subtracted from the images")
        trainer.encoder.load_state_dict(all_float32(store.below(tensors, "encoder.")))
    except ValueError as error:
        raise ValueError(f"{path} cannot be resumed: {error}") from error
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be resumed: its weights do not fit, embedding_dim or levels differ"
        ) from error


def encoder_tensors(encoder: HierarchicalEncoder) -> dict[str, Tensor]:
    """The encoder's weights under the names they have in files."""
    return {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
