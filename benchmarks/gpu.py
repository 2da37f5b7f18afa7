"""The library on a GPU against its peers, in one process, on the same inputs.

    python benchmarks/gpu.py --output DIR [--data DIR]

Times are device times by CUDA events, from the call until the result is there: medians, after one
call that is not counted. Peers that would take long are given only the first queries and compared
by rate. A peer that is not installed or fails has the reason instead of a number. A sample of the
answers is compared with float64 arithmetic on differences. Every workload names the figures it is
meant to reach. Writes gpu.json, gpu.md and gpu.png.

With --data (see search.py) the search of a clustered bank is measured on real embeddings, otherwise
on made-up ones. `--device cpu --quick` tries the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import blas
import torch
from torch import Tensor

from common import (
    CHECKED,
    CHUNK,
    Clock,
    Contender,
    Figure,
    Search,
    Workload,
    cdist_min,
    commit,
    correctness,
    exact_distances,
    faiss_flat,
    measure,
    plot,
    real_embeddings,
    wall_clock,
)
from patchsvdd_fast import HierarchicalEncoder, NormalBank, ScoreResult, nearest, ops
from patchsvdd_fast.encoders.levels import DEFAULT_LEVELS
from patchsvdd_fast.ops import reference
from patchsvdd_fast.ops.backends import describe
from patchsvdd_fast.score.encoding import encode_images, score_images

IMAGE = 3_249  # K=32 patches of a 256x256 image
SIDE = 256
PATIENCE = 3.0  # seconds after which a peer is not timed again
ON_CPU, ON_GPU = IMAGE, 16_384  # queries given to slow peers on either
FAISS_GPU, CDIST = "FAISS GPU flat", "torch.cdist + min"


@dataclass(frozen=True)
class Setting:
    """Where and how thoroughly to measure."""

    device: torch.device
    quick: bool
    repeats: int
    data: Path | None
    clock: Clock

    def pick(self, full: int, quick: int) -> int:
        """The size to use: `quick` when trying the script, else `full`."""
        return quick if self.quick else full


Results = tuple[list[dict[str, Any]], list[Figure]]


def event_clock(function: Callable[[], Any]) -> tuple[Any, float]:
    """What the function returns, and the seconds between events around it on the stream."""
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = function()
    end.record()
    end.synchronize()
    return result, begin.elapsed_time(end) / 1e3


# --- searches -------------------------------------------------------------------------------------


def ours(method: str) -> Callable[[Tensor], Search]:
    """The library's brute force, by a method of `ops.use_method`."""

    def prepare(bank: Tensor) -> Search:
        def search(queries: Tensor) -> tuple[Tensor, Tensor]:
            with ops.use_method(method):
                return nearest(queries, bank)

        return search

    return prepare


def ours_bank(bank: Tensor) -> Search:
    """The library's bank."""
    return NormalBank(bank).nearest


def ours_in_a_graph(count: int) -> Callable[[Tensor], Search]:
    """The library's bank, captured once for `count` queries and replayed."""

    def prepare(bank: Tensor) -> Search:
        if bank.device.type != "cuda":
            raise ImportError("CUDA graphs need a CUDA device")
        normal = NormalBank(bank)
        given = bank[:count].clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            normal.nearest(given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = normal.nearest(given)

        def search(queries: Tensor) -> tuple[Tensor, Tensor]:
            given.copy_(queries)
            graph.replay()
            return found

        return search

    return prepare


def faiss_gpu_flat(bank: Tensor) -> Search:
    """FAISS's exact index on the GPU, given tensors on the GPU."""
    if bank.device.type != "cuda":
        raise ImportError("needs a CUDA device")
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        raise ImportError("this FAISS is built without GPU support")
    import faiss.contrib.torch_utils

    index = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), bank.shape[1])
    index.add(bank)

    def search(queries: Tensor) -> tuple[Tensor, Tensor]:
        squared, rows = index.search(queries, 1)
        return squared[:, 0].clamp(min=0).sqrt(), rows[:, 0]

    return search


