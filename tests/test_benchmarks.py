"""The benchmarks' own logic: what they write, and that a wrong answer is scored as wrong."""

import json
import os
import subprocess
import sys

import pytest
import torch

import common
from conftest import ROOT
from patchsvdd_fast import nearest


def test_the_gpu_benchmark_runs_on_the_cpu_in_little(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PATCHSVDD_TEST_DATA"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--quick"),
            *("--repeats", "1", "--output", str(tmp_path)),
        ],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["commit"]
    assert result["quick"] is True
    assert "PyTorch" in result["machine"]
    assert result["card"]["name"].startswith("none")

    workloads = {}
    for record in result["records"]:
        workloads.setdefault(record["workload"].split(",")[0], {})[record["search"]] = record
    assert set(workloads) == {
        *("brute force", "long vectors", "pruned", "one image"),
        *("extract_patches", "score_map", "end to end"),
    }
    for records in workloads.values():
        ours = next(iter(records.values()))
        assert ours["right"] == 1.0
        assert ours["worst_relative_error"] < 3e-7
        assert ours["ours_faster"] == 1.0
        assert ours["rate"] > 0
        for record in records.values():
            assert record.get("reason") or record["seconds"] > 0
    assert "CUDA device" in workloads["brute force"]["FAISS GPU flat"]["reason"]
    assert workloads["pruned"]["torch.cdist + min"]["right"] < 1  # products cancel in a tiny ball

    assert len(result["figures"]) == 9
    for figure in result["figures"]:
        assert set(figure) == {"workload", "what", "target", "measured", "at_most", "reached"}
        assert (figure["measured"] is None) == (figure["reached"] is None)
    markdown = (tmp_path / "gpu.md").read_text()
    assert "≥ 4e+12 pairs/s" in markdown
    assert all(record["search"] in markdown for record in result["records"])


def test_wrong_answers_are_scored_as_wrong():
    queries, bank = torch.rand(500, 8), torch.rand(900, 8)
    distances, rows = nearest(queries, bank)
    exact = common.exact_distances(queries, bank)
    scored = common.correctness(queries, bank, exact, distances, rows)
    assert scored["right_neighbours"] == 1
    assert scored["zero_distances"] == 0
    assert scored["worst_relative_error"] < 2e-7
    others = common.correctness(queries, bank, exact, distances, (rows + 1) % 900)
    assert others["right_neighbours"] == 0
    missing = common.correctness(queries, bank, exact, distances, rows * 0 - 1)
    assert missing["right_neighbours"] == 0
    half = torch.arange(500) % 2 == 0
    off = common.correctness(queries, bank, exact, distances * half, rows)
    assert off["right_neighbours"] == 1
    assert off["zero_distances"] == 0.5
    assert off["worst_relative_error"] == 1


def test_contenders_are_measured_and_what_fails_has_the_reason():
    def shifted(bank):
        def search(queries):
            distances, rows = nearest(queries, bank)
            return distances, (rows + 1) % len(bank)

        return search

    def not_installed(bank):
        raise ImportError("no such library")

    def failing(bank):
        def search(queries):
            raise RuntimeError("out of something")

        return search

    workload = common.Workload(
        "small",
        torch.rand(300, 8),
        torch.rand(900, 8),
        [
            common.Contender("ours", lambda bank: lambda queries: nearest(queries, bank)),
            common.Contender("wrong", shifted, most_queries=100),
            common.Contender("absent", not_installed),
            common.Contender("failing", failing),
        ],
    )
    records = common.measure(workload, 2, warm_up=True, failures=(RuntimeError,))
    ours, wrong, absent, failed = records
    assert (ours["search"], ours["queries"], len(ours["all_seconds"])) == ("ours", 300, 2)
    assert (ours["right_neighbours"], ours["ours_faster"]) == (1, 1)
    assert (wrong["right_neighbours"], wrong["queries"]) == (0, 100)
    assert absent["reason"] == "ImportError: no such library"
    assert failed["reason"] == "RuntimeError: out of something"
    with pytest.raises(RuntimeError, match="out of something"):
        common.measure(workload, 1)
