"""Whether the false-alarm rate stays below the promised one, on real normal images.

    python benchmarks/calibration.py --data DIR --output benchmarks/results

Good images are split into some to calibrate with and new ones. The share of new images above
`threshold(rate)`, and of their pixels above `pixel_threshold(rate)`, is compared with the rate, for
each rate that so many images can promise. There are three kinds of splits:

- *train*, *train + test*: at random, many times, five of six images to calibrate with.
- *halves*: at random into two halves, a few times.
- *train, then test*: train/good to calibrate with, test/good as the new images. Nothing promises
  that the two are alike; how alike they are is measured (`mixing`).

and two ways to use a split:

- *encoded once*: light, mean image and untrained encoder are the same for all images. In a random
  split the new images then differ from the others by chance alone, so the rate must hold for any
  images: this tests the thresholds. To be fast, it searches pairs of images once and takes the
  nearest patch in a bank as the minimum over the bank's images. That gives the same bits as
  `calibrate`, which is checked on one split of each category.
- *fitted*: `PatchSVDD.fit` on the first part and `score` of the second, as a user would do. Light
  and mean are those of the calibration images alone. Encoders are trained on them only where the
  table gives a number of steps.

The promise is an average over splits. Intervals over many splits are bootstrapped and say how well
these images keep it; those of a single split are binomial. DIR holds categories in MVTec layout in
`data`; without it, built-in images are used. Writes calibration.json and calibration.md after each
category, and keeps what they hold of other categories.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import betabinom, binomtest
from torch import Tensor

from common import commit
from patchsvdd_fast import NormalBank, PatchLevel, PatchSVDD, nearest, score_map
from patchsvdd_fast.encoders.levels import DEFAULT_LEVELS
from patchsvdd_fast.files.categories import Category, find_categories
from patchsvdd_fast.files.folders import find_images
from patchsvdd_fast.files.whole import written_whole
from patchsvdd_fast.images.light import MEANS, match_illumination, mean_colour, mean_image
from patchsvdd_fast.images.prepare import load_images
from patchsvdd_fast.images.sample_cloth import write_sample_category
from patchsvdd_fast.ops.backends import describe
from patchsvdd_fast.score.calibration import Calibration, _upper_quantiles, calibrate
from patchsvdd_fast.score.encoding import encode_images
from patchsvdd_fast.score.maps import combine

SHAPE = (256, 256)
COMBINATION = "mult"
RATES = (0.01, 0.05, 0.1)
NEW = 6  # one image in NEW is new, in the random splits that are made many times
MOST_TRAIN, MOST_TEST = 120, 30  # images that are used of a category's two folders
PIXEL_STEP = 4  # thresholds use every PIXEL_STEP-th pixel of each axis; maps vary slowly
RESAMPLES = 2_000
PERMUTATIONS = 10_000
CHANCE = 0.025  # probability below which a single split counts as breaking the promise
ENCODED_ONCE = "encoded once"

Split = tuple[Tensor, Tensor]
"""Numbers of the images to calibrate with, and of the new ones; int64."""


@dataclass(frozen=True)
class Trial:
    """The result of one split."""

    calibrated: int
    """Number of images to calibrate with."""
    new: int
    """Number of new images."""
    alarms: dict[float, float]
    """By promised rate, the share of the new images above the threshold."""
    pixels: dict[float, float]
    """By promised rate, the share of their pixels above the pixel threshold."""
    p_value: float
    """Mean of the new images' p-values."""


def random_splits(images: Tensor, new: int, splits: int, seed: int) -> Iterator[Split]:
    """Split numbers of images at random, many times; the second part has `new` of them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(splits):
        mixed = images[torch.randperm(len(images), generator=generator)]
        kept, rest = mixed.tensor_split([len(images) - new])
        yield kept, rest


def try_out(calibration: Calibration, maps: Tensor) -> Trial:
    """Compare new good images' maps [N, H, W] with the thresholds of a calibration."""
    scores = maps.amax(dim=(1, 2)).double()
    rates = [rate for rate in RATES if rate >= calibration.smallest_rate - 1e-9]
    return Trial(
        calibration.num_images,
        len(maps),
        {r: float((scores > calibration.threshold(r)).double().mean()) for r in rates},
        {r: float((maps > calibration.pixel_threshold(r)).double().mean()) for r in rates},
        float(calibration.p_values(scores).mean()),
    )


# --- encoded once ---------------------------------------------------------------------------------