def keops(bank: Tensor) -> Search:
    """KeOps's symbolic distance matrix and its fused arg-min."""
    from pykeops.torch import LazyTensor

    rows = LazyTensor(bank[None, :, :])

    def search(queries: Tensor) -> tuple[Tensor, Tensor]:
        squared = ((LazyTensor(queries[:, None, :]) - rows) ** 2).sum(-1)
        least, found = squared.min_argmin(dim=1)
        return least[:, 0].sqrt(), found[:, 0]

    return search


def flash_kmeans(bank: Tensor) -> Search:
    """Flash-KMeans's fused assignment; distances are computed to the rows that it returns."""
    if bank.device.type != "cuda":
        raise ImportError("needs a CUDA device")
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    def search(queries: Tensor) -> tuple[Tensor, Tensor]:
        squares = queries.square().sum(dim=1)
        rows = euclid_assign_triton(queries[None], bank[None], squares[None])[0].long()
        return (queries - bank[rows]).norm(dim=1), rows

    return search


PEERS = [
    Contender(FAISS_GPU, faiss_gpu_flat, ON_GPU),
    Contender(CDIST, cdist_min, ON_GPU),
    Contender("FAISS CPU flat", faiss_flat, ON_CPU),
]
FUSED_PEERS = [
    Contender("KeOps", keops, ON_GPU),
    Contender("Flash-KMeans assignment", flash_kmeans, ON_GPU),
]


def compare_searches(
    setting: Setting, name: str, queries: Tensor, bank: Tensor, contenders: list[Contender]
) -> list[dict[str, Any]]:
    """Records of all contenders; an exception, of a peer or of ours, becomes the reason."""
    records = measure(
        Workload(name, queries, bank, contenders),
        setting.repeats,
        setting.clock,
        warm_up=True,
        patience=PATIENCE,
        failures=(Exception,),
    )
    for record in records:
        if "reason" not in record:
            record |= {
                "rate": record["giga_pairs_per_second"] * 1e9,
                "unit": "pairs/s",
                "right": record["right_neighbours"],
            }
    order = [contender.name for contender in contenders]
    return sorted(records, key=lambda record: order.index(record["search"]))


def value(records: list[dict[str, Any]], search: str, key: str) -> float | None:
    """A field of a contender's record; None if it was not measured."""
    return next((record.get(key) for record in records if record["search"] == search), None)


def brute_force(setting: Setting) -> Iterator[Results]:
    """A large random bank, in which clusters could rule out nothing; then long vectors."""
    generator = torch.Generator(setting.device).manual_seed(0)

    def random(rows: int, dim: int) -> Tensor:
        return torch.rand(rows, dim, generator=generator, device=setting.device)

    count, rows = setting.pick(400_000, 1_500), setting.pick(1_000_000, 4_000)
    name = f"brute force, {count:,} queries, bank {rows:,} x 64, uniform random"
    screened, plain = "nearest, screened", "nearest, plain"
    contenders = [
        Contender(screened, ours("screened")),
        Contender(plain, ours("plain"), ON_GPU),
        *PEERS,
        *FUSED_PEERS,
    ]
    records = compare_searches(setting, name, random(count, 64), random(rows, 64), contenders)
    yield (
        records,
        [
            Figure(name, "pairs/s", 4e12, value(records, screened, "rate")),
            *(
                Figure(name, f"times {peer}", 15, value(records, peer, "ours_faster"))
                for peer in (FAISS_GPU, CDIST)
            ),
        ],
    )

    count, rows = setting.pick(100_000, 500), setting.pick(100_000, 1_000)
    name = f"long vectors, {count:,} queries, bank {rows:,} x 1536, uniform random"
    contenders = [Contender(screened, ours("screened")), Contender(plain, ours("plain"), ON_GPU)]
    records = compare_searches(
        setting, name, random(count, 1536), random(rows, 1536), [*contenders, *PEERS]
    )
    faster = value(records, FAISS_GPU, "ours_faster")
    yield records, [Figure(name, f"times {FAISS_GPU}", 5, faster)]


