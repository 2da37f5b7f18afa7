"""The ops under torch on a GPU: streams, devices, CUDA graphs, compilation, errors."""

import pytest
import torch

from equality import ForeignArray, assert_same, to
from patchsvdd_fast import NormalBank, ops

METHODS = ["plain", "screened"]
CYCLES = 10**9  # of a kernel that only waits: half a second


def score(images, mean, bank):
    """All ops in a row: uint8 [N, 3, 24, 28] -> maps."""
    patches = ops.extract_patches(images, 8, 4, mean)
    distances, _ = ops.nearest(patches.flatten(3).flatten(0, 2), bank)
    return ops.score_map(distances.view(patches.shape[:3]), 8, 4, *images.shape[-2:])


def score_inputs():
    return (
        torch.randint(256, (2, 3, 24, 28), dtype=torch.uint8),
        torch.rand(3, 24, 28) * 255,
        torch.rand(500, 3 * 8 * 8),
    )


@pytest.mark.needs_card
@pytest.mark.parametrize("method", METHODS)
def test_work_is_queued_on_the_current_stream(device, method):
    """While the default stream is busy, a side stream goes ahead and has the right answers."""
    arguments = score_inputs()
    expected = score(*arguments)
    on_device = to(device, arguments)
    side, busy = torch.cuda.Stream(device), torch.cuda.Event()
    with ops.use_method(method):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            score(*on_device)  # once before, so that memory is there and kernels are loaded
        torch.cuda.synchronize(device)
        torch.cuda._sleep(CYCLES)
        busy.record()
        with torch.cuda.stream(side):
            found = score(*on_device)
        side.synchronize()
        assert not busy.query(), "the side stream waited for the default stream"
    assert_same(found, expected, device)


@pytest.mark.needs_card
def test_inputs_that_a_long_kernel_still_writes(device):
    """Values arrive behind a long kernel on a side stream; the ops must wait their turn."""
    images, mean, bank = score_inputs()
    distances = torch.rand(2, 5, 6)
    expected = score(images, mean, bank), ops.score_map(distances, 8, 4, 24, 28)
    images_there, late = torch.zeros_like(images, device=device), images.to(device)
    distances_there, distances_late = torch.zeros(2, 5, 6, device=device), distances.to(device)
    mean, bank = to(device, (mean, bank))
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        distances_there.copy_(distances_late)
        images_there.copy_(late)
        maps = ops.score_map(distances_there, 8, 4, 24, 28)
        found = score(images_there, mean, bank), maps
    side.synchronize()
    assert_same(found, expected, device)