def pair_distances(embeddings: Tensor) -> Tensor:
    """Distances [N, N, I J]: entry [i, j] from image i's patches to their nearest in image j.

    embeddings: [N, I, J, D]. An image is infinitely far from itself.
    """
    rows = embeddings.flatten(1, 2)
    count = len(rows)
    distances = torch.empty(count, count, rows.shape[1])
    for number, bank in enumerate(rows):
        found, _ = nearest(rows.flatten(0, 1), bank)
        distances[:, number] = found.view(count, -1)
        distances[number, number] = torch.inf
    return distances


def maps_against(distances: Mapping[PatchLevel, Tensor], bank: Tensor, images: Tensor) -> Tensor:
    """Combined maps [N', H, W] of images against a bank of images, each without itself.

    distances: from `pair_distances`. bank, images: numbers of images, int64.
    """
    maps = {}
    for level, pairs in distances.items():
        found = torch.stack([pairs[image, bank].amin(dim=0) for image in images])
        grid = found.unflatten(1, level.grid_shape(*SHAPE))
        maps[str(level)] = score_map(grid, level.size, level.stride, *SHAPE)
    return combine(maps, COMBINATION)


def calibration_of(maps: Tensor, step: int = PIXEL_STEP) -> Calibration:
    """The calibration from maps [N, H, W] of images, each scored against the others."""
    scores = maps.amax(dim=(1, 2)).double().sort().values
    pixels = maps[:, ::step, ::step].flatten().double()
    return Calibration(scores, _upper_quantiles(pixels, scores[-1:]))


def encoded_once(distances: Mapping[PatchLevel, Tensor], split: Split) -> Trial:
    """Try a split of images, given their `pair_distances`."""
    kept, new = split
    calibration = calibration_of(maps_against(distances, kept, kept))
    return try_out(calibration, maps_against(distances, kept, new))


def check_against_calibrate(
    embeddings: Mapping[PatchLevel, Tensor],
    distances: Mapping[PatchLevel, Tensor],
    images: Tensor,
) -> None:
    """Raise RuntimeError unless pairs of images give the same bits as `calibrate` on banks."""
    theirs = calibrate(
        {level: NormalBank(values[images]) for level, values in embeddings.items()},
        SHAPE,
        COMBINATION,
    )
    ours = calibration_of(maps_against(distances, images, images), step=1)
    same = theirs is not None and all(
        torch.equal(getattr(ours, name), getattr(theirs, name))
        for name in ("image_scores", "pixel_values")
    )
    if not same:
        raise RuntimeError("calibrate finds other scores than pairs of images give")


def mixing(pairs: Tensor, in_test: Tensor) -> dict[str, float]:
    """How well the images of two folders mix.

    pairs: from `pair_distances`. in_test: [N] bool, whether an image lies in the second folder.

    Returns `own_folder`, the share of the patches whose nearest other image lies in their own
    folder; `by_chance`, its mean over random folders of these sizes; `p_value`, how often random
    folders have as high a share; and `one_image`, the largest share of an image's patches whose
    nearest image is the same.
    """
    count = len(pairs)
    nearest_image = pairs.argmin(dim=1)  # [N, I J]
    votes = torch.stack([row.bincount(minlength=count) for row in nearest_image]).double()
    votes /= nearest_image.shape[1]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(count, generator=generator) for _ in range(PERMUTATIONS)]
    sides = 2.0 * torch.stack([in_test, *(in_test[order] for order in orders)]).double() - 1
    shares = 0.5 + 0.5 * ((sides @ votes) * sides).sum(dim=1) / count
    real, shuffled = shares[0], shares[1:]
    return {
        "own_folder": float(real),
        "by_chance": float(shuffled.mean()),
        "p_value": float(1 + (shuffled >= real).sum()) / (1 + PERMUTATIONS),
        "one_image": float(votes.max()),
    }


# --- fitted ---------------------------------------------------------------------------------------


def fitted(images: Tensor, split: Split, mean: str, steps: int | None = None) -> Trial:
    """Fit a detector on a part of images [N, 3, H, W] uint8, training for `steps` if given."""
    kept, new = split
    detector = PatchSVDD(mode="dense", steps=steps, mean=mean, image_size=SHAPE, device="cpu")
    encoder = detector.untrained_encoder() if steps is None else None
    detector.fit(images[kept], encoder=encoder)
    assert detector.calibration_ is not None
    return try_out(detector.calibration_, detector.score(images[new]).anomaly_map)


