"""Several processes: images in shares, and a bank in shards, against one process.

    python benchmarks/scale.py --data DIR --output benchmarks/results

Images: `torchrun -m patchsvdd_fast score` with processes of one thread each, against
`patchsvdd score` with as many threads as there are cores; images a second, as the command tells
them, without the time to start. A bank: `ShardedBank` with its rows in processes of one thread
each, against `NormalBank` with all rows in one; CPU seconds of all processes together, seconds on
the clock, how much of them went by in exchanges (waiting for slower processes included), bytes that
each process handed over, and the peak of its memory. All take turns several times; medians.

With more processes than cores the clock says nothing, but the CPU seconds still do. DIR is as for
search.py; without it, built-in images and an untrained encoder are used. Writes scale.json and
scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import blas
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from common import origin, real_embeddings, write_results
from patchsvdd_fast import NormalBank, PatchSVDD
from patchsvdd_fast.images.sample_cloth import write_sample_category
from patchsvdd_fast.search.sharded import ShardedBank

PROCESSES = (1, 2, 4)
QUERIES = 20_000
IMAGES = 400
ENCODER = "efficientnet_lite0"
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "isend")


# --- a bank in shards -----------------------------------------------------------------------------


class Exchanges:
    """Counts what this process hands to others, and the seconds until it has theirs."""

    def __init__(self) -> None:
        self.bytes = 0
        self.seconds = 0.0
        for name in (*COLLECTIVES, "recv"):
            setattr(distributed, name, self._counted(getattr(distributed, name)))

    def _counted(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any, **options: Any) -> Any:
            if collective.__name__ != "recv":
                self.bytes += sum(one.nbytes for one in given if isinstance(one, Tensor))  # its own
            began = time.perf_counter()
            done = collective(*given, **options)
            self.seconds += time.perf_counter() - began
            return done

        return counting


def status(field: str) -> int:
    """A figure of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def search_in_shards(folder: Path, rank: int, count: int, repeats: int) -> None:
    """What each process does: build its part, search several times, print a line of figures."""
    torch.set_num_threads(1)
    given = load_file(folder / "given.safetensors")
    if count > 1:
        distributed.init_process_group(
            "gloo", f"file://{folder}/meeting-{count}", rank=rank, world_size=count
        )
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far
    before = status("VmRSS")
    began = time.process_time()
    rows = given["bank"].tensor_split(count)[rank]
    bank = NormalBank(rows) if count == 1 else ShardedBank(rows)
    build = time.process_time() - began
    exchanges = Exchanges()
    runs = []
    for _ in range(repeats + 1):
        exchanges.bytes, exchanges.seconds = 0, 0.0
        if count > 1:
            distributed.barrier()
        cpu, began = time.process_time(), time.perf_counter()
        found = bank.nearest(given["queries"])
        runs.append(
            {
                "cpu_seconds": time.process_time() - cpu,
                "seconds": time.perf_counter() - began,
                "exchange_seconds": exchanges.seconds,
                "bytes": exchanges.bytes,
            }
        )
    peak = status("VmHWM") - before
    if rank == 0:
        save_file({"distances": found[0], "rows": found[1]}, folder / f"found-{count}.safetensors")
    print(json.dumps({"build_cpu_seconds": build, "peak_bytes": peak, "runs": runs[1:]}))
    if count > 1:
        distributed.destroy_process_group()


