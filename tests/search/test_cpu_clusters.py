"""Building a bank's clusters, and what is foreseen of their cost."""

import pytest
import torch

from patchsvdd_fast.ops.cpu_bank import project
from patchsvdd_fast.search import cpu_choice


def around_centres(rows, dim, spread):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(100, dim, generator=generator)
    noise = torch.randn(rows, dim, generator=generator)
    return centres[torch.randint(100, (rows,), generator=generator)] + spread * noise


def test_every_other_row_is_projected_as_its_copy_is():
    rows = torch.randn(40, 20)
    basis = torch.linalg.qr(torch.randn(20, 16)).Q.contiguous()
    for ours, theirs in zip(
        project(rows[::2], rows[0], basis, 1.001),
        project(rows[::2].clone(), rows[0], basis, 1.001),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dim", [32, 176])
def test_the_cost_of_clusters_grows_with_what_they_cannot_rule_out(dim):
    costs = []
    for spread in (0.05, 0.3, 1.0):
        survey = cpu_choice._Survey(around_centres(12000, dim, spread), 0, cpu_choice.Groups())
        costs.append(survey.cost_in_clusters(96))
    assert costs[0] < costs[1] < 1 < costs[2]
    assert costs[0] < 0.35
