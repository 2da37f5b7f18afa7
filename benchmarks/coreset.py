"""Choosing a coreset, PatchCore's subsampling, against the plain greedy selection and two peers.

    python benchmarks/coreset.py --category DIR --output benchmarks/results

DIR holds a category in MVTec layout, the good training images of which EfficientNet-Lite0 turns
into features. A tenth of these is chosen by `select_coreset`, as a whole. The peers compare every
row with every choice and would take long, so that only some steps of each are timed, in turn, and
the median is multiplied by the number of choices. They are written anew here as they work in

- plain: differences, squares and sums in torch;
- anomalib's KCenterGreedy: `pairwise_distance` to the newest choice, with and without its sparse
  random projection (eps 0.9, as many dimensions as Johnson and Lindenstrauss ask for);
- patchcore-inspection's ApproximateGreedyCoresetSampler: distances by matrix products, with and
  without its random linear map to 128 dimensions. Its GreedyCoresetSampler keeps all distances
  between rows, which no memory holds here.

The same rule, so the same choice, is behind plain, ours, and anomalib without its projection. With
a projection another coreset is chosen; its radius is that of the greedy choice among the projected
features, measured between the features themselves. Ours is compared with its own plain selection,
canonical as well: the first steps of all rows, and a whole coreset of some images' rows. Writes
coreset.json; coreset.md is made from it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blas
import torch
from torch import Tensor

from common import commit, wall_clock
from patchsvdd_fast import nearest, ops
from patchsvdd_fast.encoders.pretrained import pretrained_encoder
from patchsvdd_fast.files.folders import find_images
from patchsvdd_fast.files.whole import written_whole
from patchsvdd_fast.images.light import constant_mean
from patchsvdd_fast.images.prepare import load_images
from patchsvdd_fast.ops.backends import describe
from patchsvdd_fast.score.encoding import encode_images
from patchsvdd_fast.search.coreset import Coreset, select_coreset

SIDE = 256
REPEATS = 3  # of ours
ANOMALIB_EPS, PATCHCORE_DIMS = 0.9, 128
PLAIN = "ours, every row with every choice"
Step = Callable[[int], int]
"""Compares all rows with a choice; returns the next."""


def features_of(category: Path, most_images: int | None) -> Tensor:
    """EfficientNet-Lite0's features [M, 176] of the category's good training images."""
    encoder = pretrained_encoder("efficientnet_lite0").eval()
    (level,) = encoder.default_levels
    images = load_images(find_images(category / "train")[:most_images], (SIDE, SIDE), level.size)
    assert encoder.pixel_mean is not None
    mean = constant_mean(encoder.pixel_mean, SIDE, SIDE)
    (encoded,) = encode_images(encoder, images, mean, [level])
    return encoded.flatten(0, 2)


# --- peers: a step each ---------------------------------------------------------------------------


def plain_step(features: Tensor) -> Step:
    """The greedy rule in torch, by differences."""
    least = torch.full((len(features),), math.inf)

    def step(choice: int) -> int:
        squared = (features - features[choice]).square_().sum(dim=1)
        torch.minimum(least, squared, out=least)
        return int(least.argmax())

    return step


def anomalib_step(features: Tensor) -> Step:
    """As anomalib's KCenterGreedy."""
    least = torch.full((len(features), 1), math.inf)

    def step(choice: int) -> int:
        nonlocal least
        newest = features[choice : choice + 1]
        distances = torch.nn.functional.pairwise_distance(features, newest, p=2)
        least = torch.minimum(least, distances[:, None])
        return int(least.argmax())

    return step


def patchcore_step(features: Tensor) -> Step:
    """As patchcore-inspection's ApproximateGreedyCoresetSampler, once it has started."""
    least = torch.full((len(features), 1), math.inf)

    def step(choice: int) -> int:
        nonlocal least
        newest = features[choice : choice + 1]
        own = features[:, None].bmm(features[:, :, None])[:, 0]
        others = newest[:, None].bmm(newest[:, :, None])[:, 0]
        distances = (-2 * features.mm(newest.T) + own + others.T).clamp(min=0).sqrt()
        least = torch.cat([least, distances], dim=1).amin(dim=1, keepdim=True)
        return int(least.argmax())

    return step


def sparse_projection(features: Tensor) -> Tensor:
    """Features on random axes with few entries (Li, Hastie & Church 2006), as anomalib's."""
    rows, dim = features.shape
    eps = ANOMALIB_EPS
    axes = int(4 * math.log(rows) / (eps**2 / 2 - eps**3 / 3))
    generator = torch.Generator().manual_seed(0)
    density = 1 / math.sqrt(dim)
    kept = torch.rand(dim, axes, generator=generator) < density
    signs = torch.randint(2, (dim, axes), generator=generator) * 2.0 - 1
    return features @ (kept * signs * math.sqrt(1 / (density * axes)))


def linear_projection(features: Tensor) -> Tensor:
    """Features through a linear layer with torch's initial weights, as patchcore-inspection's."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(features.shape[1], PATCHCORE_DIMS, bias=False)
    with torch.no_grad():
        return layer(features)


# --- measuring ------------------------------------------------------------------------------------


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """What the function returns, its seconds, and those of processors."""
    cpu = time.process_time()
    result, seconds = wall_clock(function)
    return result, seconds, time.process_time() - cpu


def timed_steps(steps: dict[str, Step], first: int, count: int) -> dict[str, tuple[float, float]]:
    """Median seconds of `count` steps, and of processors, made in turn after an untimed one."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    choices = dict.fromkeys(steps, first)
    for i in range(count + 1):
        for name, step in steps.items():
            choices[name], *both = timed(lambda step=step, c=choices[name]: step(c))
            if i > 0:
                taken[name].append((both[0], both[1]))
    return {
        name: (statistics.median(t[0] for t in times), statistics.median(t[1] for t in times))
        for name, times in taken.items()
    }