def nearest_of_all(queries: Tensor, bank: Tensor, k: int, mode: str) -> tuple[Tensor, Tensor]:
    """torch.cdist in chunks of the bank, in the queries' dtype, then topk: [Q, k], [Q, k]."""
    parts = [
        torch.cdist(queries, part.to(queries.dtype), compute_mode=mode).topk(k, largest=False)
        for part in bank.split(CHUNK)
    ]
    rows = torch.cat([part.indices + i * CHUNK for i, part in enumerate(parts)], dim=1)
    best = torch.cat([part.values for part in parts], dim=1).topk(k, largest=False)
    return best.values, rows.gather(1, best.indices)


def several_neighbours(setting: Setting) -> Iterator[Results]:
    """Nine neighbours, as a score over several wants them, of many queries and of few."""
    k = 9
    generator = torch.Generator(setting.device).manual_seed(0)
    bank = torch.rand(
        setting.pick(1_000_000, 4_000), 64, generator=generator, device=setting.device
    )
    for what, count in (("", setting.pick(ON_GPU, 300)), (" of few", setting.pick(32, 8))):
        queries = torch.rand(count, 64, generator=generator, device=setting.device)
        checked = queries[:CHECKED]
        exact, _ = nearest_of_all(checked.double(), bank, k, "donot_use_mm_for_euclid_dist")
        exact = exact.flatten()

        def judge(found: tuple[Tensor, Tensor], checked: Tensor = checked, exact: Tensor = exact):
            distances, rows = (values[: len(checked)].flatten() for values in found)
            report = correctness(checked.repeat_interleave(k, 0), bank, exact, distances, rows)
            return {"right": report["right_neighbours"], **report}

        def with_cdist(queries: Tensor = queries) -> tuple[Tensor, Tensor]:
            return nearest_of_all(queries, bank, k, "use_mm_for_euclid_dist_if_necessary")

        pairs = count * len(bank)
        calls = [
            Call("nearest", lambda queries=queries: nearest(queries, bank, k=k), pairs, judge),
            Call("torch.cdist + topk", with_cdist, pairs, judge),
        ]
        name = f"{k} neighbours{what}, {count:,} queries, bank {len(bank):,} x 64, uniform random"
        yield compare_calls(setting, name, "pairs/s", calls), []


def made_up_embeddings(setting: Setting, images: int, seed: int) -> Tensor:
    """Embeddings [images * 57 * 57, 64] like a trained encoder's: a tiny ball far from the origin.

    Their norm is 3.58, their deviation 0.0046 per coordinate. They vary smoothly over the image
    along eight axes, with a twentieth of noise in all directions.
    """
    device = setting.device
    axes = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    field = torch.randn(images, 8, 20, 20, generator=generator, device=device)
    smooth = torch.nn.functional.interpolate(field, size=(57, 57), mode="bicubic")
    values = torch.einsum("nkij,kd->nijd", smooth, axes).flatten(0, 2)
    values /= values.std()
    values += 0.05 * torch.randn(values.shape, generator=generator, device=device)
    return values.mul_(0.0046).add_(3.58 / 8)


def pruned(setting: Setting) -> Iterator[Results]:
    """A bank like a detector's, searched for many images and for one."""
    if setting.data is not None:
        name, queries, bank = real_embeddings(setting.data, setting.quick, str(setting.device))
    else:
        name = "made-up tiny ball"
        bank = made_up_embeddings(setting, setting.pick(308, 4), seed=1)
        queries = made_up_embeddings(setting, setting.pick(40, 2), seed=2)
    size = f"bank {len(bank):,} x 64 ({name})"
    title = f"pruned, {len(queries):,} queries, {size}"
    records = compare_searches(
        setting,
        title,
        queries,
        bank,
        [
            Contender("NormalBank", ours_bank),
            Contender("nearest", ours("auto")),
            *PEERS,
            *FUSED_PEERS,
        ],
    )
    yield records, [Figure(title, "pairs/s", 2e13, value(records, "NormalBank", "rate"))]

    title = f"one image, {IMAGE:,} queries, {size}"
    records = compare_searches(
        setting,
        title,
        queries[:IMAGE],
        bank,
        [
            Contender("NormalBank", ours_bank),
            Contender("NormalBank in a CUDA graph", ours_in_a_graph(IMAGE)),
            *PEERS[:2],
        ],
    )
    seconds = value(records, "NormalBank", "seconds")
    latency = None if seconds is None else seconds * 1e3
    yield records, [Figure(title, "ms", 0.5, latency, at_most=True)]


