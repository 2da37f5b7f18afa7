"""The detector: fit on good images, score new ones, save and load."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor

from ..encoders.levels import DEFAULT_LEVELS, PatchLevel
from ..encoders.patch_svdd import SMALL_PATCH, HierarchicalEncoder
from ..images.gallery import Gallery
from ..images.light import ILLUMINATIONS, MEANS, match_illumination, mean_colour, mean_image
from ..images.prepare import (
    ImageSet,
    PreparedImage,
    load_image_set,
    name_of,
    parse_size,
    prepare_image,
)
from ..ops.backends import resolve_device
from ..score.calibration import Calibration, calibrate
from ..score.encoding import banks_of, encode_images
from ..score.image_result import ImageResult, image_results
from ..score.maps import ScoreResult, combinations_of, search_levels
from ..score.regions import Region, find_regions, highest_place
from ..score.stream import Stream
from ..search.bank import NormalBank
from ..training import settings as recipes
from ..training.checkpoints import CheckpointKeeper, resume_from
from ..training.defect_check import DefectCheck
from ..training.settings import training_settings
from ..training.trainer import (
    Trainer,
    TrainingRecord,
    TrainingSettings,
    TrainingStep,
    is_collapsed,
    warn_of_collapse,
)
from ..training.workers import joined_workers, local_device
from . import normality as updating
from .model_file import load_detector, save_detector


class PatchSVDD(OutlierMixin, BaseEstimator):  # type: ignore[misc]
    """Patch SVDD (Yi & Yoon 2020) with exact nearest-neighbour scoring.

    Parameters:
        illumination: "as_is", or "matched": each image's colours are scaled to the training images'
            mean, so that the light they were taken in matters less; None: the mode's own.
        mean: what is subtracted from images: the training images' mean image ("pixel"; from each
            training image that of the others), or one mean per channel ("channel"), for things that
            lie anywhere. "paper": one mean image for all, as in the paper's implementation; with
            few training images thresholds are then too low, see the documentation on calibration.
        image_size: resize images to this many pixels (a square), or (height, width); None keeps
            their own size, which must then be one for all.
        levels: patch sizes and strides to score at; sizes 32, 64, 128 or 256, even strides.
        combination: how the levels' maps become one: "mult", "sum", or one level, e.g. "K32".
        contamination: share of good images that may be called anomalous; sets the threshold. N
            training images can promise 1 / (N + 1) at the lowest, see `false_alarm_rate_`.
        mode: how to train: "faithful", the paper's protocol, or "dense", on neighbours from dense
            maps, for a machine without a GPU or little time.
        surface: "texture" or "object", which like another `svdd_weight` (mode faithful); None: the
            mode's own.
        epochs, steps, minutes, batch_size, learning_rate, svdd_weight, initialization,
            train_last_layer, redraw_clipped, precision, check_every, patience, seed: see
            `training.TrainingSettings`; None: what the mode and the surface say (recipes.json).
            check_every=0: no checks.
        embedding_dim: D.
        keep_images: keep small pictures of the training images, for explanations.
        device: "auto" (a GPU if there is one and the build has kernels for it), "cpu", "cuda", ...

    Images (`X`) are a folder (a category in MVTec layout: its train/good; else every image below),
    a file, a sequence of files, PIL images or arrays, or a uint8 batch: [N, H, W, 3] as a NumPy
    array, [N, 3, H, W] as a tensor.

    After `fit`: `encoder_`, `mean_` [3, H, W], `light_` [3] (the training images' mean colour),
    `banks_` (a NormalBank per level), `calibration_`, `gallery_` (the training images' names,
    figures and pictures; None in files of before), `record_` (what training reported).
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] | None = 256,
        levels: Sequence[PatchLevel] = DEFAULT_LEVELS,
        combination: str = "mult",
        contamination: float = 0.01,
        illumination: str | None = None,
        mean: str = "pixel",
        mode: str = "faithful",
        surface: str | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        minutes: float | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        svdd_weight: float | None = None,
        initialization: str | None = None,
        train_last_layer: bool | None = None,
        redraw_clipped: bool = False,
        precision: str = "float32",
        check_every: int | None = None,
        patience: int | None = None,
        embedding_dim: int = 64,
        keep_images: bool = True,
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        self.image_size = image_size
        self.levels = levels
        self.combination = combination
        self.contamination = contamination
        self.illumination = illumination
        self.mean = mean
        self.mode = mode
        self.surface = surface
        self.epochs = epochs
        self.steps = steps
        self.minutes = minutes
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.svdd_weight = svdd_weight
        self.initialization = initialization
        self.train_last_layer = train_last_layer
        self.redraw_clipped = redraw_clipped
        self.precision = precision
        self.check_every = check_every
        self.patience = patience
        self.embedding_dim = embedding_dim
        self.keep_images = keep_images
        self.device = device
        self.seed = seed

    # --- fitting ----------------------------------------------------------------------------------

    def fit(
        self,
        X: Any,  # noqa: N803 (scikit-learn's name)
        y: None = None,
        *,
        encoder: HierarchicalEncoder | None = None,
        on_step: Callable[[TrainingStep], None] | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_minutes: float = 5.0,
        resume: bool = False,
    ) -> PatchSVDD:
        """Train an encoder on good images and fill the banks with their embeddings.

        encoder: use this one as it is instead of training. on_step: called after each step (on a
            GPU, every 20th).
        checkpoint: a file to which the state of training is written every `checkpoint_minutes` and
            when training ends, by Ctrl-C, SIGTERM or an error too.
        resume: go on from `checkpoint` if it exists; the result is that of an uninterrupted run,
            on a CPU to the bit.

        Under torchrun each process trains its share of every batch; the banks are then filled in
        the first process alone.

        Raises ValueError for unusable images or parameters, and for a checkpoint of another run;
        warns (CollapseWarning) if all embeddings are alike.
        """
        self.check_parameters()
        settings = self._training_settings()
        device = local_device(resolve_device(self.device))
        loaded = self.load_images(X)
        light = mean_colour(loaded.pixels)
        images = match_illumination(loaded.pixels, self._usual(light))
        mean = mean_image(images, self.mean)
        if self.mean != "channel" and len(images) == 1:
            raise ValueError(
                "one training image is its own mean image, which leaves nothing of it: give more, "
                'or mean="channel" (--mean channel)'
            )
        record = TrainingRecord()
        if encoder is None:
            encoder = self.untrained_encoder().to(device)
            check = None
            if settings.check_every is not None and len(images) == 1:
                warnings.warn("one image: what is learned cannot be checked", stacklevel=2)
            elif settings.check_every is not None:
                check = DefectCheck(images, mean, self.levels, self.combination, self._usual(light))
            with joined_workers(device) as workers:
                trainer = Trainer(encoder, images, mean, settings, check, workers)
                found = checkpoint is not None and Path(checkpoint).exists()
                if resume and checkpoint is not None and workers.agreed(found):
                    resume_from(trainer, mean, checkpoint)
                keeper = CheckpointKeeper(
                    trainer, mean, self.header(), checkpoint, checkpoint_minutes
                )

                def after_step(step: TrainingStep) -> None:
                    if on_step is not None:
                        on_step(step)
                    keeper.after_step()

                try:
                    record = trainer.run(after_step)
                except FloatingPointError:
                    raise  # the weights are spoilt: the last checkpoint stands
                except BaseException:
                    keeper.write()
                    raise
                keeper.write()
                if not workers.is_first:
                    return self
        self.encoder_, self.mean_, self.light_ = encoder.to(device).eval(), mean, light
        # The mean image holds a part of each of these, as it does not of a new one.
        self._fill_banks(loaded, num_in_mean=len(images) if self.mean == "pixel" else None)
        self.record_ = record
        return self

    def untrained_encoder(self) -> HierarchicalEncoder:
        """A freshly initialised encoder, the one training with this seed starts from."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            depth = (self._largest_patch() // SMALL_PATCH).bit_length()
            initialization = self._training_settings().initialization
            return HierarchicalEncoder(self.embedding_dim, depth, initialization).eval()

    def load_images(self, X: Any) -> ImageSet:  # noqa: N803
        """Images as they are prepared for this detector, but for the light."""
        return load_image_set(X, parse_size(self.image_size), self._largest_patch())

    def encode(self, pixels: Tensor) -> list[Tensor]:
        """Embed uint8 images [N, 3, H, W] in their own light: one [N, I, J, D] per level.

        Raises ValueError for images of another size than in training, unless mean="channel".
        """
        return self._encode(pixels)

    def _encode(self, pixels: Tensor, num_in_mean: int | None = None) -> list[Tensor]:
        matched = match_illumination(pixels, self.usual_light())
        return encode_images(
            self.encoder_, matched, self._mean_for(pixels), self.levels, num_in_mean
        )

    def _fill_banks(self, images: ImageSet, num_in_mean: int | None = None) -> None:
        banks = banks_of(self.levels, self._encode(images.pixels, num_in_mean), self.seed)
        for level, bank in banks.items():
            if is_collapsed(bank.embeddings):
                warn_of_collapse(f"at {level}")
        self.take_over(banks, Gallery.of(images, self.keep_images))

    def take_over(self, banks: Mapping[PatchLevel, NormalBank], gallery: Gallery | None) -> None:
        """Score against these banks from now on, calibrated; nothing is changed if that fails."""
        calibration = calibrate(banks, self.image_shape(), self.combination)
        # Embeddings of one image differ if the mean of the others was taken from it but once.
        twice = 0 if gallery is None else gallery.num_alike()
        if calibration is not None:
            twice = max(twice, int((calibration.image_scores == 0).sum()))
        if twice:
            warnings.warn(
                f"{twice} training images look exactly like others, as if they were there twice: "
                "they score next to nothing, and thresholds are too low for new images",
                stacklevel=3,
            )
        # In one step, which Ctrl-C cannot divide.
        self.__dict__.update(banks_=dict(banks), gallery_=gallery, calibration_=calibration)

    # --- changing what is normal ------------------------------------------------------------------

    def add(self, X: Any) -> PatchSVDD:  # noqa: N803
        """Add good images to the banks and calibrate anew; encoder, mean and light stay.

        The images are to be others than those of `fit`, which have a part in the mean image.
        Raises ValueError for unusable images; the detector then stays as it was.
        """
        self._require_fitted()
        self.take_over(*updating.with_images(self, X))
        return self

    def remove(self, images: Sequence[str | Path | int]) -> PatchSVDD:
        """Take training images out of the banks, by name or number, and calibrate anew.

        Names are those of `gallery_`, or their last part where that is unmistakable. Raises
        ValueError for an image that is not there, and if none would be left.
        """
        self._require_fitted()
        self.take_over(*updating.without_images(self, images))
        return self

    def merge(self, other: PatchSVDD) -> PatchSVDD:
        """Add the training images of a detector with the same encoder, and calibrate anew.

        Both must embed a patch alike: one encoder, mean, light and levels, as `refit` makes them.
        Raises ValueError if they differ.
        """
        self._require_fitted()
        other._require_fitted()
        self.take_over(*updating.merged(self, other))
        return self

    def refit(self, X: Any) -> PatchSVDD:  # noqa: N803
        """A new detector with this one's encoder, mean and light, and banks of other images alone.

        As for the same product of another line. The two can be merged. The images are to be others
        than those of `fit`, which have a part in the mean image: to leave some out, use `remove`.
        Raises ValueError for unusable images, as for those of another size unless mean="channel".
        """
        self._require_fitted()
        twin = type(self)(**self.get_params())
        images = twin.load_images(X)
        twin.encoder_, twin.mean_, twin.light_ = (
            self.encoder_,
            self._mean_for(images.pixels),
            self.light_,
        )
        twin.record_ = self.record_
        twin._fill_banks(images)
        again = 0
        if self.mean == "pixel" and self.gallery_ is not None and twin.gallery_ is not None:
            again = twin.gallery_.num_alike(self.gallery_)
        if again:
            warnings.warn(
                f"{again} of the images are training images of the detector, and may have a part "
                "in its mean image, which makes thresholds too low: leave images out with "
                "`remove` (patchsvdd update --remove) instead",
                stacklevel=2,
            )
        return twin

    def check_parameters(self) -> None:
        """Raise ValueError for parameters that cannot be used."""
        if not self.levels:
            raise ValueError("levels must name at least one patch level")
        if self.combination not in combinations_of(self.levels):
            raise ValueError(
                f"combination must be one of {combinations_of(self.levels)}, "
                f"got {self.combination!r}"
            )
        if self.illumination not in (None, *ILLUMINATIONS):
            raise ValueError(
                f"illumination must be one of {ILLUMINATIONS}, got {self.illumination!r}"
            )
        if self.mean not in MEANS:
            raise ValueError(f"mean must be one of {tuple(MEANS)}, got {self.mean!r}")
        if not 0 <= self.contamination < 1:
            raise ValueError(f"contamination must be in [0, 1), got {self.contamination}")
        size = parse_size(self.image_size)
        if size is not None and min(size) < self._largest_patch():
            raise ValueError(
                f"image_size must be at least the largest patch, {self._largest_patch()} pixels, "
                f"got {size[0]}x{size[1]}"
            )

    def _training_settings(self) -> TrainingSettings:
        names = set(TrainingSettings.__dataclass_fields__) & set(self.get_params())
        return training_settings(
            surface=self.surface, **{name: getattr(self, name) for name in names}
        )

    def _illumination(self) -> str:
        return self.illumination or recipes.illumination_of(self.mode)

    def usual_light(self) -> Tensor | None:
        """What images are brought to, [3]; None if they stay as they are."""
        return self._usual(self.light_)

    def _usual(self, light: Tensor) -> Tensor | None:
        return light if self._illumination() == "matched" else None

    def _largest_patch(self) -> int:
        return max(level.size for level in self.levels)

    def image_shape(self) -> tuple[int, int]:
        """(height, width) of the training images as they were encoded, in pixels."""
        return self.mean_.shape[1], self.mean_.shape[2]

    @property
    def num_images(self) -> int:
        """How many training images the banks hold."""
        self._require_fitted()
        return len(next(iter(self.banks_.values())).groups)

    def _mean_for(self, pixels: Tensor) -> Tensor:
        """The mean to subtract from images [..., 3, H, W]; raises ValueError for another size."""
        shape = pixels.shape[-2:]
        if shape == self.image_shape():
            return self.mean_
        if self.mean == "channel":
            return self.mean_[:, :1, :1].expand(3, *shape)
        raise ValueError(
            f"images must have {self.image_shape()[1]}x{self.image_shape()[0]} pixels as in "
            f'training (or mean="channel"), got {shape[1]}x{shape[0]}'
        )

    # --- scoring ----------------------------------------------------------------------------------

    def score(self, X: Any) -> ScoreResult:  # noqa: N803
        """Anomaly maps and image scores of new images. Raises NotFittedError before `fit`."""
        self._require_fitted()
        pixels = self.load_images(X).pixels
        shape = pixels.shape[2], pixels.shape[3]
        return search_levels(self.banks_, self.encode(pixels), shape, self.combination)

    def score_stream(
        self,
        sources: Iterable[Any],
        *,
        false_alarm_rate: float | None = None,
        on_error: Callable[[Any, Exception], None] | None = None,
    ) -> Stream[ImageResult]:
        """Score images one after another, as many as there are: an iterator of `ImageResult`.

        For `for` and `async for`. Reading, encoding, searching and what the caller does with a
        result overlap, in bounded memory. Scores are those of `score`.

        sources: paths, PIL images or arrays [H, W, 3]; may be endless. They are drawn, some ahead,
            in a thread of their own.
        false_alarm_rate: sets the threshold; default: `threshold_`.
        on_error: called with an image that cannot be read, and why; it is then skipped. None: the
            error is raised, and ends the stream.
        """
        self._require_fitted()
        threshold = self.threshold_or_none(false_alarm_rate)
        # As it is now: what is done to the detector meanwhile does not reach the stream.
        fitted = copy.copy(self)

        def read(item: Any, number: int) -> PreparedImage:
            size, smallest = parse_size(fitted.image_size), fitted._largest_patch()
            image = prepare_image(item, name_of(item, number), size, smallest)
            fitted._mean_for(image.pixels)  # refuses what cannot be encoded
            return image

        def encode(images: list[PreparedImage]) -> tuple[list[PreparedImage], list[Tensor]]:
            return images, fitted.encode(torch.stack([image.pixels for image in images]))

        def search(encoded: tuple[list[PreparedImage], list[Tensor]]) -> list[ImageResult]:
            images, embeddings = encoded
            height, width = images[0].pixels.shape[1:]
            scores = search_levels(fitted.banks_, embeddings, (height, width), fitted.combination)
            return image_results(images, scores, fitted.calibration_, threshold, fitted.gallery_)

        return Stream(sources, read, encode, search, on_error)

    def explain(self, result: ImageResult, false_alarm_rate: float | None = None) -> list[Region]:
        """The anomalous regions of an image, each with the normal patch most like it.

        The most anomalous first; none where the image is not anomalous. result: of
        `score_stream`. false_alarm_rate: sets the threshold; default: `threshold_`.
        """
        self._require_fitted()
        threshold = self.threshold_or_none(false_alarm_rate)
        return find_regions(
            result.scores, self.levels, self.calibration_, threshold, self._image_names()
        )

    def highest_place(self, result: ImageResult) -> Region:
        """Where an image looks least normal, anomalous or not, as `explain` gives regions."""
        self._require_fitted()
        return highest_place(result.scores, self.levels, self.calibration_, self._image_names())

    def match_picture(self, region: Region) -> Image.Image | None:
        """The training image that holds a region's nearest normal patch, if it was kept."""
        self._require_fitted()
        if self.gallery_ is None:
            return None
        return self.gallery_.picture(region.match_image, self.image_shape())

    def _image_names(self) -> tuple[str, ...]:
        return () if self.gallery_ is None else self.gallery_.names

    def score_samples(self, X: Any) -> npt.NDArray[np.float32]:  # noqa: N803
        """Normality of each image, [N]: the negative image score, higher is more normal."""
        scores: npt.NDArray[np.float32] = -self.score(X).image_scores.numpy()
        return scores

    def decision_function(self, X: Any) -> npt.NDArray[np.float32]:  # noqa: N803
        """`score_samples(X) - offset_`, [N]: negative for anomalous images."""
        return np.asarray(self.score_samples(X) - np.float32(self.offset_), dtype=np.float32)

    def predict(self, X: Any) -> npt.NDArray[np.int64]:  # noqa: N803
        """+1 for normal and -1 for anomalous images, [N]."""
        return np.where(self.decision_function(X) < 0, -1, 1).astype(np.int64)

    @property
    def threshold_(self) -> float:
        """Image score above which an image is called anomalous, from the training images."""
        return self.threshold(self.false_alarm_rate_)

    @property
    def false_alarm_rate_(self) -> float:
        """What `threshold_` promises: `contamination`, or the least that N images can promise."""
        return max(self.contamination, self._calibration().smallest_rate)

    def threshold(self, false_alarm_rate: float) -> float:
        """Image score that new good images exceed with at most this probability.

        Holds for images like the training images; see `Calibration.threshold`. Raises ValueError
        if there are too few of these for so low a rate (1 % takes 99).
        """
        return self._calibration().threshold(false_alarm_rate)

    def threshold_or_none(self, false_alarm_rate: float | None = None) -> float | None:
        """`threshold` of the rate given, else `threshold_`; None of a single training image.

        Raises ValueError for a rate that cannot be promised.
        """
        if false_alarm_rate is not None:
            return self.threshold(false_alarm_rate)
        return None if self.calibration_ is None else self.threshold_

    def pixel_threshold(self, false_alarm_rate: float) -> float:
        """Map value above which at most this share of a good image's pixels lies, on average.

        Raises ValueError as `threshold` does.
        """
        return self._calibration().pixel_threshold(false_alarm_rate)

    def p_values(
        self, image_scores: Tensor | npt.NDArray[np.floating[Any]]
    ) -> npt.NDArray[np.float64]:
        """How probable it is that a good image scores so high: [N] for image scores [N]."""
        return self._calibration().p_values(image_scores)

    @property
    def offset_(self) -> float:
        """scikit-learn's name for the negative threshold."""
        return -self.threshold_

    def _calibration(self) -> Calibration:
        self._require_fitted()
        if self.calibration_ is None:
            raise ValueError("a threshold needs at least two training images, got one")
        return self.calibration_

    def _require_fitted(self) -> None:
        if not hasattr(self, "banks_"):
            raise NotFittedError("this PatchSVDD is not fitted yet: call fit or PatchSVDD.load")

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the fitted detector to one safetensors file, atomically. Raises OSError."""
        self._require_fitted()
        save_detector(self, path)

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> PatchSVDD:
        """Open a detector written by `save`; the file is mapped, not copied.

        Files of schema 2 and 3 are calibrated anew, which takes a while: save it to keep that.
        Raises ValueError if the file holds no detector, is damaged, or of a newer version.
        """
        return load_detector(cls, path, device, resolve_device(device))

    def header(self) -> dict[str, Any]:
        """The parameters as a file's header has them."""
        parameters = self.get_params()
        parameters["levels"] = [(level.size, level.stride) for level in self.levels]
        parameters["illumination"] = self._illumination()  # whatever the mode's will be one day
        return {"parameters": parameters}
