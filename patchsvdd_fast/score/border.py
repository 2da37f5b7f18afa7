"""Distances near an image's border, where an encoder that pads sees its own padding.

There fewer normal patches have embeddings alike, for they, too, lie near a border. So distances are
larger, and the highest of an image would mostly be found there. Each ring of patches around the
image is therefore divided by how much larger the good images' distances are in it than inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

RINGS = 4
"""Rings of patches that are corrected, from the border inwards."""

MOST = 4.0
"""The largest factor: padding makes distances larger by less than that. Where good images differ
much more near the border than inside, that is their nature."""

_LEAST_INSIDE = 4  # patches; fewer say little of the images


def ring_means(distances: Tensor) -> Tensor:
    """Mean distance in each ring of each image, and inside of them all.

    distances: [N, I, J]. Returns [N, RINGS + 1] float64; all are 1 if the grid is too small to have
    an inside of some patches.
    """
    count, rows, columns = distances.shape
    rings = _rings(rows, columns, torch.device("cpu"))
    sizes = torch.bincount(rings.flatten(), minlength=RINGS + 1)
    if sizes[-1] < _LEAST_INSIDE:
        return torch.ones(count, RINGS + 1, dtype=torch.float64)
    sums = torch.zeros(count, RINGS + 1, dtype=torch.float64)
    sums.index_add_(1, rings.flatten(), distances.cpu().flatten(1).double())
    return sums / sizes


def border_factors(means: Tensor) -> Tensor:
    """How much larger distances are in each ring than inside, 1 to `MOST`.

    means: [..., RINGS + 1], of `ring_means`, averaged over images. Returns [..., RINGS] float64.
    """
    inside = means[..., -1:].clamp(min=1e-30)
    return (means[..., :-1] / inside).clamp(min=1, max=MOST)


def corrected(distances: Tensor, factors: Tensor) -> Tensor:
    """Distances [N, I, J], divided by the factor of their ring: [RINGS], or [N, RINGS]."""
    rows, columns = distances.shape[1:]
    return distances / factors_by_place(factors.to(distances), rows, columns)


def factors_by_place(factors: Tensor, rows: int, columns: int) -> Tensor:
    """The factor of each place of a grid, 1 inside: [..., RINGS] -> [..., rows, columns]."""
    padded = torch.cat([factors, torch.ones_like(factors[..., :1])], dim=-1)
    return padded[..., _rings(rows, columns, factors.device)]


def _rings(rows: int, columns: int, device: torch.device) -> Tensor:
    """The ring of each place of a grid, [rows, columns] int64; inside it is RINGS."""
    up, aside = torch.arange(rows, device=device), torch.arange(columns, device=device)
    down = torch.minimum(up, rows - 1 - up)[:, None]
    across = torch.minimum(aside, columns - 1 - aside)[None]
    return torch.minimum(down, across).clamp(max=RINGS)