def radius_of(features: Tensor, rows: Tensor) -> float:
    """The largest distance of any row to the nearest of `rows`."""
    return float(nearest(features, features[rows])[0].max())


def plain_native(features: Tensor, count: int) -> tuple[Coreset, float, float]:
    """Ours, which compares every row with every choice, its seconds, and those of processors."""
    with ops.use_method("plain"):
        return timed(lambda: select_coreset(features, count))


def same(some: Coreset, whole: Coreset) -> bool:
    """Whether a coreset is the beginning of another, to the bit."""
    count = len(some.rows)
    return torch.equal(some.rows, whole.rows[:count]) and torch.equal(
        some.distances, whole.distances[:count]
    )


def measure(features: Tensor, share: float, steps: int, checked: Tensor) -> dict[str, Any]:
    """All that coreset.json says of these features; checked: those of some images."""
    count = max(2, int(share * len(features)))
    runs = [timed(lambda: select_coreset(features, count)) for _ in range(REPEATS)]
    found = runs[0][0]
    first = int(found.rows[0])
    sparse, linear = sparse_projection(features), linear_projection(features)
    contenders = {
        "plain, torch": (plain_step, features),
        "anomalib's, no projection": (anomalib_step, features),
        "anomalib's": (anomalib_step, sparse),
        "patchcore-inspection's, no projection": (patchcore_step, features),
        "patchcore-inspection's": (patchcore_step, linear),
    }
    each = timed_steps({name: make(x) for name, (make, x) in contenders.items()}, first, steps)
    radii = {id(features): found.radius}
    for projected in (sparse, linear):
        radii[id(projected)] = radius_of(features, select_coreset(projected, count).rows)
    start, *begun = plain_native(features, 1)
    more, *taken = plain_native(features, 1 + steps)
    each[PLAIN] = ((taken[0] - begun[0]) / steps, (taken[1] - begun[1]) / steps)
    contenders[PLAIN] = (plain_step, features)
    ours = {
        "name": "ours",
        "dim": features.shape[1],
        "seconds": statistics.median(run[1] for run in runs),
        "cpu_seconds": statistics.median(run[2] for run in runs),
        "steps_timed": count,
        "radius": found.radius,
    }
    records = [ours]
    for name, (_, values) in contenders.items():
        seconds, cpu_seconds = (value * count for value in each[name])
        records.append(
            {
                "name": name,
                "dim": values.shape[1],
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "steps_timed": steps,
                "radius": radii[id(values)],
            }
        )
    for record in records:
        record["ours_faster"] = record["seconds"] / ours["seconds"]
        record["ours_faster_by_cpu"] = record["cpu_seconds"] / ours["cpu_seconds"]
    whole = max(2, int(share * len(checked)))
    part = select_coreset(checked, whole)
    exact, *_ = plain_native(checked, whole)
    return {
        "rows": len(features),
        "dim": features.shape[1],
        "count": count,
        "records": records,
        "same_as_plain": {
            "steps_of_all_rows": len(more.rows) if same(start, found) and same(more, found) else 0,
            "rows_of_some_images": len(checked),
            "all_choices_among_these": whole,
            "same": same(part, exact) and part.radius == exact.radius,
        },
    }


def table(result: dict[str, Any]) -> str:
    """The records as Markdown."""
    lines = [
        f"{result['count']:,} of {result['rows']:,} x {result['dim']} features of "
        f"{result['category']}. Machine: {result['machine']['system']}, "
        f"{result['machine']['threads']} threads, {result['machine']['CPU search']}; load on it "
        f"{result['load'][0]:.1f} before and {result['load'][1]:.1f} after. "
        f"Commit {result['commit']}.",
        "",
        "| selection | dimensions | seconds | of processors | steps timed | ours is faster "
        "| by processors' time | radius |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in result["records"]:
        lines.append(
            f"| {record['name']} | {record['dim']} | {record['seconds']:,.1f} | "
            f"{record['cpu_seconds']:,.1f} | {record['steps_timed']:,} | "
            f"{record['ours_faster']:.0f} x | {record['ours_faster_by_cpu']:.0f} x | "
            f"{record['radius']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--category", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.1, help="of the rows, to choose")
    parser.add_argument("--steps", type=int, default=40, help="timed, of each peer")
    parser.add_argument("--images", type=int, help="only so many")
    parser.add_argument("--checked-images", type=int, default=30)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    features = features_of(options.category, options.images)
    images = len(find_images(options.category / "train")[: options.images])
    per_image = len(features) // images
    before = os.getloadavg()[0]
    result = {
        "category": options.category.name,
        "commit": commit(),
        "machine": describe(),
        "blas": blas.libraries(),
        **measure(
            features, options.share, options.steps, features[: options.checked_images * per_image]
        ),
        "load": [before, os.getloadavg()[0]],
    }
    text = table(result)
    with written_whole(options.output / "coreset.json") as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n")
    (options.output / "coreset.md").write_text(text)
    print(text)
    print("identical to plain:", result["same_as_plain"])


if __name__ == "__main__":
    blas.restart_with_best_kernels()
    main()
