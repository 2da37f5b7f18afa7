"""What follows from a detector's calibration: thresholds, p-values, scikit-learn's predictions.

And how a fitted detector is shown, which names its threshold.
"""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from ..encoders.levels import PatchLevel
from ..encoders.patch_encoder import PatchEncoder
from ..files.folders import counted
from ..files.store import MappedFile
from ..score.calibration import Calibration
from ..score.maps import ScoreResult
from ..search.rounds import AnyBank


class ThresholdsMixin:
    """Thresholds and p-values for a detector with `score`, `contamination` and `calibration_`."""

    contamination: float
    """Share of good images that may be called anomalous, as the detector was given it."""
    file_: MappedFile | None
    """The model file that it was loaded from, to notice that somebody wrote into it."""
    calibration_: Calibration | None
    """What good images score; None of a single training image."""
    encoder_: PatchEncoder
    """What embeds patches."""
    banks_: dict[PatchLevel, AnyBank]
    """The embeddings of the training images' patches, per level."""
    mean_: Tensor
    """[3, H, W]: what is subtracted from images."""

    def score(self, X: Any, y: Any = None) -> ScoreResult:  # noqa: N803 (scikit-learn's name)
        """Anomaly maps and image scores; the detector defines it."""
        raise NotImplementedError

    def image_shape(self) -> tuple[int, int]:
        """(height, width) of the training images as they were encoded, in pixels."""
        self._require_fitted()
        return self.mean_.shape[1], self.mean_.shape[2]

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
        """Image score above which an image is called anomalous, at `false_alarm_rate_`."""
        return self.threshold(self.false_alarm_rate_)

    @property
    def false_alarm_rate_(self) -> float:
        """The rate that `threshold_` promises: `contamination`, but no less than 1 / (N + 1)."""
        return max(self.contamination, self._calibration().smallest_rate)

    def threshold(self, false_alarm_rate: float) -> float:
        """Image score that a new good image exceeds with at most this probability.

        Holds for images like the training images; see `Calibration.threshold`. Raises ValueError
        if there are too few training images for so low a rate (1 % takes 99).
        """
        return self._calibration().threshold(false_alarm_rate)

    def threshold_or_none(self, false_alarm_rate: float | None = None) -> float | None:
        """The threshold for this rate; for None `threshold_`, or None with one training image.

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
        """Probability that a good image scores so high: [N] float64 for image scores [N]."""
        return self._calibration().p_values(image_scores)

    @property
    def offset_(self) -> float:
        """scikit-learn's name for the negative threshold."""
        return -self.threshold_

    def __repr__(self) -> str:
        if not hasattr(self, "banks_"):
            return _with_a_named_encoder(self) or super().__repr__()
        height, width = self.mean_.shape[1:]
        bank = next(iter(self.banks_.values()))
        parts = [f"{counted(len(bank.groups), 'image')} of {width}x{height}", self.encoder_.name]
        parts += [f"{level}: {len(bank):,} x {bank.dim}" for level, bank in self.banks_.items()]
        if self.calibration_ is not None:  # in memory, whatever became of the file
            rate = max(self.contamination, self.calibration_.smallest_rate)
            threshold = self.calibration_.threshold(rate)
            parts.append(f"threshold {threshold:.4g} at {rate:.2%} false alarms")
        return f"{type(self).__name__}({', '.join([*parts, str(bank.device)])})"

    def __getstate__(self) -> dict[str, Any]:
        if hasattr(self, "banks_"):
            self._require_fitted()  # a copy of a file that was changed could not notice it any more
        state: dict[str, Any] = super().__getstate__()  # type: ignore[misc]
        return state

    def _repr_mimebundle_(self, **options: Any) -> dict[str, str]:
        """For notebooks: a fitted detector is shown by its `repr`, not by its 30 parameters."""
        if hasattr(self, "banks_"):
            return {"text/plain": repr(self), "text/html": f"<code>{escape(repr(self))}</code>"}
        bundle: dict[str, str] = super()._repr_mimebundle_(**options)  # type: ignore[misc]
        return bundle

    def _calibration(self) -> Calibration:
        self._require_fitted()
        if self.calibration_ is None:
            raise ValueError("a threshold needs at least two training images, got one")
        return self.calibration_

    def _require_fitted(self) -> None:
        if not hasattr(self, "banks_"):
            raise NotFittedError("this PatchSVDD is not fitted yet: call fit or PatchSVDD.load")
        if self.file_ is not None:
            self.file_.check()


def _with_a_named_encoder(detector: Any) -> str | None:
    """scikit-learn's `repr` of a detector whose encoder is a module, by the encoder's name.

    None if the encoder is a name already.
    """
    parameters = detector.get_params(deep=False)
    encoder = parameters["encoder"]
    if not isinstance(encoder, nn.Module):
        return None
    name = getattr(encoder, "name", type(encoder).__name__)
    return repr(type(detector)(**{**parameters, "encoder": name}))
