"""Patch SVDD anomaly detection with exact nearest-neighbour search.

from patchsvdd_fast import PatchSVDD

detector = PatchSVDD(mode="dense").fit("images/good")
result = detector.score("images/new")
result.image_scores, result.anomaly_map

Names are imported on first use, so using the search alone does not load the detector.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .detector.categories import CategoryDetectors
    from .detector.patch_svdd import PatchSVDD
    from .encoders.levels import PatchLevel
    from .encoders.patch_svdd import HierarchicalEncoder, load_official_checkpoint
    from .score import NormalBank, ScoreResult, nearest, score_map

    __version__: str

_HOMES = {
    "CategoryDetectors": "detector.categories",
    "HierarchicalEncoder": "encoders.patch_svdd",
    "NormalBank": "score",
    "PatchLevel": "encoders.levels",
    "PatchSVDD": "detector.patch_svdd",
    "ScoreResult": "score",
    "load_official_checkpoint": "encoders.patch_svdd",
    "nearest": "score",
    "score_map": "score",
}

_ROOMS = {
    *("cli", "report", "detector", "training", "score"),
    *("encoders", "search", "images", "ops", "files"),
}

__all__ = [
    "CategoryDetectors",
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


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _installed_version()
    elif name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name in _ROOMS:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _displays() -> Any:
    """How results are shown in notebooks: `report.display`, for methods of results in rooms below.

    Only this face knows that it is the room `report` that draws.
    """
    return import_module(f"{__name__}.report.display")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _installed_version() -> str:
    """From the installed metadata; "unknown" in a source tree that was never installed."""
    try:
        return version("patchsvdd-fast")
    except PackageNotFoundError:
        return "unknown"
