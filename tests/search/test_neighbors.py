"""scikit-learn's view of the search: its own checks, its transformer's answers, its pipelines."""

import copy
import pickle

import numpy as np
import pytest
import sklearn
from scipy import sparse
from sklearn.base import clone
from sklearn.cluster import DBSCAN
from sklearn.exceptions import NotFittedError
from sklearn.manifold import TSNE
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier, KNeighborsTransformer
from sklearn.neighbors import sort_graph_by_row_values as sorted_by_scikit_learn
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks
from threadpoolctl import threadpool_limits

from patchsvdd_fast import NormalBank, nearest
from patchsvdd_fast.search.neighbors import ExactKNeighborsTransformer

MODES = ["distance", "connectivity"]


@parametrize_with_checks(
    [
        ExactKNeighborsTransformer(),
        ExactKNeighborsTransformer(mode="connectivity"),
        ExactKNeighborsTransformer(n_neighbors=1, seed=3),
    ]
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.fixture
def points():
    """Points [300, 12] whose neighbours lie at distances that no rounding confuses."""
    return np.random.default_rng(0).normal(size=(300, 12)).astype(np.float32)


@pytest.fixture
def new_points():
    return np.random.default_rng(1).normal(size=(40, 12)).astype(np.float32)


@pytest.fixture
def blobs():
    """Points [240, 8] in four groups far apart, and their groups [240]."""
    rng = np.random.default_rng(2)
    labels = np.arange(240) % 4
    centres = 20 * np.eye(8)[:4]
    return centres[labels] + rng.normal(size=(240, 8)), labels


def pickled(estimator):
    return pickle.loads(pickle.dumps(estimator))


def theirs_of(**parameters):
    return KNeighborsTransformer(algorithm="brute", **parameters)


def assert_same_graph(ours, theirs):
    """The same neighbours in the same order; distances up to their rounding."""
    assert ours.format == "csr" and ours.shape == theirs.shape
    assert np.array_equal(ours.indptr, theirs.indptr)
    assert np.array_equal(ours.indices, theirs.indices)
    # scikit-learn adds up squared norms in float64, so a point is near 0 from itself, not at 0.
    np.testing.assert_allclose(ours.data, theirs.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 5, 31])
def test_graphs_have_the_neighbours_of_scikit_learns_transformer(points, new_points, mode, count):
    ours = ExactKNeighborsTransformer(mode=mode, n_neighbors=count)
    theirs = theirs_of(mode=mode, n_neighbors=count)
    assert_same_graph(ours.fit_transform(points), theirs.fit_transform(points))
    assert_same_graph(ours.transform(new_points), theirs.transform(new_points))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [None, 1, 32])
def test_kneighbors_are_those_of_scikit_learn(points, new_points, mode, count):
    ours, theirs = ExactKNeighborsTransformer().fit(points), theirs_of().fit(points)
    for queries in (None, points, new_points):
        distances, indices = ours.kneighbors(queries, count)
        their_distances, their_indices = theirs.kneighbors(queries, count)
        assert np.array_equal(indices, their_indices)
        np.testing.assert_allclose(distances, their_distances, rtol=1e-5, atol=1e-6)
        assert (distances.dtype, indices.dtype) == (np.float32, np.int64)
        assert np.array_equal(ours.kneighbors(queries, count, return_distance=False), indices)
        graph = ours.kneighbors_graph(queries, count, mode=mode)
        assert_same_graph(graph, theirs.kneighbors_graph(queries, count, mode=mode))
        assert graph.dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.uint8, bool, object])
def test_points_of_any_real_dtype_are_rounded_once(points, new_points, dtype):
    scaled, new = (40 * points + 100).astype(dtype), (40 * new_points + 100).astype(dtype)
    found = ExactKNeighborsTransformer(n_neighbors=3).fit(scaled).kneighbors(new)
    expected = nearest(new.astype(np.float32), scaled.astype(np.float32), k=3)
    for ours, canonical in zip(found, expected, strict=True):
        assert np.array_equal(ours, canonical)
    lists = ExactKNeighborsTransformer(n_neighbors=3).fit(scaled.tolist()).kneighbors(new.tolist())
    assert np.array_equal(lists[1], expected[1])


