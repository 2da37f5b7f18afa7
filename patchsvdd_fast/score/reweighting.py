"""PatchCore's re-weighting of an image's score, by how alone its nearest normal patch is.

Equation 7 of Roth et al. 2022 (https://arxiv.org/abs/2106.08265). Let q be the patch of the image
that is farthest from the bank, m its nearest bank row, and N(m) the `reweight` bank rows nearest to
m, itself among them. The image's score is multiplied by

    w = 1 - exp(|q - m|) / sum over n in N(m) of exp(|q - n|).

As m is the nearest, w lies between 1 - 1 / `reweight` and 1: near the lower end where all of N(m)
is about as far from q as m is, near 1 where m is alone. Distances enter as they are, so the factor
says more the larger an encoder's embeddings are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..ops.checks import check_int
from ..ops.search_kernels import MOST_NEIGHBOURS
from ..search.rounds import AnyBank, nearest


def check_reweight(reweight: Any, levels: Sequence[PatchLevel]) -> None:
    """Raise ValueError or TypeError for what is not None and no number of neighbours to take.

    One neighbour alone, m itself, would make every score 0. The equation knows one bank only, so
    several levels are refused.
    """
    if reweight is None:
        return
    check_int("reweight", reweight, 2, MOST_NEIGHBOURS)
    if len(levels) != 1:
        raise ValueError(
            "reweight is for a single patch level, as pretrained encoders have, "
            f"got {', '.join(map(str, levels))}"
        )


def image_weights(
    bank: AnyBank,
    embeddings: Tensor,
    values: Tensor,
    reweight: int,
    groups: Tensor | None = None,
) -> Tensor:
    """The factor w of each image's score, [N] float64 on the CPU.

    embeddings: [N, I, J, D] float32 of the images' patches, on the bank's device.
    values: [N, I, J], the distances of these patches as maps show them; q is the patch with the
        largest, the first of equal ones.
    reweight: how many bank rows N(m) has, 2 to 32.
    groups: [N] int64, one per image: neither m nor N(m) are rows of that group.

    A bank with fewer rows that may be matched is taken whole; with one or none, w is 1.
    """
    highest = values.flatten(1).argmax(dim=1).to(embeddings.device)
    images = torch.arange(len(embeddings), device=embeddings.device)
    queries = embeddings.flatten(1, 2)[images, highest]  # [N, D]
    _, own_rows = nearest(bank, queries, exclude_same_group=groups)
    matched = bank.embeddings_of(own_rows.clamp(min=0)).float()
    # Of rows equal to m others may be found instead of it, at the same distance.
    _, rows = nearest(bank, matched, k=reweight, exclude_same_group=groups)  # [N, reweight]
    around = bank.embeddings_of(rows.clamp(min=0)).double()
    distances = (queries.double()[:, None] - around).norm(dim=-1)
    distances = torch.where(rows >= 0, distances, -torch.inf)  # adds nothing to the sum
    own = (queries.double() - matched.double()).norm(dim=-1, keepdim=True)
    largest = distances.amax(dim=1, keepdim=True)
    share = (own - largest).exp() / (distances - largest).exp().sum(dim=1, keepdim=True)
    alone = (rows >= 0).sum(dim=1) < 2
    return (1 - share[:, 0]).where(~alone, 1.0).cpu()
