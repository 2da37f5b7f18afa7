"""The two losses of Patch SVDD: the relative-position classifier and SVDD'."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..encoders.patch_svdd import LEAKY_SLOPE

NUM_POSITIONS = 8
_HIDDEN = 128


class PositionClassifier(nn.Module):
    """Tells from two embeddings [B, D] in which of 8 directions the second patch lies: [B, 8].

    Works on the difference of the embeddings (Doersch et al. 2015). By default the last layer is
    as in the paper's implementation: its weight is divided by its norm over the classes and gets
    no gradient, a fixed random projection of which only the bias learns. `train_last_layer` makes
    it an ordinary linear layer.
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
    """SVDD': mean Euclidean distance between embeddings [B, D] of neighbouring patches."""
    return torch.linalg.vector_norm(first - second, dim=1).mean()


def position_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [B, 8] against the directions [B] (int64)."""
    return F.cross_entropy(logits, labels)
