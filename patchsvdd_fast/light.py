"""Changes of light between two views of one thing, which the encoder is to see past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

_FIELD_CELLS = 5  # of the coarse grid that uneven light is drawn on, per axis


@dataclass(frozen=True)
class Light:
    """How the two views of a crop differ in light, besides the paper's colour shift and noise.

    Standard deviations: of the brightness (in units of the patches, 1 = 255 gray levels), of the
    logarithm of the contrast, and of a brightness that varies over the crop.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    unevenness: float = 0.0

    def draw(self, channels: int, generator: Generator) -> LightChange:
        """What to change in the two views of one crop."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(2, *shape, generator=generator)

        return LightChange(
            (self.contrast * normal(1, 1, 1)).exp(),
            self.brightness * normal(1, 1, 1),
            self.unevenness * normal(channels, _FIELD_CELLS, _FIELD_CELLS),
        )


class LightChange(NamedTuple):
    """A change of light of each of V views; `apply` makes it."""

    contrast: Tensor  # [V, 1, 1, 1], a factor
    brightness: Tensor  # [V, 1, 1, 1], added
    field: Tensor  # [V, C, n, n], added, interpolated over the view

    def apply(self, views: Tensor) -> Tensor:
        """The views [V, C, H, W] in another light; the contrast changes about their mean."""
        contrast, brightness, field = (part.to(views.device) for part in self)
        middle = views.mean(dim=(2, 3), keepdim=True)
        uneven = F.interpolate(field, size=views.shape[2:], mode="bilinear", align_corners=True)
        return middle + (views - middle) * contrast + brightness + uneven
