"""Building a bank's clusters: what is foreseen of their cost, and the memory that it takes."""

import json
import sys
from pathlib import Path

import pytest
import torch

from patchsvdd_fast.ops.cpu_bank import project
from patchsvdd_fast.search import cpu_choice
from processes import run_script


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


MEASURE = """
import json, sys
import torch
sys.path += sys.argv[2:]
from patchsvdd_fast import NormalBank
from processes import status
from test_cpu_clusters import around_centres
spread = float(sys.argv[1])
NormalBank(around_centres(5000, 128, spread))  # loads libraries
rows = around_centres(100_000, 128, spread)
open("/proc/self/clear_refs", "w").write("5")  # the peak so far
before = status("VmRSS")
bank = NormalBank(rows)
print(json.dumps([bank.num_clusters, (status("VmHWM") - before) / rows.nbytes]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("spread", "clustered", "most"), [(0.05, True, 2.7), (1.0, False, 0.9)])
def test_building_a_bank_takes_little_memory_beyond_its_own(tmp_path, spread, clustered, most):
    """As a share of the rows: their sorted copy and codes, but no projections beside the copy."""
    (tmp_path / "measure.py").write_text(MEASURE)
    here = Path(__file__).parent
    done = run_script(tmp_path / "measure.py", spread, here, here.parent)
    assert done.returncode == 0, done.stderr
    clusters, peak = json.loads(done.stdout)
    assert (clusters > 0) == clustered
    assert peak <= most
