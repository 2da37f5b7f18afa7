"""The memory bank: embeddings of normal patches, searched exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .validation import check_dtype, check_finite_rows, check_shape


class NormalBank:
    """Holds the embeddings of normal patches and finds the nearest to a query, exactly.

    embeddings: [M, D] float32, finite, M >= 1; kept on their device and not copied if contiguous.
    Raises ValueError naming the first row that holds NaN or infinity.
    """

    def __init__(self, embeddings: Tensor) -> None:
        check_shape("embeddings", embeddings, "M, D")
        check_dtype("embeddings", embeddings, torch.float32)
        if embeddings.numel() == 0:
            raise ValueError(f"a bank needs at least one embedding, got {list(embeddings.shape)}")
        check_finite_rows("embeddings", embeddings)
        self.embeddings = embeddings.detach().contiguous()

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    def __repr__(self) -> str:
        return f"NormalBank({len(self):,} x {self.dim}, {self.embeddings.device})"

    @property
    def dim(self) -> int:
        """D, the length of an embedding."""
        return self.embeddings.shape[1]

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """L2 distance [...] float32 and bank row [...] int64 nearest to each query [..., D].

        The lowest row wins a tie. Raises ValueError for NaN or infinity in a query.
        """
        if queries.ndim < 1 or queries.shape[-1] != self.dim:
            raise ValueError(
                f"queries must have shape [..., {self.dim}] to match the bank, "
                f"got {list(queries.shape)}"
            )
        distances, rows = ops.nearest(queries.reshape(-1, self.dim), self.embeddings)
        return distances.view(queries.shape[:-1]), rows.view(queries.shape[:-1])
