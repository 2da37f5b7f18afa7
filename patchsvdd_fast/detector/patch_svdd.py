"""The detector: fit on good images, score new ones, save and load.

Methods have a few lines each: the work is done in the other files of this folder, and below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sklearn.base import BaseEstimator, OutlierMixin
from torch import Tensor, nn

from ..encoders.levels import PatchLevel
from ..encoders.patch_svdd import HierarchicalEncoder
from ..encoders.pretrained import PATCH_SVDD
from ..files.categories import scored_paths
from ..images.prepare import ImageSet
from ..ops.backends import resolve_device
from ..score.image_result import ImageResult, ScoredImages
from ..score.maps import ScoreResult
from ..score.stream import Stream
from ..training.record import TrainingStep
from . import fitting, parameters, scoring
from .changes import ChangesMixin
from .model_file import Model, load_models, save_model
from .progress_bars import OnProgress


class PatchSVDD(ChangesMixin, OutlierMixin, BaseEstimator):  # type: ignore[misc]
    """Patch SVDD (Yi & Yoon 2020) with exact nearest-neighbour scoring.

    Parameters:
        encoder: what embeds patches. "patch-svdd" is the paper's, which is trained on X;
            "efficientnet_lite0" to 2, "timm/NAME" and "torchvision/NAME" are pretrained and
            stay as they are, see `encoders.pretrained`. Or a module: a `PatchEncoder`, or a
            backbone that gives feature maps, see `encoders.backbone`.
        projection: of a pretrained encoder, see `BackboneEncoder`; None: its own.
        image_size: side of the square that images are resized to, or (height, width), in pixels;
            None keeps their own size, which must be the same for all.
        levels: pairs (size, stride), or `PatchLevel`, to score at; of Patch SVDD sizes 32, 64, 128
            or 256 and even strides, of others see there; None: the encoder's own.
        combination: how the levels' maps become one: "mult", "sum", or one level, e.g. "K32".
        contamination: share of good images that may be called anomalous; sets the threshold. N
            training images can promise 1 / (N + 1) at the lowest, see `false_alarm_rate_`.
        illumination: how an image's light is treated; None: "matched" for Patch SVDD in mode
            dense, else "as_is".

            - "as_is": it stays as it is.
            - "matched": colours are scaled so that their mean is that of the training images.
        mean: what is subtracted from every image; None: "pixel" for Patch SVDD, "fixed" for
            pretrained encoders. docs/calibration.md compares them.

            - "pixel": the training images' mean image; from each of them, the mean of the others.
            - "channel": one mean per colour channel, for objects that lie anywhere.
            - "paper": one mean image from all, as in the paper's implementation.
            - "fixed": the constants that a pretrained encoder was trained with.
        mode: how the encoder is trained.

            - "faithful": the paper's protocol; hours on a GPU.
            - "dense": on neighbouring patches of dense maps; minutes on a CPU.
        surface: "texture" or "object": sets the `svdd_weight` that suits it (mode faithful).
        epochs, steps, minutes: limits of training; it ends at the first. None at all: the mode's.
        batch_size, learning_rate, svdd_weight, initialization, train_last_layer, redraw_clipped,
            precision, check_every, patience, seed: see `training.settings.TrainingSettings`. None:
            as the mode and the surface say (recipes.json). check_every=0: no checks.
        encoding_precision: of convolutions for banks and scores: "float32", "tf32", "bfloat16".
        embedding_dim: D, an embedding's length; None: 64 for Patch SVDD, all channels of others.
        coreset: share of the patches that banks keep, so chosen that no other is far from them, see
            `NormalBank.coreset`; None: all. Images can then not be added, removed or merged.
        reweight: multiply image scores as PatchCore does, by how alone the nearest normal patch is
            among this many, 2 to 32, see `score.reweighting`; None: do not. For a single level, as
            pretrained encoders have.
        bit_depth: of samples in 16-bit files and uint16 arrays, 8 to 16; None: found from the
            training images, see `images.samples.survey`.
        value_range: (lowest, highest) of floating-point samples, made 0 and 255; None: found from
            files; where there is one, arrays of floats have it, too, else 0 to 1.
        channel_order: of arrays and tensors, "rgb", or "bgr" as OpenCV gives them; files and PIL
            images are not affected. May be set after `load`: ``set_params(channel_order="bgr")``.
        keep_images: keep small pictures of the training images, for explanations.
        device: "auto" (a GPU if there is one and the build has kernels for it), "cpu", "cuda", ...

    Images (`X`) are a folder (a category in MVTec layout: its train/good; else every image below),
    a file, a sequence of files, PIL images, arrays [H, W, 3] or tensors [3, H, W], or a batch of
    either; uint8, uint16, or floats in 0 to 1 (or `value_range`). If any has more than 8 bits,
    fractions are kept.

    After `fit`: `encoder_`, `mean_` [3, H, W], `light_` [3] (the images' mean colour), `banks_` (a
    NormalBank per level), `calibration_` (None with one image), `gallery_` (their names, statistics
    and pictures; None from a file of schema 2 or 3), `record_` (what training reported),
    `samples_` (the depth and range in use).
    """

    def __init__(
        self,
        *,
        encoder: str | nn.Module = PATCH_SVDD,
        projection: str | None = None,
        image_size: int | tuple[int, int] | None = 256,
        levels: Sequence[PatchLevel | tuple[int, int]] | None = None,
        combination: str = "mult",
        contamination: float = 0.01,
        illumination: str | None = None,
        mean: str | None = None,
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
        encoding_precision: str = "float32",
        check_every: int | None = None,
        patience: int | None = None,
        embedding_dim: int | None = None,
        coreset: float | None = None,
        reweight: int | None = None,
        bit_depth: int | None = None,
        value_range: tuple[float, float] | None = None,
        channel_order: str = "rgb",
        keep_images: bool = True,
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        self.encoder = encoder
        self.projection = projection
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
        self.encoding_precision = encoding_precision
        self.check_every = check_every
        self.patience = patience
        self.embedding_dim = embedding_dim
        self.coreset = coreset
        self.reweight = reweight
        self.bit_depth = bit_depth
        self.value_range = value_range
        self.channel_order = channel_order
        self.keep_images = keep_images
        self.device = device
        self.seed = seed

    # --- fitting ----------------------------------------------------------------------------------

    def fit(
        self,
        X: Any,  # noqa: N803 (scikit-learn's name)
        y: None = None,
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
        shard_bytes: int | None = None,
    ) -> PatchSVDD:
        """Train an encoder on good images, or take one, and fill the banks with their embeddings.

        encoder: use this one as it is, instead of the parameter `encoder`; nothing is trained.
        on_step: called after each training step, on a GPU after every 20th.
        on_progress: called with a phase, its share done, and the whole fit's seconds left or None.
        progress: show the same: bars in a terminal, lines in a notebook, else a line a minute.
        checkpoint: file that the state of training is written to every `checkpoint_minutes`, and
            when training ends, also by Ctrl-C, SIGTERM or an error.
        resume: go on from `checkpoint` if it exists; the result is that of an uninterrupted run,
            on a CPU to the bit.
        skip_unreadable: leave out files that cannot be read, with a warning that lists them.
        pages: of a file with several, "first", or "all": each as an image (stack.tif#2).

        shard_bytes: keep the banks in parts with embeddings of at most so many bytes; under
            torchrun each process keeps those of its own images. docs/scale.md says more.

        Under torchrun all processes call this at once. Each trains its share of every batch, and
        embeds its share of the images; without `shard_bytes` the first alone is fitted then.

        Raises ValueError for unusable images or parameters, listing all files that cannot be read,
        and for a checkpoint of another run; FloatingPointError if the loss does not stay finite.
        Warns (CollapseWarning) if all embeddings are (nearly) the same.
        """
        keeping = fitting.Keeping(checkpoint, checkpoint_minutes, resume, shard_bytes)
        how = encoder, keeping, on_step, on_progress, progress, skip_unreadable, pages
        models = fitting.fit_given(self.get_params(), {"": X}, *how)
        if models is not None:  # else the first process has it
            self._use(models[""])
        return self

    def untrained_encoder(self) -> HierarchicalEncoder:
        """The random encoder that the training of Patch SVDD with this seed starts from."""
        return parameters.untrained_encoder(parameters.resolved(self.get_params()))

    def load_images(self, X: Any) -> ImageSet:  # noqa: N803
        """Load and resize images as this detector does; their light is matched by `encode`."""
        samples = getattr(self, "samples_", None)
        return scoring.load(X, self.parameters_, samples=samples, paths_in=scored_paths)

    def encode(self, pixels: Tensor, names: Sequence[str] | None = None) -> list[Tensor]:
        """Match the light of images [N, 3, H, W] and embed them: one [N, I, J, D] per level.

        pixels: uint8, or float32 in 0 to 255. names: of the images, for messages of errors.

        Raises ValueError for another size than in training, unless the mean is one per channel.
        """
        self._require_fitted()
        how = self.encoder_, self.mean_, self.light_, self.parameters_
        return scoring.encode(*how, pixels, names=names)

    @property
    def levels_(self) -> tuple[PatchLevel, ...]:
        """The patch levels that images are scored at."""
        self._require_fitted()
        return tuple(self.banks_)

    @property
    def parameters_(self) -> dict[str, Any]:
        """The parameters, with the encoder's own values for those that are None."""
        given, fitted = self.get_params(), getattr(self, "encoder_", None)
        return parameters.resolved(given, fitted or parameters.ready_encoder(given))

    def _use(self, model: Model) -> None:
        # All at once, so that Ctrl-C cannot leave a half of it.
        self.__dict__.update({f"{name}_": getattr(model, name) for name in _FITTED})

    def _twin(self, model: Model) -> PatchSVDD:
        twin = type(self)(**self.get_params())
        twin._use(model)
        return twin

    def usual_light(self) -> Tensor | None:
        """The colour that images are matched to, [3] float32; None if they stay as they are."""
        self._require_fitted()
        return parameters.usual_light(self.parameters_, self.light_)

    # --- scoring ----------------------------------------------------------------------------------

    def score(self, X: Any, y: Any = None, *, progress: bool = False) -> ScoredImages:  # noqa: N803
        """Anomaly maps and image scores of new images, all in memory; y is ignored.

        progress: show how far it is, as `fit` does.
        """
        return scoring.score_source(self.model(), X, self.threshold_or_none(), progress)

    def score_encoded(self, encoded: Sequence[Tensor], shape: tuple[int, int]) -> ScoreResult:
        """As `score`, from embeddings of images of (height, width), as `encode` gives them."""
        return scoring.score_encoded(self.model(), encoded, shape)

    def score_stream(
        self,
        sources: Iterable[Any],
        *,
        false_alarm_rate: float | None = None,
        on_error: Callable[[Any, Exception], None] | None = None,
        keep_originals: bool = False,
    ) -> Stream[ImageResult]:
        """Score images one after another, as many as there are: an iterator of `ImageResult`.

        For `for` and `async for`. Reading, encoding, searching and what the caller does with a
        result overlap, in bounded memory. Scores are those of `score`.

        sources: paths, PIL images, arrays or tensors; may be endless, or a batch. A thread of the
            stream iterates over them, some images ahead.
        false_alarm_rate: share of good images that may be called anomalous; None: `threshold_`.
        on_error: called with an image that cannot be read, and why; it is then skipped. None: the
            error is raised, and ends the stream.
        keep_originals: keep each image as it was before resizing, shrunk to 1,024 pixels a side if
            it is larger: `ImageResult.original`, for pictures. Takes up to 3 MB a result.
        """
        self._require_fitted()
        threshold = self.threshold_or_none(false_alarm_rate)
        # The model as it is now: later changes of the detector do not reach the stream.
        return scoring.score_stream(self.model(), sources, threshold, on_error, keep_originals)

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the fitted detector to one safetensors file, atomically. Raises OSError.

        One whose banks lie in shards, to files beside an index, NAME.safetensors.index.json; all
        processes call this at once. Raises ValueError for a name that does not suit it.
        """
        save_model(self.model(), path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "auto",
        encoder: nn.Module | None = None,
        category: str | None = None,
    ) -> PatchSVDD:
        """Open a detector written by `save`; the file is mapped, not copied.

        Of a model in shards each process of torch.distributed opens a part, all at once; they then
        score together: each its own images, with as many calls. A stream ends when those of all
        do.

        encoder: for a detector with an encoder of your own, of which the file holds only the
            weights: a module of the same architecture.
        category: of a file with the detectors of several (`CategoryDetectors.save`), which one.

        A file of schema 2 or 3 is calibrated anew each time, which takes a while: `save` it once.
        Raises ValueError if the file holds no detector, is damaged, or of a newer version, and
        unless it has this category.
        """
        target, only = resolve_device(device), category or ""
        (model,) = load_models(path, target, cls().get_params(), encoder, only).values()
        return cls.of_model(model, device, encoder)

    @classmethod
    def of_model(cls, model: Model, device: str, encoder: nn.Module | None = None) -> PatchSVDD:
        """A fitted detector of what it is made of; device, encoder: as of `load`."""
        own = {"device": device} if encoder is None else {"device": device, "encoder": encoder}
        detector = cls(**{**model.parameters, **own})
        detector._use(model)
        return detector

    def model(self) -> Model:
        """What it is made of, as a plain value."""
        self._require_fitted()
        fitted: Mapping[str, Any] = {name: getattr(self, f"{name}_") for name in _FITTED}
        return Model(self.parameters_, **fitted)


# What `fit` sets: fields of `Model`, which are attributes of the detector with "_" appended.
_FITTED = tuple(field.name for field in fields(Model) if field.name != "parameters")
