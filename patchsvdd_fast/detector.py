"""The detector: fit on good images, score new ones, save and load."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor

from . import _native, recipes, store
from .bank import NormalBank
from .calibration import Calibration, calibrate
from .checkpoints import CheckpointKeeper, encoder_tensors, resume_from
from .encoder import SMALL_PATCH, HierarchicalEncoder, load_official_checkpoint
from .images import (
    ILLUMINATIONS,
    load_images,
    match_illumination,
    mean_colour,
    mean_image,
    parse_size,
)
from .levels import DEFAULT_LEVELS, PatchLevel
from .recipes import training_settings
from .score import ScoreResult, combinations_of, fill_banks, score_images
from .selection import DefectCheck
from .store import below
from .training import (
    Trainer,
    TrainingRecord,
    TrainingSettings,
    TrainingStep,
    is_collapsed,
    record_of,
    warn_of_collapse,
)
from .workers import joined_workers, local_device


class PatchSVDD(OutlierMixin, BaseEstimator):  # type: ignore[misc]
    """Patch SVDD (Yi & Yoon 2020) with exact nearest-neighbour scoring.

    Parameters:
        illumination: "as_is", or "matched": each image's colours are scaled to the training images'
            mean, so that the light they were taken in matters less; None: the mode's own.
        mean: what is subtracted from images: the training images' mean image ("pixel"), or one mean
            per channel ("channel"), for things that lie anywhere.
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
        device: "auto" (a GPU if there is one and the build has kernels for it), "cpu", "cuda", ...

    Images (`X`) are a folder (a category in MVTec layout: its train/good; else every image below),
    a file, a sequence of files, PIL images or arrays, or a uint8 batch: [N, H, W, 3] as a NumPy
    array, [N, 3, H, W] as a tensor.

    After `fit`: `encoder_`, `mean_` [3, H, W], `light_` [3] (the training images' mean colour),
    `banks_` (a NormalBank per level), `calibration_`, `record_` (what training reported).
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
        self._check_parameters()
        settings = self._training_settings()
        device = local_device(resolve_device(self.device))
        images = load_images(X, parse_size(self.image_size), self._largest_patch())
        light = mean_colour(images)
        images = match_illumination(images, self._usual(light))
        mean = mean_image(images, self.mean)
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
                    resume_from(trainer, checkpoint)
                keeper = CheckpointKeeper(
                    trainer, mean, self._header(), checkpoint, checkpoint_minutes
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
        self._fill_banks(encoder.to(device).eval(), images, mean)
        self.light_ = light
        self.record_ = record
        return self

    def untrained_encoder(self) -> HierarchicalEncoder:
        """A freshly initialised encoder, the one training with this seed starts from."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            depth = (self._largest_patch() // SMALL_PATCH).bit_length()
            initialization = self._training_settings().initialization
            return HierarchicalEncoder(self.embedding_dim, depth, initialization).eval()

    def _fill_banks(self, encoder: HierarchicalEncoder, images: Tensor, mean: Tensor) -> None:
        self.encoder_ = encoder
        self.mean_ = mean
        self.banks_ = fill_banks(encoder, images, mean, self.levels, self.seed)
        for level, bank in self.banks_.items():
            if is_collapsed(bank.embeddings):
                warn_of_collapse(f"at {level}")
        self.calibration_ = calibrate(self.banks_, self._image_shape(), self.combination)

    def _check_parameters(self) -> None:
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

    def _usual(self, light: Tensor) -> Tensor | None:
        """What images are to be matched to."""
        return light if self._illumination() == "matched" else None

    def _largest_patch(self) -> int:
        return max(level.size for level in self.levels)

    def _image_shape(self) -> tuple[int, int]:
        return self.mean_.shape[1], self.mean_.shape[2]

    # --- scoring ----------------------------------------------------------------------------------

    def score(self, X: Any) -> ScoreResult:  # noqa: N803
        """Anomaly maps and image scores of new images. Raises NotFittedError before `fit`."""
        self._require_fitted()
        images = load_images(X, parse_size(self.image_size), self._largest_patch())
        images = match_illumination(images, self._usual(self.light_))
        return score_images(self.encoder_, self.banks_, images, self.mean_, self.combination)

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
        tensors = encoder_tensors(self.encoder_) | {"mean": self.mean_, "light": self.light_}
        for level, bank in self.banks_.items():
            tensors |= {f"bank.{level}.{name}": value for name, value in bank.state_dict().items()}
        if self.calibration_ is not None:
            tensors |= {f"calibration.{k}": v for k, v in vars(self.calibration_).items()}
        store.save(path, "detector", tensors, self._header() | {"record": asdict(self.record_)})

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> PatchSVDD:
        """Read a detector written by `save`. Raises ValueError if the file holds no detector."""
        tensors, header = store.load(path)
        if header["kind"] != "detector":
            raise ValueError(
                f"{path} is a training {header['kind']}, not a fitted detector: finish it with "
                f"`patchsvdd train --encoder {path}`"
            )
        parameters = dict(header["parameters"])
        parameters["levels"] = tuple(PatchLevel(*level) for level in parameters["levels"])
        if isinstance(parameters["image_size"], list):
            parameters["image_size"] = tuple(parameters["image_size"])
        detector = cls(**{**parameters, "device": device})
        target = resolve_device(device)
        detector.encoder_ = _encoder_of(tensors, header).to(target)
        detector.mean_ = tensors["mean"]
        # Files of before illumination mattered lack it: then it is as it is.
        detector.light_ = tensors.get("light", detector.mean_.mean(dim=(1, 2)))
        detector.banks_ = {
            level: NormalBank.from_state_dict(below(tensors, f"bank.{level}.")).to(target)
            for level in detector.levels
        }
        if header.get("calibration") is not None:  # of schema 2: a threshold without the scores
            detector.calibration_ = calibrate(
                detector.banks_, detector._image_shape(), detector.combination
            )
        else:
            calibration = below(tensors, "calibration.")
            detector.calibration_ = Calibration(**calibration) if calibration else None
        detector.record_ = record_of(header["record"])
        return detector

    def _header(self) -> dict[str, Any]:
        parameters = self.get_params()
        parameters["levels"] = [(level.size, level.stride) for level in self.levels]
        parameters["illumination"] = self._illumination()  # whatever the mode's will be one day
        return {"parameters": parameters}


def load_encoder(path: str | Path) -> HierarchicalEncoder:
    """Read the encoder of a detector, a training checkpoint, or an official checkpoint (.pkl, .pt).

    Raises ValueError if the file is none of these.
    """
    if Path(path).suffix in (".pkl", ".pt", ".pth"):
        return load_official_checkpoint(path)
    return _encoder_of(*store.load(path))


def preparation_of(path: str | Path) -> dict[str, str]:
    """How images were prepared for the encoder of a file: `illumination` and `mean`."""
    if Path(path).suffix in (".pkl", ".pt", ".pth"):
        return {"illumination": "as_is", "mean": "pixel"}
    _, header = store.load(path)
    parameters = header["parameters"]
    illumination = parameters.get("illumination")
    return {
        "illumination": illumination or recipes.illumination_of(parameters.get("mode", "faithful")),
        "mean": parameters.get("mean", "pixel"),
    }


def resolve_device(device: str) -> torch.device:
    """The device to run on; "auto" prefers a GPU that this build has kernels for."""
    if device == "auto":
        usable = _native.cuda is not None and torch.cuda.is_available()
        return torch.device("cuda" if usable else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f'device must be "auto", "cpu", "cuda" or "cuda:N", got {device!r}'
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch finds no GPU")
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a CUDA GPU, got {device!r}")
    return resolved


def _encoder_of(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> HierarchicalEncoder:
    sizes = [size for size, _ in header["parameters"]["levels"]]
    depth = (max(sizes) // SMALL_PATCH).bit_length()
    encoder = HierarchicalEncoder(header["parameters"]["embedding_dim"], depth)
    # Of a training run with checks, the best weights so far.
    best = below(tensors, "training.best.")
    encoder.load_state_dict(best or below(tensors, "encoder."))
    return encoder.eval()
