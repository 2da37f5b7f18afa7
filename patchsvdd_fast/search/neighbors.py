"""scikit-learn's view of the search: a transformer from points to the graph of their neighbours.

This file imports scikit-learn, which the search does without: so no other file here imports it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn import get_config
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..ops.checks import check_int
from ..ops.search_kernels import MOST_NEIGHBOURS
from .bank import NormalBank

_MODES = ("distance", "connectivity")


class ExactKNeighborsTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """scikit-learn's `KNeighborsTransformer` over the exact search: Euclidean, on the CPU.

    Parameters:
        mode: of `transform`: "distance", graphs of distances; "connectivity", graphs of ones.
        n_neighbors: how many neighbours each point has in a graph, 1 to 32. Graphs of distances
            hold one more, as in scikit-learn, where each training point counts as its own
            neighbour: so at most 31 in mode "distance".
        seed: of the clustering. It changes the speed, not the answers.

    Points (`X`) are array-like, [n, D], of any real dtype, dense and finite. They are rounded to
    float32, each value once, and neighbours are exact for the rounded points: what float32 does not
    tell apart, such as small differences far from zero, is at distance 0. Of equally near points
    the one fitted first comes first.

    Distances and graphs are float32. A distance whose square is beyond float32 is infinity.
    Indices are int64; those in a graph are as SciPy chooses. Threads are torch's.

    After `fit`: `bank_` (the NormalBank that is searched), `n_samples_fit_`, `n_features_in_`, and
    `feature_names_in_` if X had names of columns. `get_feature_names_out` and `set_output` are
    scikit-learn's. Fitted estimators can be pickled.

    Raises TypeError or ValueError in `fit` for parameters out of range, and wherever points do not
    have the form above; scikit-learn's NotFittedError before `fit`.
    """

    def __init__(self, *, mode: str = "distance", n_neighbors: int = 5, seed: int = 0) -> None:
        self.mode = mode
        self.n_neighbors = n_neighbors
        self.seed = seed

    def fit(self, X: Any, y: Any = None) -> ExactKNeighborsTransformer:  # noqa: N803
        """Keep a copy of the points [n, D] for searching, in float32; y is ignored."""
        self._check_parameters()
        points = self._points(X, reset=True)
        self.bank_ = NormalBank(points, seed=self.seed)
        self.n_samples_fit_ = len(points)
        self._n_features_out = len(points)
        return self

    def kneighbors(
        self,
        X: Any = None,  # noqa: N803
        n_neighbors: int | None = None,
        return_distance: bool = True,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]] | npt.NDArray[np.int64]:
        """The nearest fitted points of each point, nearest first.

        X: [n, D]; None: the fitted points, none of which counts as its own neighbour.
        n_neighbors: K, how many, 1 to 32; None: as the estimator says.
        return_distance: False: indices only.

        Returns distances [n, K] float32 and indices [n, K] int64. Raises ValueError if there are
        not so many fitted points.
        """
        check_is_fitted(self)
        count = self._neighbours(n_neighbors)
        fitted = self.n_samples_fit_
        queries: Tensor | npt.NDArray[np.float32]
        own = None
        if X is None:
            queries, own = self.bank_.embeddings, self.bank_.groups
        else:
            queries = self._points(X, reset=False)
        if count > fitted - (own is not None):
            relation = "<=" if own is None else "<"
            raise ValueError(
                f"Expected n_neighbors {relation} n_samples_fit, but n_neighbors = {count}, "
                f"n_samples_fit = {fitted}, n_samples = {len(queries)}"  # scikit-learn's words
            )
        found = self.bank_.nearest(queries, k=count, exclude_same_group=own)
        distances, indices = (np.asarray(values) for values in found)
        return (distances, indices) if return_distance else indices

    def kneighbors_graph(
        self,
        X: Any = None,  # noqa: N803
        n_neighbors: int | None = None,
        mode: str = "connectivity",
    ) -> Any:
        """The neighbours of each point as a sparse graph.

        X, n_neighbors: as for `kneighbors`.
        mode: "connectivity": ones for neighbours; "distance": their distances.

        Returns a CSR matrix [n, M] float32 for M fitted points (a CSR array if scikit-learn is
        configured so) with K entries in each row, nearest first. Distances of 0 are entries, too.
        """
        check_is_fitted(self)
        _check_mode(mode)
        distances, indices = self.kneighbors(X, n_neighbors)
        rows, count = indices.shape
        values = np.ones_like(distances) if mode == "connectivity" else distances
        starts = np.arange(0, rows * count + 1, count)
        as_array = get_config().get("sparse_interface") == "sparray"  # from scikit-learn 1.9 on
        make = sparse.csr_array if as_array else sparse.csr_matrix
        return make((values.ravel(), indices.ravel(), starts), shape=(rows, self.n_samples_fit_))

    def transform(self, X: Any) -> Any:  # noqa: N803
        """The graph from points [n, D] to the fitted ones, see `kneighbors_graph`.

        Each row has `n_neighbors` entries, in mode "distance" one more. A fitted point is its own
        first neighbour, at distance 0, but for points equal to it that were fitted before it.
        """
        check_is_fitted(self)
        self._check_parameters()
        return self.kneighbors_graph(X, self.n_neighbors + (self.mode == "distance"), self.mode)

    def fit_transform(self, X: Any, y: Any = None) -> Any:  # noqa: N803
        """`fit(X).transform(X)`: the graph of the points [n, D] among themselves."""
        return self.fit(X).transform(X)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _more_tags(self) -> dict[str, Any]:
        """The same for scikit-learn before 1.6."""
        return {"preserves_dtype": [np.float32]}

    def __getstate__(self) -> dict[str, Any]:
        """With the bank as its named tensors, a form that later versions can read."""
        state = dict(super().__getstate__())
        if "bank_" in state:
            state["bank_"] = state["bank_"].state_dict()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "bank_" in state:
            state = {**state, "bank_": NormalBank.from_state_dict(state["bank_"])}
        super().__setstate__(state)

    def _check_parameters(self) -> None:
        _check_mode(self.mode)
        count = check_int("n_neighbors", self.n_neighbors, 1, MOST_NEIGHBOURS)
        if self.mode == "distance" and count == MOST_NEIGHBOURS:
            raise ValueError(
                f"n_neighbors must be in [1, {MOST_NEIGHBOURS - 1}] in mode 'distance', whose "
                f"graphs hold one neighbour more, got {count}"
            )

    def _neighbours(self, n_neighbors: int | None) -> int:
        given = self.n_neighbors if n_neighbors is None else n_neighbors
        return check_int("n_neighbors", given, 1, MOST_NEIGHBOURS)

    def _points(self, X: Any, reset: bool) -> npt.NDArray[np.float32]:  # noqa: N803
        """Checked points [n, D]. reset: these are fitted, so a copy; else they must fit."""
        with np.errstate(over="ignore"):  # what is infinite in float32 is refused next
            points = _validated(self, X, reset=reset, dtype=np.float32, order="C", copy=reset)
        # Torch warns of memory that cannot be written to.
        return points if points.flags.writeable else points.copy()


def _check_mode(mode: str) -> None:
    if mode not in _MODES:
        raise ValueError(f"mode must be {' or '.join(map(repr, _MODES))}, got {mode!r}")


def _validated(estimator: Any, X: Any, **options: Any) -> npt.NDArray[np.float32]:  # noqa: N803
    """scikit-learn's `validate_data`, which was a method before version 1.6."""
    try:
        from sklearn.utils.validation import validate_data
    except ImportError:
        return estimator._validate_data(X, **options)
    return validate_data(estimator, X, **options)