def started(folder: Path, rank: int, count: int, repeats: int) -> subprocess.Popen[str]:
    """A process that runs `search_in_shards`."""
    command = [sys.executable, __file__, "--shard", str(rank), str(count), str(folder)]
    return subprocess.Popen(
        [*command, "--repeats", str(repeats)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The figures that a process printed. Raises RuntimeError if it failed."""
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a process ended with status {process.returncode}")
    figures: dict[str, Any] = json.loads(output)
    return figures


def bank_in_shards(data: Path | None, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """A record for each number of processes."""
    name, queries, bank = real_embeddings(data, quick)
    chosen = torch.linspace(0, len(queries) - 1, min(QUERIES, len(queries))).long()
    turns: dict[int, list[list[dict[str, Any]]]] = {count: [] for count in PROCESSES}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_file({"queries": queries[chosen], "bank": bank}, folder / "given.safetensors")
        for _ in range(1 if quick else 5):
            for count in PROCESSES:
                (folder / f"meeting-{count}").unlink(missing_ok=True)
                processes = [started(folder, rank, count, repeats) for rank in range(count)]
                turns[count].append([told(process) for process in processes])
        answers = [load_file(folder / f"found-{count}.safetensors") for count in PROCESSES]
    same = all(
        torch.equal(answer[key], answers[0][key]) for answer in answers for key in answers[0]
    )
    records = []
    for count, of_turns in turns.items():
        runs = [
            [process["runs"][number] for process in turn]
            for turn in of_turns
            for number in range(repeats)
        ]
        records.append(
            {
                "workload": name,
                "rows": len(bank),
                "dim": bank.shape[1],
                "queries": len(chosen),
                "processes": count,
                "cpu_seconds": statistics.median(
                    sum(p["cpu_seconds"] for p in run) for run in runs
                ),
                "seconds": statistics.median(max(p["seconds"] for p in run) for run in runs),
                "exchange_share": statistics.median(
                    max(p["exchange_seconds"] / p["seconds"] for p in run) for run in runs
                ),
                "bytes_a_query": max(p["bytes"] for p in runs[0]) / len(chosen),
                "build_cpu_seconds": statistics.median(
                    sum(p["build_cpu_seconds"] for p in turn) for turn in of_turns
                ),
                "peak_bytes": max(p["peak_bytes"] for turn in of_turns for p in turn),
                "row_bytes": bank.nbytes / count,
                "same_bits": same,
            }
        )
    # Against one process in the same turn: the machine's pace differs from turn to turn.
    paces = [[cpu_seconds(turn, repeats) for turn in turns[count]] for count in PROCESSES]
    for record, own in zip(records, paces, strict=True):
        ratios = [mine / one for mine, one in zip(own, paces[0], strict=True)]
        record["times_cpu"], record["all_times_cpu"] = statistics.median(ratios), ratios
    return records


def cpu_seconds(turn: list[dict[str, Any]], repeats: int) -> float:
    """The median over the searches of a turn, of all its processes together."""
    return statistics.median(
        sum(process["runs"][number]["cpu_seconds"] for process in turn) for number in range(repeats)
    )


# --- images in shares -----------------------------------------------------------------------------


def rate(command: Sequence[str], threads: int) -> float:
    """Images a second, as a command that scores tells it. Raises RuntimeError if it fails."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    found = re.search(r"scored ([\d,]+) images in ([\d.,]+) s", done.stdout)
    if done.returncode or found is None:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    images, seconds = (float(figure.replace(",", "")) for figure in found.groups())
    return images / seconds


def images_in_shares(repeats: int, quick: bool) -> list[dict[str, Any]]:
    """A record for each number of processes, and with and without heat maps."""
    cores = len(os.sched_getaffinity(0))
    rates: dict[tuple[bool, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        train, tests = (8, 12) if quick else (40, IMAGES)
        category = write_sample_category(folder, train, tests, per_defect=0)
        model = folder / "model.safetensors"
        PatchSVDD(encoder=ENCODER).fit(category.root / "train").save(model)
        for _ in range(repeats):
            for pictures in (True, False):
                for count in (1, cores):
                    score = ["patchsvdd_fast", "score", str(model), str(category.root / "test")]
                    score += ["-o", str(folder / "scores"), "--overwrite"]
                    score += [] if pictures else ["--no-heat-maps"]
                    start = [sys.executable, "-m"]
                    if count > 1:
                        start += ["torch.distributed.run", "--standalone"]
                        start += ["--nproc-per-node", str(count), "-m"]
                    found = rate([*start, *score], 1 if count > 1 else cores)
                    rates.setdefault((pictures, count), []).append(found)
    return [
        {
            "encoder": ENCODER,
            "images": tests,
            "heat_maps": pictures,
            "processes": count,
            "threads_each": 1 if count > 1 else cores,
            "images_per_second": statistics.median(found),
            "all_rates": found,
            "times_one": statistics.median(found) / statistics.median(rates[pictures, 1]),
        }
        for (pictures, count), found in rates.items()
    ]


# --- showing --------------------------------------------------------------------------------------


def table(shards: list[dict[str, Any]], shares: list[dict[str, Any]]) -> str:
    """Markdown: a table of the bank in shards, and one of images in shares."""
    first = shards[0]
    lines = [
        f"A bank of {first['rows']:,} x {first['dim']} ({first['workload']}), "
        f"{first['queries']:,} queries, processes of one thread each:",
        "",
        "| processes | CPU s | times one | clock s | in exchanges | bytes a query | build CPU s | "
        "peak MB (rows of a process) | same bits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['processes']} | {r['cpu_seconds']:.2f} | {r['times_cpu']:.2f} | {r['seconds']:.2f} "
        f"| {r['exchange_share']:.1%} | {r['bytes_a_query']:.1f} | {r['build_cpu_seconds']:.1f} "
        f"| {r['peak_bytes'] / 1e6:.0f} ({r['row_bytes'] / 1e6:.0f}) "
        f"| {'yes' if r['same_bits'] else 'no'} |"
        for r in shards
    ]
    lines += [
        "",
        f"Scoring {shares[0]['images']} images of 256x256 pixels with {ENCODER}:",
        "",
        "| heat maps | processes x threads | images/s | times one process |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {'yes' if r['heat_maps'] else 'no'} | {r['processes']} x {r['threads_each']} "
        f"| {r['images_per_second']:.1f} | {r['times_one']:.2f} |"
        for r in shares
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print a table, and write JSON and table; or do one process's part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of images and checkpoints")
    parser.add_argument("--output", type=Path, help="folder for scale.json and .md")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small inputs, to try the script")
    parser.add_argument("--shard", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shard:
        rank, count, folder = options.shard
        search_in_shards(Path(folder), int(rank), int(count), options.repeats)
        return
    shards = bank_in_shards(options.data, options.repeats, options.quick)
    shares = images_in_shares(options.repeats, options.quick)
    print(table(shards, shares))
    if options.output:
        result = {**origin(), "bank_in_shards": shards, "images_in_shares": shares}
        write_results(options.output, "scale", result, table(shards, shares))


if __name__ == "__main__":
    blas.restart_with_best_kernels()
    main()