# --- records --------------------------------------------------------------------------------------


def record(category: str, division: str, way: str, trials: Sequence[Trial]) -> dict[str, Any]:
    """A record for the table: shares with intervals over the trials, by promised rate."""
    calibrated, new = trials[0].calibrated, trials[0].new
    p_values = [trial.p_value for trial in trials]
    rates = []
    for rate in trials[0].alarms:
        above = math.floor((calibrated + 1) * rate + 1e-9)  # ranks above the threshold, of N + 1
        alarms = [trial.alarms[rate] for trial in trials]
        entry: dict[str, Any] = {
            "rate": rate,
            "attainable": above / (calibrated + 1),
            "alarms": interval(alarms) if len(trials) > 1 else one_split(alarms[0], new),
            "pixels": interval([trial.pixels[rate] for trial in trials]),
        }
        if len(trials) == 1:
            as_many = betabinom(new, above, calibrated + 1 - above).sf(round(alarms[0] * new) - 1)
            entry["by_chance"] = float(as_many)
        rates.append(entry)
    return {
        "category": category,
        "division": division,
        "way": way,
        "calibrated": calibrated,
        "new": new,
        "splits": len(trials),
        "p_value": interval(p_values),
        "p_values": p_values,
        "exchangeable_p_value": (calibrated + 2) / (2 * (calibrated + 1)),
        "rates": rates,
    }


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean over splits with a bootstrapped 95 % interval; for a single split, without one."""
    share = statistics.mean(values)
    if len(values) == 1:
        return {"share": share, "low": None, "high": None}
    generator = np.random.default_rng(0)
    means = generator.choice(np.array(values), (RESAMPLES, len(values))).mean(axis=1)
    low, high = (float(end) for end in np.quantile(means, (0.025, 0.975)))
    return {"share": share, "low": low, "high": high}


def one_split(share: float, new: int) -> dict[str, float | None]:
    """A share of `new` images with its exact binomial 95 % interval."""
    found = binomtest(round(share * new), new).proportion_ci(method="exact")
    return {"share": share, "low": float(found.low), "high": float(found.high)}


def records_of(
    category: Category, splits: int, fits: int, trained_fits: int, steps: int
) -> Iterator[dict[str, Any]]:
    """A record for each split and way on a category; one also says how its folders mix."""
    train = some_of(find_images(category.root / "train" / "good"), MOST_TRAIN)
    test = some_of(find_images(category.root / "test" / "good"), MOST_TEST)
    raw = load_images([*train, *test], SHAPE, max(level.size for level in DEFAULT_LEVELS))
    images = match_illumination(raw, mean_colour(raw))
    encoder = PatchSVDD(mode="dense").untrained_encoder()
    encoded = encode_images(encoder, images, mean_image(images), DEFAULT_LEVELS)
    embeddings = dict(zip(DEFAULT_LEVELS, encoded, strict=True))
    distances = {level: pair_distances(values) for level, values in embeddings.items()}

    everything = torch.arange(len(raw))
    check_against_calibrate(embeddings, distances, everything[::2])
    for division, pool in (("train", everything[: len(train)]), ("train + test", everything)):
        many = random_splits(pool, max(1, round(len(pool) / NEW)), splits, seed=0)
        trials = [encoded_once(distances, split) for split in many]
        yield record(category.name, division, ENCODED_ONCE, trials)

    halves = list(random_splits(everything, len(raw) // 2, fits, seed=1))
    trials = [encoded_once(distances, half) for half in halves]
    yield record(category.name, "halves", ENCODED_ONCE, trials)
    for mean in (name for name in MEANS if name != "fixed"):
        trials = [fitted(raw, half, mean) for half in halves]
        yield record(category.name, "halves", f"fitted, {mean} mean", trials)
    trials = [fitted(raw, half, "pixel", steps) for half in halves[:trained_fits]]
    yield record(category.name, "halves", f"fitted, pixel mean, {steps} steps", trials)

    folders = everything[: len(train)], everything[len(train) :]
    smallest = min(DEFAULT_LEVELS, key=lambda level: level.size)
    trials = [encoded_once(distances, folders)]
    yield record(category.name, "train, then test", ENCODED_ONCE, trials) | {
        "mixing": mixing(distances[smallest], everything >= len(train))
    }
    trials = [fitted(raw, folders, "pixel")]
    yield record(category.name, "train, then test", "fitted, pixel mean", trials)


def some_of(paths: Sequence[Path], most: int) -> list[Path]:
    """At most `most` of the paths, drawn at random, in their original order."""
    if len(paths) <= most:
        return list(paths)
    drawn = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))[:most]
    return [paths[number] for number in sorted(drawn.tolist())]


# --- showing --------------------------------------------------------------------------------------


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as Markdown: shares in percent, with their intervals."""
    columns = " | ".join(f"{rate:.0%}: images | pixels" for rate in RATES)
    lines = [
        "New good images, and pixels of them, above the thresholds for three rates, in percent, "
        "with 95 % intervals; in front of the slash, what so many images can come to at most. "
        "Bold: above the rate by more than chance explains. p: mean p-value of the new images, "
        "and what it is if they are like the others; where it is lower, they score higher.",
        "",
        f"| category | division | way | N + new | splits | p | if alike | {columns} |",
        f"|---|---|---|---|---|---|---|{'---|' * 2 * len(RATES)}",
    ]
    for one in records:
        by_rate = {entry["rate"]: entry for entry in one["rates"]}
        cells = [
            *(one["category"], one["division"], one["way"]),
            f"{one['calibrated']} + {one['new']}",
            str(one["splits"]),
            _with_interval(one["p_value"], 1),
            f"{one['exchangeable_p_value']:.2f}",
        ]
        for rate in RATES:
            cells += _cells(by_rate[rate]) if rate in by_rate else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "How train/good and test/good mix: of the patches (K=32), how many have their nearest "
        "other image in their own folder, and how many if folders were drawn at random; and the "
        "largest share of an image's patches whose nearest all lie in one other (near-duplicates).",
        "",
        "| category | own folder | at random | p-value | one image |",
        "|---|---|---|---|---|",
    ]
    for one in records:
        if "mixing" in one:
            mixed = one["mixing"]
            lines.append(
                f"| {one['category']} | {mixed['own_folder']:.1%} | {mixed['by_chance']:.1%} "
                f"| {mixed['p_value']:.4f} | {mixed['one_image']:.0%} |"
            )
    return "\n".join(lines) + "\n"


