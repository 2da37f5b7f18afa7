"""Self-supervised training of the encoder: the paper's protocol, seeded."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from .encoder import HierarchicalEncoder
from .losses import PositionClassifier, position_loss, svdd_loss
from .ops import crop_pairs
from .sampling import PairKind

CROPS_PER_IMAGE = 100
"""How often an epoch visits each training image."""

_COLLAPSE_PATIENCE = 20  # consecutive steps


class CollapseWarning(UserWarning):
    """The embeddings of all patches have become (nearly) one point."""


@dataclass(frozen=True)
class TrainingSettings:
    """What determines a training run besides the images."""

    epochs: int = 300
    """Passes over CROPS_PER_IMAGE x the number of images."""
    steps: int | None = None
    """Stop after this many steps, whatever `epochs` says."""
    batch_size: int = 64
    """Pairs of each kind and patch size per step."""
    learning_rate: float = 1e-4
    svdd_weight: float = 1e-3
    """lambda: the weight of SVDD' against the position loss."""
    train_last_layer: bool = False
    redraw_clipped: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not self.svdd_weight >= 0:
            raise ValueError(f"svdd_weight must not be negative, got {self.svdd_weight}")

    def total_steps(self, num_images: int) -> int:
        """Steps of the whole run."""
        per_epoch = math.ceil(num_images * CROPS_PER_IMAGE / self.batch_size)
        scheduled = self.epochs * per_epoch
        return scheduled if self.steps is None else min(scheduled, self.steps)


@dataclass(frozen=True)
class LevelMetrics:
    """What one step measured at one patch size."""

    position_loss: float
    """Cross-entropy, nats; ln 8 = 2.079 is chance."""
    svdd_loss: float
    position_accuracy: float
    """Share of right directions in the batch; 0.125 is chance."""
    spread: float
    """Standard deviation of the embeddings over a batch of clean patches, mean over dimensions."""


@dataclass(frozen=True)
class TrainingStep:
    """What a progress callback receives after each step."""

    step: int
    """Steps done, from 1."""
    total_steps: int
    loss: float
    levels: dict[int, LevelMetrics]
    """By patch size in pixels."""


@dataclass
class TrainingRecord:
    """What a finished run reports; kept in the model file."""

    steps: int = 0
    seconds: float = 0.0
    collapsed: bool = False
    final_loss: float = math.nan
    position_accuracy: dict[int, float] = field(default_factory=dict)


def embedding_spread(embeddings: Tensor) -> float:
    """Standard deviation per dimension over embeddings [..., D], averaged over dimensions."""
    return float(embeddings.detach().flatten(0, -2).double().std(dim=0, correction=0).mean())


def is_collapsed(embeddings: Tensor) -> bool:
    """Whether embeddings [..., D] differ by no more than float32 rounding noise.

    Spreads of 1e-6 are still useful (a published leather encoder has less), a few units in the
    last place are not: every patch then looks like every other and AUROC sits at 0.5.
    """
    magnitude = float(embeddings.detach().double().square().mean().sqrt())
    return embedding_spread(embeddings) <= 4 * torch.finfo(torch.float32).eps * magnitude


def total_loss(
    encoder: HierarchicalEncoder,
    classifier: PositionClassifier,
    positions: tuple[Tensor, Tensor, Tensor],
    neighbours: tuple[Tensor, Tensor],
    svdd_weight: float,
) -> tuple[Tensor, LevelMetrics, Tensor]:
    """The loss of one patch size: CE + lambda * SVDD'.

    positions: first and second patches [B, 3, K, K] and labels [B]; neighbours: first and second
    patches [B, 3, K, K]. Returns the loss, its parts, and the embeddings of clean patches [B, D].
    """
    first, second, labels = positions
    patches = torch.cat([first, second, *neighbours])
    first, second, near, jittered = encoder(patches).split(
        [len(first), len(second), len(neighbours[0]), len(neighbours[1])]
    )
    logits = classifier(first, second)
    cross_entropy = position_loss(logits, labels)
    svdd = svdd_loss(near, jittered)
    metrics = LevelMetrics(
        position_loss=float(cross_entropy.detach()),
        svdd_loss=float(svdd.detach()),
        position_accuracy=float((logits.argmax(dim=1) == labels).float().mean()),
        spread=embedding_spread(near),
    )
    return cross_entropy + svdd_weight * svdd, metrics, near.detach()


