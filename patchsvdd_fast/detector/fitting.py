"""What `PatchSVDD.fit` does: from good images to a fitted detector's `Model`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..encoders.backbone import BackboneEncoder
from ..encoders.patch_encoder import PatchEncoder
from ..encoders.precision import warn_of_slow_bfloat16
from ..images.light import (
    PER_CHANNEL,
    constant_mean,
    match_illumination,
    mean_colour,
    mean_image,
    mean_of_size,
)
from ..images.prepare import ImageSet, evenly_spread, survey_images
from ..images.samples import to_8_bits
from ..ops.backends import resolve_device
from ..score.calibration import Calibration, calibrate
from ..training.checkpoints import train_encoder
from ..training.defect_check import check_of
from ..training.record import TrainingRecord, TrainingStep
from ..training.workers import local_device
from . import normality, parameters
from .forecast import Progress
from .model_file import Model, differences
from .normality import Normality
from .parameters import Parameters
from .progress_bars import (
    CALIBRATING,
    ENCODING,
    FILLING,
    READING,
    THRESHOLDS,
    OnProgress,
    OnStep,
    fit_shown,
)
from .scoring import encode, load

_FIT_IMAGES = 64  # most images that a projection is fitted to


class Keeping(NamedTuple):
    """What is to be kept of a training while it goes on; see `PatchSVDD.fit`."""

    checkpoint: str | Path | None = None
    checkpoint_minutes: float = 5.0
    resume: bool = False


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

    Returns None in all but the first process under torchrun. Raises as `PatchSVDD.fit`.
    """
    parameters.check_parameters(given)
    settings = parameters.settings_of(given)
    device = local_device(resolve_device(given["device"]))
    in_training = settings.precision if encoder is None else None
    if "bfloat16" in (given["encoding_precision"], in_training):
        warn_of_slow_bfloat16(device)
    progress = Progress(on_progress)
    loaded, sets = _load(sources, given, progress.phase(READING), skip_unreadable, pages)
    light = mean_colour(loaded.pixels)
    usual = parameters.usual_light(given, light)
    images = match_illumination(loaded.pixels, usual)
    mean = _mean_of(given, encoder, images)
    # Of one category, whose time after training is tried; all take about so many times as long.
    few = max(sets.values(), key=lambda one: len(one.names)).pixels
    forecast = partial(progress.forecast, mean=mean, light=light, images=few, of=len(images))
    record = TrainingRecord()
    if encoder is None:
        encoder = parameters.untrained_encoder(given).to(device)
        images = to_8_bits(images)  # that crops are cut out of; banks keep fractions
        check = check_of(settings, images, mean, given["levels"], given["combination"], usual)
        if check is not None and on_progress is not None:
            check.on_progress = progress.check
        header = parameters.to_header(given)
        progress.trains = True
        forecast(given, encoder.eval())

        def after_step(step: TrainingStep) -> None:
            progress.step(step)
            if on_step is not None:
                on_step(step)

        trained = train_encoder(
            encoder, images, mean, settings, check, header, *keeping, after_step
        )
        if trained is None:
            return None
        record = trained
    encoder = encoder.to(device).eval()
    if isinstance(encoder, BackboneEncoder) and encoder.needs_fit:
        encoder = _with_projection(encoder, mean, light, given, loaded)
        given = {**given, "embedding_dim": encoder.embedding_dim}
    if record.best_step != 0:  # else these are the weights that it was tried with
        forecast(given, encoder)
    # Each of these images is part of the mean image; a new one is not.
    num_in_mean = len(images) if given["mean"] == "pixel" else None
    models: dict[str, Model] = {}
    for category, part in sets.items():
        progress.begin_category(len(part.names))
        normal, calibration = filled(
            given, encoder, mean, light, part, num_in_mean, progress=progress, category=category
        )
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
        progress.end_category()
    return models


def _load(
    sources: Mapping[str, Any],
    given: Parameters,
    progress: Callable[[float], None] | None,
    skip_unreadable: bool,
    pages: str,
) -> tuple[ImageSet, dict[str, ImageSet]]:
    """Load the images of all categories: together, and those of each, in the same memory."""
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
                sets[category] = load(source, given, tell, samples, skip_unreadable, pages)
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
    before: Model, source: Any, skip_unreadable: bool = False, on_progress: OnProgress = None
) -> Model:
    """A model with other training images; encoder and light stay. See `PatchSVDD.refit`."""
    given, encoder, light = before.parameters, before.encoder, before.light
    progress = Progress(on_progress)
    images = load(source, given, progress.phase(READING), before.samples, skip_unreadable)
    mean = mean_of_size(before.mean, given["mean"], *images.pixels.shape[-2:])
    progress.forecast(given, encoder, mean, light, images.pixels)
    normal, calibration = filled(given, encoder, mean, light, images, progress=progress)
    if given["mean"] == "pixel":
        normality.warn_of_repeats(normal.gallery, before.gallery)
    banks, gallery = normal
    return replace(
        before, mean=mean, banks=banks, gallery=gallery, calibration=calibration, file=None
    )


