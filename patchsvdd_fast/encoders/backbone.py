"""Patch embeddings from a frozen backbone: any module that turns images into feature maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .levels import PatchLevel
from .patch_encoder import PatchEncoder, device_of
from .precision import computing_in

GRID = 8
"""Pixels from one cell of the joined maps to the next."""

PROJECTIONS = ("none", "axes", "whiten")
"""What is made of the joined maps, see `BackboneEncoder`."""

_PROBE = 128  # side of the image on which the backbone's maps are counted
_ROWS_AT_ONCE = 16_384  # in float64, when a projection is fitted
_LONG_PROBE = (64, 4096)  # of that on which it is measured how far a cell sees


class BackboneEncoder(PatchEncoder):
    """The feature maps of a frozen backbone, joined, and averaged over each patch.

    backbone: maps [B, 3, H, W] float32 to a list of feature maps [B, C, h, w]: the interface of
        timm's `create_model(name, features_only=True)`. Cells of a map are H / h pixels apart, a
        power of two. It is put into evaluation mode, and its parameters get no gradients.
    name: what the encoder is called in files.
    maps: which of the maps to use, by number; None: all.
    pixel_mean, pixel_scale: images are normalised as (pixel - mean) / scale per channel, in pixel
        values of 0 to 255.
    projection: what is made of the joined maps:

        - "none": they are the embeddings.
        - "axes": their first `dim` principal axes.
        - "whiten": the same, each divided by its standard deviation, but for `shrinkage`.

        Axes are those of the training images; `PatchSVDD.fit` calls `fit_projection`.
    dim: D, for a projection; None: as many as there are channels.
    shrinkage: of "whiten": share of the largest variance that is added to each. At 0 all axes
        become equally long; the larger it is, the more of their lengths they keep.

    A level's patches have sides and strides of a multiple of 8 pixels. What surrounds a patch has a
    part in its embedding, too. Raises ValueError or TypeError for a backbone that does not fit.
    """

    default_levels = (PatchLevel(size=24, stride=GRID),)

    def __init__(
        self,
        backbone: nn.Module,
        *,
        name: str = "own",
        maps: Sequence[int] | None = None,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_scale: Sequence[float] = (58.395, 57.12, 57.375),
        projection: str = "none",
        dim: int | None = None,
        shrinkage: float = 0.01,
    ) -> None:
        super().__init__()
        if projection not in PROJECTIONS:
            raise ValueError(f"projection must be one of {PROJECTIONS}, got {projection!r}")
        if not shrinkage >= 0:
            raise ValueError(f"shrinkage must not be negative, got {shrinkage}")
        self.backbone = backbone.eval().requires_grad_(False)
        self.name, self.maps = name, None if maps is None else tuple(maps)
        self.pixel_mean = _per_channel("pixel_mean", pixel_mean)
        self.pixel_scale = _per_channel("pixel_scale", pixel_scale)
        self.projection, self.shrinkage = projection, shrinkage
        self._strides, channels = self._measure_maps()
        self._channels = sum(channels)
        self.tile_step = max(GRID, *self._strides)
        self.surroundings = self._measure_surroundings()
        self._dim = self._channels if dim is None or projection == "none" else dim
        if not 1 <= self._dim <= self._channels:
            raise ValueError(f"dim must be in 1 to {self._channels}, the channels, got {dim}")
        # [C, D]; zeros until it is fitted, and empty without a projection.
        shape = (0, 0) if projection == "none" else (self._channels, self._dim)
        self.axes: Tensor
        self.register_buffer("axes", torch.zeros(shape))

    @property
    def embedding_dim(self) -> int:
        """D, the length of an embedding; before `fit_projection` the number of channels, C."""
        return self._channels if self.needs_fit else self._dim

    @property
    def needs_fit(self) -> bool:
        """Whether there is a projection that was not fitted yet."""
        return self.projection != "none" and not bool(self.axes.any())

    def settings(self) -> dict[str, Any]:
        """The arguments it was made with, but for the backbone and the name."""
        return {
            "maps": self.maps,
            "pixel_mean": self.pixel_mean,
            "pixel_scale": self.pixel_scale,
            "projection": self.projection,
            "dim": self._dim,
            "shrinkage": self.shrinkage,
        }

    def check_levels(self, levels: Sequence[PatchLevel]) -> None:
        """Raise ValueError for sides or strides that are no multiple of 8 pixels."""
        for level in levels:
            if level.size % GRID or level.stride % GRID:
                raise ValueError(
                    f"patches of a backbone have sides and strides of a multiple of {GRID} "
                    f"pixels, got {level.size} and {level.stride}"
                )

    @torch.no_grad()
    def dense(self, images: Tensor, levels: Sequence[PatchLevel] | None = None) -> list[Tensor]:
        """Embed every patch of each level's grid: one [N, I, J, D] float32 per level.

        images: [N, 3, H, W] float32, (pixel - `pixel_mean`) / `pixel_scale`.
        levels: None: `default_levels`.

        Raises ValueError for other levels than `check_levels` allows, and for images smaller than a
        patch. Before `fit_projection`, embeddings are the joined maps, D = C.
        """
        levels = self.default_levels if levels is None else levels
        self.check_levels(levels)
        shapes = [level.grid_shape(*images.shape[-2:]) for level in levels]
        joined = self._joined(images)
        dense = []
        for level, (rows, columns) in zip(levels, shapes, strict=True):
            cells, step = level.size // GRID, level.stride // GRID
            means = F.avg_pool2d(joined, cells, stride=step)[:, :, :rows, :columns]
            embeddings = means.permute(0, 2, 3, 1).contiguous()  # [N, I, J, C]
            if self.projection != "none" and not self.needs_fit:
                with computing_in("float32", embeddings.device):
                    embeddings = embeddings @ self.axes.to(embeddings)
            dense.append(embeddings)
        return dense

    def fit_projection(self, embeddings: Tensor) -> None:
        """Fit the projection to the joined maps of good images.

        embeddings: [M, C] float32, what `dense` gives before. Raises ValueError if it was fitted.
        """
        if not self.needs_fit:
            raise ValueError("the encoder has no projection, or it was fitted before")
        mean = embeddings.mean(dim=0, dtype=torch.float64)
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
        for some in embeddings.split(_ROWS_AT_ONCE):
            values = some.double() - mean
            covariance += values.T @ values / len(embeddings)
        variances, vectors = torch.linalg.eigh(covariance)  # ascending
        variances = variances.flip(0)[: self._dim].clamp(min=0)
        axes = vectors.flip(1)[:, : self._dim]
        if self.projection == "whiten":
            # At least a rounding error's worth, so that no constant channel becomes noise.
            added = max(self.shrinkage, 1e-9) * variances[0].clamp(min=1e-30)
            axes = axes * ((variances[0] + added) / (variances + added)).sqrt()
        self.axes.copy_(axes)

    # --- inside -----------------------------------------------------------------------------------

    def _joined(self, images: Tensor) -> Tensor:
        """The maps on one grid of 8 pixels: [N, 3, H, W] -> [N, C, H // 8, W // 8]."""
        height, width = images.shape[-2] // GRID, images.shape[-1] // GRID
        parts = []
        for values, stride in zip(self._feature_maps(images), self._strides, strict=True):
            part = values
            if stride < GRID:
                part = F.avg_pool2d(values, GRID // stride)
            elif stride > GRID:
                factor = stride // GRID
                part = F.interpolate(values, scale_factor=factor, mode="bilinear")
            if part.shape[2] < height or part.shape[3] < width:
                raise ValueError(
                    f"the backbone's map of stride {stride} has {values.shape[2]}x{values.shape[3]}"
                    f" cells, too few for an image of {images.shape[2]}x{images.shape[3]} pixels"
                )
            parts.append(part[:, :, :height, :width].to(images.dtype))
        return torch.cat(parts, dim=1)

    def _feature_maps(self, images: Tensor) -> list[Tensor]:
        try:
            found = self.backbone(images.contiguous(memory_format=torch.channels_last))
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:
            height, width = images.shape[-2:]
            raise ValueError(
                f"the backbone of {self.name} fails on an image of {width}x{height} pixels; "
                f"backbones take float32 images of any size of {_PROBE} pixels and more: {error}"
            ) from error
        if isinstance(found, Tensor) or not isinstance(found, Sequence):
            raise TypeError(
                "a backbone must return a list of feature maps, got "
                f"{type(found).__name__}: in timm, create_model(name, features_only=True)"
            )
        numbers = range(len(found)) if self.maps is None else self.maps
        for number in numbers:
            if not 0 <= number < len(found):
                raise ValueError(f"the backbone has maps 0 to {len(found) - 1}, not {number}")
            if not isinstance(found[number], Tensor) or found[number].ndim != 4:
                raise TypeError(f"map {number} of the backbone must be a tensor [B, C, h, w]")
        return [found[number] for number in numbers]

    @torch.no_grad()
    def _measure_maps(self) -> tuple[list[int], list[int]]:
        """Stride in pixels and number of channels of each map in use."""
        device = device_of(self.backbone)
        found = self._feature_maps(torch.zeros(1, 3, _PROBE, _PROBE, device=device))
        if not found:
            raise ValueError("maps must name at least one map")
        strides = []
        for values in found:
            stride = _PROBE // values.shape[2]
            if values.shape[2:] != (_PROBE // stride,) * 2 or stride & (stride - 1):
                raise ValueError(
                    f"an image of {_PROBE}x{_PROBE} pixels must give maps whose strides are "
                    f"powers of two, got one of {values.shape[2]}x{values.shape[3]} cells"
                )
            strides.append(stride)
        return strides, [values.shape[1] for values in found]

    @torch.no_grad()
    def _measure_surroundings(self) -> int | None:
        """How many pixels around a cell may influence it, at most; None: all of the image's.

        NaN spreads to all that depends on it: pixels that are NaN in one half of a long image show
        how far into the other half cells see it.
        """
        device = device_of(self.backbone)
        low, length = _LONG_PROBE
        reach = 0
        for shape in ((low, length), (length, low)):
            for first_half in (True, False):
                image = torch.zeros(1, 3, *shape, device=device)
                along = image if shape[1] == length else image.transpose(2, 3)
                half = along[..., : length // 2] if first_half else along[..., length // 2 :]
                half.fill_(math.nan)
                joined = self._joined(image)[0].isnan().any(dim=0)
                seen = joined.any(dim=0 if shape[1] == length else 1)  # [length / 8]
                if bool(seen.all()):
                    return None
                half_cells = length // 2 // GRID
                outside = seen[half_cells:] if first_half else seen[:half_cells]
                reach = max(reach, int(outside.sum()) * GRID)
        # Other places relative to the coarsest map's cells may see up to a cell more.
        step = self.tile_step
        around = -(-reach // step) * step + step
        return around if self._cells_stay(around, device) else None

    def _cells_stay(self, around: int, device: torch.device) -> bool:
        """Whether a tile's cells, `around` pixels from its end, are those of the whole image.

        They are not where a network pads by the image's size, as TensorFlow's "same" padding does:
        that moves the cells of an image with an odd side.
        """
        side = around + 2 * self.tile_step
        shape = (1, 3, side + self.tile_step // 2 + 1, side + self.tile_step // 2 + 1)
        image = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
        kept = (side - around) // GRID
        whole = self._joined(image)[..., :kept, :kept]
        tile = self._joined(image[..., :side, :side])[..., :kept, :kept]
        return torch.allclose(whole, tile, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


def _per_channel(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3:
        raise ValueError(f"{name} must have a value for each of 3 channels, got {len(numbers)}")
    return numbers[0], numbers[1], numbers[2]
