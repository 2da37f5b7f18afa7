"""What `PatchSVDD.fit` does: from good images to a fitted detector's `Model`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..encoders.backbone import BackboneEncoder
from ..encoders.patch_encoder import PatchEncoder, device_of
from ..encoders.precision import warn_of_slow_bfloat16
from ..images.gallery import evenly_spread
from ..images.light import (
    PER_CHANNEL,
    constant_mean,
    match_illumination,
    mean_colour,
    mean_image,
    mean_of_size,
    of_one_process,
)
from ..images.prepare import ImageSet, survey_images
from ..images.samples import to_8_bits
from ..ops.backends import resolve_device
from ..training.checkpoints import train_encoder
from ..training.defect_check import DefectCheck, check_of
from ..training.record import TrainingRecord, TrainingStep
from ..training.workers import Workers, joined_workers, local_device
from . import normality, parameters
from .filling import check_shares, filled, load_share, own_share
from .forecast import Progress
from .model_file import Model, differences
from .parameters import Parameters
from .progress_bars import (
    READING,
    OnProgress,
    OnStep,
    fit_shown,
)
from .scoring import encode, load

_FIT_IMAGES = 64  # most images that a projection is fitted to


class Keeping(NamedTuple):
    """What is to be kept of a training while it goes on, and how banks are; see `PatchSVDD.fit`."""

    checkpoint: str | Path | None = None
    checkpoint_minutes: float = 5.0
    resume: bool = False
    shard_bytes: int | None = None


def fit_given(
    given: Parameters,
    sources: Mapping[str, Any],
    encoder: nn.Module | None,
    keeping: Keeping,
    on_step: OnStep,
    on_progress: OnProgress,
    progress: bool,
    skip_unreadable: bool,
    pages: str,
) -> dict[str, Model] | None:
    """As `fit_models`, of parameters as they were given; see `PatchSVDD.fit`.

    encoder: instead of the parameter `encoder`. progress: show it, besides telling it.
    """
    ready = parameters.ready_encoder(given, encoder)
    resolved = parameters.resolved(given, ready)
    with fit_shown(progress, on_step, on_progress) as told:
        return fit_models(resolved, sources, ready, keeping, *told, skip_unreadable, pages)


def fit_models(
    given: Parameters,
    sources: Mapping[str, Any],
    encoder: PatchEncoder | None,
    keeping: Keeping,
    on_step: OnStep,
    on_progress: OnProgress,
    skip_unreadable: bool = False,
    pages: str = "first",
) -> dict[str, Model] | None:
    """Train one encoder on all good images, or take one; fill and calibrate each category's banks.

    given: resolved parameters. sources: each category's images, as `PatchSVDD` takes them.
    encoder: to use as it is, but for a projection that is not fitted yet; None: Patch SVDD's is
        trained.
    on_step: called after training steps. on_progress: see `PatchSVDD.fit`.
    skip_unreadable, pages: as of `load_image_set`.

    Returns None in all but the first process under torchrun, unless banks are in shards. Raises as
    `PatchSVDD.fit`.
    """
    parameters.check_parameters(given)
    _check_shards(given, sources, keeping.shard_bytes)
    device = local_device(resolve_device(given["device"]))
    with joined_workers(device) as workers:
        how = encoder, keeping, on_step, on_progress, skip_unreadable, pages
        return _fitted(given, sources, device, workers, *how)


def _check_shards(given: Parameters, sources: Mapping[str, Any], shard_bytes: int | None) -> None:
    """Raise ValueError for what cannot be in shards."""
    if shard_bytes is None:
        return
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    if given["coreset"] is not None:
        raise ValueError("a coreset is chosen from all patches, so its bank cannot be in shards")
    if len(sources) > 1:
        raise ValueError("the banks of several categories in one model cannot be in shards")


def _fitted(
    given: Parameters,
    sources: Mapping[str, Any],
    device: torch.device,
    workers: Workers,
    encoder: PatchEncoder | None,
    keeping: Keeping,
    on_step: OnStep,
    on_progress: OnProgress,
    skip_unreadable: bool,
    pages: str,
) -> dict[str, Model] | None:
    """As `fit_models`, which has checked what is given, in one of so many processes."""
    settings = parameters.settings_of(given)
    in_training = settings.precision if encoder is None else None
    if "bfloat16" in (given["encoding_precision"], in_training):
        warn_of_slow_bfloat16(device)
    progress = Progress(on_progress)
    # Each process trains on all images, but without training it needs those alone that it embeds.
    all_here = encoder is None or workers.count == 1
    with workers.together():
        loaded, sets = _load(
            *(sources, given, progress.phase(READING), skip_unreadable, pages),
            share=None if all_here else workers.share_of_images,
        )
    if not all_here:
        check_shares(sets, workers, skip_unreadable)
    summed = of_one_process if all_here else workers.summed
    count = int(summed(torch.tensor(len(loaded.names))))
    light = mean_colour(loaded.pixels, summed)
    usual = parameters.usual_light(given, light)
    images = match_illumination(loaded.pixels, usual)
    mean = _mean_of(given, encoder, images, count, summed)
    # Of one category, whose time after training is tried; all take about so many times as long.
    few = max(sets.values(), key=lambda one: len(one.names)).pixels
    forecast = partial(progress.forecast, mean=mean, light=light, images=few, of=len(images))
    record = TrainingRecord()
    if encoder is None:
        encoder = parameters.untrained_encoder(given).to(device)
        images = to_8_bits(images)  # that crops are cut out of; banks keep fractions
        check = check_of(settings, images, mean, given["levels"], given["combination"], usual)
        progress.trains = True
        forecast(given, encoder.eval())
        training = partial(train_encoder, encoder, images, mean, settings, check)
        trained = training(
            parameters.to_header(given),
            *(keeping.checkpoint, keeping.checkpoint_minutes, keeping.resume),
            _telling(progress, check, on_step),
        )
        record = _same_weights(encoder, trained, workers)
        sets = {name: own_share(part, workers) for name, part in sets.items()}
    encoder = encoder.to(device).eval()
    if isinstance(encoder, BackboneEncoder) and encoder.needs_fit:
        encoder = _with_projection(encoder, mean, light, given, loaded, workers)
        given = {**given, "embedding_dim": encoder.embedding_dim}
    if record.best_step != 0:  # else these are the weights that it was tried with
        forecast(given, encoder)
    # Each of these images is part of the mean image; a new one is not.
    num_in_mean = count if given["mean"] == "pixel" else None
    models: dict[str, Model] = {}
    for category, part in sets.items():
        progress.begin_category(len(part.names))
        how = given, encoder, mean, light, part, num_in_mean
        made = filled(*how, progress, category, workers, keeping.shard_bytes)
        progress.end_category()
        if made is None:
            continue
        normal, calibration = made
        models[category] = Model(
            dict(given),
            encoder,
            mean,
            light,
            banks=dict(normal.banks),
            calibration=calibration,
            gallery=normal.gallery,
            record=record,
            samples=part.samples,
        )
    return models or None


def _telling(
    progress: Progress, check: DefectCheck | None, on_step: OnStep
) -> Callable[[TrainingStep], None]:
    """What is called after each step of training; checks tell how far they are, too."""
    if check is not None and progress.on_progress is not None:
        check.on_progress = progress.check

    def after_step(step: TrainingStep) -> None:
        progress.step(step)
        if on_step is not None:
            on_step(step)

    return after_step


def _same_weights(
    encoder: PatchEncoder, trained: TrainingRecord | None, workers: Workers
) -> TrainingRecord:
    """Give all processes the weights of the first, and what it knows of the training."""

    def of_first() -> tuple[TrainingRecord, dict[str, Tensor]]:
        assert trained is not None, "the first process has it"
        return trained, {name: value.cpu() for name, value in encoder.state_dict().items()}

    record, weights = workers.from_first(of_first)
    encoder.load_state_dict(weights)
    return record


def _load(
    sources: Mapping[str, Any],
    given: Parameters,
    progress: Callable[[float], None] | None,
    skip_unreadable: bool,
    pages: str,
    share: Callable[[int], slice] | None,
) -> tuple[ImageSet, dict[str, ImageSet]]:
    """Load the images of all categories: together, and those of each, in the same memory.

    share: as of `load_image_set`, of each category.
    """
    samples, unsurveyed = None, None
    if len(sources) > 1:
        try:
            samples = survey_images(sources.values(), parameters.samples_of(given), pages)
        except (ValueError, TypeError, OSError) as error:
            unsurveyed = error  # told below with its category, unless it is of all together
    sets: dict[str, ImageSet] = {}
    failed: list[str] = []
    for number, (category, source) in enumerate(sources.items()):
        tell = None if progress is None else _share_of(progress, number, len(sources))
        try:
            with in_category(category):
                sets[category] = load(source, given, tell, samples, skip_unreadable, pages, share)
        except ValueError as error:  # the others may have faults, too: all are told at once
            if len(sources) == 1:
                raise
            failed.append(str(error))
    if failed:
        raise ValueError("\n".join(failed))
    if unsurveyed is not None:
        raise unsurveyed
    if len(sets) == 1:
        return next(iter(sets.values())), sets
    sides = {category: one.pixels.shape[-2:] for category, one in sets.items()}
    if len({*sides.values()}) > 1:
        found = ", ".join(f"{name} {width}x{height}" for name, (height, width) in sides.items())
        raise ValueError(f"categories that share an encoder must have images of one size: {found}")
    every = ImageSet(
        tuple(f"{category}/{name}" for category, one in sets.items() for name in one.names),
        torch.cat([one.pixels for one in sets.values()]),
        tuple(size for one in sets.values() for size in one.original_sizes),
        next(iter(sets.values())).samples,
    )
    parts = every.pixels.split([len(one.names) for one in sets.values()])
    return every, {
        category: replace(one, pixels=part)
        for (category, one), part in zip(sets.items(), parts, strict=True)
    }


@contextlib.contextmanager
def in_category(category: str) -> Iterator[None]:
    """Within the context, errors name the category; "": they stay as they are."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        if not category:
            raise
        kinds = (TypeError, FileNotFoundError, OSError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{category}: {error}") from error


def _share_of(progress: Callable[[float], None], part: int, parts: int) -> Callable[[float], None]:
    """A callback for the share done of one of so many parts of what `progress` tells."""
    return lambda share: progress((part + share) / parts)


def refit_model(
    before: Model,
    source: Any,
    skip_unreadable: bool = False,
    on_progress: OnProgress = None,
    pages: str = "first",
) -> Model | None:
    """A model with other training images; encoder and light stay. See `PatchSVDD.refit`.

    Returns None in all but the first process under torchrun.
    """
    given, encoder, light = before.parameters, before.encoder, before.light
    progress = Progress(on_progress)
    with joined_workers(device_of(encoder)) as workers:
        how = progress.phase(READING), before.samples, skip_unreadable, pages
        images = load_share(source, given, *how, workers)
        mean = mean_of_size(before.mean, given["mean"], *images.pixels.shape[-2:])
        progress.forecast(given, encoder, mean, light, images.pixels)
        made = filled(given, encoder, mean, light, images, None, progress, "", workers)
    if made is None:
        return None
    normal, calibration = made
    if given["mean"] == "pixel":
        normality.warn_of_repeats(normal.gallery, before.gallery)
    banks, gallery = normal
    return replace(
        before, mean=mean, banks=banks, gallery=gallery, calibration=calibration, file=None
    )


def require_alike(one: Model, other: Model) -> None:
    """Raise ValueError unless two models embed a patch alike, so that they can be merged."""
    differing = differences(one, other)
    if differing:
        raise ValueError(
            "detectors can be merged only if they embed alike, but these differ in "
            f"{', '.join(differing)}; refit (patchsvdd update --replace) makes one that can be"
        )


def _mean_of(
    given: Parameters,
    encoder: PatchEncoder | None,
    images: Tensor,
    count: int,
    summed: Callable[[Tensor], Tensor],
) -> Tensor:
    """What is subtracted from images, [3, H, W] float32. Raises ValueError if nothing was left.

    images: of this process; count: of all. summed: as of `mean_image`.
    """
    if encoder is not None and encoder.pixel_mean is not None:
        return constant_mean(encoder.pixel_mean, *images.shape[-2:])
    if given["mean"] not in PER_CHANNEL and count == 1:
        raise ValueError(
            "one training image is its own mean image, which leaves nothing of it: give more, "
            'or mean="channel" (--mean channel)'
        )
    return mean_image(images, given["mean"], summed)


def _with_projection(
    encoder: BackboneEncoder,
    mean: Tensor,
    light: Tensor,
    given: Parameters,
    images: ImageSet,
    workers: Workers,
) -> BackboneEncoder:
    """A copy of the encoder whose projection is fitted to training images.

    images: those of this process; some of each are taken.
    """
    encoder = copy.deepcopy(encoder)  # the caller may fit another detector with it
    counts = workers.processes.told(len(images.names))
    some = evenly_spread(sum(counts), min(sum(counts), _FIT_IMAGES)) - sum(counts[: workers.rank])
    some = some[(some >= 0) & (some < len(images.names))]
    names = [images.names[i] for i in some]
    with workers.together():
        encoded = encode(encoder, mean, light, given, images.pixels[some], names=names)
    rows = torch.cat([values.flatten(0, 2) for values in encoded])
    encoder.fit_projection(workers.processes.joined(rows))
    encoder.load_state_dict(workers.from_first(encoder.state_dict))  # to the bit
    return encoder
