"""The BLAS of the peers: it has to run the best kernels that this processor allows.

FAISS's wheel brings an OpenBLAS that is too old to know recent processors, and takes kernels there
that are several times slower than need be. A ratio to such a peer says nothing, so it is not
published.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

_VARIABLE = "OPENBLAS_CORETYPE"
# By what a processor must have, best first: the kernels to ask OpenBLAS for, and all as good.
_KERNELS = (
    ("avx512bw", "SKYLAKEX", ("skylakex", "cooperlake", "sapphirerapids")),
    ("avx2", "HASWELL", ("haswell", "zen")),
)


def restart_with_best_kernels() -> None:
    """Start this program anew with the kernels named in the environment, unless they are.

    They count when a library is loaded, which has happened by now. Call it before anything else.
    """
    wanted, _ = _best()
    if wanted and os.environ.get(_VARIABLE, "").upper() != wanted:
        os.environ[_VARIABLE] = wanted
        os.execv(sys.executable, [sys.executable, *sys.argv])


def libraries() -> list[dict[str, Any]]:
    """What each BLAS that is loaded says of itself; [] if threadpoolctl is not installed."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return []
    return [
        {
            "of": Path(entry["filepath"]).parent.name.removesuffix(".libs"),
            "name": entry["internal_api"],
            **{key: entry.get(key) for key in ("version", "architecture", "num_threads")},
        }
        for entry in threadpool_info()
        if entry["user_api"] == "blas"
    ]


def require_best_kernels(loaded: list[dict[str, Any]]) -> None:
    """Raise RuntimeError if an OpenBLAS among those of `libraries` runs others."""
    wanted, good = _best()
    for library in loaded:
        found = str(library["architecture"])
        if library["name"] == "openblas" and good and found.lower() not in good:
            raise RuntimeError(
                f"no ratio is published: the OpenBLAS {library['version']} of {library['of']} runs "
                f"its {found} kernels, this processor has better ones ({_VARIABLE}={wanted})"
            )


def _best() -> tuple[str, tuple[str, ...]]:
    """The kernels to ask for, and the names of all that are as good; empty if unknown."""
    described = Path("/proc/cpuinfo")
    features = set(described.read_text().split()) if described.exists() else set()
    return next(((name, good) for has, name, good in _KERNELS if has in features), ("", ()))
