"""The detector: fit on good images, score new ones, save and load."""

from __future__ import annotations

import time
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

from . import _native, store
from .bank import NormalBank
from .calibration import Calibration, calibrate
from .encoder import SMALL_PATCH, HierarchicalEncoder, load_official_checkpoint
from .images import load_images, mean_image, parse_size
from .levels import DEFAULT_LEVELS, PatchLevel
from .score import ScoreResult, combinations_of, encode_images, score_images
from .training import (
    Trainer,
    TrainingRecord,
    TrainingSettings,
    TrainingStep,
    is_collapsed,
    warn_of_collapse,
)


class PatchSVDD(OutlierMixin, BaseEstimator):  # type: ignore[misc]
    """Patch SVDD (Yi & Yoon 2020) with exact nearest-neighbour scoring.

    Parameters:
        image_size: resize images to this many pixels (a square), or (height, width); None keeps
            their own size, which must then be one for all.
        levels: patch sizes and strides to score at; sizes 32, 64, 128 or 256, even strides.
        combination: how the levels' maps become one: "mult", "sum", or one level, e.g. "K32".
        contamination: share of good images that may be called anomalous; sets the threshold.
        epochs, steps, batch_size, learning_rate, svdd_weight, train_last_layer, redraw_clipped,
            seed: see `training.TrainingSettings`. The defaults are the paper's protocol.
        initialization: see `HierarchicalEncoder`.
        embedding_dim: D.
        device: "auto" (a GPU if there is one and the build has kernels for it), "cpu", "cuda", ...

    Images (`X`) are a folder (a category in MVTec layout: its train/good; else every image below),
    a file, a sequence of files, PIL images or arrays, or a uint8 batch: [N, H, W, 3] as a NumPy
    array, [N, 3, H, W] as a tensor.

    After `fit`: `encoder_`, `mean_` [3, H, W], `banks_` (a NormalBank per level), `calibration_`,
    `record_` (what training reported).
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] | None = 256,
        levels: Sequence[PatchLevel] = DEFAULT_LEVELS,
        combination: str = "mult",
        contamination: float = 0.01,
        epochs: int = 300,
        steps: int | None = None,
        batch_size: int = 64,
        learning_rate: float = 1e-4,
        svdd_weight: float = 1e-3,
        initialization: str = "default",
        train_last_layer: bool = False,
        redraw_clipped: bool = False,
        embedding_dim: int = 64,
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        self.image_size = image_size
        self.levels = levels
        self.combination = combination
        self.contamination = contamination
        self.epochs = epochs
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.svdd_weight = svdd_weight
        self.initialization = initialization
        self.train_last_layer = train_last_layer
        self.redraw_clipped = redraw_clipped
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
    ) -> PatchSVDD:
        """Train an encoder on good images and fill the banks with their embeddings.

        encoder: use this one as it is instead of training. on_step: called after each step.
        checkpoint: a file to which the encoder is written every `checkpoint_minutes` and when
            training ends, by Ctrl-C or an error too.

        Raises ValueError for unusable images or parameters; warns (CollapseWarning) if all
        embeddings are alike.
        """
        self._check_parameters()
        settings = self._training_settings()
        device = resolve_device(self.device)
        images = load_images(X, parse_size(self.image_size), self._largest_patch())
        mean = mean_image(images)
        record = TrainingRecord()
        if encoder is None:
            encoder = self.untrained_encoder()
            encoder.to(device)
            trainer = Trainer(encoder, images, mean, settings)
            keeper = _CheckpointKeeper(self, encoder, mean, checkpoint, checkpoint_minutes)

            def after_step(step: TrainingStep) -> None:
                keeper.after_step(step)
                if on_step is not None:
                    on_step(step)

            try:
                record = trainer.run(after_step)
            finally:  # at the end, and whatever ends it early
                keeper.write()
        self._fill_banks(encoder.to(device).eval(), images, mean)
        self.record_ = record
        return self

    def untrained_encoder(self) -> HierarchicalEncoder:
        """A freshly initialised encoder, the one training with this seed starts from."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            depth = (self._largest_patch() // SMALL_PATCH).bit_length()
            return HierarchicalEncoder(self.embedding_dim, depth, self.initialization).eval()

    def _fill_banks(self, encoder: HierarchicalEncoder, images: Tensor, mean: Tensor) -> None:
        encoded = encode_images(encoder, images, mean, self.levels)
        embeddings = dict(zip(self.levels, encoded, strict=True))
        for level, values in embeddings.items():
            if is_collapsed(values):
                warn_of_collapse(f"at {level}")
        self.encoder_ = encoder
        self.mean_ = mean
        self.banks_ = {
            level: NormalBank(values, seed=self.seed) for level, values in embeddings.items()
        }
        self.calibration_ = calibrate(
            self.banks_, embeddings, self._image_shape(), self.combination, self.contamination
        )

    def _check_parameters(self) -> None:
        if not self.levels:
            raise ValueError("levels must name at least one patch level")
        if self.combination not in combinations_of(self.levels):
            raise ValueError(
                f"combination must be one of {combinations_of(self.levels)}, "
                f"got {self.combination!r}"
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
        names = TrainingSettings.__dataclass_fields__
        return TrainingSettings(**{name: getattr(self, name) for name in names})

    def _largest_patch(self) -> int:
        return max(level.size for level in self.levels)

    def _image_shape(self) -> tuple[int, int]:
        return self.mean_.shape[1], self.mean_.shape[2]

    # --- scoring ----------------------------------------------------------------------------------

    def score(self, X: Any) -> ScoreResult:  # noqa: N803
        """Anomaly maps and image scores of new images. Raises NotFittedError before `fit`."""
        self._require_fitted()
        images = load_images(X, parse_size(self.image_size), self._largest_patch())
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
        self._require_fitted()
        if self.calibration_ is None:
            raise ValueError("a threshold needs at least two training images, got one")
        return self.calibration_.threshold

    @property
    def offset_(self) -> float:
        """scikit-learn's name for the negative threshold."""
        return -self.threshold_

    def _require_fitted(self) -> None:
        if not hasattr(self, "banks_"):
            raise NotFittedError("this PatchSVDD is not fitted yet: call fit or PatchSVDD.load")

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the fitted detector to one safetensors file, atomically. Raises OSError."""
        self._require_fitted()
        tensors = _encoder_tensors(self.encoder_) | {"mean": self.mean_}
        for level, bank in self.banks_.items():
            tensors |= {f"bank.{level}.{name}": value for name, value in bank.state_dict().items()}
        header = self._header() | {
            "calibration": None if self.calibration_ is None else asdict(self.calibration_),
            "record": asdict(self.record_),
        }
        store.save(path, "detector", tensors, header)

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
        detector.banks_ = {
            level: NormalBank.from_state_dict(_below(tensors, f"bank.{level}.")).to(target)
            for level in detector.levels
        }
        calibration = header["calibration"]
        detector.calibration_ = None if calibration is None else Calibration(**calibration)
        record = dict(header["record"])
        record["position_accuracy"] = {int(k): v for k, v in record["position_accuracy"].items()}
        detector.record_ = TrainingRecord(**record)
        return detector

    def _header(self) -> dict[str, Any]:
        parameters = self.get_params()
        parameters["levels"] = [(level.size, level.stride) for level in self.levels]
        return {"parameters": parameters}


class _CheckpointKeeper:
    """Writes the encoder in training to a file every so often."""

    def __init__(
        self,
        detector: PatchSVDD,
        encoder: HierarchicalEncoder,
        mean: Tensor,
        path: str | Path | None,
        minutes: float,
    ) -> None:
        self.detector, self.encoder, self.mean = detector, encoder, mean
        self.path, self.seconds = path, 60 * minutes
        self.written = time.monotonic()
        self.steps = 0

    def after_step(self, step: TrainingStep) -> None:
        self.steps = step.step
        if time.monotonic() - self.written >= self.seconds:
            self.write()

    def write(self) -> None:
        """Write the checkpoint; a disk that is full by now must not end the training."""
        if self.path is None or self.steps == 0:
            return
        tensors = _encoder_tensors(self.encoder) | {"mean": self.mean}
        header = self.detector._header() | {"steps": self.steps}
        try:
            store.save(self.path, "checkpoint", tensors, header)
        except OSError as error:
            warnings.warn(f"no checkpoint was written: {error}", RuntimeWarning, stacklevel=3)
        self.written = time.monotonic()


def load_encoder(path: str | Path) -> HierarchicalEncoder:
    """Read the encoder of a detector, a training checkpoint, or an official checkpoint (.pkl, .pt).

    Raises ValueError if the file is none of these.
    """
    if Path(path).suffix in (".pkl", ".pt", ".pth"):
        return load_official_checkpoint(path)
    return _encoder_of(*store.load(path))


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


def _encoder_tensors(encoder: HierarchicalEncoder) -> dict[str, Tensor]:
    return {f"encoder.{name}": value for name, value in encoder.state_dict().items()}


def _encoder_of(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> HierarchicalEncoder:
    sizes = [size for size, _ in header["parameters"]["levels"]]
    depth = (max(sizes) // SMALL_PATCH).bit_length()
    encoder = HierarchicalEncoder(header["parameters"]["embedding_dim"], depth)
    encoder.load_state_dict(_below(tensors, "encoder."))
    return encoder.eval()


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, under the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
