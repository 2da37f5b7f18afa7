"""Input of any kind: arrays of other libraries, values that are not finite, errors by name."""

import pytest
import torch

from equality import ForeignArray
from patchsvdd_fast import NormalBank, ops
from patchsvdd_fast.ops.checks import check_finite_rows, first_bad_row


def test_arrays_of_other_libraries():
    queries, bank = torch.rand(2, 3, 5), torch.rand(9, 5)
    groups = torch.arange(2)[:, None].expand(2, 3).contiguous(), torch.arange(9)
    given = ForeignArray(queries.numpy()), ForeignArray(bank.numpy())
    foreign_groups = tuple(ForeignArray(values.numpy()) for values in groups)
    found = ops.nearest(ForeignArray(queries[0].numpy()), given[1])
    for ours, expected in zip(found, ops.nearest(queries[0], bank), strict=True):
        assert torch.equal(ours, expected)
    found = NormalBank(given[1], groups=foreign_groups[1]).nearest(
        given[0], exclude_same_group=foreign_groups[0]
    )
    expected = NormalBank(bank).nearest(queries, exclude_same_group=groups[0])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    maps = ops.score_map(given[0], 4, 2, 8, 12)
    assert torch.equal(maps, ops.score_map(queries, 4, 2, 8, 12))


def test_values_are_not_read_back_while_a_graph_is_captured(monkeypatch):
    """A meta tensor's values cannot be read at all, as a card's cannot during a capture."""
    rows = torch.empty(3, 4, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        check_finite_rows("queries", rows)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_finite_rows("queries", rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_first_bad_row_is_found_on_devices_without_a_kernel_for_it(dtype):
    largest = torch.finfo(dtype).max
    rows = torch.randn(9, 5).to(dtype)
    rows[2], rows[3, 1], rows[3, 2] = largest, largest, -largest
    assert first_bad_row(rows) == -1
    assert first_bad_row(rows[:0]) == -1
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = rows.clone()
        bad[4, 4] = bad[7, 0] = value
        assert first_bad_row(bad) == 4
    rows[5, 0], rows[5, 1] = torch.inf, -torch.inf
    assert first_bad_row(rows) == 5


def _crop(
    images=None,
    mean=None,
    image_of=(0, 1),
    size=32,
    kind="position",
    step=0,
    redraw_clipped=False,
    first_pair=0,
):
    images = torch.zeros(2, 1, 40, 50, dtype=torch.uint8) if images is None else images
    mean = torch.zeros(1, 40, 50) if mean is None else mean
    return ops.crop_pairs(
        images, mean, torch.as_tensor(image_of), size, kind, 0, step, redraw_clipped, first_pair
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.extract_patches(torch.rand(3, 8, 8), 4, 2), ValueError, r"\[N, C, H, W\]"),
        (lambda: ops.extract_patches(torch.rand(1, 3, 8, 8), 9, 2), ValueError, "at least 9x9"),
        (lambda: ops.extract_patches(torch.rand(1, 3, 8, 8), 4, 0), ValueError, "stride"),
        (lambda: ops.extract_patches(torch.ones(1, 3, 8, 8).int(), 4, 2), TypeError, "int32"),
        (
            lambda: ops.extract_patches(torch.rand(1, 3, 8, 8), 4, 2, torch.rand(3, 8, 9)),
            ValueError,
            r"mean must have shape \[3, 8, 8\].*got \[3, 8, 9\]",
        ),
        (lambda: ops.score_map(torch.rand(1, 3, 3), 4, 2, 8, 9), None, None),
        (
            lambda: ops.score_map(torch.rand(1, 3, 3), 4, 2, 9, 10),
            ValueError,
            r"\[N, 3, 4\].*got \[1, 3, 3\]",
        ),
        (lambda: ops.score_map(torch.rand(1, 3, 3).double(), 4, 2, 8, 8), TypeError, "float32"),
        (
            lambda: ops.nearest(torch.rand(4, 128), torch.rand(9, 64)),
            ValueError,
            r"queries must have shape \[Q, 64\] to match the bank, got \[4, 128\]",
        ),
        (lambda: ops.nearest(torch.rand(4, 8), torch.rand(0, 8)), ValueError, "at least one"),
        (lambda: ops.nearest(torch.rand(4, 8) + 1j, torch.rand(9, 8)), TypeError, "queries"),
        (
            lambda: ops.nearest(torch.tensor([[0.0], [torch.nan]]), torch.rand(9, 1)),
            ValueError,
            "queries must be finite.*row 1",
        ),
        (
            lambda: ops.nearest(torch.rand(2, 1), torch.tensor([[0.0], [1], [torch.inf]])),
            ValueError,
            "bank must be finite.*row 2",
        ),
        (lambda: _crop(images=torch.zeros(2, 1, 40, 50)), TypeError, "images must be uint8"),
        (lambda: _crop(mean=torch.zeros(3, 40, 50)), ValueError, r"mean must have.*\[1, 40, 50\]"),
        (lambda: _crop(image_of=[[0]]), ValueError, r"image_of must have shape \[B\]"),
        (lambda: _crop(image_of=[0.0]), TypeError, "image_of must be int64, got float32"),
        (lambda: _crop(image_of=[1, 2]), ValueError, "image_of.*less than 2, got 2 at position 1"),
        (lambda: _crop(image_of=[-1]), ValueError, "image_of.*got -1 at position 0"),
        (
            lambda: _crop(torch.zeros(0, 1, 40, 50, dtype=torch.uint8)),
            ValueError,
            "images must hold at least one",
        ),
        (lambda: _crop(image_of=torch.zeros(1).long().expand(2**30)), ValueError, "shorter than"),
        (lambda: _crop(size=41), ValueError, "at least 41x41"),
        (lambda: _crop(size=3), ValueError, "size must be at least 4 for position pairs, got 3"),
        (lambda: _crop(size=31, kind="neighbour"), ValueError, "at least 32 for neighbour pairs"),
        (lambda: _crop(size=0, kind="view"), ValueError, "at least 1 for view pairs, got 0"),
        (
            lambda: _crop(kind="other"),
            ValueError,
            "kind must be 'position' or 'neighbour' or 'view', got 'other'",
        ),
        (lambda: _crop(step=-1), ValueError, "step must be at least 0"),
        (lambda: _crop(step=2**32), ValueError, r"step.*less than 2\^32, got 4294967296"),
        (lambda: _crop(first_pair=-1), ValueError, "first_pair must be at least 0.*got -1"),
        (lambda: _crop(first_pair=2**32 - 2), ValueError, r"less than 2\^32 - 2 for 2 pairs"),
        (lambda: _crop(first_pair=2**32 - 3), None, None),
        (lambda: _crop(redraw_clipped=True), ValueError, "at least 63x63.*got 50x40"),
    ],
)
def test_bad_input_is_named(call, error, message):
    if error is None:
        call()
        return
    with pytest.raises(error, match=message):
        call()
