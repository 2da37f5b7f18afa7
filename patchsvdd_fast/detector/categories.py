"""Detectors of several categories that share one encoder, in one file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..files.folders import counted
from ..files.store import naming
from ..images.prepare import PreparedImage
from ..ops.backends import resolve_device
from ..score.image_result import ImageResult
from ..score.stream import Stream
from ..training.record import TrainingStep
from . import fitting, scoring
from .model_file import Model, differences, load_models, save_models
from .patch_svdd import PatchSVDD
from .progress_bars import OnProgress

NEAREST = "nearest"
"""Stands for the category whose normal patches an image's are nearest to."""


class CategoryDetectors(Mapping[str, PatchSVDD]):
    """A detector for each of several categories, such as products; all share one encoder.

    Each has banks and a threshold of its own. An image is embedded once, whichever category it is
    compared with, so the encoder, the mean image and the light that images are matched to are those
    of all categories together.

    A mapping from a category's name to its `PatchSVDD`. Encoder and parameters have to stay the
    same in all; a detector can be replaced, or one added, by assignment, and taken out by ``del``:
    ``detectors["new"] = detectors["old"].refit("images/new")``.

    detectors: by category, at least one. Raises ValueError if they embed patches differently.
    """

    def __init__(self, detectors: Mapping[str, PatchSVDD]) -> None:
        if not detectors:
            raise ValueError("no categories given")
        self._detectors: dict[str, PatchSVDD] = {}
        for category, detector in detectors.items():
            self[category] = detector

    @classmethod
    def fit(
        cls,
        detector: PatchSVDD,
        X: Mapping[str, Any],  # noqa: N803 (scikit-learn's name)
        *,
        encoder: nn.Module | None = None,
        on_step: Callable[[TrainingStep], None] | None = None,
        on_progress: OnProgress = None,
        progress: bool = False,
        checkpoint: str | Path | None = None,
        checkpoint_minutes: float = 5.0,
        resume: bool = False,
        skip_unreadable: bool = False,
        pages: str = "first",
    ) -> CategoryDetectors | None:
        """Train one encoder on the good images of all categories, or take one, and fill all banks.

        detector: not fitted; its parameters are those of all. X: each category's images, by its
        name, as `PatchSVDD.fit` takes them; all of one size once they are resized.

        The rest is as of `PatchSVDD.fit`, and so is what is raised. None in all but the first
        process under torchrun.
        """
        if not isinstance(X, Mapping) or not X:
            raise TypeError(
                "X must map at least one category's name to its images, got "
                f"{'none' if isinstance(X, Mapping) else type(X).__name__}"
            )
        check_names(X)
        given = detector.get_params()
        keeping = fitting.Keeping(checkpoint, checkpoint_minutes, resume)
        how = encoder, keeping, on_step, on_progress, progress, skip_unreadable, pages
        models = fitting.fit_given(given, X, *how)
        if models is None:
            return None
        return cls(
            {name: PatchSVDD.of_model(model, given["device"]) for name, model in models.items()}
        )

    # --- as a mapping -----------------------------------------------------------------------------

    def __getitem__(self, category: str) -> PatchSVDD:
        return self._detectors[category]

    def __setitem__(self, category: str, detector: PatchSVDD) -> None:
        """Replace a category's detector, or add one. Raises ValueError if it embeds differently."""
        check_names([category])
        for name, one in self.items():
            if name != category:
                _require_shared(one.model(), detector.model(), category)
                break
        self._detectors[category] = detector

    def __delitem__(self, category: str) -> None:
        """Take a category out. Raises ValueError for the only one, and for one that is not here."""
        self.require(category)
        if len(self) == 1:
            raise ValueError(f"{category} is the only category, so it cannot be taken out")
        del self._detectors[category]

    def __iter__(self) -> Iterator[str]:
        return iter(self._detectors)

    def __len__(self) -> int:
        return len(self._detectors)

    def __repr__(self) -> str:
        parts = [next(iter(self.values())).encoder_.name]
        parts += [f"{name}: {counted(one.num_images, 'image')}" for name, one in self.items()]
        return f"CategoryDetectors({', '.join(parts)})"

    def __copy__(self) -> CategoryDetectors:
        return CategoryDetectors(self)

    def merge(self, other: CategoryDetectors, *, progress: bool = False) -> CategoryDetectors:
        """Add the training images of another's categories to those of the same names.

        Categories that are only there are added. progress: as of `PatchSVDD.fit`. Raises ValueError
        unless all embed alike; nothing then changes.
        """
        own, theirs = self._models(), other._models()
        first = next(iter(own.values()))
        for category, model in theirs.items():
            _require_shared(first, model, category)
        for category, detector in other.items():
            if category in self:
                self[category].merge(detector, progress=progress)
            else:
                self[category] = detector
        return self

    # --- scoring ----------------------------------------------------------------------------------

    def score_stream(
        self,
        sources: Iterable[Any],
        *,
        category: str | Callable[[Any], str | None] | None = None,
        false_alarm_rate: float | None = None,
        on_error: Callable[[Any, Exception], None] | None = None,
        keep_originals: bool = False,
    ) -> Stream[ImageResult]:
        """Score images one after another; each result names the `category` it was compared with.

        category: the one of all images; or called with each of the sources, for its category, or
            None for the nearest; or "nearest" for all. None: `category_of_path`, of paths, else the
            nearest. That is the category with the lowest mean of the anomaly map; finding it takes
            a search in the banks of all.
        sources, false_alarm_rate, on_error, keep_originals: as of `PatchSVDD.score_stream`.

        Raises ValueError for a category that is not here.
        """
        choose = self._choice(category)
        models = self._models()
        thresholds = thresholds_of(self, false_alarm_rate)

        def results_in(
            name: str, images: Sequence[PreparedImage], embeddings: Sequence[Tensor]
        ) -> list[ImageResult]:
            found = scoring.results_of(models[name], thresholds[name], images, embeddings)
            return [replace(result, category=name) for result in found]

        def search(images: list[PreparedImage], embeddings: list[Tensor]) -> list[ImageResult]:
            chosen = [choose(image.source) for image in images]
            for name in chosen:
                if name is not None and name not in models:
                    self.require(name)
                    raise ValueError(f"the category {name!r} was added after the stream began")
            candidates: list[list[ImageResult]] = [[] for _ in images]
            for name in models:
                some = [number for number, its in enumerate(chosen) if its in (None, name)]
                if some:
                    of_some = [values[some] for values in embeddings]
                    found = results_in(name, [images[number] for number in some], of_some)
                    for number, result in zip(some, found, strict=True):
                        candidates[number].append(result)
            return [min(results, key=_mean_of_map) for results in candidates]

        shared = next(iter(models.values()))
        return scoring.score_stream(shared, sources, None, on_error, keep_originals, search)

    def category_of_path(self, path: Any) -> str | None:
        """The innermost folder in a path that is called as a category; None if there is none."""
        if not isinstance(path, str | os.PathLike):
            return None
        folders = Path(os.path.abspath(path)).parent.parts  # noqa: PTH100 (follows no links)
        return next((folder for folder in reversed(folders) if folder in self), None)

    def _choice(
        self, category: str | Callable[[Any], str | None] | None
    ) -> Callable[[Any], str | None]:
        if category is None:
            return self.category_of_path
        if callable(category):
            return category
        if category == NEAREST and NEAREST not in self:
            return lambda _: None
        self.require(category)
        return lambda _: category

    def require(self, category: str) -> None:
        """Raise ValueError for a category that is not here."""
        if category not in self:
            raise ValueError(f"no category {category!r}, only {', '.join(self)}")

    def _models(self) -> dict[str, Model]:
        """What the detectors are made of now. Raises ValueError if they no longer share it."""
        models = {name: one.model() for name, one in self.items()}
        first, *others = models
        for name in others:
            _require_shared(models[first], models[name], name)
        return models

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write all detectors to one safetensors file, the encoder once. Raises OSError.

        `PatchSVDD.load` opens one of them. Raises ValueError for too many categories (hundreds).
        """
        save_models(self._models(), path)

    @classmethod
    def load(
        cls, path: str | Path, device: str = "auto", encoder: nn.Module | None = None
    ) -> CategoryDetectors:
        """Open what `save` wrote; the file is mapped, not copied.

        encoder, and what is raised: as of `PatchSVDD.load`; ValueError also for a file that holds
        the detector of a single category.
        """
        opened = open_detectors(path, device, encoder)
        if isinstance(opened, PatchSVDD):
            raise ValueError(f"{path} holds a single detector: open it with PatchSVDD.load")
        return opened


def open_detectors(
    path: str | Path, device: str = "auto", encoder: nn.Module | None = None
) -> PatchSVDD | CategoryDetectors:
    """Open a model file of either kind; arguments and errors as of `PatchSVDD.load`."""
    models = load_models(path, resolve_device(device), PatchSVDD().get_params(), encoder)
    detectors = {name: PatchSVDD.of_model(model, device, encoder) for name, model in models.items()}
    if "" in detectors:
        return detectors[""]
    with naming(path):
        return CategoryDetectors(detectors)


def by_category(opened: PatchSVDD | CategoryDetectors) -> dict[str, PatchSVDD]:
    """The detectors by category; a single one as that of ""."""
    return {"": opened} if isinstance(opened, PatchSVDD) else dict(opened)


def thresholds_of(
    opened: Mapping[str, PatchSVDD], false_alarm_rate: float | None
) -> dict[str, float | None]:
    """The threshold of each category at a rate; None: at its own. Raises ValueError, naming one."""
    thresholds = {}
    for category, detector in opened.items():
        with fitting.in_category(category):
            thresholds[category] = detector.threshold_or_none(false_alarm_rate)
    return thresholds


def score_stream(
    opened: PatchSVDD | CategoryDetectors,
    sources: Iterable[Any],
    category: str | Callable[[Any], str | None] | None,
    **options: Any,
) -> Stream[ImageResult]:
    """`score_stream` of either kind; category, options: see `CategoryDetectors.score_stream`."""
    if isinstance(opened, CategoryDetectors):
        options["category"] = category
    return opened.score_stream(sources, **options)


def require_category(opened: PatchSVDD | CategoryDetectors, category: str | None) -> None:
    """Raise ValueError for a category that `CategoryDetectors.score_stream` would not take."""
    if category is None:
        return
    if isinstance(opened, PatchSVDD):
        raise ValueError(f"the model has no categories, such as {category!r}")
    if category != NEAREST:
        opened.require(category)


def _mean_of_map(result: ImageResult) -> float:
    return float(result.anomaly_map.double().mean())


def _require_shared(one: Model, other: Model, category: str) -> None:
    """Raise ValueError unless two models of categories embed alike and have the same parameters."""
    sides, its_sides = (f"{model.mean.shape[2]}x{model.mean.shape[1]}" for model in (one, other))
    if its_sides != sides:
        raise ValueError(
            f"all categories share a size of images, {sides} pixels, but those of {category} have "
            f"{its_sides}: resize them"
        )
    mine, theirs = one.parameters, other.parameters
    differing = differences(one, other)
    differing += [name for name in mine if name != "device" and mine[name] != theirs[name]]
    if differing:
        raise ValueError(
            "all categories share one encoder and its parameters, but those of "
            f"{category} differ in {', '.join(dict.fromkeys(differing))}; `refit` of another "
            "detector that is here makes one that fits"
        )


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError for what cannot be a category's name, which is a folder's in reports."""
    for name in names:
        usable = isinstance(name, str) and name == name.strip() and name.isprintable()
        if not usable or name in ("", ".", "..", "index.html") or {*"/\\"} & {*name}:
            raise ValueError(
                "a category's name must be that of a folder, without slashes and spaces around it, "
                f"got {name!r}"
            )
