"""How a bank on the CPU is searched fastest: in clusters, or by codes of its rows.

Which it is depends on the embeddings and on the processor, so searches of the bank at hand are
timed. Whatever is chosen, the answers are the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.checks import Groups
from ..ops.cpu_bank import ClusterArrays
from ..ops.cpu_codes import (
    LEADING_STEP,
    LEAST_DIMS,
    MOST_DIMS,
    CodedRows,
    LeadingAxes,
    encode_rows,
)
from ..ops.search_kernels import Found, search_clusters, search_codes, search_rows
from .centroids import can_be_clustered, clusters_wanted
from .cpu_clusters import Spectrum, build_clusters, cost_in_clusters, spectrum

_LEAST_CODED = 1024  # rows; of fewer, codes are made as fast as they are searched
_TRIAL_RUNS, _TRIAL_RUN = 4, 128  # of rows that follow each other, as an image's patches do
_MOST_ABOUT = 4096  # rows that are left out about a query whose image is not known
_REPEATS = 3  # of what is timed; the fastest counts
_LONG_ENOUGH = 0.1  # seconds; what took so long in all is not timed again
_HOPELESS = 2  # times what another search takes
_FORESEEN_OF_RUN = 32  # queries of each run by which the cost of clusters is foreseen
# New images' patches lie farther from the bank than its own rows do: queries of a trial are rows
# moved away from their nearest by this share of the distance.
_MOVED_AWAY = 0.5
_WORTHWHILE = 1.1  # how much faster what takes more memory has to be
_LEAST_LEADING = 128  # dimensions; of fewer, images are hardly shorter
_VARIANCE_LEFT_OUT = 0.15  # the share that leading axes may leave out


def lay_out(
    embeddings: Tensor,
    num_clusters: int | None,
    seed: int,
    groups: Groups,
    keeps_codes: bool,
) -> tuple[ClusterArrays, float] | CodedRows | None:
    """The clusters of a bank with the stretch of their projection, or its codes, or neither.

    embeddings: [M, D] float32 or float16, finite, contiguous, on the CPU.
    num_clusters: None chooses it from M, and gives up clusters where they do not pay.
    groups: `of_bank`, the groups of the rows; a trial's queries match none of their own.
    keeps_codes: whether codes may be kept.
    """
    wanted = clusters_wanted(embeddings, num_clusters)
    if num_clusters is not None and wanted > 0:
        return build_clusters(embeddings, wanted, seed)
    survey = _Survey(embeddings, seed, groups)
    coded = survey.codes() if keeps_codes else _Coded()
    if wanted == 0 or survey.cost_in_clusters(wanted) * _WORTHWHILE > coded.share:
        return coded.codes
    trial = survey.trial

    def seconds_without() -> float:
        if coded.codes is None:
            return trial.seconds(trial.rows)
        return trial.seconds_of_codes(coded.codes)

    without = seconds_without() if coded.seconds is None else coded.seconds
    arrays, stretch = build_clusters(embeddings, wanted, seed, survey.spectrum)
    clustered = _WORTHWHILE * trial.seconds(lambda: trial.clusters(arrays, stretch), rival=without)
    # What clusters seem to beat is timed again: the machine may have been busy the first time.
    pays = clustered < without and clustered < seconds_without()
    return (arrays, stretch) if pays else coded.codes


def choose_codes(embeddings: Tensor, seed: int, groups: Groups) -> CodedRows | None:
    """The codes of a bank, with leading axes if a search is faster; None where codes are no use.

    Arguments as for `lay_out`.
    """
    return _Survey(embeddings, seed, groups).codes().codes


def can_be_coded(embeddings: Tensor) -> bool:
    """Whether codes of embeddings [M, D] are of use."""
    rows, dim = embeddings.shape
    return rows >= _LEAST_CODED and LEAST_DIMS <= dim <= MOST_DIMS


class _Coded(NamedTuple):
    """The codes that were chosen for a bank, and what a trial by them took, if it was timed."""

    codes: CodedRows | None = None
    """None: there are none."""
    seconds: float | None = None
    share: float = 1.0
    """What a trial took, as a share of one by codes without leading axes."""


class _Survey:
    """What is found out about embeddings [M, D] to choose how they are laid out, each once."""

    def __init__(self, embeddings: Tensor, seed: int, groups: Groups) -> None:
        self.embeddings, self.groups = embeddings, groups
        self.generator = torch.Generator("cpu").manual_seed(seed)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Their spectrum."""
        return spectrum(self.embeddings, self.generator)

    @cached_property
    def trial(self) -> _Trial:
        """Queries to try searches with."""
        return _Trial(self.embeddings, self.groups, self.generator)

    def codes(self) -> _Coded:
        """What `choose_codes` returns."""
        if not can_be_coded(self.embeddings):
            return _Coded()
        leading = None
        if self.embeddings.shape[1] >= _LEAST_LEADING and can_be_clustered(self.embeddings):
            leading = leading_axes(self.spectrum, self.generator)
        plain = encode_rows(self.embeddings)
        if leading is None:
            return _Coded(plain)
        coded = encode_rows(self.embeddings, leading)
        without = self.trial.seconds_of_codes(plain)
        seconds = self.trial.seconds_of_codes(coded, rival=without)
        pays = seconds * _WORTHWHILE < without
        return _Coded(coded, seconds, seconds / without) if pays else _Coded(plain, without)

    def cost_in_clusters(self, num_clusters: int) -> float:
        """About what a search in so many clusters costs at least, as a share of one by codes."""
        some = slice(None, None, _TRIAL_RUN // _FORESEEN_OF_RUN)
        queries, distances = self.trial.queries[some], self.trial.distances[some]
        return cost_in_clusters(
            self.embeddings, num_clusters, self.spectrum, queries, distances, self.generator
        )


def leading_axes(known: Spectrum, generator: torch.Generator) -> LeadingAxes | None:
    """Axes that hold most of the variance of embeddings [M, D], half of D at most; None: too many.

    They are principal axes turned at random within the space they span, so that no coordinate is
    much larger than others, for which codes would be coarse.
    """
    mean, left_out, vectors = known
    enough = int((left_out > _VARIANCE_LEFT_OUT).sum()) + 1
    axes = -(-(enough + 1) // LEADING_STEP) * LEADING_STEP
    if axes > len(mean) // 2 or axes > len(left_out):
        return None
    turned = torch.randn(axes - 1, axes - 1, generator=generator, dtype=torch.float64, device="cpu")
    basis, _ = torch.linalg.qr(vectors[:, : axes - 1] @ torch.linalg.qr(turned)[0])
    return LeadingAxes.along(mean, basis)


def suit_axes(embeddings: Tensor, leading: LeadingAxes) -> bool:
    """Whether leading axes leave out about as little of other embeddings [M, D] as of their own."""
    squared = leading.images(embeddings)[0].double().square().sum(dim=0)
    return float(squared[-1]) <= 2 * _VARIANCE_LEFT_OUT * float(squared.sum())


class _Trial:
    """Queries like those to come, for searches of a bank to be timed with."""

    def __init__(self, embeddings: Tensor, groups: Groups, generator: torch.Generator) -> None:
        rows = len(embeddings)
        run = torch.arange(min(_TRIAL_RUN, rows), device="cpu")
        last = rows - len(run) + 1
        starts = torch.randint(last, (_TRIAL_RUNS, 1), generator=generator, device="cpu")
        picked = (starts + run).flatten()
        self.embeddings = embeddings
        self.excluded = own_groups(picked, rows, groups)
        self.queries = embeddings[picked].float()
        found = Found.nothing(self.queries, None)
        search_rows(found, self.queries, embeddings, self.excluded)
        squared = found.squared[:, 0]
        known = squared.isfinite()
        nearest = embeddings[found.rows[known, 0]].float()
        self.queries[known] += _MOVED_AWAY * (self.queries[known] - nearest)
        self.distances = (1 + _MOVED_AWAY) * squared.sqrt()  # to the nearest rows, or a little more

    def clusters(self, arrays: ClusterArrays, stretch: float) -> None:
        search_clusters(self._nothing(), self.queries, arrays, stretch, self.excluded)

    def codes(self, codes: CodedRows) -> None:
        search_codes(self._nothing(), self.queries, codes, self.excluded)

    def rows(self) -> None:
        search_rows(self._nothing(), self.queries, self.embeddings, self.excluded)

    def seconds(self, search: Callable[[], None], rival: float = math.inf) -> float:
        """What a search takes, at best.

        rival: what another search takes; one that is much slower is not timed again.
        """
        taken: list[float] = []
        while len(taken) < _REPEATS and sum(taken) < _LONG_ENOUGH:
            began = time.perf_counter()
            search()
            taken.append(time.perf_counter() - began)
            if taken[0] > _HOPELESS * rival:
                break
        return min(taken)

    def seconds_of_codes(self, codes: CodedRows, rival: float = math.inf) -> float:
        """What a search by codes takes, at best."""
        return self.seconds(lambda: self.codes(codes), rival)

    def _nothing(self) -> Found:
        return Found.nothing(self.queries, None)


def own_groups(picked: Tensor, rows: int, groups: Groups) -> Groups:
    """Groups that exclude each picked row's own from its search, or else the rows about it.

    A group that is most of the bank would leave nothing to search; and rows that are each their own
    group may still be of one image, one after the other.
    """
    if groups.of_bank is not None:
        of_queries = groups.of_bank[picked // groups.rows_per_group]
        largest = int(groups.of_bank.unique(return_counts=True)[1].max()) * groups.rows_per_group
        if 1 < largest <= rows // 2:
            return Groups(of_queries, groups.of_bank, groups.rows_per_group)
    run = max(1, min(_MOST_ABOUT, rows // 8))
    return Groups(picked // run, torch.arange(rows, device="cpu") // run)
