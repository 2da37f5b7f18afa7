"""What a detector needs of an encoder: the base class of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .levels import PatchLevel


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights lie; the CPU if it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


class PatchEncoder(nn.Module):
    """Embeds the patches of images. An encoder of your own is a subclass with a `dense`.

    An embedding must depend only on the pixels of its patch and of at most `surroundings` pixels
    around it; then large images can be encoded in tiles.
    """

    name: str = "own"
    """What it is called in files and on the command line."""
    default_levels: tuple[PatchLevel, ...] = ()
    """The levels that a detector scores at if it is given none."""
    pixel_mean: tuple[float, float, float] | None = None
    """Subtracted from each channel, in pixel values; None: the mean of the training images is,
    see the parameter `mean` of `PatchSVDD`."""
    pixel_scale: tuple[float, float, float] = (255.0, 255.0, 255.0)
    """What each channel is divided by after that, in pixel values."""
    surroundings: int | None = 0
    """Pixels around a patch, on each side, that may influence its embedding; None: any number.
    Such an encoder always gets whole images, however large they are. Unless it is 0, maps are
    interpolated, and corrected near the image's border, see `score.maps.MapRule`."""
    tile_step: int = 1
    """Where tiles may begin: at multiples of so many pixels."""
    scratch_bytes: int = 512
    """Memory that encoding takes for each pixel of what is encoded at once."""

    @property
    def embedding_dim(self) -> int:
        """D, the length of an embedding, at all levels."""
        raise NotImplementedError

    def check_levels(self, levels: Sequence[PatchLevel]) -> None:
        """Raise ValueError for levels that `dense` cannot embed."""

    def dense(self, images: Tensor, levels: Sequence[PatchLevel]) -> list[Tensor]:
        """Embed every patch of each level's grid: one [N, I, J, D] float32 per level.

        images: [N, 3, H, W] float32, (pixel - mean) / `pixel_scale`.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What a model file says of this encoder beside its weights, as values for JSON."""
        return {}
