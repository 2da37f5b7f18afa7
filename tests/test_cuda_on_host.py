"""The CUDA kernels, compiled for and run on the host, against the reference and the CPU kernels."""

import contextlib

import pytest
import torch

from equality import assert_same
from grids import GRIDS, PAIRS
from patchsvdd_fast import NormalBank, ops
from patchsvdd_fast.ops import backends, reference
from patchsvdd_fast.ops.checks import Groups
from patchsvdd_fast.ops.gpu_bank import visit_tile
from patchsvdd_fast.ops.search_kernels import (
    Found,
    coreset_on_cpu,
    coreset_on_gpu,
    search_rows,
    search_segments,
)
from patchsvdd_fast.search import centroids as k_means
from patchsvdd_fast.search import index as index_module
from patchsvdd_fast.search.gpu_clusters import build_segments, segments_about
from patchsvdd_fast.search.larger_than_card import nearest_streamed

CPU = torch.device("cpu")


@pytest.fixture
def on_cuda_kernels(cuda_on_host, monkeypatch):
    """Within the context, ops on CPU tensors run the CUDA kernels."""

    @contextlib.contextmanager
    def use():
        @contextlib.contextmanager
        def backend(tensor):
            assert tensor.device.type == "cpu"
            yield cuda_on_host.cuda, 0

        with monkeypatch.context() as patch:
            patch.setattr(backends, "backend_of", backend)
            yield

    return use


PATCHES = [
    *GRIDS,
    (16, 3, 40, 53),
    (32, 5, 70, 67),
    (64, 16, 80, 97),
    (24, 24, 60, 90),
    (8, 1, 9, 700),
    (2, 1, 720, 4),  # several rows of patches per block
    (4, 3, 6, 6000),  # too wide for one block
]


@pytest.mark.parametrize(("size", "stride", "height", "width"), PATCHES)
def test_extract_patches(on_cuda_kernels, size, stride, height, width):
    for dtype in (torch.uint8, torch.float16, torch.float32, torch.float64):
        images = (torch.rand(2, 3, height, width) * 255).to(dtype)
        mean = None if dtype == torch.float64 else torch.rand(3, height, width)
        for offset in (None, mean):
            with on_cuda_kernels():
                patches = ops.extract_patches(images, size, stride, offset)
            assert torch.equal(patches, reference.extract_patches(images, size, stride, offset))


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [15, 16, 18, 20, 32])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_extract_patches_of_images_at_any_address(on_cuda_kernels, dtype, size, offset):
    shape = (2, 3, 37, 41)
    images = (torch.rand(2 * 3 * 37 * 41 + offset) * 255).to(dtype)[offset:].view(shape)
    assert images.data_ptr() % 16 != 0
    for mean in (None, torch.rand(1 + 3 * 37 * 41)[1:].view(shape[1:])):
        with on_cuda_kernels():
            patches = ops.extract_patches(images, size, 3, mean)
        assert torch.equal(patches, reference.extract_patches(images, size, 3, mean))


def test_extract_patches_longer_than_a_block_can_stage(on_cuda_kernels):
    images = torch.arange(2561 * 2563, dtype=torch.float64).view(1, 1, 2561, 2563)
    with on_cuda_kernels():
        patches = ops.extract_patches(images, 2561, 2)
    assert torch.equal(patches, reference.extract_patches(images, 2561, 2))