class Trainer:
    """One training run over images held on the encoder's device.

    images: [N, 3, H, W] uint8; mean: [3, H, W] float32, the per-pixel mean image. The encoder is
    trained in place. The same settings, images and device give the same weights.
    """

    def __init__(
        self,
        encoder: HierarchicalEncoder,
        images: Tensor,
        mean: Tensor,
        settings: TrainingSettings,
    ) -> None:
        device = next(encoder.parameters()).device
        self.encoder = encoder
        self.images = images.to(device).contiguous()
        self.mean = mean.to(device).contiguous()
        self.settings = settings
        self.order = Generator().manual_seed(settings.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.classifiers = nn.ModuleDict(
                {
                    str(size): PositionClassifier(encoder.embedding_dim, settings.train_last_layer)
                    for size in encoder.patch_sizes
                }
            ).to(device)
        parameters = [*encoder.parameters(), *self.classifiers.parameters()]
        self.optimizer = torch.optim.Adam(
            [p for p in parameters if p.requires_grad], lr=settings.learning_rate
        )
        self._queue = torch.empty(0, dtype=torch.int64)

    def run(self, on_step: Callable[[TrainingStep], None] | None = None) -> TrainingRecord:
        """Train to the end of the schedule; `on_step` is called after every step.

        Ctrl-C takes effect between two steps, as a KeyboardInterrupt. Raises FloatingPointError
        if the loss stops being finite. Warns (CollapseWarning) once if the embeddings collapse.
        """
        record = TrainingRecord()
        total = self.settings.total_steps(len(self.images))
        started = time.perf_counter()
        collapsed_steps = 0
        self.encoder.train()
        try:
            with _finish_step_on_interrupt() as interrupted, _flushed_denormals():
                for number in range(1, total + 1):
                    step, collapsed = self._step(number, total)
                    collapsed_steps = collapsed_steps + 1 if collapsed else 0
                    if collapsed_steps >= _COLLAPSE_PATIENCE and not record.collapsed:
                        record.collapsed = True
                        warn_of_collapse(f"after {number} steps")
                    record.steps = number
                    record.final_loss = step.loss
                    record.position_accuracy = {
                        size: level.position_accuracy for size, level in step.levels.items()
                    }
                    record.seconds = time.perf_counter() - started
                    if on_step is not None:
                        on_step(step)
                    if interrupted.is_set():
                        raise KeyboardInterrupt
        finally:
            self.encoder.eval()
        return record

    def _step(self, number: int, total: int) -> tuple[TrainingStep, bool]:
        image_of = self._next_images().to(self.images.device)
        losses, levels, collapsed = [], {}, False
        for size in reversed(self.encoder.patch_sizes):
            loss, levels[size], clean = self._level_loss(size, image_of, number)
            losses.append(loss)
            collapsed = collapsed or is_collapsed(clean)
        loss = torch.stack(losses).sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {float(loss.detach())} at step {number}: lower the learning rate"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return TrainingStep(number, total, float(loss.detach()), levels), collapsed

    def _level_loss(
        self, size: int, image_of: Tensor, number: int
    ) -> tuple[Tensor, LevelMetrics, Tensor]:
        settings = self.settings

        def draw(kind: PairKind) -> tuple[Tensor, Tensor, Tensor]:
            (first, second), _, labels = crop_pairs(
                self.images,
                self.mean,
                image_of,
                size,
                kind,
                settings.seed,
                number,
                settings.redraw_clipped,
            )
            return first, second, labels

        classifier = self.classifiers[str(size)]
        assert isinstance(classifier, PositionClassifier)
        return total_loss(
            self.encoder, classifier, draw("position"), draw("neighbour")[:2], settings.svdd_weight
        )

    def _next_images(self) -> Tensor:
        """[B]: the images of the next batch; an epoch visits each CROPS_PER_IMAGE times."""
        if len(self._queue) == 0:
            crops = len(self.images) * CROPS_PER_IMAGE
            self._queue = torch.randperm(crops, generator=self.order) % len(self.images)
        batch, self._queue = self._queue.tensor_split([self.settings.batch_size])
        return batch


def warn_of_collapse(when: str) -> None:
    """Warn that the embeddings are all alike, and say what helps."""
    warnings.warn(
        f"the embeddings have collapsed to one point {when}: scores will be no better than chance. "
        "Try a smaller svdd_weight (lambda), initialization='kaiming', or train_last_layer=True",
        CollapseWarning,
        stacklevel=3,
    )


@contextlib.contextmanager
def _finish_step_on_interrupt() -> Iterator[threading.Event]:
    """Within the context the first Ctrl-C only sets the event; a second one acts at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def note(signum: int, frame: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _flushed_denormals() -> Iterator[None]:
    """Flush subnormals to zero: the vanishing gradients of early training are full of them."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
