"""Forged banks that would lead a search outside of their arrays are refused."""

import pytest
import torch

from patchsvdd_fast import NormalBank
from patchsvdd_fast.ops.cpu_bank import MOST_CLUSTERS

HUGE = 2**63 - 1


@pytest.fixture(scope="module")
def bank_state():
    """A clustered bank that projects, and whose clusters do not fill their last blocks."""
    generator = torch.Generator().manual_seed(1)
    few_axes = torch.randn(3, 200, 6, generator=generator) @ torch.randn(6, 40, generator=generator)
    bank = NormalBank(few_axes.flatten(0, 1), clusters=3)
    state = bank.state_dict()
    assert state["basis"].shape == (40, 16)
    assert len(state["starts"]) == 4
    return state


def with_value(name, index, value):
    def change(state):
        changed = state[name].clone()
        changed.view(-1)[index] = value
        return {name: changed}

    return change


def wrapping_starts(state):
    """Sizes that are all positive and add up to the rows, but for 2^64."""
    rows = len(state["ids"])
    starts = torch.tensor([0, HUGE, -17, rows])
    blocks = torch.cat([torch.zeros(1, dtype=torch.int64), ((starts.diff() + 15) // 16).cumsum(0)])
    assert (starts.diff() > 0).all()
    kept = int(blocks[-1])
    return {
        "starts": starts,
        "blocks": blocks,
        "codes": state["codes"][:kept],
        "bias": state["bias"][: 16 * kept],
        "block_radius": state["block_radius"][:kept].sort().values,
    }


def of_clusters(count):
    """A bank of one row in each cluster."""
    state = NormalBank(torch.rand(8, 20), clusters=1).state_dict()
    each = torch.arange(count + 1)
    return {
        "data": torch.rand(count, 20),
        "groups": each[:-1],
        "ids": each[:-1],
        "starts": each,
        "blocks": each,
        "codes": state["codes"][:1].repeat(count, 1, 1, 1) * 0,
        "bias": torch.tensor([0, *[2**31 - 1] * 15], dtype=torch.int32).repeat(count),
        "block_radius": torch.zeros(count),
        "mean": state["mean"],
        "basis": state["basis"],
        "centroids": state["centroids"][:1].repeat(count, 1),
        **{n: state[n][:1].repeat(count) for n in ("scales", "slack", "code_slack", "reach")},
    }


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (wrapping_starts, "do not cover"),
        (with_value("starts", 1, 0), "do not cover"),
        (with_value("starts", 1, HUGE), "do not cover"),
        (with_value("blocks", 1, -HUGE), "do not cover"),
        (with_value("ids", 0, -1), "do not cover"),
        (with_value("ids", 0, HUGE), "do not cover"),
        (lambda s: {"block_radius": s["block_radius"][:, None][:, :0]}, "must have shape"),
        (lambda s: {"block_radius": s["block_radius"][0]}, "must have shape"),
        (lambda s: {"basis": s["basis"][0, 0]}, "must have shape"),
        # All queries near (1, 1, ...) would be nearest to what fills up the last tile of centroids.
        (lambda s: {"basis": torch.full_like(s["basis"], 1e18)}, "basis must be orthonormal"),
        (with_value("basis", 5, torch.nan), "basis must be orthonormal"),
        (with_value("mean", 0, torch.inf), "mean must be in"),
        (with_value("centroids", 3, torch.nan), "do not cover"),
        (with_value("centroids", 3, 1e18), "do not cover"),
        (with_value("scales", 0, 0.0), "scales must be in"),
        (with_value("scales", 0, torch.nan), "scales must be in"),
        (with_value("slack", 0, -1.0), "slack must be in"),
        (with_value("code_slack", 0, torch.inf), "code_slack must be in"),
        (with_value("reach", 0, torch.nan), "reach must be in"),
        (with_value("block_radius", 0, torch.nan), "block_radius must be in"),
        (with_value("block_radius", 0, 1e9), "must not fall within a cluster"),
        (with_value("bias", 0, -(2**31)), "bias does not fit"),
        (with_value("bias", 0, 2**31 - 1), "bias does not fit"),
        (with_value("bias", -1, 0), "bias does not fit"),
        (with_value("codes", -1, 1), "bias does not fit"),
        (with_value("data", 77, torch.nan), "data must be finite"),
        (with_value("stretch", 0, torch.nan), "stretch"),
        (lambda s: {"stretch": s["stretch"].repeat(2)}, "stretch"),
        (
            lambda s: {"clustered_rows": s["clustered_rows"].double()},
            "clustered_rows must be int64",
        ),
        (lambda s: {"grid": torch.tensor([0, 1])}, "grid at least 1 x 1"),
        (lambda s: {"grid": torch.tensor([-1, -1])}, "grid at least 1 x 1"),
        (lambda s: {"grid": torch.tensor([2**32, 2**32])}, "600 groups cannot have 600 rows"),
        (lambda s: {"grid": torch.tensor(1)}, r"grid must be int64 \[2\]"),
        (lambda s: {"grid": torch.ones(2)}, r"grid must be int64 \[2\]"),
        (lambda s: {"settings": torch.ones(3).long()}, r"settings must be int64 \[2\]"),
        (lambda s: {"groups": s["groups"].int()}, "groups must be int64"),
        (lambda s: {"groups": s["groups"][:, None]}, "groups must be int64"),
        (lambda s: {"groups": s["groups"][:0]}, "0 groups cannot have 600 rows"),
        (lambda s: {"data": s["data"].double()}, "data must have shape"),
        (lambda s: {"data": s["data"][:, :0]}, "data must have shape"),
        (lambda s: {"data": s["data"][0, 0]}, "data must have shape"),
        (lambda _: of_clusters(MOST_CLUSTERS + 1), "cannot have 4097 clusters"),
    ],
)
def test_banks_that_would_lead_astray(bank_state, change, complaint):
    with pytest.raises(ValueError, match=complaint):
        NormalBank.from_state_dict(bank_state | change(bank_state))


def test_as_many_clusters_as_are_allowed(bank_state):
    opened = NormalBank.from_state_dict(bank_state | of_clusters(MOST_CLUSTERS))
    assert opened.num_clusters == MOST_CLUSTERS
    assert opened.nearest(torch.rand(3, 20))[1].shape == (3,)


def test_a_bank_that_is_not_aligned_is_refused(bank_state):
    shifted = torch.empty(8 * 4 + 1, dtype=torch.uint8)[1:].view(torch.uint8)
    starts = torch.frombuffer(shifted.numpy(), dtype=torch.int64, count=4).copy_(
        bank_state["starts"]
    )
    assert starts.data_ptr() % 8
    with pytest.raises(ValueError, match="starts must be aligned"):
        NormalBank.from_state_dict(bank_state | {"starts": starts})


def test_a_bank_as_it_should_be(bank_state):
    opened = NormalBank.from_state_dict(bank_state)
    queries = torch.randn(30, 40)
    expected = NormalBank(opened.embeddings, clusters=0).nearest(queries)
    assert all(map(torch.equal, opened.nearest(queries), expected))