def test_normalized_pixels_are_those_of_the_cpu_to_the_bit(on_cuda_kernels):
    """All quotients that an 8-bit pixel and a mean of 16 bits have, and those of extreme means."""
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 1, 256, 256)
    for mean in (
        torch.arange(2**16, dtype=torch.float32).view(1, 256, 256) / 257,
        torch.rand(1, 256, 256) * 10.0 ** torch.randint(-45, 38, (1, 256, 256)),
    ):
        with on_cuda_kernels():
            patches = ops.extract_patches(pixels, 256, 1, mean)
        expected = ops.extract_patches(pixels, 256, 1, mean)
        assert torch.equal(patches.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(("size", "stride", "height", "width"), GRIDS)
def test_extract_patches_backward(on_cuda_kernels, size, stride, height, width):
    rows, columns = (height - size) // stride + 1, (width - size) // stride + 1
    for dtype in (torch.float32, torch.float64):
        gradients = torch.rand(2, rows, columns, 3, size, size, dtype=dtype)
        backward = torch.ops.patchsvdd_fast.extract_patches_backward
        with on_cuda_kernels():
            on_cuda = backward(gradients, stride, height, width)
        assert torch.equal(on_cuda, backward(gradients, stride, height, width))


@pytest.mark.parametrize(
    ("size", "stride", "height", "width"), [*GRIDS, (64, 16, 256, 256), (32, 4, 70, 90)]
)
def test_score_map_is_that_of_the_cpu_to_the_bit(on_cuda_kernels, size, stride, height, width):
    rows, columns = (height - size) // stride + 1, (width - size) // stride + 1
    distances = torch.rand(3, rows, columns) * 10.0 ** torch.randint(-6, 6, (3, rows, columns))
    with on_cuda_kernels():
        on_cuda = ops.score_map(distances, size, stride, height, width)
    assert torch.equal(on_cuda, ops.score_map(distances, size, stride, height, width))


METHODS = ["plain", "screened"]


@pytest.mark.parametrize("dim", [20, 70])
def test_nearest_in_many_chunks(on_cuda_kernels, dim):
    queries, bank = torch.randn(530, dim), torch.randn(800, dim)
    bank[100] = bank[500] = queries[300]
    with on_cuda_kernels(), ops.use_method("screened"), ops.use_workspace_limit(1):
        distances, indices = ops.nearest(queries, bank)
    expected = ops.nearest(queries, bank)
    assert_same((distances, indices), expected, CPU)


@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [1, 5, 16, 33, 64, 65, 100, 130])
@pytest.mark.parametrize("count", [1, 300])
def test_nearest_is_the_canonical_answer_to_the_bit(
    on_cuda_kernels, cuda_on_host, count, dim, method, schedule
):
    queries, bank = torch.randn(count, dim), torch.randn(600, dim)
    bank[40] = bank[70] = bank[590] = queries[0]  # a tie within a segment and across two
    cuda_on_host.cuda.set_schedule(schedule)
    with on_cuda_kernels(), ops.use_method(method):
        distances, indices = ops.nearest(queries, bank)
    expected = ops.nearest(queries, bank)
    assert_same((distances, indices), expected, CPU)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [3, 24])
def test_nearest_is_that_of_the_reference(on_cuda_kernels, dim, method):
    queries, bank = torch.randn(9, dim), torch.randn(80, dim)
    with on_cuda_kernels(), ops.use_method(method):
        distances, indices = ops.nearest(queries, bank)
    expected = reference.nearest(queries, bank)
    assert_same((distances, indices), expected, CPU)


def _tiny_ball(queries, bank):
    """Like trained embeddings: differences of 1e-5 about a point of norm 3."""
    return 0.4 + 1e-5 * queries, 0.4 + 1e-5 * bank


def _outlier(queries, bank):
    bank[5] = 1e6
    queries[3] = -1e8
    return queries, bank


def _too_large_to_screen(queries, bank):
    bank[7] = 3e38
    queries[0] = -3e38
    return queries, bank


def _all_equal(queries, bank):
    return queries * 0 + 1, bank * 0 + 1


def _subnormal(queries, bank):
    return queries * 1e-40, bank * 1e-40


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "change", [_tiny_ball, _outlier, _too_large_to_screen, _all_equal, _subnormal]
)
def test_nearest_of_difficult_values(on_cuda_kernels, change, method):
    queries, bank = change(torch.randn(40, 20), torch.randn(300, 20))
    with on_cuda_kernels(), ops.use_method(method):
        distances, indices = ops.nearest(queries, bank)
    expected = ops.nearest(queries, bank)
    assert_same((distances, indices), expected, CPU)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [6, 16])
def test_nearest_in_a_float16_bank(on_cuda_kernels, dim, method):
    queries, bank = torch.randn(30, dim), torch.randn(500, dim).half()
    with on_cuda_kernels(), ops.use_method(method):
        distances, indices = ops.nearest(queries, bank)
    expected = ops.nearest(queries, bank.float())
    assert_same((distances, indices), expected, CPU)