def _cells(entry: Mapping[str, Any]) -> list[str]:
    alarms, pixels = (_with_interval(entry[what], 100) for what in ("alarms", "pixels"))
    by_chance = entry.get("by_chance")
    if entry["alarms"]["low"] > entry["rate"] if by_chance is None else by_chance < CHANCE:
        alarms = f"**{alarms}**"
    if (entry["pixels"]["low"] or 0) > entry["rate"]:
        pixels = f"**{pixels}**"
    return [f"{100 * entry['attainable']:.1f} / {alarms}", pixels]


def _with_interval(found: Mapping[str, float | None], unit: float) -> str:
    digits = 2 if unit == 1 else 1
    share, low, high = (
        "" if value is None else f"{unit * value:.{digits}f}" for value in found.values()
    )
    return f"{share} ({low} .. {high})" if low else share


def main() -> None:
    """Try all categories, print the table, and write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named = os.environ.get("PATCHSVDD_TEST_DATA")
    parser.add_argument("--data", type=Path, default=named and Path(named))
    parser.add_argument("--output", type=Path, help="folder for calibration.json and .md")
    parser.add_argument("--categories", nargs="*", help="names; default: all in DIR")
    parser.add_argument("--splits", type=int, default=200, help="of images encoded once")
    parser.add_argument("--fits", type=int, default=6, help="per mean, on random halves")
    parser.add_argument("--trained-fits", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100, help="of dense training")
    options = parser.parse_args()
    path = options.output / "calibration.json" if options.output else None
    records = json.loads(path.read_text())["records"] if path and path.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            write_sample_category(Path(folder), train=20, test_good=10, per_defect=1)
        for category in find_categories(options.data / "data" if options.data else Path(folder)):
            if options.categories and category.name not in options.categories:
                continue
            given = (options.splits, options.fits, options.trained_fits, options.steps)
            found = []
            for one in records_of(category, *given):
                print(category.name, one["division"], one["way"], flush=True)
                found.append(one | {"commit": commit()})
            records = [one for one in records if one["category"] != category.name] + found
            records.sort(key=lambda one: one["category"])  # stable: keeps ways in order
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                with written_whole(path) as partial:
                    written = {"machine": describe(), "records": records}
                    partial.write_text(json.dumps(written, indent=1) + "\n")
                path.with_suffix(".md").write_text(table(records))
    print(table(records))


if __name__ == "__main__":
    main()