# --- other work -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """Something to time: the call, its amount of work, and how to judge its result."""

    name: str
    run: Callable[[], Any]
    work: float
    judge: Callable[[Any], dict[str, float]] = lambda result: {}


def compare_calls(setting: Setting, name: str, unit: str, calls: list[Call]) -> list[Any]:
    """A record per call, ours first: seconds, rate of work, correctness of the result."""
    records = []
    for call in calls:
        record: dict[str, Any] = {"workload": name, "search": call.name}
        records.append(record)
        try:
            record |= call.judge(call.run())  # also warms up; the result is not kept
            seconds = [setting.clock(call.run)[1] for _ in range(setting.repeats)]
        except Exception as error:
            record["reason"] = f"{type(error).__name__}: {error}"
            continue
        median = statistics.median(seconds)
        record |= {"seconds": median, "all_seconds": seconds}
        record |= {"rate": call.work / median, "unit": unit}
    for record in records:
        if "rate" in record:
            ours = records[0].get("rate")
            record["ours_faster"] = ours and ours / record["rate"]
    return records


def agreement(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Share of values equal to `expected` up to float32 rounding, and largest relative error."""
    found, expected = found.double(), expected.to(found.device).double()
    error = (found - expected).abs() / expected.abs().clamp(min=1e-30)
    error[found == expected] = 0
    return {
        "right": float((error <= 2e-7).double().mean()),
        "worst_relative_error": float(error.max()),
    }


def patches(setting: Setting) -> Iterator[Results]:
    """extract_patches: bound by memory, so measured against a copy."""
    count, level = setting.pick(256, 2), DEFAULT_LEVELS[1]
    images = torch.rand(count, 3, SIDE, SIDE, device=setting.device)
    cells = level.grid_shape(SIDE, SIDE)
    made = count * cells[0] * cells[1] * 3 * level.size**2 * images.element_size()
    source = torch.rand(made // 4 // images.element_size(), device=setting.device)
    target = torch.empty_like(source)

    def judge(result: Tensor) -> dict[str, float]:
        return agreement(
            result[-1:], reference.extract_patches(images[-1:].cpu(), level.size, level.stride)
        )

    moved = made + images.numel() * images.element_size()
    name = f"extract_patches, {count} float32 images of 256x256, K=32, stride 4"
    copy, unfold = "a copy", "unfold + contiguous"
    calls = [
        Call(
            "extract_patches",
            lambda: ops.extract_patches(images, level.size, level.stride),
            moved,
            judge,
        ),
        Call(
            unfold,
            lambda: reference.extract_patches(images, level.size, level.stride),
            moved,
            judge,
        ),
        Call(copy, lambda: target.copy_(source), 2 * source.numel() * source.element_size()),
    ]
    records = compare_calls(setting, name, "bytes/s", calls)
    yield (
        records,
        [
            Figure(name, "of a copy's bandwidth", 0.85, value(records, copy, "ours_faster")),
            Figure(name, f"times {unfold}", 3, value(records, unfold, "ours_faster")),
        ],
    )


def maps(setting: Setting) -> Iterator[Results]:
    """score_map, against a transposed convolution with ones."""
    count, level = setting.pick(256, 2), DEFAULT_LEVELS[1]
    size, stride = level.size, level.stride
    distances = torch.rand(count, *level.grid_shape(SIDE, SIDE), device=setting.device)
    ones = torch.ones(1, 1, size, size, device=setting.device)
    covering = torch.nn.functional.conv_transpose2d(
        torch.ones_like(distances[:1, None]), ones, stride=stride
    )

    def convolution() -> Tensor:
        sums = torch.nn.functional.conv_transpose2d(distances[:, None], ones, stride=stride)
        return (sums / covering)[:, 0]

    def judge(result: Tensor) -> dict[str, float]:
        return agreement(
            result[-1:], reference.score_map(distances[-1:].cpu(), size, stride, SIDE, SIDE)
        )

    calls = [
        Call("score_map", lambda: ops.score_map(distances, size, stride, SIDE, SIDE), count, judge),
        Call("conv_transpose2d", convolution, count, judge),
    ]
    yield compare_calls(setting, f"score_map, {count} maps of 256x256, K=32", "maps/s", calls), []


def random_images(count: int, seed: int) -> Tensor:
    """Smooth coloured images with noise, uint8 [N, 3, 256, 256] on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 16, 16, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")
    noise = torch.rand(count, 3, SIDE, SIDE, generator=generator)
    return ((0.9 * smooth + 0.1 * noise) * 255).byte()


def end_to_end(setting: Setting) -> Iterator[Results]:
    """From images to anomaly maps, both in the host's memory, with banks for two levels."""
    torch.manual_seed(0)
    encoder = HierarchicalEncoder(initialization="kaiming").eval().to(setting.device)
    train, images = random_images(setting.pick(320, 2), 1), random_images(setting.pick(64, 1), 2)
    mean = train.float().mean(dim=0)
    levels = list(DEFAULT_LEVELS)
    encoded = dict(zip(levels, encode_images(encoder, train, mean, levels), strict=True))
    banks = {level: NormalBank(values) for level, values in encoded.items()}
    rows = {level: values.flatten(0, 2) for level, values in encoded.items()}
    few = images[: setting.pick(4, 1)]

    def with_cdist() -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        made = []
        for level, queries in zip(levels, encode_images(encoder, few, mean, levels), strict=True):
            distances, found = cdist_min(rows[level])(queries.flatten(0, 2))
            grid = distances.view(queries.shape[:3])
            made.append(ops.score_map(grid, level.size, level.stride, SIDE, SIDE).cpu())
        return made, queries, distances, found  # of the last level, K=32

    bank = rows[levels[1]]

    def judge(embeddings: Tensor, distances: Tensor, found: Tensor) -> dict[str, float]:
        """Correctness of the answers for some K=32 patches of the first images."""
        count = len(few) * IMAGE
        checked = torch.linspace(0, count - 1, CHECKED).long().to(setting.device)
        queries = embeddings.flatten(0, 2)[checked]
        picked = (v.to(setting.device).flatten()[checked] for v in (distances, found))
        report = correctness(queries, bank, exact_distances(queries, bank), *picked)
        return {"right": report["right_neighbours"], **report}

    def judge_ours(result: ScoreResult) -> dict[str, float]:
        embeddings = encode_images(encoder, images, mean, levels)[1]
        return judge(embeddings, result.distances["K32"], result.bank_rows["K32"])

    name = f"end to end, 256x256 images, banks of {len(train)} images (K=64 and K=32)"
    whole, peer = "score_images", f"the same encoder, {CDIST}"
    calls = [
        Call(
            whole,
            lambda: score_images(encoder, banks, images, mean),
            len(images),
            judge_ours,
        ),
        Call(peer, with_cdist, len(few), lambda result: judge(*result[1:])),
        Call(
            "the encoder alone", lambda: encode_images(encoder, images, mean, levels), len(images)
        ),
    ]
    records = compare_calls(setting, name, "images/s", calls)
    yield records, [Figure(name, "images/s", 1_000, value(records, whole, "rate"))]


WORKLOADS = (brute_force, several_neighbours, pruned, patches, maps, end_to_end)


# --- showing --------------------------------------------------------------------------------------


def card(device: torch.device) -> dict[str, Any]:
    """Name, driver and size of the GPU; on a CPU, only a note that it is one."""
    if device.type == "cpu":
        return {"name": "none: measured on the CPU"}
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    except OSError:
        asked = []
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "driver": asked[0] if asked else "unknown",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "CUDA of PyTorch": torch.version.cuda,
        "TF32 in convolutions": torch.backends.cudnn.allow_tf32,
        "TF32 in matrix products": torch.backends.cuda.matmul.allow_tf32,
    }