@pytest.mark.parametrize("method", METHODS)
def test_nearest_from_misaligned_memory(on_cuda_kernels, method):
    """Rows of a view that starts at an odd element are not aligned to 16 bytes."""
    queries = torch.randn(30 * 16 + 1)[1:].view(30, 16)
    bank = torch.randn(300 * 16 + 3)[3:].view(300, 16)
    with on_cuda_kernels(), ops.use_method(method):
        distances, indices = ops.nearest(queries, bank)
    expected = ops.nearest(queries, bank)
    assert_same((distances, indices), expected, CPU)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("in_order", [True, False])
def test_nearest_excludes_groups(on_cuda_kernels, count, method, in_order):
    queries, bank = torch.randn(count, 20), torch.randn(700, 20)
    rows = torch.randint(3, (700,))
    groups = torch.randint(3, (count,)), rows.sort().values if in_order else rows
    expected = ops.nearest(queries, bank, exclude_same_group=groups)
    nothing = torch.zeros(count, dtype=torch.int64), torch.zeros(700, dtype=torch.int64)
    with on_cuda_kernels(), ops.use_method(method):
        found = ops.nearest(queries, bank, exclude_same_group=groups)
        none = ops.nearest(queries, bank, exclude_same_group=nothing)
    assert_same(found, expected, CPU)
    assert torch.isinf(none[0]).all()
    assert (none[1] == -1).all()


