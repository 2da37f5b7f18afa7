"""How long a fit will take: by its own pace, and for phases to come by a trial on few images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..encoders.patch_encoder import PatchEncoder
from ..images.prepare import evenly_spread
from ..score.encoding import NotFiniteError, banks_of
from ..search.bank import NormalBank
from ..training.record import TrainingStep
from .parameters import Parameters
from .scoring import encode

OnProgress = Callable[[str, float, float | None], None] | None
"""Called with the name of a phase of `PHASES`, the share of it that is done, 0 to 1, and the
seconds that the whole fit will still take (None as long as that is unknown)."""

READING, TRAINING, ENCODING = "reading", "training", "encoding"
FILLING, CALIBRATING = "filling banks", "calibrating"
PHASES = (READING, TRAINING, ENCODING, FILLING, CALIBRATING)
"""What a fit does, in this order."""

_TRIED, _LEAST_TRIED = 32, 4  # images that the phases to come are tried on: at most, at least


class Progress:
    """Tells `on_progress` how far a fit is and how long it will still take.

    A phase's own pace says when it will end. What comes after it is `expected`, in seconds by
    phase; it is unknown until `forecast` has tried it.
    """

    def __init__(self, on_progress: OnProgress = None) -> None:
        self.on_progress = on_progress
        self.expected: dict[str, float] = {}
        self._phase, self._began = "", 0.0

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
        self._phase = TRAINING
        share = 0.0 if step.total_steps is None else step.step / step.total_steps
        self._report(share, step.seconds_left)

    def forecast(
        self, given: Parameters, encoder: PatchEncoder, mean: Tensor, light: Tensor, images: Tensor
    ) -> None:
        """Try what follows training on a few images, if anybody listens; arguments as of `encode`.

        images: [N, 3, H, W], all of them.
        """
        if self.on_progress is None or len(images) < _LEAST_TRIED:
            return
        count = min(_TRIED, max(_LEAST_TRIED, len(images) // 4))
        some = evenly_spread(len(images), count)
        try:
            encode(encoder, mean, light, given, images[some[:2]])  # loads libraries
            began = time.perf_counter()
            encoded = encode(encoder, mean, light, given, images[some])
        except NotFiniteError:
            return  # encoding all of them will name the image
        self.expected[ENCODING] = (time.perf_counter() - began) * len(images) / count
        began = time.perf_counter()
        banks = banks_of(given["levels"], encoded, given["seed"], given["coreset"])
        growth = len(images) / count
        # The rows of a coreset are compared with all patches, and both grow.
        growth **= 1 if given["coreset"] is None else 2
        self.expected[FILLING] = (time.perf_counter() - began) * growth
        fewer = [values[: max(1, count // 4)].contiguous() for values in encoded]
        few = banks_of(given["levels"], fewer, given["seed"], given["coreset"])
        self.expected[CALIBRATING] = len(images) * sum(
            _seconds_of_search(values, few[level], bank, len(images))
            for values, (level, bank) in zip(encoded, banks.items(), strict=True)
        )

    def _report(self, share: float, left: float | None) -> None:
        later = [self.expected.get(name) for name in PHASES[PHASES.index(self._phase) + 1 :]]
        parts = [seconds for seconds in (left, *later) if seconds is not None]
        if self.on_progress is not None:
            whole = sum(parts) if len(parts) == len(later) + 1 else None
            self.on_progress(self._phase, share, whole)


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
