"""Patch SVDD anomaly detection with exact nearest-neighbour search.

from patchsvdd_fast import PatchSVDD

detector = PatchSVDD(epochs=10).fit("images/good")
result = detector.score("images/new")
result.image_scores, result.anomaly_map
"""

from importlib.metadata import PackageNotFoundError, version

from .detector.patch_svdd import PatchSVDD
from .encoders.levels import PatchLevel
from .encoders.patch_svdd import HierarchicalEncoder, load_official_checkpoint
from .score.encoding import NormalBank, ScoreResult, nearest, score_map

try:
    __version__ = version("patchsvdd-fast")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "unknown"

__all__ = [
    "HierarchicalEncoder",
    "NormalBank",
    "PatchLevel",
    "PatchSVDD",
    "ScoreResult",
    "__version__",
    "load_official_checkpoint",
    "nearest",
    "score_map",
]
