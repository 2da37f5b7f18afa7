"""Scoring: distances to the nearest normal patch, spread into anomaly maps, and combined.

Usable without the detector, with any embeddings::

    from patchsvdd_fast.score import NormalBank, nearest, score_map
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bank import NormalBank
from .encoder import HierarchicalEncoder
from .images import normalize
from .levels import PatchLevel
from .ops import nearest, score_map
from .precision import computing_in

__all__ = [
    "NormalBank",
    "ScoreResult",
    "combine",
    "encode_images",
    "fill_banks",
    "nearest",
    "score_images",
    "score_map",
]

_IMAGES_PER_PASS = 8  # bounds the encoder's memory


@dataclass(frozen=True)
class ScoreResult:
    """Scores of N images, from every patch to the whole image."""

    combination: str
    """How the levels' maps are joined: "mult", "sum", or one level, e.g. "K32"."""
    level_maps: dict[str, Tensor]
    """Per level ("K64", "K32"): anomaly map [N, H, W] float32."""
    distances: dict[str, Tensor] = field(repr=False)
    """Per level: L2 distance of each patch to its nearest normal patch, [N, I, J] float32."""
    bank_rows: dict[str, Tensor] = field(repr=False)
    """Per level: row of that normal patch in the bank, [N, I, J] int64."""
    matches: dict[str, Tensor] = field(repr=False)
    """Per level: where that normal patch came from, [N, I, J, 3] int64: the training image, and row
    and column in its grid of patches (times the level's stride: top and left in pixels)."""

    def map(self, combination: str | None = None) -> Tensor:
        """Anomaly map [N, H, W] under the given combination (default: the result's own)."""
        return combine(self.level_maps, combination or self.combination)

    @property
    def anomaly_map(self) -> Tensor:
        """[N, H, W] float32; higher is more anomalous."""
        return self.map()

    @property
    def image_scores(self) -> Tensor:
        """[N] float32: the maximum of each anomaly map."""
        return self.anomaly_map.amax(dim=(1, 2))


def combinations_of(levels: Sequence[PatchLevel]) -> list[str]:
    """Every way to turn the levels' maps into one: each alone, "sum" and "mult"."""
    return [*(str(level) for level in levels), "sum", "mult"]


def combine(level_maps: Mapping[str, Tensor], combination: str) -> Tensor:
    """Join the levels' maps [N, H, W]: their product ("mult"), sum ("sum"), or one by name."""
    if combination in level_maps:
        return level_maps[combination]
    stacked = torch.stack(list(level_maps.values()))
    if combination == "mult":
        return stacked.prod(dim=0)
    if combination == "sum":
        return stacked.sum(dim=0)
    raise ValueError(
        f"combination must be one of {[*level_maps, 'sum', 'mult']}, got {combination!r}"
    )


@torch.no_grad()
def encode_images(
    encoder: HierarchicalEncoder, images: Tensor, mean: Tensor, levels: Sequence[PatchLevel]
) -> list[Tensor]:
    """Embed every patch of every level: uint8 [N, 3, H, W] -> one [N, I, J, D] per level.

    mean: [3, H, W] float32. The result lies on the encoder's device.
    """
    if images.shape[1:] != mean.shape:
        raise ValueError(
            f"images must have shape [N, {', '.join(map(str, mean.shape))}] as in training, "
            f"got {list(images.shape)}"
        )
    device = next(encoder.parameters()).device
    mean = mean.to(device)
    with computing_in("float32", device):
        passes = [
            encoder.dense(normalize(chunk.to(device), mean), levels)
            for chunk in images.split(_IMAGES_PER_PASS)
        ]
    return [torch.cat(parts) for parts in zip(*passes, strict=True)]


def fill_banks(
    encoder: HierarchicalEncoder,
    images: Tensor,
    mean: Tensor,
    levels: Sequence[PatchLevel],
    seed: int = 0,
) -> dict[PatchLevel, NormalBank]:
    """A bank per level of all patches of uint8 images [N, 3, H, W]; mean: [3, H, W] float32.

    seed: of the banks' clustering, which changes no answer.
    """
    encoded = encode_images(encoder, images, mean, levels)
    return {
        level: NormalBank(values, seed=seed) for level, values in zip(levels, encoded, strict=True)
    }


def score_images(
    encoder: HierarchicalEncoder,
    banks: Mapping[PatchLevel, NormalBank],
    images: Tensor,
    mean: Tensor,
    combination: str = "mult",
) -> ScoreResult:
    """Score uint8 images [N, 3, H, W] against a bank per level; results lie on the CPU."""
    levels = list(banks)
    if combination not in combinations_of(levels):
        raise ValueError(
            f"combination must be one of {combinations_of(levels)}, got {combination!r}"
        )
    height, width = images.shape[-2:]
    maps, distances, rows, matches = {}, {}, {}, {}
    for level, embeddings in zip(levels, encode_images(encoder, images, mean, levels), strict=True):
        found, row = banks[level].nearest(embeddings)  # [N, I, J]
        name = str(level)
        maps[name] = score_map(found, level.size, level.stride, height, width).cpu()
        distances[name], rows[name] = found.cpu(), row.cpu()
        matches[name] = banks[level].source(row).cpu()
    return ScoreResult(combination, maps, distances, rows, matches)