def _near_a_plane(rows, dim, spread=1.0, offset=0.0):
    """Points near some points of a plane, as embeddings are; queries beside some of them."""
    corners = torch.randn(rows // 10, 3) @ torch.randn(3, dim)
    bank = corners[torch.randint(len(corners), (rows,))] + 0.1 * torch.randn(rows, dim)
    queries = bank[torch.randint(rows, (300,))] + 0.05 * torch.randn(300, dim)
    return offset + spread * queries, offset + spread * bank


def nearest_in_segments(queries, *bank_and_groups, k=None):
    found = Found.nothing(queries, k)
    search_segments(found, queries, *bank_and_groups)
    return found.finish(k)


@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("has_groups", [False, True])
@pytest.mark.parametrize("limit", [1, 1 << 30])
@pytest.mark.parametrize(("dim", "spread", "offset"), [(5, 1, 0), (24, 1e-4, 3), (70, 1, 0)])
def test_clusters_give_the_canonical_answer(
    on_cuda_kernels, cuda_on_host, dim, spread, offset, limit, has_groups, schedule
):
    queries, bank = _near_a_plane(1500, dim, spread, offset)
    bank[1400] = bank[40] = queries[0]
    groups = (torch.randint(4, (300,)), torch.randint(4, (1500,))) if has_groups else (None, None)
    cuda_on_host.cuda.set_schedule(schedule)
    visits = torch.zeros(1, dtype=torch.int64)
    with on_cuda_kernels(), ops.use_workspace_limit(limit):
        arrays = build_segments(bank, 5)
        found = nearest_in_segments(queries, arrays, Groups(*groups), visits)
        tiles = -(-300 // visit_tile(bank))
    expected = ops.nearest(queries, bank, exclude_same_group=groups if has_groups else None)
    assert_same(found, expected, CPU)
    count = len(arrays.segment_clusters)
    assert count > 5  # some clusters have several segments
    assert 0 < int(visits) < 0.9 * tiles * count  # and some are skipped


@pytest.mark.parametrize(
    "change", [_tiny_ball, _outlier, _too_large_to_screen, _all_equal, _subnormal]
)
def test_clusters_of_difficult_values(on_cuda_kernels, change):
    queries, bank = change(torch.randn(40, 20), torch.randn(300, 20))
    with on_cuda_kernels():
        arrays = build_segments(bank, 5)
        if arrays is None:
            assert change is _too_large_to_screen
            return
        found = nearest_in_segments(queries, arrays)
    expected = ops.nearest(queries, bank)
    assert_same(found, expected, CPU)


def test_a_cluster_of_one_group_does_not_make_its_queries_visit_all(on_cuda_kernels):
    """Twenty clusters on a line, each of one group: what is next to a query's own is enough."""
    centroids = torch.zeros(20, 16)
    centroids[:, 0] = 100.0 * torch.arange(20)
    groups = torch.arange(20).repeat_interleave(60)
    bank = centroids[groups] + torch.randn(1200, 16)
    queries, query_groups = bank[::2] + 0.01, groups[::2]
    visits = torch.zeros(1, dtype=torch.int64)
    with on_cuda_kernels():
        arrays = segments_about(bank, centroids)
        found = nearest_in_segments(queries, arrays, Groups(query_groups, groups), visits)
        tiles = -(-len(queries) // visit_tile(bank))
    assert_same(found, ops.nearest(queries, bank, exclude_same_group=(query_groups, groups)), CPU)
    assert 0 < int(visits) < 0.4 * tiles * len(arrays.segment_clusters)

    # Where a query may have no row at all, there is nothing to visit for it.
    visits.zero_()
    with on_cuda_kernels():
        groups = Groups(query_groups * 0, groups * 0)
        none = nearest_in_segments(queries, arrays, groups, visits)
    assert torch.isinf(none[0]).all()
    assert (none[1] == -1).all()
    assert int(visits) == 0


def test_clusters_of_equal_rows(on_cuda_kernels):
    """Segments of a cluster then differ in nothing, and their ring is a sphere of radius 0."""
    centroids = torch.randn(4, 20)
    bank = centroids.repeat_interleave(300, dim=0)
    queries = torch.cat([centroids, centroids + 0.1 * torch.randn(4, 20), torch.randn(30, 20)])
    with on_cuda_kernels():
        arrays = segments_about(bank, centroids)
        found = nearest_in_segments(queries, arrays)
    assert len(arrays.segment_clusters) == 8
    assert_same(found, ops.nearest(queries, bank), CPU)


def test_no_queries_of_a_clustered_bank(on_cuda_kernels):
    bank = torch.randn(300, 9)
    nothing = torch.empty(0, dtype=torch.int64)
    with on_cuda_kernels():
        arrays = build_segments(bank, 3)
        for groups in ((None, None), (nothing, torch.arange(300))):
            distances, indices = nearest_in_segments(torch.empty(0, 9), arrays, Groups(*groups))
            assert distances.shape == indices.shape == (0,)


@pytest.mark.parametrize("storage", [torch.float32, torch.float16])
def test_a_bank_on_a_gpu(on_cuda_kernels, monkeypatch, storage):
    """All that a bank does, as on a GPU: clustered, searched, changed."""
    queries, rows = _near_a_plane(1200, 16)
    rows = rows.view(12, 10, 10, 16)
    plain = NormalBank(rows, clusters=0, storage=storage)
    monkeypatch.setattr(index_module, "_on_gpu", lambda tensor: True)
    with on_cuda_kernels():
        bank = NormalBank(rows, clusters=6, storage=storage)
        assert bank.num_clusters in range(1, 7)
        assert torch.equal(bank.embeddings, plain.embeddings)
        for change in (
            lambda b: None,
            lambda b: b.add(rows[:2] + 0.01),
            lambda b: b.remove(torch.tensor([3, 4])),
            lambda b: b.merge(b),
        ):
            change(bank)
            change(plain)
            found = bank.nearest(queries)
            own_groups = bank.groups.repeat_interleave(100)[:300]
            own = bank.nearest(bank.embeddings[:300].float(), exclude_same_group=own_groups)
            expected = ops.nearest(queries, plain.embeddings)
            assert_same(found, expected, CPU)
            row_groups = bank.groups.repeat_interleave(100)
            others = ops.nearest(
                bank.embeddings[:300].float(),
                bank.embeddings,
                exclude_same_group=(own_groups, row_groups),
            )
            assert torch.equal(own[0], others[0])
            assert torch.equal(own[1], others[1])


@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("storage", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "dim", "count"), [(1, 1, 1), (9, 3, 9), (300, 20, 40), (1100, 35, 12)]
)
def test_coresets(on_cuda_kernels, cuda_on_host, rows, dim, count, storage, schedule):
    embeddings = torch.randn(rows, dim).to(storage)
    embeddings[rows // 2 :: 5] = embeddings[rows // 3].clone()
    first = rows // 4
    cuda_on_host.cuda.set_schedule(schedule)
    shares = []
    with on_cuda_kernels():
        found = coreset_on_gpu(embeddings, first, count, shares.append)
    assert_same(found[:2], coreset_on_cpu(embeddings, first, count)[:2], CPU)
    expected = reference.coreset(embeddings, first, count)
    assert_same(found[:2], expected[:2], CPU)
    assert found[2] == expected[2]
    assert shares[-1] == 1


def test_a_coreset_of_more_steps_than_are_launched_at_once(on_cuda_kernels):
    embeddings = torch.randn(600, 3)
    shares = []
    with on_cuda_kernels():
        found = coreset_on_gpu(embeddings, 5, 600, shares.append)
    assert_same(found[:2], coreset_on_cpu(embeddings, 5, 600)[:2], CPU)
    assert found[2] == 0
    assert shares == [256 / 600, 512 / 600, 1]


@pytest.mark.parametrize(
    "change", [_tiny_ball, _outlier, _too_large_to_screen, _all_equal, _subnormal]
)
def test_coresets_of_difficult_values(on_cuda_kernels, change):
    _, embeddings = change(torch.randn(40, 20), torch.randn(150, 20))
    with on_cuda_kernels():
        found = coreset_on_gpu(embeddings, 3, 60)
    expected = coreset_on_cpu(embeddings, 3, 60)
    assert_same(found[:2], expected[:2], CPU)
    assert found[2] == expected[2]


@pytest.mark.parametrize("k", [None, 1, 2])
def test_nearest_of_no_queries(on_cuda_kernels, k):
    with on_cuda_kernels():
        distances, indices = ops.nearest(torch.empty(0, 4), torch.rand(3, 4), k=k)
    assert distances.shape == indices.shape == ((0,) if k is None else (0, k))


SEVERAL = [2, 9, 32]


@pytest.mark.parametrize("schedule", [0, 2])
@pytest.mark.parametrize("k", SEVERAL)
@pytest.mark.parametrize("dim", [1, 33])
@pytest.mark.parametrize("count", [1, 40])
def test_k_neighbours_are_the_canonical_ones(
    on_cuda_kernels, cuda_on_host, count, dim, k, schedule
):
    queries, bank = torch.randn(count, dim), torch.randn(600, dim)
    bank[40] = bank[41] = bank[70] = bank[590] = queries[0]  # ties within a share and across two
    bank[300:] = bank[:300].clone()
    cuda_on_host.cuda.set_schedule(schedule)
    with on_cuda_kernels():
        found = ops.nearest(queries, bank, k=k)
    assert_same(found, ops.nearest(queries, bank, k=k), CPU)


@pytest.mark.parametrize("k", SEVERAL)
def test_k_neighbours_are_those_of_the_reference(on_cuda_kernels, k):
    queries, bank = torch.randn(9, 20), torch.randn(150, 20)
    groups = torch.randint(3, (9,)), torch.randint(3, (150,))
    for exclude in (None, groups):
        with on_cuda_kernels():
            found = ops.nearest(queries, bank, k=k, exclude_same_group=exclude)
        expected = reference.nearest(queries, bank, k=k, exclude_same_group=exclude)
        assert_same(found, expected, CPU)


@pytest.mark.parametrize("k", SEVERAL)
@pytest.mark.parametrize(
    "change", [_tiny_ball, _outlier, _too_large_to_screen, _all_equal, _subnormal]
)
def test_k_neighbours_of_difficult_values(on_cuda_kernels, change, k):
    queries, bank = change(torch.randn(40, 20), torch.randn(300, 20))
    with on_cuda_kernels():
        found = ops.nearest(queries, bank, k=k)
    assert_same(found, ops.nearest(queries, bank, k=k), CPU)


def test_k_neighbours_whose_distances_overflow(on_cuda_kernels):
    far = torch.full((300, 2), 3e38)
    with on_cuda_kernels():
        distances, rows = ops.nearest(far[:3], -far, k=5)
    assert torch.isinf(distances).all()
    assert rows.tolist() == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("rows", [1, 5, 31])
def test_more_neighbours_than_rows(on_cuda_kernels, rows):
    queries, bank = torch.randn(40, 7), torch.randn(rows, 7)
    with on_cuda_kernels():
        distances, found = ops.nearest(queries, bank, k=32)
    assert_same((distances, found), ops.nearest(queries, bank, k=32), CPU)
    assert torch.isinf(distances[:, rows:]).all()
    assert (found[:, rows:] == -1).all()


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [16, 390])
def test_k_neighbours_from_misaligned_memory(on_cuda_kernels, dim, stored):
    """Also where queries are too long to be staged in shared memory."""
    queries = torch.randn(5 * dim + 1)[1:].view(5, dim)
    bank = torch.randn(300 * dim + 3).to(stored)[3:].view(300, dim)
    for rows in (bank, bank.clone()):
        with on_cuda_kernels():
            found = ops.nearest(queries, rows, k=3)
        assert_same(found, ops.nearest(queries, rows, k=3), CPU)


@pytest.mark.parametrize("k", SEVERAL)
@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("in_order", [True, False])
def test_k_neighbours_exclude_groups(on_cuda_kernels, count, in_order, k):
    queries, bank = torch.randn(count, 20), torch.randn(700, 20)
    rows = torch.randint(3, (700,))
    groups = torch.randint(3, (count,)), rows.sort().values if in_order else rows
    few = torch.zeros(count, dtype=torch.int64), (torch.arange(700) % 350 == 9).long()
    with on_cuda_kernels():
        found = ops.nearest(queries, bank, k=k, exclude_same_group=groups)
        two = ops.nearest(queries, bank, k=k, exclude_same_group=few)
    assert_same(found, ops.nearest(queries, bank, k=k, exclude_same_group=groups), CPU)
    assert (two[1][:, :2].sort().values == torch.tensor([9, 359])).all()
    assert torch.isinf(two[0][:, 2:]).all()
    assert (two[1][:, 2:] == -1).all()


@pytest.mark.parametrize("k", SEVERAL)
@pytest.mark.parametrize("has_groups", [False, True])
def test_k_neighbours_in_a_clustered_bank(on_cuda_kernels, has_groups, k):
    """Its rows lie in another order than their numbers."""
    queries, bank = _near_a_plane(900, 12)
    queries = queries[:50]
    bank[800] = bank[40] = queries[0]
    groups = (torch.randint(4, (50,)), torch.randint(4, (900,))) if has_groups else (None, None)
    with on_cuda_kernels():
        arrays = build_segments(bank, 5)
        found = nearest_in_segments(queries, arrays, Groups(*groups), k=k)
    assert not torch.equal(arrays.ids, torch.arange(900))
    expected = ops.nearest(queries, bank, k=k, exclude_same_group=groups if has_groups else None)
    assert_same(found, expected, CPU)


@pytest.mark.parametrize("k", [1, 9])
@pytest.mark.parametrize("limit", [1, 1 << 30])
@pytest.mark.parametrize("rows_at_once", [7, 200, 1000])
def test_k_neighbours_in_a_streamed_bank(on_cuda_kernels, rows_at_once, limit, k):
    queries, bank = torch.randn(20, 9), torch.randn(700, 9)
    bank[650] = bank[40] = queries[3]  # a tie across chunks
    groups = torch.randint(3, (20,)), torch.randint(3, (700,))
    for exclude in (None, groups):
        with on_cuda_kernels(), ops.use_workspace_limit(limit):
            found = nearest_streamed(
                queries, bank, rows_at_once=rows_at_once, k=k, exclude_same_group=exclude
            )
        assert_same(found, ops.nearest(queries, bank, k=k, exclude_same_group=exclude), CPU)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("count", [3, 300])
def test_a_second_search_of_the_same_rows_changes_nothing(on_cuda_kernels, count, k):
    """Rows whose numbers need 64 bits; those that are there already are not entered twice."""
    queries, bank = torch.randn(count, 9), torch.randn(600, 9)
    ids = 2**62 - 3 * torch.randperm(600)
    found, expected = Found.nothing(queries, k), Found.nothing(queries, k)
    search_rows(expected, queries, bank, ids=ids)
    with on_cuda_kernels():
        for _ in range(2):
            search_rows(found, queries, bank, ids=ids)
            assert_same(tuple(found), tuple(expected), CPU)


def test_nan_spoils_only_what_holds_it(on_cuda_kernels):
    """Values are not checked while a CUDA graph is captured."""
    queries, bank = torch.randn(3, 9), torch.randn(600, 9)
    expected = Found.nothing(queries, 4)
    search_rows(expected, queries, bank[1:], first_row=1)
    queries[1, 5] = bank[0, 2] = torch.nan
    found = Found.nothing(queries, 4)
    with on_cuda_kernels():
        search_rows(found, queries, bank)
    for q in (0, 2):
        assert torch.equal(found.squared[q], expected.squared[q])
        assert torch.equal(found.rows[q], expected.rows[q])
    assert torch.isnan(found.squared[1]).all()


@pytest.mark.parametrize(("kind", "size", "channels", "height", "width", "redraw_clipped"), PAIRS)
def test_crop_pairs_are_those_of_the_cpu_to_the_bit(
    on_cuda_kernels, kind, size, channels, height, width, redraw_clipped
):
    images = torch.randint(256, (3, channels, height, width), dtype=torch.uint8)
    mean = torch.rand(channels, height, width) * 255
    arguments = (images, mean, torch.randint(3, (5,)), size, kind, 3, 4, redraw_clipped, 2**32 - 6)
    with on_cuda_kernels():
        on_cuda = ops.crop_pairs(*arguments)
    for found, expected in zip(on_cuda, ops.crop_pairs(*arguments), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["position", "neighbour", "view"])
def test_crop_pairs_of_a_split_batch_are_those_of_the_whole(on_cuda_kernels, kind):
    images = torch.randint(256, (3, 2, 50, 60), dtype=torch.uint8)
    mean, image_of = torch.rand(2, 50, 60) * 255, torch.randint(3, (7,))

    def crop(first, last):
        return ops.crop_pairs(images, mean, image_of[first:last], 32, kind, 1, 2, first_pair=first)

    with on_cuda_kernels():
        drawn = [crop(0, 3), crop(3, 7), crop(0, 7)]
    for left, right, whole in zip(*drawn, strict=True):
        axis = 0 if whole.ndim == 1 else 1  # of the pairs
        assert torch.equal(torch.cat([left, right], axis), whole)


def test_crop_pairs_of_no_pairs(on_cuda_kernels):
    images, nothing = torch.zeros(1, 1, 9, 9, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    with on_cuda_kernels():
        patches, _, _ = ops.crop_pairs(images, torch.zeros(1, 9, 9), nothing, 8, "position", 0, 0)
    assert patches.shape == (2, 0, 1, 8, 8)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 3000])
def test_the_runtime_runs_every_thread(cuda_on_host, count):
    """A copy of `count` elements has that many elements: the harness itself is not vacuous."""
    images = torch.arange(count, dtype=torch.float32).reshape(1, 1, 1, count)
    patches = torch.full((1, 1, count, 1, 1, 1), -1.0)
    module = cuda_on_host
    grid = module.PatchGrid(1, 1, 1, count, 1, count, 1, 1)
    module.cuda.extract_patches(
        grid, images.data_ptr(), 0, patches.data_ptr(), 4, module.PixelType.FLOAT32, 0
    )
    assert torch.equal(patches.flatten(), images.flatten())


def test_no_more_clusters_are_made_than_their_distances_have_room_for(on_cuda_kernels, monkeypatch):
    monkeypatch.setattr(k_means, "MOST_CLUSTERS", 8)
    with on_cuda_kernels():
        assert len(build_segments(torch.randn(300, 9), 100).centroids) <= 8