def test_a_bank_with_clusters_gives_the_same_graphs():
    rng = np.random.default_rng(4)
    centres = 10 * rng.normal(size=(30, 16))
    labels = rng.integers(30, size=3000)
    points = (centres[labels] + rng.normal(size=(3000, 16))).astype(np.float32)
    plain = ExactKNeighborsTransformer().fit(points)
    clustered = copy.copy(plain)
    clustered.bank_ = NormalBank(points, clusters=30)  # else its speed decides
    assert clustered.bank_.num_clusters > 20
    plain.bank_ = NormalBank(points, clusters=0)
    for transformer in (clustered, pickled(clustered)):
        assert transformer.bank_.num_clusters == clustered.bank_.num_clusters
        for queries in (None, points):
            graph = transformer.kneighbors_graph(queries, mode="distance")
            expected = plain.kneighbors_graph(queries, mode="distance")
            assert np.array_equal(graph.indices, expected.indices)
            assert np.array_equal(graph.data, expected.data)


def test_equal_points_are_neighbours_at_distance_0_and_none_is_its_own():
    points = np.repeat(np.array([[0.0, 0.0], [3.0, 4.0]]), [3, 2], axis=0)
    transformer = ExactKNeighborsTransformer(n_neighbors=2).fit(points)
    distances, indices = transformer.kneighbors()
    assert indices.tolist() == [[1, 2], [0, 2], [0, 1], [4, 0], [3, 0]]
    assert distances.tolist() == [[0, 0], [0, 0], [0, 0], [0, 5], [0, 5]]
    graph = transformer.transform(points)
    assert graph.nnz == 15
    assert graph.indices.reshape(5, 3).tolist() == [[0, 1, 2]] * 3 + [[3, 4, 0]] * 2
    assert graph.data.reshape(5, 3).tolist() == [[0, 0, 0]] * 3 + [[0, 0, 5]] * 2  # zeros are kept
    assert (np.diff(graph.data.reshape(5, 3)) >= 0).all()
    assert sorted_by_scikit_learn(graph, warn_when_not_sorted=True) is graph


def test_the_array_that_was_fitted_may_change_and_none_is_written_to(points):
    given = points.copy()
    transformer = ExactKNeighborsTransformer().fit(given)
    before = transformer.kneighbors(points)
    given[:] = 0
    assert np.array_equal(transformer.kneighbors(points)[0], before[0])


@pytest.mark.filterwarnings("error")
def test_arrays_may_be_read_only(points):
    expected = ExactKNeighborsTransformer().fit_transform(points)
    points.flags.writeable = False
    assert (ExactKNeighborsTransformer().fit_transform(points) != expected).nnz == 0


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"mode": "distances"}, ValueError, "mode must be 'distance' or 'connectivity', got"),
        ({"n_neighbors": 0}, ValueError, r"n_neighbors must be in \[1, 32\], got 0"),
        (
            {"n_neighbors": 33, "mode": "connectivity"},
            ValueError,
            r"n_neighbors must be in \[1, 32\], got 33",
        ),
        (
            {"n_neighbors": 32},
            ValueError,
            r"in \[1, 31\] in mode 'distance', whose graphs hold one neighbour more, got 32",
        ),
        ({"n_neighbors": 2.0}, TypeError, "n_neighbors must be an integer, got 2.0"),
        ({"n_neighbors": True}, TypeError, "n_neighbors must be an integer, got True"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"seed": None}, TypeError, "seed must be an integer, got None"),
    ],
)
def test_parameters_are_checked_in_fit_and_kept_as_given(points, parameters, error, message):
    transformer = ExactKNeighborsTransformer(**parameters)
    name, value = next(iter(parameters.items()))
    assert transformer.get_params()[name] is value
    with pytest.raises(error, match=message):
        transformer.fit(points)


