"""Reports of training as plain values: of a step, a whole run, and a check of the encoder."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..files.folders import counted

_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class LevelMetrics:
    """What one step measured at one patch size."""

    svdd_loss: float
    """SVDD', the mean over pairs of neighbours."""
    spread: float
    """Standard deviation of the embeddings over a batch of patches, mean over dimensions."""
    loss: float | None = None
    """Cross-entropy of positions in nats; ln 8 = 2.079 is chance; None in mode dense."""
    accuracy: float | None = None
    """Share of positions classified correctly; 0.125 is chance; None in mode dense."""


@dataclass(frozen=True)
class Quality:
    """How well an encoder finds synthetic defects, in percent; see `defect_check`."""

    detection: float
    """AUROC of images."""
    segmentation: float
    """AUROC of pixels."""

    @property
    def criterion(self) -> float:
        """Decides which weights are kept: the mean of both, detection counting twice."""
        return (2 * self.detection + self.segmentation) / 3


@dataclass(frozen=True)
class TrainingStep:
    """What a progress callback receives after a step (which ones: see `Trainer.run`)."""

    step: int
    """Number of this step, from 1."""
    total_steps: int | None
    """Of the whole run; None until they have been fitted to `minutes`."""
    loss: float
    """The minimised loss, summed over patch sizes."""
    learning_rate: float
    """Of this step."""
    seconds: float
    """Of training so far, without the time between being interrupted and resumed."""
    seconds_left: float | None
    """Expected until the last step, of steps and checks at their speed so far; None until
    `total_steps` is known."""
    levels: dict[int, LevelMetrics]
    """By patch size in pixels."""
    quality: Quality | None = None
    """What the check after this step found; None without one."""


@dataclass
class TrainingRecord:
    """What a run has done, kept in the model file and in checkpoints."""

    steps: int = 0
    """Steps done."""
    seconds: float = 0.0
    """See `TrainingStep.seconds`."""
    collapsed: bool = False
    """Whether all embeddings became alike, see `is_collapsed`. With checks of the encoder that ends
    training, and the weights of an earlier check are kept."""
    final_loss: float | None = None
    """Of the last measured step; None without training."""
    accuracy: dict[int, float] = field(default_factory=dict)
    """By patch size: `LevelMetrics.accuracy` of the last measured step; empty in mode dense."""
    best_step: int | None = None
    """The step whose weights are kept (0: the untrained ones); None without checks."""
    qualities: list[tuple[int, float]] = field(default_factory=list)
    """Step and `Quality.criterion` of each check."""
    least_gain: float = 0.0
    """By how much a criterion had to exceed that of the untrained weights for its weights to be
    kept, in points."""

    def __repr__(self) -> str:
        parts = [
            f"{counted(self.steps, 'step')} in {self.seconds:,.0f} s"
            if self.steps
            else "no training"
        ]
        if self.final_loss is not None:
            parts.append(f"loss {self.final_loss:.4g}")
        if self.best_step is not None:
            parts.append(f"weights of step {self.best_step:,}")
        if self.qualities:
            parts.append(counted(len(self.qualities), "check"))
        if self.collapsed:
            parts.append("collapsed")
        return f"TrainingRecord({', '.join(parts)})"


def record_of(values: Mapping[str, Any]) -> TrainingRecord:
    """A record from the JSON object that a file holds of it; older files are understood, too."""
    record = dict(values)
    # Files of schema 2 call it position_accuracy.
    accuracy = record.pop("position_accuracy", None) or record.get("accuracy", {})
    record["accuracy"] = {int(size): value for size, value in accuracy.items()}
    loss = record.get("final_loss")
    record["final_loss"] = None if loss is None or math.isnan(loss) else loss  # NaN in older files
    record["qualities"] = [(step, value) for step, value in record.get("qualities", [])]
    return TrainingRecord(**record)


def embedding_spread(embeddings: Tensor) -> float:
    """Standard deviation per dimension over embeddings [..., D], averaged over dimensions."""
    return float(embeddings.detach().flatten(0, -2).double().std(dim=0, correction=0).mean())


class CollapseWarning(UserWarning):
    """The embeddings of all patches have become (nearly) one point."""


def is_collapsed(embeddings: Tensor) -> bool:
    """Whether embeddings [..., D] differ by no more than float32 rounding noise.

    A spread of 1e-6 is still useful (a published leather encoder has less). One of a few units in
    the last place is not: all patches then look alike, and AUROC stays near 0.5.
    """
    return have_collapsed(moments(embeddings))


def moments(embeddings: Tensor) -> Tensor:
    """The number, sums and sums of squares of embeddings [..., D]: [3, D] float64 on the CPU.

    Those of parts add up to those of the whole.
    """
    total = torch.zeros(3, embeddings.shape[-1], dtype=torch.float64)
    for some in embeddings.detach().flatten(0, -2).split(_ROWS_AT_ONCE):
        values = some.double()
        count = torch.full_like(values[0], len(values))
        total += torch.stack([count, values.sum(dim=0), values.square().sum(dim=0)]).cpu()
    return total


def have_collapsed(moments: Tensor) -> bool:
    """As `is_collapsed`, of embeddings with these moments."""
    count, sums, squares = moments
    spread = (squares / count - (sums / count).square()).clamp(min=0).sqrt().mean()
    magnitude = (squares / count).mean().sqrt()
    return bool(spread <= 4 * torch.finfo(torch.float32).eps * magnitude)


def warn_of_collapse(when: str) -> None:
    """Warn that all embeddings are alike, and say what helps; when: such as "after 20 steps"."""
    warnings.warn(
        f"the embeddings have collapsed to one point {when}: scores will be no better than chance. "
        "Try fewer steps, or in mode faithful a smaller svdd_weight (lambda), "
        "initialization='kaiming' or train_last_layer=True",
        CollapseWarning,
        stacklevel=3,
    )
