"""What a training step minimises: the losses, the images it draws from, and the paper's objective.

An item's random numbers depend only on the seed, the step and the item's number in the batch. So
any step can be repeated, which makes resuming exact, and several processes can each compute a share
of the batch. `PatchPairs` is the paper's objective (mode "faithful"); `dense_pairs` has the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..encoders.patch_svdd import LEAKY_SLOPE, HierarchicalEncoder
from ..ops import crop_pairs
from ..ops.pair_protocol import PairKind
from .record import LevelMetrics, embedding_spread

NUM_POSITIONS = 8
_HIDDEN = 128  # width of the position classifier's layers


class LevelLoss(NamedTuple):
    """The losses of one patch size, kept as tensors: reading numbers would wait for the device."""

    total: Tensor
    """What is minimised; gradients flow through it."""
    svdd: Tensor
    """See `svdd_loss`."""
    embeddings: Tensor
    """[P, D], without gradient: of the first patches of the neighbour pairs."""
    classification: Tensor | None = None
    """See `position_loss`; None without position pairs, as is `right`."""
    right: Tensor | None = None
    """[P] bool: whether the direction of a position pair was classified correctly."""

    def metrics(self) -> LevelMetrics:
        """As numbers, to show and to log."""
        return LevelMetrics(
            svdd_loss=float(self.svdd.detach()),
            spread=embedding_spread(self.embeddings),
            loss=None if self.classification is None else float(self.classification.detach()),
            accuracy=None if self.right is None else float(self.right.float().mean()),
        )


class Objective(Protocol):
    """What the trainer calls each step."""

    classifiers: nn.ModuleDict
    """Trained besides the encoder: a position classifier per patch size, or none."""

    def losses(self, image_of: Tensor, step: int, share: slice) -> dict[int, LevelLoss]:
        """The losses of a step by patch size, largest first, as means over the share.

        image_of: [B] int64 on the CPU, the image that each item of the whole batch is drawn from.
        step: its number, from 1. share: the items to compute here.
        """


class PositionClassifier(nn.Module):
    """Classifies in which of 8 directions the second patch of a pair lies from the first.

    It sees the difference of their embeddings (the task: Doersch et al. 2015). By default the last
    layer is as in the paper's implementation: its weight, divided by its norm over the classes,
    gets no gradient, so it is a fixed random projection and only the bias learns.
    `train_last_layer` makes it an ordinary linear layer.
    """

    def __init__(self, embedding_dim: int = 64, train_last_layer: bool = False) -> None:
        super().__init__()
        self.train_last_layer = train_last_layer
        self.hidden = nn.Sequential(
            nn.Linear(embedding_dim, _HIDDEN),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.LeakyReLU(LEAKY_SLOPE),
        )
        self.last = nn.Linear(_HIDDEN, NUM_POSITIONS)
        self.last.weight.requires_grad_(train_last_layer)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Logits [B, 8] for embeddings [B, D] of the first and the second patches."""
        weight = self.last.weight
        if not self.train_last_layer:
            weight = F.normalize(weight.detach(), dim=0)  # over the class axis
        return F.linear(self.hidden(first - second), weight, self.last.bias)


def svdd_loss(first: Tensor, second: Tensor) -> Tensor:
    """SVDD': mean Euclidean distance between embeddings [P, D] of neighbouring patches."""
    return torch.linalg.vector_norm(first - second, dim=1).mean()