def load_to_add(
    source: Any,
    model: Model,
    skip_unreadable: bool = False,
    progress: Callable[[float], None] | None = None,
) -> ImageSet:
    """Load images to add to a model. Raises ValueError if they are of another size than its own."""
    images = load(source, model.parameters, progress, model.samples, skip_unreadable)
    (height, width), found = model.mean.shape[1:], images.pixels.shape
    if found[2:] != (height, width):
        raise ValueError(
            f"images to add must have {width}x{height} pixels as those in the banks, "
            f"got {found[3]}x{found[2]}"
        )
    return images


def require_alike(one: Model, other: Model) -> None:
    """Raise ValueError unless two models embed a patch alike, so that they can be merged."""
    differing = differences(one, other)
    if differing:
        raise ValueError(
            "detectors can be merged only if they embed alike, but these differ in "
            f"{', '.join(differing)}; refit (patchsvdd update --replace) makes one that can be"
        )


def filled(
    given: Parameters,
    encoder: PatchEncoder,
    mean: Tensor,
    light: Tensor,
    images: ImageSet,
    num_in_mean: int | None = None,
    *,
    progress: Progress | None = None,
    category: str = "",
) -> tuple[Normality, Calibration | None]:
    """New banks and a gallery of these images, and their calibration; arguments as of `encode`.

    category: of these images, for warnings.
    """
    progress = progress or Progress()
    encoding = progress.phase(ENCODING)
    encoded = encode(
        encoder, mean, light, given, images.pixels, num_in_mean, encoding, images.names
    )
    filling = progress.phase(FILLING)
    normal = normality.normality_of(
        given["levels"],
        images,
        encoded,
        given["keep_images"],
        given["seed"],
        given["coreset"],
        filling,
    )
    if filling is not None:
        filling(1.0)
    shape = mean.shape[1], mean.shape[2]
    return normal, calibrated(given, encoder, normal, shape, progress, encoded, category)


def calibrated(
    given: Parameters,
    encoder: PatchEncoder,
    normal: Normality,
    image_shape: tuple[int, int],
    progress: Progress | None = None,
    embeddings: Sequence[Tensor] | None = None,
    category: str = "",
) -> Calibration | None:
    """The calibration of banks; warns of training images that are there twice.

    embeddings: of all their patches, see `calibrate`; None: the banks hold them.
    category: of these images, for the warning.
    """
    progress = progress or Progress()
    calibrating = progress.phase(CALIBRATING)
    calibration = calibrate(
        normal.banks,
        image_shape,
        given["combination"],
        calibrating,
        encoder.surroundings != 0,
        embeddings,
        given["reweight"],
        lambda: progress.phase(THRESHOLDS),
    )
    normality.warn_of_twins(normal.gallery, calibration, category)
    return calibration


def _mean_of(given: Parameters, encoder: PatchEncoder | None, images: Tensor) -> Tensor:
    """What is subtracted from images, [3, H, W] float32. Raises ValueError if nothing was left."""
    if encoder is not None and encoder.pixel_mean is not None:
        return constant_mean(encoder.pixel_mean, *images.shape[-2:])
    if given["mean"] not in PER_CHANNEL and len(images) == 1:
        raise ValueError(
            "one training image is its own mean image, which leaves nothing of it: give more, "
            'or mean="channel" (--mean channel)'
        )
    return mean_image(images, given["mean"])


def _with_projection(
    encoder: BackboneEncoder, mean: Tensor, light: Tensor, given: Parameters, images: ImageSet
) -> BackboneEncoder:
    """A copy of the encoder whose projection is fitted to training images."""
    encoder = copy.deepcopy(encoder)  # the caller may fit another detector with it
    count = len(images.names)
    some = evenly_spread(count, min(count, _FIT_IMAGES))
    names = [images.names[i] for i in some]
    encoded = encode(encoder, mean, light, given, images.pixels[some], names=names)
    encoder.fit_projection(torch.cat([values.flatten(0, 2) for values in encoded]))
    return encoder
