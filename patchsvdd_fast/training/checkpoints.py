"""Checkpoints: a training run's whole state in one file, from which it resumes exactly."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encoders.patch_encoder import PatchEncoder
from ..encoders.patch_svdd import HierarchicalEncoder
from ..files import store
from .defect_check import DefectCheck
from .record import TrainingRecord, TrainingStep
from .settings import TrainingSettings
from .trainer import Trainer, all_float32
from .workers import joined_workers


def train_encoder(
    encoder: HierarchicalEncoder,
    images: Tensor,
    mean: Tensor,
    settings: TrainingSettings,
    check: DefectCheck | None,
    header: Mapping[str, Any],
    checkpoint: str | Path | None,
    minutes: float,
    resume: bool,
    on_step: Callable[[TrainingStep], None] | None = None,
) -> TrainingRecord | None:
    """Train an encoder where it lies, with the state of training in a file meanwhile.

    images, mean, settings, check: as of `Trainer`.
    header, minutes: as of `CheckpointKeeper`; the state is also written when training ends, by
        Ctrl-C, SIGTERM or an error too. resume: go on from the checkpoint if there is one.
    on_step: called after each step, on a GPU after every 20th.

    Under torchrun this process does its share; None is returned in all but the first. Raises as
    `Trainer.run` and `resume_from` do.
    """
    with joined_workers(next(encoder.parameters()).device) as workers:
        # Minutes of mode dense may harm; the paper's protocol is followed where it leads.
        least_gain = 0.0 if check is None or settings.mode != "dense" else check.least_gain
        trainer = Trainer(encoder, images, mean, settings, check, workers, least_gain)
        found = checkpoint is not None and Path(checkpoint).exists()
        if resume and checkpoint is not None and workers.agreed(found):
            resume_from(trainer, mean, checkpoint)
        keeper = CheckpointKeeper(trainer, mean, header, checkpoint, minutes)

        def after_step(step: TrainingStep) -> None:
            if on_step is not None:
                on_step(step)
            keeper.after_step()

        try:
            record = trainer.run(after_step)
        except FloatingPointError:
            raise  # the weights are useless: keep the last checkpoint
        except BaseException:
            keeper.write()
            raise
        keeper.write()
        return record if workers.is_first else None


class CheckpointKeeper:
    """Writes a trainer's state to a file every so often; `resume_from` reads it back.

    mean: [3, H, W] float32, what is subtracted from the images. header: the detector's header with
    its parameters, by which the encoder alone can be read. path: None writes nothing. minutes:
    between two checkpoints. Of several processes only the first writes.
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
        """Write the checkpoint; if that fails, as on a full disk, warn and let training go on."""
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
            warnings.warn(f"no checkpoint was written: {error}", RuntimeWarning, stacklevel=4)
        self.written = time.monotonic()


def resume_from(trainer: Trainer, mean: Tensor, path: str | Path) -> None:
    """Bring a trainer to the state in a checkpoint.

    Raises ValueError if the file is no checkpoint, or one with other settings, mean or images.
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


def encoder_tensors(encoder: PatchEncoder) -> dict[str, Tensor]:
    """The encoder's weights under the names they have in files; bool as uint8."""
    return {
        f"encoder.{name}": value.byte() if value.dtype == torch.bool else value
        for name, value in encoder.state_dict().items()
    }