def position_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [B, 8] against the directions [B] (int64)."""
    return F.cross_entropy(logits, labels)


def pair_loss(
    classifier: PositionClassifier,
    positions: tuple[Tensor, Tensor],
    labels: Tensor,
    neighbours: tuple[Tensor, Tensor],
    svdd_weight: float,
) -> LevelLoss:
    """The paper's loss of one patch size: cross-entropy of positions + lambda * SVDD'.

    positions, neighbours: embeddings [P, D] of the first and of the second patches of the pairs.
    labels: [P] int64, the position pairs' directions. svdd_weight: lambda.
    """
    logits = classifier(*positions)
    position = position_loss(logits, labels)
    svdd = svdd_loss(*neighbours)
    total = position + svdd_weight * svdd
    right = logits.detach().argmax(dim=1) == labels
    return LevelLoss(total, svdd, neighbours[0].detach(), position, right)


class DrawnPairs(NamedTuple):
    """The patches of one size, [B, 3, K, K] each: position pairs, labels [B], neighbour pairs.

    first, second, labels: position pairs, and the direction [B] of the second from the first.
    near, jittered: neighbour pairs.
    """

    first: Tensor
    second: Tensor
    labels: Tensor
    near: Tensor
    jittered: Tensor


def patch_losses(
    encoder: HierarchicalEncoder,
    classifiers: Mapping[int, PositionClassifier],
    drawn: Mapping[int, DrawnPairs],
    svdd_weight: float,
) -> dict[int, LevelLoss]:
    """The losses by patch size; patches of all sizes are encoded together."""
    embedded = encoder.forward_sizes(
        [
            torch.cat([pairs.first, pairs.second, pairs.near, pairs.jittered])
            for pairs in drawn.values()
        ]
    )
    losses = {}
    for (size, pairs), embeddings in zip(drawn.items(), embedded, strict=True):
        counts = [len(part) for part in (pairs.first, pairs.second, pairs.near, pairs.jittered)]
        first, second, near, jittered = embeddings.split(counts)
        losses[size] = pair_loss(
            classifiers[size], (first, second), pairs.labels, (near, jittered), svdd_weight
        )
    return losses


class TrainingImages:
    """The training set, on the device if it fits there (in half of a GPU's free memory).

    Otherwise it stays in pinned CPU memory, from where each batch is copied to the device; the
    pairs drawn are the same. images: [N, 3, H, W] uint8; mean: [3, H, W] float32.
    """

    def __init__(self, images: Tensor, mean: Tensor, device: torch.device) -> None:
        self.mean = mean.to(device).contiguous()
        self.device = device
        self.images = images.contiguous()
        self.images = self.images.to(device) if self._fits() else self.images.pin_memory()

    def __len__(self) -> int:
        return len(self.images)

    def _fits(self) -> bool:
        if self.device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(self.device)
        return self.images.nbytes <= free // 2

    def crop_pairs(
        self,
        image_of: Tensor,
        size: int,
        kind: PairKind,
        draw: tuple[int, int],
        first_pair: int,
        redraw_clipped: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`ops.crop_pairs` on the device; image_of: [B] int64 on the CPU; draw: (seed, step)."""
        images = self.images
        if images.device != self.device:
            images = images[image_of].pin_memory().to(self.device, non_blocking=True)
            image_of = torch.arange(len(image_of))
        return crop_pairs(
            images,
            self.mean,
            image_of.to(self.device, non_blocking=True),
            size,
            kind,
            *draw,
            redraw_clipped,
            first_pair,
        )


class PatchPairs:
    """The paper's protocol: each patch of each pair is cut out and encoded by itself."""

    def __init__(
        self,
        encoder: HierarchicalEncoder,
        classifiers: nn.ModuleDict,
        images: TrainingImages,
        seed: int,
        svdd_weight: float,
        redraw_clipped: bool,
    ) -> None:
        self.encoder, self.classifiers, self.images = encoder, classifiers, images
        self.seed, self.svdd_weight, self.redraw_clipped = seed, svdd_weight, redraw_clipped

    def losses(self, image_of: Tensor, step: int, share: slice) -> dict[int, LevelLoss]:
        """See `Objective`; an item is a position and a neighbour pair of each patch size."""
        sizes = self.encoder.patch_sizes[::-1]
        drawn = {size: self._draw(size, image_of, step, share) for size in sizes}
        classifiers = {size: classifier_of(self.classifiers, size) for size in sizes}
        return patch_losses(self.encoder, classifiers, drawn, self.svdd_weight)

    def _draw(self, size: int, image_of: Tensor, step: int, share: slice) -> DrawnPairs:
        def draw(kind: PairKind) -> tuple[Tensor, Tensor, Tensor]:
            (first, second), _, labels = self.images.crop_pairs(
                image_of[share], size, kind, (self.seed, step), share.start, self.redraw_clipped
            )
            return first, second, labels

        return DrawnPairs(*draw("position"), *draw("neighbour")[:2])


def classifier_of(classifiers: nn.ModuleDict, size: int) -> PositionClassifier:
    """The position classifier of a patch size."""
    classifier = classifiers[str(size)]
    assert isinstance(classifier, PositionClassifier)
    return classifier


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed that depends on all the numbers (mixed as in SplitMix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1
