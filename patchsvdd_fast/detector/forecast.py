"""How long a fit will take: by its own pace, and for phases to come by a trial on few images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..encoders.patch_encoder import PatchEncoder
from ..images.gallery import evenly_spread
from ..ops.backends import use_method
from ..score.calibration import pixel_step
from ..score.encoding import NotFiniteError, banks_of
from ..score.maps import MapRule, combine, scores_of
from ..search.bank import NormalBank
from ..search.coreset import as_count, is_screened
from ..training.record import TrainingStep
from .parameters import Parameters
from .progress_bars import (
    AFTER_TRAINING,
    CALIBRATING,
    CHECKING,
    ENCODING,
    ESTIMATING,
    FILLING,
    THRESHOLDS,
    TRAINING,
    OnProgress,
    fit_shown,
)
from .scoring import encode

_OF_EACH_CATEGORY = AFTER_TRAINING[AFTER_TRAINING.index(ESTIMATING) + 1 :]
_TRIED, _LEAST_TRIED = 32, 4  # images that the phases to come are tried on: at most, at least


class Progress:
    """Tells `on_progress` how far a fit is and how long it will still take.

    A phase's own pace says when it will end. What comes after it is `expected`, in seconds by
    phase; it is unknown until `forecast` has tried it. Training says itself how long its steps and
    checks will take.
    """

    def __init__(self, on_progress: OnProgress = None) -> None:
        self.on_progress = on_progress
        self.expected: dict[str, float] = {}
        self.trains = False
        """Whether training is still to come, so that nobody knows how long the whole will take."""
        self._phase, self._began = "", 0.0
        self._training_ends: float | None = None  # by `time.perf_counter`
        self._check_began, self._seconds_of_check = 0.0, 0.0
        self._category, self._to_come = 1, 1  # images: of the category; of it and those to come

    def begin_category(self, num_images: int) -> None:
        """Expect of this category, and of those to come, times that grow as its images do."""
        growth = num_images / self._category
        self.expected = {name: seconds * growth for name, seconds in self.expected.items()}
        self._category = num_images

    def end_category(self) -> None:
        """Its images are done."""
        self._to_come -= self._category

    def phase(self, name: str) -> Callable[[float], None] | None:
        """Begin a phase; returns a callback for its share done, or None if nobody listens."""
        if self.on_progress is None:
            return None
        self._phase, self._began = name, time.perf_counter()

        def report(share: float) -> None:
            spent = time.perf_counter() - self._began
            left = spent * (1 - share) / share if share > 0 else self.expected.get(name)
            self._report(share, left)

        report(0.0)
        return report

    def step(self, step: TrainingStep) -> None:
        """Report a step of training, which tells itself how long training will take."""
        self._phase, self.trains = TRAINING, False
        share = 0.0 if step.total_steps is None else step.step / step.total_steps
        if step.seconds_left is not None:
            self._training_ends = time.perf_counter() + step.seconds_left
        self._report(share, step.seconds_left)

    def check(self, share: float) -> None:
        """Report how much is done of a check of what was learned, during training.

        The end of training, as the last step told it, moves by what this check takes longer than
        the one before.
        """
        now = time.perf_counter()
        if share == 0:
            self._phase, self._check_began = CHECKING, now
        spent = now - self._check_began
        left = None
        if self._training_ends is not None:
            longer = 0.0 if share == 0 else max(0.0, spent / share - self._seconds_of_check)
            left = max(0.0, self._training_ends - now + longer)
        if share == 1:
            self._seconds_of_check = spent
        self._report(share, left)

    def forecast(
        self,
        given: Parameters,
        encoder: PatchEncoder,
        mean: Tensor,
        light: Tensor,
        images: Tensor,
        of: int | None = None,
    ) -> None:
        """Try what follows training on a few images, if anybody listens; arguments as of `encode`.

        images: [N, 3, H, W], all of one category. of: how many all categories have; None: N.
        """
        self._category, self._to_come = len(images), of or len(images)
        if self.on_progress is None or len(images) < _LEAST_TRIED:
            return
        report, trial_began = self.phase(ESTIMATING), time.perf_counter()
        assert report is not None
        count = min(_TRIED, max(_LEAST_TRIED, len(images) // 4))
        some = evenly_spread(len(images), count)
        try:
            encode(encoder, mean, light, given, images[some[:2]])  # loads libraries
            began = time.perf_counter()
            encoded = encode(encoder, mean, light, given, images[some])
        except NotFiniteError:
            return  # encoding all of them will name the image
        self.expected[ENCODING] = (time.perf_counter() - began) * len(images) / count
        report(0.4)
        filling, searching = 0.0, 0.0
        for level, values in zip(given["levels"], encoded, strict=True):
            if given["coreset"] is None:
                seconds = _seconds_of_bank(values, given["seed"], len(images))
            else:
                seconds = _seconds_of_coreset(level, values, given, len(images))
            filling += seconds[0]
            searching += seconds[1]
        self.expected[FILLING] = filling
        self.expected[CALIBRATING] = len(images) * searching
        report(0.8)
        shape = images.shape[2], images.shape[3]
        self.expected[THRESHOLDS] = _seconds_of_maps(encoder, given, encoded, shape, len(images))
        self.expected[ESTIMATING] = time.perf_counter() - trial_began
        report(1.0)

    def _report(self, share: float, left: float | None) -> None:
        if self.on_progress is None:
            return
        known = self._phase in AFTER_TRAINING
        after = AFTER_TRAINING[AFTER_TRAINING.index(self._phase) + 1 if known else 0 :]
        later = [self.expected.get(name) for name in after]
        parts = [seconds for seconds in (left, *later) if seconds is not None]
        whole = sum(parts) if len(parts) == len(later) + 1 and not self.trains else None
        if whole is not None:
            of_each = sum(self.expected.get(name, 0.0) for name in _OF_EACH_CATEGORY)
            whole += of_each * (self._to_come / self._category - 1)
        self.on_progress(self._phase, share, whole)


@contextmanager
def changes_shown(wanted: bool) -> Iterator[Progress]:
    """Within the context, the progress of a change of banks that ends with their calibration.

    wanted: False: it is not shown. How long thresholds take, after the calibration's searches, is
    left out of the time that is told.
    """
    with fit_shown(wanted, None, None) as (_, on_progress):
        progress = Progress(on_progress)
        progress.expected[THRESHOLDS] = 0.0
        yield progress


def _seconds_of_bank(embeddings: Tensor, seed: int, num_images: int) -> tuple[float, float]:
    """Expected time to fill a bank with so many images, and to search all patches of one.

    embeddings: [M, I, J, D], of some images.
    """
    began = time.perf_counter()
    bank = NormalBank(embeddings, seed=seed)
    filling = (time.perf_counter() - began) * num_images / len(embeddings)
    few = NormalBank(_quarter(embeddings), seed=seed)
    return filling, _seconds_of_search(embeddings, few, bank, num_images)


def _seconds_of_coreset(
    level: PatchLevel, embeddings: Tensor, given: Parameters, num_images: int
) -> tuple[float, float]:
    """As `_seconds_of_bank`, for a coreset: a share of all rows.

    The choice is taken to grow with the number of images, and its square: rows that are chosen are
    compared with all. A search takes about as long in any rows that are as many.
    """
    seed, share = given["seed"], given["coreset"]

    def seconds(some: Tensor) -> float:
        began = time.perf_counter()
        banks_of([level], [some], seed, share)
        return time.perf_counter() - began

    count, few = len(embeddings), _quarter(embeddings)
    patches, dim = embeddings[0, ..., 0].numel(), embeddings.shape[-1]
    rows = num_images * patches
    wanted = as_count(share, rows)
    with use_method("screened" if is_screened(rows, dim, wanted) else "auto"):
        seconds(few)  # loads libraries
        less, more = seconds(few) / len(few), seconds(embeddings) / count  # per image
    growth = min(max(0.0, more - less) / (count - len(few)), more / count)
    filling = num_images * (more + growth * (num_images - count))

    spread = evenly_spread(count * patches, min(wanted, count * patches))
    picked = torch.from_numpy(spread).to(embeddings.device)
    sample = NormalBank(
        embeddings.flatten(0, 2)[picked].contiguous(), groups=picked // patches, seed=seed
    )
    return filling, _timed(embeddings, sample) * wanted / len(sample)


def _quarter(embeddings: Tensor) -> Tensor:
    """Those of a quarter of the images, at least one."""
    return embeddings[: max(1, len(embeddings) // 4)].contiguous()


def _seconds_of_search(
    embeddings: Tensor, few: NormalBank, bank: NormalBank, num_images: int
) -> float:
    """Expected time to search all patches of an image in a bank of so many images.

    embeddings: [M, I, J, D], of the M images in the bank. few: a bank of a quarter of them. Time is
    taken to grow with the bank as from the one to the other: by as much for each image; where
    clusters rule out a part of the bank by less, half as much as that and half as a power of their
    number.
    """
    count = len(embeddings)
    less, more = _timed(embeddings, few), _timed(embeddings, bank)
    added = count - len(few.groups)
    linear = more + max(0.0, more - less) / added * (num_images - count)
    if not bank.num_clusters:
        return linear
    growth = count / len(few.groups)
    power = min(1.0, max(0.0, math.log(more / less) / math.log(growth)))
    return 0.5 * (linear + more * float((num_images / count) ** power))


def _seconds_of_maps(
    encoder: PatchEncoder,
    given: Parameters,
    encoded: Sequence[Tensor],
    shape: tuple[int, int],
    num_images: int,
) -> float:
    """Expected time that a calibration takes after its searches, as `calibrate` does it.

    encoded: embeddings [N, I, J, D] per level, N >= 2. shape: (height, width) in pixels.
    """
    rule, making, sorting = MapRule(interpolate=encoder.surroundings != 0), math.inf, math.inf
    some = [values[:2, ..., 0].abs() for values in encoded]  # stand for distances
    for _ in range(2):  # the first loads libraries
        began = time.perf_counter()
        maps = {
            str(level): rule.map(values, level, shape).cpu()
            for level, values in zip(given["levels"], some, strict=True)
        }
        combined = combine(maps, given["combination"])
        for level_map in (*maps.values(), combined):
            scores_of(level_map)
        pixels = combined.flatten().double()
        made = time.perf_counter()
        pixels.sort()
        making = min(making, made - began)
        sorting = min(sorting, time.perf_counter() - made)
    step = pixel_step(num_images, shape)
    sorted_at_once = num_images * -(-shape[0] // step) * -(-shape[1] // step)
    growth = sorted_at_once * math.log(sorted_at_once) / (len(pixels) * math.log(len(pixels)))
    return making / 2 * num_images + sorting * growth


def _timed(embeddings: Tensor, bank: NormalBank) -> float:
    """Seconds that an image's search takes; patches of its own image do not count."""
    seconds: list[float] = []
    for number in range(len(embeddings) - 3, len(embeddings)):
        one = embeddings[number : number + 1]
        own = torch.full(one.shape[:-1], number, device=one.device)
        began = time.perf_counter()
        distances, _ = bank.nearest(one, exclude_same_group=own)
        float(distances.max())  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[1]