@pytest.mark.needs_card
def test_a_device_that_is_not_the_current_one(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("only one card here")
    arguments = score_inputs()
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    found = score(*to(other, arguments))
    assert torch.cuda.current_device() != other.index
    assert_same(found, score(*arguments), other)


def capture(function):
    """A graph of one call, and the tensors into which each replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function()
    return graph, found


@pytest.mark.needs_card
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_search_in_a_graph(device, method, stored):
    queries, bank = torch.rand(700, 64, device=device), torch.rand(5_000, 64).to(device, stored)
    with ops.use_method(method):
        graph, found = capture(lambda: ops.nearest(queries, bank))
    for _ in range(3):
        new = torch.rand(700, 64), torch.rand(5_000, 64).to(stored)
        queries.copy_(new[0])
        bank.copy_(new[1])
        graph.replay()
        assert_same(found, ops.nearest(*new), device)
    # What the docstring says of values that cannot be checked during a capture.
    queries[3, 1] = torch.nan
    graph.replay()
    assert torch.isnan(found[0]).nonzero().flatten().tolist() == [3]


@pytest.mark.needs_card
def test_whole_scoring_in_a_graph(device):
    arguments = to(device, score_inputs())
    graph, found = capture(lambda: score(*arguments))
    for _ in range(2):
        new = score_inputs()
        for there, values in zip(arguments, new, strict=True):
            there.copy_(values)
        graph.replay()
        assert_same(found, score(*new), device)


@pytest.mark.needs_card
def test_clustered_bank_in_a_graph(device):
    axes = torch.randn(6, 64)
    rows, *batches = (0.45 + 0.005 * torch.randn(count, 6) @ axes for count in (9_000, 700, 700))
    bank, queries = NormalBank(rows.to(device), clusters=30), torch.zeros(700, 64, device=device)
    graph, found = capture(lambda: bank.nearest(queries))
    assert bank.num_clusters > 0
    for batch in batches:
        queries.copy_(batch)
        graph.replay()
        assert_same(found, ops.nearest(batch, rows), device)


def test_compiles_to_a_full_graph(device):
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    arguments = to(device, score_inputs())
    compiled = torch.compile(lambda *given: score(*given) * 2 + 1, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*arguments), score(*arguments) * 2 + 1)


def test_opcheck(device):
    op = torch.ops.patchsvdd_fast
    for function, arguments in (
        (op.extract_patches, (torch.rand(2, 3, 20, 21), 6, 3)),
        (op.extract_patches, (torch.ones(2, 3, 20, 21, dtype=torch.uint8), 6, 3)),
        (op.extract_patches, (torch.rand(2, 3, 20, 21), 6, 3, torch.rand(3, 20, 21))),
        (op.extract_patches_backward, (torch.rand(2, 5, 6, 3, 6, 6), 3, 20, 21)),
        (op.score_map, (torch.rand(2, 5, 6), 6, 3, 20, 21)),
        (op.nearest, (torch.rand(5, 7), torch.rand(11, 7))),
        (op.nearest, (torch.rand(5, 7), torch.rand(11, 7).half())),
        (
            op.crop_pairs,
            (
                torch.randint(256, (2, 3, 40, 50), dtype=torch.uint8),
                *(torch.rand(3, 40, 50), torch.tensor([0, 1, 1]), 32, "position", 3, 4),
            ),
        ),
        (
            op.crop_pairs,
            (
                torch.randint(256, (2, 3, 40, 50), dtype=torch.uint8),
                *(torch.rand(3, 40, 50), torch.tensor([0, 1, 1]), 6, "view", 3, 4, False, 7),
            ),
        ),
    ):
        torch.library.opcheck(function, to(device, arguments))
    images = torch.rand(2, 3, 20, 21, device=device, requires_grad=True)
    torch.library.opcheck(op.extract_patches, (images, 6, 3))


@pytest.mark.parametrize("library", ["cupy", "dlpack alone"])
def test_arrays_of_other_libraries(device, library):
    queries, bank = torch.rand(300, 24), torch.rand(900, 24)
    if library == "cupy":
        cupy = pytest.importorskip("cupy")
        if device.type == "cpu":
            pytest.skip("needs a card")
        with cupy.cuda.Device(device.index):
            given = [cupy.asarray(values.numpy()) for values in (queries, bank)]
            groups = tuple(cupy.arange(len(values)) for values in given)
    else:
        given = [ForeignArray(values.to(device)) for values in (queries, bank)]
        groups = tuple(ForeignArray(torch.arange(len(v), device=device)) for v in (queries, bank))
    expected = ops.nearest(queries, bank)
    assert_same(ops.nearest(*given), expected, device)
    assert_same(ops.nearest(queries.to(device), given[1]), expected, device)
    own = torch.arange(300), torch.arange(900)
    expected = ops.nearest(queries, bank, exclude_same_group=own)
    assert_same(ops.nearest(*given, exclude_same_group=groups), expected, device)


@pytest.mark.needs_card
def test_inputs_on_two_devices_are_named(device):
    here, cpu = torch.rand(4, 3, device=device), torch.rand(5, 3)
    with pytest.raises(ValueError, match=rf"queries .* bank \(cpu\), got {device}"):
        ops.nearest(here, cpu)
    with pytest.raises(ValueError, match=rf"queries .* bank \({device}\), got cpu"):
        ops.nearest(cpu, here)
    groups = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=rf"query_groups .*\({device}\), got cpu"):
        ops.nearest(here, here, exclude_same_group=groups)
    with pytest.raises(ValueError, match=rf"mean .*\({device}\), got cpu"):
        ops.extract_patches(torch.rand(1, 3, 8, 8, device=device), 4, 2, torch.rand(3, 8, 8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda d: ops.nearest(torch.rand(4, 128, device=d), torch.rand(9, 64, device=d)),
            ValueError,
            r"queries must have shape \[Q, 64\] to match the bank, got \[4, 128\]",
        ),
        (
            lambda d: ops.nearest(
                torch.tensor([[0.0], [1], [torch.nan]], device=d), torch.rand(9, 1, device=d)
            ),
            ValueError,
            "queries must be finite, got NaN or infinity in row 2",
        ),
        (
            lambda d: ops.nearest(
                torch.rand(2, 1, device=d), torch.tensor([[0.0], [torch.inf]], device=d)
            ),
            ValueError,
            "bank must be finite, got NaN or infinity in row 1",
        ),
        (
            lambda d: ops.nearest(torch.rand(4, 8, device=d), torch.rand(0, 8, device=d)),
            ValueError,
            "at least one",
        ),
        (
            lambda d: ops.nearest(torch.rand(4, 8, device=d) > 0, torch.rand(9, 8, device=d)),
            TypeError,
            "queries must be real numbers, got bool",
        ),
        (
            lambda d: ops.score_map(torch.rand(1, 3, 3, device=d), 4, 2, 9, 10),
            ValueError,
            r"\[N, 3, 4\].*got \[1, 3, 3\]",
        ),
        (
            lambda d: ops.extract_patches(torch.rand(1, 3, 8, 8, device=d), 9, 2),
            ValueError,
            "at least 9x9",
        ),
    ],
)
def test_bad_input_is_named(device, call, error, message):
    with pytest.raises(error, match=message):
        call(device)
