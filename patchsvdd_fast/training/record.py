"""What training tells: of a step, of a whole run, of what was learned; plain values all."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LevelMetrics:
    """What one step measured at one patch size."""

    svdd_loss: float
    spread: float
    """Standard deviation of the embeddings over a batch of patches, mean over dimensions."""
    loss: float | None = None
    """Cross-entropy of positions, nats; ln 8 = 2.079 is chance; None in mode dense."""
    accuracy: float | None = None
    """Share of right directions in the batch; 0.125 is chance; None in mode dense."""


@dataclass(frozen=True)
class Quality:
    """How well an encoder finds the drawn defects, in percent."""

    detection: float
    """AUROC of images."""
    segmentation: float
    """AUROC of pixels."""

    @property
    def criterion(self) -> float:
        """What decides which weights are kept: a mean in which detection counts twice."""
        return (2 * self.detection + self.segmentation) / 3


@dataclass(frozen=True)
class TrainingStep:
    """What a progress callback receives: after each step, on a GPU after every 20th."""

    step: int
    """Steps done, from 1."""
    total_steps: int | None
    """Of the whole run; None until it has been fitted to the minutes."""
    loss: float
    learning_rate: float
    seconds: float
    """Of training so far, interruptions left out."""
    seconds_left: float | None
    """At the speed so far; None until `total_steps` is known."""
    levels: dict[int, LevelMetrics]
    """By patch size in pixels."""
    quality: Quality | None = None
    """What a check after this step found, if there was one."""


@dataclass
class TrainingRecord:
    """What a finished run reports; kept in the model file."""

    steps: int = 0
    seconds: float = 0.0
    collapsed: bool = False
    """Whether all embeddings became alike. With checks that ends the training, and the weights that
    are kept are of before."""
    final_loss: float | None = None
    """None without training."""
    accuracy: dict[int, float] = field(default_factory=dict)
    """By patch size, share of positions told right in the last step; empty in mode dense."""
    best_step: int | None = None
    """The step whose weights were kept, where checks decided; 0: the untrained ones."""
    qualities: list[tuple[int, float]] = field(default_factory=list)
    """Step and criterion of each check."""


def record_of(values: Mapping[str, Any]) -> TrainingRecord:
    """A record as JSON keeps it, read back."""
    record = dict(values)
    accuracy = record.pop("position_accuracy", None) or record.get("accuracy", {})
    record["accuracy"] = {int(size): value for size, value in accuracy.items()}
    loss = record.get("final_loss")
    record["final_loss"] = None if loss is None or math.isnan(loss) else loss  # earlier files: NaN
    record["qualities"] = [(step, value) for step, value in record.get("qualities", [])]
    return TrainingRecord(**record)


def embedding_spread(embeddings: Tensor) -> float:
    """Standard deviation per dimension over embeddings [..., D], averaged over dimensions."""
    return float(embeddings.detach().flatten(0, -2).double().std(dim=0, correction=0).mean())


class CollapseWarning(UserWarning):
    """The embeddings of all patches have become (nearly) one point."""


def is_collapsed(embeddings: Tensor) -> bool:
    """Whether embeddings [..., D] differ by no more than float32 rounding noise.

    Spreads of 1e-6 are still useful (a published leather encoder has less), a few units in the
    last place are not: every patch then looks like every other and AUROC sits at 0.5.
    """
    magnitude = float(embeddings.detach().double().square().mean().sqrt())
    return embedding_spread(embeddings) <= 4 * torch.finfo(torch.float32).eps * magnitude


def warn_of_collapse(when: str) -> None:
    """Warn that the embeddings are all alike, and say what helps."""
    warnings.warn(
        f"the embeddings have collapsed to one point {when}: scores will be no better than chance. "
        "Try fewer steps, or in mode faithful a smaller svdd_weight (lambda), "
        "initialization='kaiming' or train_last_layer=True",
        CollapseWarning,
        stacklevel=3,
    )