def row_of(record: dict[str, Any]) -> str:
    """A line of a workload's table."""
    if "reason" in record:
        reason = " ".join(record["reason"].split())[:120].replace("|", "/")
        return f"| {record['search']} |  |  |  |  |  | {reason} |"

    def shown(key: str, form: str) -> str:
        return "" if record.get(key) is None else format(record[key], form)

    return (
        f"| {record['search']} | {record['seconds'] * 1e3:.4g} | {record['rate']:.3g} "
        f"| {shown('ours_faster', '.3g')} | {shown('right', '.2%')} "
        f"| {shown('worst_relative_error', '.0e')} |  |"
    )


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: the figures to reach, then every workload."""
    about = result["card"]
    lines = [
        f"{about['name']}, driver {about.get('driver', '-')}, PyTorch "
        f"{result['machine']['PyTorch']}, commit {result['commit']}",
        "",
        "| workload | figure to reach | measured | reached |",
        "|---|---|---|---|",
    ]
    for figure in result["figures"]:
        measured, reached = figure["measured"], figure["reached"]
        lines.append(
            f"| {figure['workload']} | {'≤' if figure['at_most'] else '≥'} {figure['target']:g} "
            f"{figure['what']} | {'' if measured is None else f'{measured:.3g}'} "
            f"| {'' if reached is None else 'yes' if reached else 'no'} |"
        )
    for workload in dict.fromkeys(record["workload"] for record in result["records"]):
        records = [r for r in result["records"] if r["workload"] == workload]
        unit = next((r["unit"] for r in records if "unit" in r), "rate")
        lines += [
            "",
            f"**{workload}**",
            "",
            f"| | ms | {unit} | ours is faster by | right | worst error | not measured because |",
            "|---|---|---|---|---|---|---|",
            *map(row_of, records),
        ]
    return "\n".join(lines) + "\n"


def panels(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """What to plot: the rates, a panel per workload."""
    for workload in dict.fromkeys(record["workload"] for record in result["records"]):
        records = [r for r in result["records"] if r["workload"] == workload and "rate" in r]
        if records:
            yield f"{workload} [{records[0]['unit']}]", {r["search"]: r["rate"] for r in records}


def write(result: dict[str, Any], folder: Path) -> None:
    """Write gpu.json and gpu.md."""
    folder.mkdir(parents=True, exist_ok=True)
    result["blas"] = blas.libraries()  # FAISS's is loaded by now
    (folder / "gpu.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "gpu.md").write_text(table(result))


def run(setting: Setting, output: Path | None) -> tuple[dict[str, Any], bool]:
    """Run all workloads, write after each; returns the result and whether all of ours worked."""
    result: dict[str, Any] = {
        "commit": commit(),
        "machine": describe(),
        "card": card(setting.device),
        "quick": setting.quick,
        "figures": [],
        "records": [],
    }
    complete = True
    for workloads in WORKLOADS:
        for records, figures in workloads(setting):
            result["records"] += records
            result["figures"] += [asdict(f) | {"reached": f.reached} for f in figures]
            complete = complete and "reason" not in records[0]
            print(f"done: {records[0]['workload']}", file=sys.stderr, flush=True)
            if output:
                write(result, output)
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return result, complete


def main() -> None:
    """Measure, print a table, and write JSON, table and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named = os.environ.get("PATCHSVDD_TEST_DATA")
    parser.add_argument("--data", type=Path, default=named and Path(named))
    parser.add_argument("--output", type=Path, help="folder for gpu.json, .md and .png")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small inputs, to try the script")
    parser.add_argument("--device", type=torch.device, default="cuda")
    options = parser.parse_args()
    device = options.device
    if device.type == "cuda":
        if not torch.cuda.is_available():
            sys.exit("no CUDA device here; --device cpu --quick tries the script without one")
        torch.cuda.set_device(device.index or 0)
    clock = event_clock if device.type == "cuda" else wall_clock
    setting = Setting(device, options.quick, options.repeats, options.data, clock)
    result, complete = run(setting, options.output)
    print(table(result))
    if options.output:
        plot(panels(result), "rate, in the unit of each panel", options.output / "gpu.png")
    if not complete:
        sys.exit("some workloads failed: their tables name the reason")


if __name__ == "__main__":
    blas.restart_with_best_kernels()
    main()
