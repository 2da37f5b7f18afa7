"""Self-supervised training of the encoder: seeded, exactly resumable, by one or more processes.

A step depends on the weights, the optimiser's state and the step's number alone: its random numbers
come from (seed, step). So a run that is resumed from a checkpoint equals one that was never
interrupted (on a CPU to the bit).
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..encoders.patch_svdd import HierarchicalEncoder
from ..encoders.precision import computing_in, fastest_layout, flushed_denormals
from ..files.store import below
from .dense_pairs import DensePairs
from .interrupts import delayed_interrupts, take_effect
from .objectives import (
    LevelLoss,
    Objective,
    PatchPairs,
    PositionClassifier,
    TrainingImages,
    mixed_seed,
)
from .record import Quality, TrainingRecord, TrainingStep, is_collapsed, record_of, warn_of_collapse
from .settings import CROPS_PER_IMAGE, TrainingSettings
from .workers import Workers

_COLLAPSE_PATIENCE = 20  # measured steps in a row with collapsed embeddings, before it counts
_MEASURED_EVERY = 20  # steps on a GPU, since measuring waits for it; on a CPU each step is measured
# To fit the number of steps to `minutes`, this process's steps 3 to 10 are timed.
_UNTIMED_STEPS, _FITTED_AFTER = 2, 10
_TIMED = 20  # of the last measured steps, whose pace says how long the others will take


class Trainer:
    """One training run.

    encoder: trained in place, on its device.
    images: [N, 3, H, W] uint8.
    mean: [3, H, W] float32, what is subtracted from the images.
    check: judges the encoder every `settings.check_every` steps, such as a `DefectCheck`.
    workers: the processes that share each batch; None: this one alone.
    least_gain: points by which a check has to exceed that of the untrained encoder, or these
        weights are not kept.

    The same settings, images and device give the same weights. Raises ValueError for images that
    are too small for mode dense, and for more workers than items in a batch.
    """

    def __init__(
        self,
        encoder: HierarchicalEncoder,
        images: Tensor,
        mean: Tensor,
        settings: TrainingSettings,
        check: Callable[[HierarchicalEncoder], Quality] | None = None,
        workers: Workers | None = None,
        least_gain: float = 0.0,
    ) -> None:
        self.device = next(encoder.parameters()).device
        self.encoder = encoder
        self.settings = settings
        self.workers = workers or Workers()
        self.check = check if settings.check_every is not None else None
        self.record = TrainingRecord(least_gain=least_gain)
        self._limit = settings.total_steps(len(images))
        self.total = self._limit if settings.minutes is None else None
        self._data = TrainingImages(images, mean, self.device)
        self._fingerprint = _fingerprint(images)
        self._share = self.workers.share(settings.batch_size)
        self._objective = self._make_objective()
        parameters = [*encoder.parameters(), *self._objective.classifiers.parameters()]
        self._parameters = [p for p in parameters if p.requires_grad]
        self._optimizer = torch.optim.Adam(self._parameters, lr=settings.learning_rate, fused=True)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        self._best: dict[str, Tensor] | None = None
        self._checks_since_best = 0
        self._collapsed_steps = 0
        self._first_step, self._timed_from, self._seconds_of_check = 0, 0.0, 0.0
        self._timed: deque[tuple[int, float]] = deque(maxlen=_TIMED)  # steps done, seconds in them
        self._started, self._in_checks = 0.0, 0.0  # this process's steps; seconds of its checks
        self.is_between_steps = True
        """Whether weights, optimiser and record are of one step, so that they can be saved."""

    # --- running ----------------------------------------------------------------------------------

    def run(self, on_step: Callable[[TrainingStep], None] | None = None) -> TrainingRecord:
        """Train to the last step, from where `load_state` left it or the beginning.

        on_step: called after each step (on a GPU every 20th, those with a check and the last).

        With checks, the encoder gets the best weights in the end. Ctrl-C and SIGTERM take effect
        between two steps, as KeyboardInterrupt and `interrupts.Terminated`. Raises
        FloatingPointError if the loss is no longer finite. Without checks, warns (CollapseWarning)
        once if the embeddings collapse.
        """
        record, before = self.record, self.record.seconds
        self._first_step = record.steps
        self.encoder.train()
        self.encoder.small.memory_format = fastest_layout(self.device, self.settings.mode)
        try:
            with delayed_interrupts() as interrupts, flushed_denormals():
                if self.check is not None and record.steps == 0:
                    self._judge()
                started = time.perf_counter()
                self._started, self._in_checks = started, 0.0
                self._timed = deque([(record.steps, 0.0)], maxlen=_TIMED)
                while record.steps < (self._end or math.inf):
                    take_effect(self.workers.largest(interrupts.arrived))
                    if self._is_over():
                        break
                    self.is_between_steps = False
                    losses = self._step(record.steps + 1)
                    record.steps += 1
                    record.seconds = before + time.perf_counter() - started
                    self._fit_to_minutes(time.perf_counter() - started)
                    step = self._measure(losses)
                    self.is_between_steps = True
                    if step is not None and on_step is not None:
                        on_step(step)
                take_effect(self.workers.largest(interrupts.arrived))
        finally:
            self.encoder.eval()
            self.encoder.small.memory_format = torch.contiguous_format
        if self._best is not None:
            self.encoder.load_state_dict(self._best)
        return record

    @property
    def _end(self) -> int | None:
        """The number of the last step; None if not known yet."""
        return self.total or self._limit

    def _step(self, number: int) -> dict[int, LevelLoss]:
        settings = self.settings
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(number, self._end)
        images = self._images_of(number)
        with computing_in(settings.precision, self.device):
            losses = self._objective.losses(images, number, self._share)
            total = torch.stack([level.total for level in losses.values()]).sum()
            if self.device.type == "cpu":  # on a GPU that would wait; there `_measure` does it
                self._check_finite(float(total.detach()), number)
            self._optimizer.zero_grad(set_to_none=True)
            # The loss is a mean over the share. Weighted by the share, gradients add up to those
            # of the mean over the whole batch.
            (total * ((self._share.stop - self._share.start) / settings.batch_size)).backward()
        self.workers.add_gradients(self._parameters)
        self._optimizer.step()
        return losses

    def _images_of(self, step: int) -> Tensor:
        """The image of each item of a step's batch [B]; an epoch has each CROPS_PER_IMAGE times."""
        crops = len(self._data) * CROPS_PER_IMAGE
        missing = self.settings.batch_size
        position, batch = (step - 1) * missing, []
        while missing:
            epoch, start = divmod(position, crops)
            if epoch != self._epoch:
                generator = Generator().manual_seed(mixed_seed(self.settings.seed, epoch))
                self._order = torch.randperm(crops, generator=generator) % len(self._data)
                self._epoch = epoch
            batch.append(self._order[start : start + missing])
            position += len(batch[-1])
            missing -= len(batch[-1])
        return torch.cat(batch)

    def _fit_to_minutes(self, seconds: float) -> None:
        """Set the number of steps, once, when this process's first steps have been timed.

        seconds: since this process began to train.
        """
        if self.settings.minutes is None or self.total is not None:
            return
        new_steps = self.record.steps - self._first_step
        if self.device.type == "cuda" and new_steps in (_UNTIMED_STEPS, _FITTED_AFTER):
            torch.cuda.synchronize(self.device)
        if new_steps == _UNTIMED_STEPS:
            self._timed_from = seconds
        if new_steps == _FITTED_AFTER:
            each = (seconds - self._timed_from) / (_FITTED_AFTER - _UNTIMED_STEPS)
            if self.check is not None:
                each += self._seconds_of_check / (self.settings.check_every or 1)
            left = 60 * self.settings.minutes - self.record.seconds - self._seconds_of_check
            fitting = self.record.steps + max(0, int(left / each))
            self.total = int(self.workers.agreed(min(fitting, self._limit or fitting)))

    def _measure(self, losses: dict[int, LevelLoss]) -> TrainingStep | None:
        """Report the last step, with a check if one is due; None if it is not to be measured."""
        record, number = self.record, self.record.steps
        is_last = number == self._end
        every = 1 if self.device.type == "cpu" else _MEASURED_EVERY
        is_checked = self.check is not None and (
            is_last or number % (self.settings.check_every or 1) == 0
        )
        if not (is_last or is_checked or number % every == 0):
            return None
        loss = sum(float(level.total.detach()) for level in losses.values())
        self._check_finite(loss, number)
        quality = self._judge() if is_checked else None
        levels = {size: level.metrics() for size, level in losses.items()}
        self._watch_collapse(any(is_collapsed(level.embeddings) for level in losses.values()))
        record.final_loss = loss
        record.accuracy = {
            size: level.accuracy for size, level in levels.items() if level.accuracy is not None
        }
        rate = self._optimizer.param_groups[0]["lr"]
        left = None if self.total is None else self._seconds_left(self.total)
        return TrainingStep(number, self.total, loss, rate, record.seconds, left, levels, quality)

    def _seconds_left(self, total: int) -> float:
        """Of the steps to the last, and the checks among them."""
        done, (first, before) = self.record.steps, self._timed[0]
        in_steps = time.perf_counter() - self._started - self._in_checks
        self._timed.append((done, in_steps))
        left = (total - done) * (in_steps - before) / (done - first)
        if first == self._first_step:  # the first step also loaded libraries
            self._timed.popleft()
        if self.check is not None:
            every = self.settings.check_every or 1
            left += (-(-total // every) - done // every) * self._seconds_of_check
        return left

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss} at step {step}: lower the learning rate"
            )

    def _watch_collapse(self, collapsed: bool) -> None:
        self._collapsed_steps = self._collapsed_steps + 1 if collapsed else 0
        if self._collapsed_steps >= _COLLAPSE_PATIENCE and not self.record.collapsed:
            self.record.collapsed = True
            if self.check is None:
                warn_of_collapse(f"after {self.record.steps} steps")

    # --- keeping the best -------------------------------------------------------------------------

    def _judge(self) -> Quality:
        assert self.check is not None
        started = time.perf_counter()
        self.encoder.eval()
        quality = self.check(self.encoder) if self.workers.is_first else Quality(0.0, 0.0)
        quality = Quality(*map(self.workers.agreed, astuple(quality)))
        self.encoder.train()
        self._seconds_of_check = time.perf_counter() - started
        self._in_checks += self._seconds_of_check
        record, value = self.record, quality.criterion
        improved = value > max((other for _, other in record.qualities), default=-math.inf)
        self._checks_since_best = 0 if improved else self._checks_since_best + 1
        record.qualities.append((record.steps, value))
        if self._is_to_be_kept(value):
            record.best_step = record.steps
            self._best = {name: value.clone() for name, value in self.encoder.state_dict().items()}
        return quality

    def _is_to_be_kept(self, criterion: float) -> bool:
        """Whether a check's weights replace those kept so far, which begin with the untrained."""
        record = self.record
        if record.best_step is None:
            return True
        untrained, kept = record.qualities[0][1], dict(record.qualities)[record.best_step]
        return criterion > kept and criterion >= untrained + record.least_gain

    def _is_over(self) -> bool:
        if self.check is None:
            return False
        patience = self.settings.patience
        # A collapsed encoder does not recover; the best weights are those of an earlier check.
        return self.record.collapsed or (
            patience is not None and self._checks_since_best >= patience
        )

    # --- state ------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `load_state` needs to go on from here: tensors by name, and values for JSON.

        The encoder's current weights are not included; the best ones of the checks are.
        """
        tensors = {
            f"classifier.{k}": v for k, v in self._objective.classifiers.state_dict().items()
        }
        for index, slots in self._optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in slots.items()}
        tensors |= {f"best.{name}": value for name, value in (self._best or {}).items()}
        return tensors, {
            "settings": asdict(self.settings),
            "images": self._fingerprint,
            "total": self.total,
            "record": asdict(self.record),
            "checks_since_best": self._checks_since_best,
            "collapsed_steps": self._collapsed_steps,
            "seconds_of_check": self._seconds_of_check,
        }

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; the caller loads the encoder's weights.

        Raises ValueError if that was of a run with other settings or images, or is damaged.
        """
        ours = asdict(self.settings)
        other = {k: v for k, v in values["settings"].items() if ours.get(k, v) != v}
        if other:
            differences = ", ".join(f"{k} {v!r} instead of {ours[k]!r}" for k, v in other.items())
            raise ValueError(f"the checkpoint was trained with other settings: {differences}")
        if values["images"] != self._fingerprint:
            raise ValueError("the checkpoint was trained on other images")
        self._objective.classifiers.load_state_dict(below(tensors, "classifier."))
        self._load_optimizer(below(tensors, "adam."))
        self._best = all_float32(below(tensors, "best.")) or None
        if self._best is not None:
            copy.deepcopy(self.encoder).load_state_dict(self._best)  # raises if they do not fit
        total = values["total"]
        if self.settings.minutes is None and total != self.total:
            raise ValueError(f"it has {total} steps in all, not {self.total}")
        self.total = None if total is None else _check_count("total", total)
        # Older checkpoints do not say what gain is needed.
        self.record = record_of({"least_gain": self.record.least_gain, **values["record"]})
        if _check_count("steps", self.record.steps) > (self._end or math.inf):
            raise ValueError(f"it has made {self.record.steps} of {self._end} steps")
        if not 0 <= float(self.record.seconds) < math.inf:
            raise ValueError(f"its seconds must be finite, got {self.record.seconds}")
        self._checks_since_best = _check_count("checks_since_best", values["checks_since_best"])
        self._collapsed_steps = _check_count("collapsed_steps", values["collapsed_steps"])
        self._seconds_of_check = float(values.get("seconds_of_check", 0.0))

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Load Adam's moments; tensors: by name, <number of the parameter>.<slot>."""
        groups = self._optimizer.state_dict()["param_groups"]
        shapes: dict[str, torch.Size] = {}
        for index, parameter in enumerate(self._parameters):
            shapes |= {f"{index}.{slot}": parameter.shape for slot in ("exp_avg", "exp_avg_sq")}
            shapes[f"{index}.step"] = torch.Size()
        if {name: value.shape for name, value in all_float32(tensors).items()} != shapes:
            raise ValueError("the state of its optimizer does not fit")
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            number, slot = name.split(".")
            slots.setdefault(int(number), {})[slot] = value
        self._optimizer.load_state_dict({"state": slots, "param_groups": groups})

    def _make_objective(self) -> Objective:
        settings = self.settings
        if settings.mode == "dense":
            return DensePairs(
                self.encoder,
                self._data,
                settings.seed,
                settings.crop_size,
                settings.pairs_per_crop,
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            classifiers = nn.ModuleDict(
                {
                    str(size): PositionClassifier(
                        self.encoder.embedding_dim, settings.train_last_layer
                    )
                    for size in self.encoder.patch_sizes
                }
            ).to(self.device)
        return PatchPairs(
            self.encoder,
            classifiers,
            self._data,
            settings.seed,
            settings.svdd_weight,
            settings.redraw_clipped,
        )


def all_float32(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are; raises ValueError for one that is not float32."""
    for name, value in tensors.items():
        if value.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {value.dtype}")
    return tensors


def _check_count(name: str, value: Any) -> int:
    """A count read from JSON; raises ValueError if it is not an integer of 0 to 2^53."""
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(f"{name} must be a count, got {value!r}")
    return value


def _fingerprint(images: Tensor) -> str:
    return hashlib.sha256(images.cpu().contiguous().numpy().data).hexdigest()
