"""Scoring: distances to the nearest normal patches, made into anomaly maps and combined.

Usable without the detector, with any embeddings::

    from patchsvdd_fast.score import NormalBank, nearest, score_map
"""

from ..ops import nearest, score_map
from ..search.bank import NormalBank
from .encoding import use_encoding_limit
from .maps import ScoreResult, combine, search_levels

__all__ = [
    "NormalBank",
    "ScoreResult",
    "combine",
    "nearest",
    "score_map",
    "search_levels",
    "use_encoding_limit",
]