def test_parameters_changed_after_fit_are_checked_again(points):
    transformer = ExactKNeighborsTransformer(mode="connectivity", n_neighbors=32).fit(points)
    assert transformer.transform(points[:2]).nnz == 64
    transformer.set_params(mode="distance")
    with pytest.raises(ValueError, match="one neighbour more, got 32"):
        transformer.transform(points)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_neighbors": 33}, ValueError, r"n_neighbors must be in \[1, 32\], got 33"),
        ({"n_neighbors": 0}, ValueError, r"n_neighbors must be in \[1, 32\], got 0"),
        ({"n_neighbors": 1.5}, TypeError, "n_neighbors must be an integer, got 1.5"),
        ({"n_neighbors": 10}, ValueError, "Expected n_neighbors < n_samples_fit, but n_neighb.*10"),
        (
            {"X": np.zeros((3, 12)), "n_neighbors": 11},
            ValueError,
            "Expected n_neighbors <= n_samples_fit, but n_neighbors = 11, n_samples_fit = 10, "
            "n_samples = 3",
        ),
        ({"X": np.zeros((3, 11))}, ValueError, "11 features, but .* is expecting 12"),
        ({"X": np.full((1, 12), np.nan)}, ValueError, "NaN"),
        ({"X": np.full((1, 12), 1e300)}, ValueError, "too large for dtype.*float32"),
        ({"X": np.ones((1, 12), complex)}, ValueError, "Complex data not supported"),
        ({"X": sparse.csr_matrix((3, 12))}, TypeError, "[Ss]parse"),
        ({"X": np.zeros((0, 12))}, ValueError, "0 sample"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_does_not_fit_is_refused(points, arguments, error, message):
    transformer = ExactKNeighborsTransformer().fit(points[:10])
    with pytest.raises(error, match=message):
        transformer.kneighbors(**arguments)
    if "X" in arguments and arguments["X"].shape[1] == 12 and "n_neighbors" not in arguments:
        with pytest.raises(error, match=message):
            clone(transformer).fit(arguments["X"])


def test_a_graph_of_another_mode_is_refused(points):
    transformer = ExactKNeighborsTransformer().fit(points)
    with pytest.raises(ValueError, match="mode must be 'distance' or 'connectivity', got 'both'"):
        transformer.kneighbors_graph(mode="both")


def test_few_points_can_be_fitted_but_not_searched_for_more():
    transformer = ExactKNeighborsTransformer(n_neighbors=5).fit(np.eye(5))
    assert transformer.kneighbors(np.eye(5))[1].shape == (5, 5)
    with pytest.raises(ValueError, match="n_neighbors = 6, n_samples_fit = 5"):
        transformer.transform(np.eye(5))


def test_an_estimator_that_was_not_fitted_says_so(points):
    transformer = ExactKNeighborsTransformer()
    for method in (transformer.kneighbors, transformer.kneighbors_graph, transformer.transform):
        with pytest.raises(NotFittedError):
            method(points)


def test_the_graph_is_of_the_kind_that_scikit_learn_is_set_to(points):
    transformer = ExactKNeighborsTransformer().fit(points)
    assert sparse.isspmatrix_csr(transformer.transform(points))
    if "sparse_interface" in sklearn.get_config():
        with sklearn.config_context(sparse_interface="sparray"):
            graph = transformer.transform(points)
        assert isinstance(graph, sparse.csr_array)


def test_names_of_columns_are_kept(points):
    pyarrow = pytest.importorskip("pyarrow")
    columns = [f"x{i}" for i in range(12)]
    table = pyarrow.table(dict(zip(columns, points.T, strict=True)))
    transformer = ExactKNeighborsTransformer().fit(table)
    assert transformer.feature_names_in_.tolist() == columns
    assert np.array_equal(
        transformer.transform(table).indices,
        ExactKNeighborsTransformer().fit_transform(points).indices,
    )
    with pytest.raises(ValueError, match="feature names"):
        transformer.transform(table.select(columns[::-1]))


def test_names_of_the_graphs_columns(points):
    transformer = ExactKNeighborsTransformer().fit(points)
    names = transformer.get_feature_names_out()
    assert len(names) == transformer.n_samples_fit_ == 300 and transformer.n_features_in_ == 12
    assert names[299] == "exactkneighborstransformer299"


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
def test_copies_and_pickles_answer_alike(points, new_points, duplicate):
    transformer = ExactKNeighborsTransformer(n_neighbors=4, seed=7).fit(points)
    again = duplicate(transformer)
    assert again.get_params() == transformer.get_params()
    assert again.n_samples_fit_ == 300 and isinstance(again.bank_, NormalBank)
    for before, after in zip(
        transformer.kneighbors(new_points), again.kneighbors(new_points), strict=True
    ):
        assert np.array_equal(before, after)
    assert isinstance(transformer.bank_, NormalBank)  # what was pickled is as it was


def test_a_clone_is_not_fitted(points):
    for transformer in (ExactKNeighborsTransformer(seed=7), pickled(ExactKNeighborsTransformer())):
        copied = clone(transformer.fit(points))
        assert copied.get_params() == transformer.get_params()
        assert not hasattr(copied, "bank_")


# --- in scikit-learn's pipelines, as its user guide has them --------------------------------------


def test_classifying_with_a_graph_equals_classifying_with_points(blobs, tmp_path):
    X, labels = blobs
    X += 6 * np.random.default_rng(5).normal(size=X.shape)  # so that not all are right
    pipeline = make_pipeline(
        ExactKNeighborsTransformer(n_neighbors=7, mode="distance"),
        KNeighborsClassifier(n_neighbors=7, metric="precomputed"),
        memory=str(tmp_path),
    )
    direct = KNeighborsClassifier(n_neighbors=7, algorithm="brute").fit(X[:160], labels[:160])
    predicted = pipeline.fit(X[:160], labels[:160]).predict(X[160:])
    assert np.array_equal(predicted, direct.predict(X[160:]))
    assert 0.4 < (predicted == labels[160:]).mean() < 1
    search = GridSearchCV(pipeline, {"kneighborsclassifier__n_neighbors": [1, 3, 7]}, cv=3)
    plain = GridSearchCV(direct, {"n_neighbors": [1, 3, 7]}, cv=3)
    ours, theirs = search.fit(X, labels).cv_results_, plain.fit(X, labels).cv_results_
    assert np.array_equal(ours["mean_test_score"], theirs["mean_test_score"])


def test_clustering_a_graph_finds_the_clusters(blobs):
    X, labels = blobs
    pipeline = make_pipeline(
        ExactKNeighborsTransformer(n_neighbors=20, mode="distance"),
        DBSCAN(eps=3.5, min_samples=5, metric="precomputed"),
    )
    found = pipeline.fit_predict(X)
    assert set(found) - {-1} == {0, 1, 2, 3}
    for cluster in range(4):
        assert len(set(labels[found == cluster])) == 1
    with_theirs = DBSCAN(eps=3.5, min_samples=5, metric="precomputed").fit_predict(
        theirs_of(n_neighbors=20).fit_transform(X)
    )
    assert np.array_equal(found, with_theirs)


def test_tsne_of_a_graph_keeps_the_groups_apart(blobs):
    X, labels = (values[:160] for values in blobs)
    perplexity = 10  # takes 3 * 10 + 1 neighbours: the most that a graph holds
    pipeline = make_pipeline(
        ExactKNeighborsTransformer(n_neighbors=31),
        TSNE(init="random", perplexity=perplexity, metric="precomputed", random_state=0),
    )
    with threadpool_limits(1):  # more wait for each other on a busy machine
        placed = pipeline.fit_transform(X)
    assert placed.shape == (160, 2)
    own = KNeighborsClassifier(n_neighbors=5).fit(placed, labels)
    assert own.score(placed, labels) == 1
