"""Changing which images a detector takes as normal, without training anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..encoders.patch_encoder import device_of
from ..training.workers import joined_workers
from . import filling, fitting, normality
from .explanations import ExplanationsMixin
from .filling import Embedder
from .forecast import Progress, changes_shown
from .model_file import Model
from .normality import Normality
from .progress_bars import ENCODING, READING, fit_shown

if TYPE_CHECKING:
    from typing_extensions import Self


class ChangesMixin(ExplanationsMixin):
    """Other training images, for a detector that defines `model` and `_twin`."""

    def model(self) -> Model:
        """What it is made of, as a plain value."""
        raise NotImplementedError

    def _twin(self, model: Model) -> Self:
        """A detector with these parameters, made of another model."""
        raise NotImplementedError

    def add(
        self,
        X: Any,  # noqa: N803
        *,
        skip_unreadable: bool = False,
        pages: str = "first",
        progress: bool = False,
    ) -> Self:
        """Add good images to the banks and calibrate anew; encoder, mean and light stay.

        X must not hold images of `fit`, whose mean was taken: thresholds would become too low.
        skip_unreadable, pages, progress: as of `fit`. Under torchrun all processes call this at
        once, and the first alone is changed. Raises ValueError for unusable images; then nothing
        changes.
        """
        before, model = self._normality(), self.model()
        normality.whole_banks(before)  # before it takes long
        encoder = model.encoder
        with changes_shown(progress) as told, joined_workers(device_of(encoder)) as workers:
            how = skip_unreadable, told.phase(READING), pages, workers
            images = filling.load_to_add(X, model, *how)
            how_encoded = model.parameters, encoder, model.mean, model.light, images
            embedder = Embedder(*how_encoded, None, told.phase(ENCODING), workers)
            embedded = embedder.in_first()
            if embedded is not None:
                self._take_over(normality.with_images(before, *embedded), told)
        return self

    def remove(self, images: Sequence[str | Path | int], *, progress: bool = False) -> Self:
        """Take training images out of the banks, by name or number, and calibrate anew.

        Names are those of `gallery_`, or their last part if only one image has it. progress: as of
        `fit`. Raises ValueError for an image that is not there, and if none would be left.
        """
        fewer = normality.without_images(self._normality(), images)
        with changes_shown(progress) as told:
            self._take_over(fewer, told)
        return self

    def merge(self, other: ChangesMixin, *, progress: bool = False) -> Self:
        """Add the training images of a detector with the same encoder, and calibrate anew.

        Both must embed a patch in the same way, with one encoder, mean, light and levels: `refit`
        makes such detectors. progress: as of `fit`. Raises ValueError if they differ.
        """
        if not isinstance(other, ChangesMixin):
            raise TypeError(f"only a detector can be merged, got {type(other).__name__}: use add")
        fitting.require_alike(self.model(), other.model())
        more = normality.merged(self._normality(), other._normality())
        with changes_shown(progress) as told:
            self._take_over(more, told)
        return self

    def refit(
        self,
        X: Any,  # noqa: N803
        *,
        skip_unreadable: bool = False,
        pages: str = "first",
        progress: bool = False,
    ) -> Self:
        """A new detector with this one's encoder, mean and light, whose banks hold other images.

        For the same product on another line, say; the two can be merged. X must not hold images of
        `fit`: to leave some of those out, use `remove`. skip_unreadable, pages, progress: as of
        `fit`. Under torchrun all processes call this at once, and the first alone has the new one;
        others return this one. Raises ValueError for unusable images, and for those of another size
        unless mean="channel".
        """
        with fit_shown(progress, None, None) as (_, on_progress):
            model = fitting.refit_model(self.model(), X, skip_unreadable, on_progress, pages)
        return self if model is None else self._twin(model)

    @property
    def num_images(self) -> int:
        """How many training images the banks hold."""
        return self._normality().num_images

    def _normality(self) -> Normality:
        self._require_fitted()
        return Normality(self.banks_, self.gallery_)

    def _take_over(self, normal: Normality, progress: Progress) -> None:
        """Calibrate these banks and score against them from now on; a failure changes nothing."""
        given, shape = self.model().parameters, self.image_shape()
        calibration = filling.calibrated(given, self.encoder_, normal, shape, progress)
        banks, gallery = normal
        self.__dict__.update(banks_=dict(banks), gallery_=gallery, calibration_=calibration)
