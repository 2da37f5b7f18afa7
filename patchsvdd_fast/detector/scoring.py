"""How a fitted detector embeds images, and scores a stream of them in overlapped stages."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..encoders.levels import PatchLevel
from ..encoders.patch_encoder import PatchEncoder
from ..files.categories import scored_paths, training_paths
from ..images.arrays import images_of_batch, is_array
from ..images.light import match_illumination, mean_of_size
from ..images.prepare import (
    ImageSet,
    PathsIn,
    PreparedImage,
    load_image_set,
    name_of,
    prepare_image,
)
from ..images.samples import Samples
from ..score.calibration import Calibration
from ..score.encoding import NotFiniteError, encode_images
from ..score.image_result import ImageResult, ScoredImages, image_results
from ..score.maps import MapRule, ScoreResult, search_levels
from ..score.stream import Stream
from ..search.rounds import AnyBank, Rounds, processes_of
from .model_file import Model
from .parameters import (
    Parameters,
    channel_order_of,
    largest_patch,
    parse_size,
    samples_of,
    usual_light,
)
from .progress_bars import phases_shown

Search = Callable[[list[PreparedImage], list[Tensor]], list[ImageResult]]
"""Makes one result per image from images of one size and their embeddings."""


def encode(
    encoder: PatchEncoder,
    mean: Tensor,
    light: Tensor,
    parameters: Parameters,
    pixels: Tensor,
    num_in_mean: int | None = None,
    progress: Callable[[float], None] | None = None,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """Match the light of images and embed all their patches: one [N, I, J, D] float32 per level.

    mean: [3, H, W] float32, what is subtracted from images, in pixel values.
    light: [3] float32, the training images' mean colour, in pixel values.
    pixels: [N, 3, H, W], uint8 or float32 in 0 to 255, in the light they were taken in.
    num_in_mean: N, if these images are the N that the mean was taken from; see `encode_images`.
    progress: called now and then with the share done, 0 to 1.
    names: of the images, for messages of errors.

    Raises ValueError for images of another size than the mean, unless the mean is one per channel.
    """
    matched = match_illumination(pixels, usual_light(parameters, light))
    mean = mean_of_size(mean, parameters["mean"], *pixels.shape[-2:])
    levels, precision = parameters["levels"], parameters["encoding_precision"]
    try:
        return encode_images(encoder, matched, mean, levels, num_in_mean, progress, precision)
    except NotFiniteError as error:
        raise (error if names is None else error.named(names)) from None


def load(
    source: Any,
    given: Parameters,
    progress: Callable[[float], None] | None = None,
    samples: Samples | None = None,
    skip_unreadable: bool = False,
    pages: str = "first",
    share: Callable[[int], slice] | None = None,
    paths_in: PathsIn = training_paths,
) -> ImageSet:
    """Load and resize images as resolved parameters say; samples: None: found from these images.

    share, paths_in: see `load_image_set`.
    """
    return load_image_set(
        source,
        parse_size(given["image_size"]),
        largest_patch(given["levels"]),
        progress,
        samples,
        samples_of(given),
        skip_unreadable,
        pages,
        channel_order_of(given),
        share,
        paths_in,
    )


def score_source(
    model: Model, source: Any, threshold: float | None, show_progress: bool = False
) -> ScoredImages:
    """Load, encode and score images, all in memory.

    source: as `PatchSVDD` takes them. threshold: for verdicts; None: there are none.
    """
    given = model.parameters
    with phases_shown(show_progress, ("reading", "encoding", "searching")) as (
        read,
        encoded,
        found,
    ):
        images = load(source, given, read, model.samples, paths_in=scored_paths)
        how = model.encoder, model.mean, model.light, given
        embeddings = encode(*how, images.pixels, progress=encoded, names=images.names)
        if found is not None:
            found(0.0)
        height, width = images.pixels.shape[2:]
        scores = score_encoded(model, embeddings, (height, width))
        if found is not None:
            found(1.0)
    return ScoredImages.of(scores, images, threshold, model.calibration, model.gallery)


def map_rule(encoder: PatchEncoder, calibration: Calibration | None) -> MapRule:
    """How a detector with this encoder makes maps."""
    border = {} if calibration is None else calibration.border
    return MapRule(interpolate=encoder.surroundings != 0, border=border)


def score_encoded(
    model: Model,
    encoded: Sequence[Tensor],
    shape: tuple[int, int],
    banks: Mapping[PatchLevel, AnyBank] | None = None,
) -> ScoreResult:
    """Score images of (height, width) pixels by their embeddings, as `encode` gives them.

    banks: those of the levels that were encoded; None: all of the model.
    """
    parameters = model.parameters
    return search_levels(
        model.banks if banks is None else banks,
        encoded,
        shape,
        parameters["combination"],
        rule=map_rule(model.encoder, model.calibration),
        reweight=parameters["reweight"],
    )


def score_stream(
    model: Model,
    sources: Iterable[Any],
    threshold: float | None,
    on_error: Callable[[Any, Exception], None] | None,
    keep_originals: bool = False,
    search: Search | None = None,
) -> Stream[ImageResult]:
    """Score images in their order; sources, on_error, keep_originals: see `PatchSVDD.score_stream`.

    An array or tensor of sources is a batch of images, or one image, as `PatchSVDD.score` takes it.

    threshold: image score above which an image is called anomalous; None: no verdicts.
    search: makes the results of embedded images; None: `results_of` with this model.

    Of a model whose banks lie in several processes all call this at once, each for its own images;
    one that ends its stream before its images end, ends the others'.

    Raises TypeError for a single path or PIL image.
    """
    if isinstance(sources, str | os.PathLike | Image.Image):
        raise TypeError(
            "a stream takes images one after another, such as a list of paths, got one "
            f"{type(sources).__name__} alone: put it, or what is in the folder, into a list"
        )
    if is_array(sources):
        sources = images_of_batch(sources)
    parameters = model.parameters
    size, smallest = parse_size(parameters["image_size"]), largest_patch(parameters["levels"])
    order = channel_order_of(parameters)

    def read(item: Any, number: int) -> PreparedImage:
        name = name_of(item, number)
        image = prepare_image(item, name, size, smallest, model.samples, order, keep_originals)
        # Raises for an image of another size than can be encoded.
        mean_of_size(model.mean, parameters["mean"], *image.pixels.shape[-2:])
        return image

    def embed(images: list[PreparedImage]) -> tuple[list[PreparedImage], list[Tensor]]:
        pixels = torch.stack([image.pixels for image in images])
        names = [image.name for image in images]
        embeddings = encode(model.encoder, model.mean, model.light, parameters, pixels, names=names)
        return images, embeddings

    rounds = None
    if search is None and processes_of(model.banks).count > 1:
        rounds = Rounds(model.banks, partial(_scores_in_round, model))

    def found(embedded: tuple[list[PreparedImage], list[Tensor]]) -> list[ImageResult]:
        if search is not None:
            return search(*embedded)
        if rounds is None:
            return results_of(model, threshold, *embedded)
        images, embeddings = embedded
        scores = rounds.do((embeddings, _shape_of(images)))
        return image_results(images, scores, model.calibration, threshold, model.gallery)

    return Stream(sources, read, embed, found, on_error, rounds)


def _scores_in_round(
    model: Model,
    banks: Mapping[PatchLevel, AnyBank],
    given: tuple[list[Tensor], tuple[int, int]] | None,
) -> ScoreResult:
    """Score embedded images of this process, if it has any, in a round of all processes."""
    if given is None:
        none = [torch.empty(0, *bank.grid, bank.dim, device=bank.device) for bank in banks.values()]
        given = none, (model.mean.shape[1], model.mean.shape[2])
    return score_encoded(model, *given, banks)


def _shape_of(images: Sequence[PreparedImage]) -> tuple[int, int]:
    """(height, width) of images of one size."""
    return images[0].pixels.shape[1], images[0].pixels.shape[2]


def results_of(
    model: Model,
    threshold: float | None,
    images: Sequence[PreparedImage],
    embeddings: Sequence[Tensor],
) -> list[ImageResult]:
    """One result per image, of images of one size; embeddings: as `encode` gives them."""
    scores = score_encoded(model, embeddings, _shape_of(images))
    return image_results(images, scores, model.calibration, threshold, model.gallery)
