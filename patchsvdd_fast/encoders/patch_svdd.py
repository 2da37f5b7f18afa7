"""The hierarchical patch encoder of Patch SVDD, patch by patch and densely over whole images.

A patch of 32 pixels goes through eight unpadded convolutions, the small encoder. A patch of 64 is
cut into four quadrants; the small encoder embeds each, and a 2x2 convolution joins the four.
Patches of 128 and 256 go on in the same way. Since no layer pads or normalises, one pass over a
whole image yields the embedding of every patch on a grid of stride 2 or a multiple of it: its dense
map, the same numbers at a fraction of the work.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .levels import DEFAULT_LEVELS, PatchLevel
from .patch_encoder import PatchEncoder

SMALL_PATCH = 32
"""Side of a patch that the small encoder embeds, in pixels."""

TRUNK_STRIDE = 2
"""Pixels between neighbouring embeddings of the small encoder's dense map."""

LEAKY_SLOPE = 0.1
_SMALL_CHANNELS = (3, 32, 64, 128, 128, 64, 32, 32)
_HEAD_CHANNELS = 128
_LEAST_PATCHES = 64  # joined at once; a CPU sums fewer than 16 in another order
_QUADRANTS_IN_CACHE = 256  # of 32 pixels; 128 is as fast, 64 and 1,280 are a tenth slower
_PATCHES_PER_PASS = 4096  # bounds the memory of embedding many patches at once without gradients

INITIALIZATIONS = ("default", "kaiming")
"""How weights may begin, see `HierarchicalEncoder`."""

# The convolution that PyTorch's own compiler calls on a CPU. It is not public; without it the
# encoder is slower.
_convolution_in_onednn = (
    getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    if torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
    else None
)


class SmallEncoder(nn.Sequential):
    """Eight 3x3 convolutions, the first of stride 2, that embed a patch of 32x32 pixels.

    Maps [B, 3, 32, 32] to [B, D, 1, 1], and a larger image to its dense map at stride 2. The
    receptive field is 31 pixels: the last row and column of a patch have no influence.
    """

    memory_format = torch.contiguous_format
    """Memory layout of the activations; affects the speed, and the results only by rounding."""

    def __init__(self, embedding_dim: int) -> None:
        channels = (*_SMALL_CHANNELS, embedding_dim)
        layers: list[nn.Module] = []
        for index, (c_in, c_out) in enumerate(pairwise(channels)):
            if index:
                layers.append(nn.LeakyReLU(LEAKY_SLOPE, inplace=True))
            layers.append(nn.Conv2d(c_in, c_out, kernel_size=3, stride=2 if index == 0 else 1))
        layers.append(nn.Tanh())
        super().__init__(*layers)

    def forward(self, images: Tensor, step: int = 1) -> Tensor:
        """[B, 3, H, W] -> [B, D, h, w]: the dense map, of which every `step`-th cell is kept.

        The last convolution does not compute the other cells; with oneDNN the cells that are kept
        have the same bits at every `step`.
        """
        if self._stays_in_onednn(images):
            return self._forward_in_onednn(images, step)
        values = images.contiguous(memory_format=self.memory_format)
        *layers, before_last, activation, _, _ = self
        last = self.convolutions()[-1]
        for layer in layers:
            values = layer(values)
        # The last two convolutions, and the heads, are never rounded to bfloat16: neighbours differ
        # so little that they could not be told apart.
        with torch.autocast(values.device.type, enabled=False):
            values = activation(before_last(values.to(last.weight.dtype)))
            return torch.tanh(F.conv2d(values, last.weight, last.bias, stride=step))

    def _stays_in_onednn(self, images: Tensor) -> bool:
        return (
            _convolution_in_onednn is not None
            and bool(torch.backends.mkldnn.enabled)
            and self.memory_format is torch.contiguous_format
            and images.device.type == "cpu"
            and images.dtype == self.convolutions()[0].weight.dtype == torch.float32
            and images.ndim == 4
            and images.numel() > 0
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        )

    def _forward_in_onednn(self, images: Tensor, step: int) -> Tensor:
        """As `forward`, with the same bits, but activations stay in oneDNN's layout between layers.

        This saves an eighth of the time: PyTorch converts each layer's input and output.
        """
        values = images.contiguous().to_mkldnn()
        *layers, last = self.convolutions()
        for layer in layers:
            values = _in_onednn(values, layer, layer.stride, "leaky_relu", [LEAKY_SLOPE])
        return torch.tanh(_in_onednn(values, last, (step, step), "none", []).to_dense())

    def convolutions(self) -> list[nn.Conv2d]:
        """The eight convolutions in order."""
        return [layer for layer in self if isinstance(layer, nn.Conv2d)]


class QuadrantHead(nn.Module):
    """Joins the embeddings of a patch's four quadrants, [B, D, 2, 2], into one, [B, D, 1, 1]."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.join = nn.Conv2d(embedding_dim, _HEAD_CHANNELS, kernel_size=2)
        self.activation = nn.LeakyReLU(LEAKY_SLOPE)
        self.project = nn.Conv2d(_HEAD_CHANNELS, embedding_dim, kernel_size=1)

    def forward(self, quadrants: Tensor) -> Tensor:
        """[B, D, 2, 2] -> [B, D, 1, 1]."""
        count = len(quadrants)
        if not torch.is_grad_enabled() and 0 < count < _LEAST_PATCHES:
            quadrants = torch.cat([quadrants, quadrants[:1].expand(_LEAST_PATCHES, -1, -1, -1)])
        with torch.autocast(quadrants.device.type, enabled=False):
            joined: Tensor = torch.tanh(self.project(self.activation(self.join(quadrants))))
        return joined[:count]


class HierarchicalEncoder(PatchEncoder):
    """Embeds patches of 32, 64, ... 32 * 2^(num_levels-1) pixels (Yi & Yoon, 2020, section 3.3).

    Input pixels are float32, normalised as `(pixel - mean) / 255`. Embeddings lie in (-1, 1)^D.

    embedding_dim: D, the length of an embedding.
    num_levels: number of patch sizes.
    initialization: "default" is PyTorch's own, as in the paper's implementation; "kaiming" keeps
        the variance from layer to layer, so that training learns positions from the start.

    Raises ValueError for a value out of range.
    """

    name = "patch-svdd"
    default_levels = DEFAULT_LEVELS

    def __init__(
        self,
        embedding_dim: int = 64,
        num_levels: int = 2,
        initialization: str = "default",
    ) -> None:
        super().__init__()
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1, got {embedding_dim}")
        if num_levels < 1:
            raise ValueError(f"num_levels must be at least 1, got {num_levels}")
        if initialization not in INITIALIZATIONS:
            raise ValueError(
                f"initialization must be one of {INITIALIZATIONS}, got {initialization!r}"
            )
        self._dim = embedding_dim
        self.small = SmallEncoder(embedding_dim)
        self.heads = nn.ModuleList(QuadrantHead(embedding_dim) for _ in range(num_levels - 1))
        if initialization != "default":
            self._initialize_variance_preserving()

    @property
    def embedding_dim(self) -> int:
        """D, the length of an embedding."""
        return self._dim

    @property
    def patch_sizes(self) -> tuple[int, ...]:
        """The patch sizes this encoder embeds, in pixels, smallest first."""
        return tuple(SMALL_PATCH << depth for depth in range(len(self.heads) + 1))

    def forward(self, patches: Tensor) -> Tensor:
        """Embed patches [B, 3, K, K] (float32, normalised) as [B, D]; K picks the level."""
        (embedded,) = self.forward_sizes([patches])
        return embedded

    def forward_sizes(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """As `forward`, for batches of several sizes that go through the small encoder together.

        On a GPU in one pass; on a CPU 256 quadrants at a time, so activations fit its cache.
        """
        depths, quadrants = [], []
        for patches in batches:
            if patches.ndim != 4 or patches.shape[1] != 3 or patches.shape[2] != patches.shape[3]:
                raise ValueError(f"patches must have shape [B, 3, K, K], got {list(patches.shape)}")
            depths.append(self._depth(patches.shape[-1]))
            quadrants.append(_quartered(patches, depths[-1]))
        together = torch.cat(quadrants)
        at_once = _QUADRANTS_IN_CACHE if together.device.type == "cpu" else max(1, len(together))
        embedded = torch.cat([self.small(part) for part in together.split(at_once)]).split(
            [len(part) for part in quadrants]
        )
        return [
            self._joined(part, depth).flatten(1)
            for part, depth in zip(embedded, depths, strict=True)
        ]

    @torch.no_grad()
    def embed(self, patches: Tensor) -> Tensor:
        """As `forward`, without gradients, and in parts that bound the memory it takes."""
        if patches.shape[0] == 0:
            self._depth(patches.shape[-1])
            return patches.new_empty(0, self.embedding_dim)
        return torch.cat([self(chunk) for chunk in patches.split(_PATCHES_PER_PASS)])

    def dense(self, images: Tensor, levels: Sequence[PatchLevel] = DEFAULT_LEVELS) -> list[Tensor]:
        """Embed every patch of each level's grid in one pass over the images.

        images: [N, 3, H, W] float32, normalised as `(pixel - mean) / 255`.
        levels: patch sizes among `patch_sizes`, with even strides.

        Returns one [N, I, J, D] float32 per level, equal to encoding each patch by itself. Raises
        ValueError for other sizes, odd strides, and images smaller than a patch.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape [N, 3, H, W], got {list(images.shape)}")
        height, width = images.shape[-2:]
        for level in levels:
            self._depth(level.size)
            level.grid_shape(height, width)
            if level.stride % TRUNK_STRIDE:
                raise ValueError(f"dense encoding needs an even stride, got {level}")
        finest = PatchLevel(SMALL_PATCH, math.gcd(*(level.stride for level in levels), SMALL_PATCH))
        maps = {finest: self.small(images, finest.stride // TRUNK_STRIDE)}
        dense = []
        for level in levels:
            rows, columns = level.grid_shape(height, width)
            embeddings = self._dense_map(level, maps)[:, :, :rows, :columns]
            dense.append(embeddings.permute(0, 2, 3, 1).contiguous())  # [N, I, J, D]
        return dense

    def _dense_map(self, level: PatchLevel, maps: dict[PatchLevel, Tensor]) -> Tensor:
        """The level's embeddings [N, D, >=I, >=J], joined from the map of half its patch size.

        maps: those made so far, first the finest of the small encoder; new ones are added.
        """
        if level not in maps:
            if level.size == SMALL_PATCH:
                finest = next(iter(maps))
                step = level.stride // finest.stride
                maps[level] = maps[finest][:, :, ::step, ::step]
            else:
                # Quadrants are half a patch apart, patches a stride. The coarsest grid that holds
                # all quadrants has the greatest common divisor of the two as its stride.
                half = level.size // 2
                below = PatchLevel(half, math.gcd(half, level.stride))
                quadrants = _quadrants_of_patches(
                    self._dense_map(below, maps),
                    step=level.stride // below.stride,
                    distance=half // below.stride,
                )  # [N, I, J, D, 2, 2]
                # Joined as a batch of patches, so that the convolution library sums in the same
                # order as for single patches: trained embeddings may lie as close as 1e-6.
                joined = self.head(level.size)(quadrants.flatten(0, 2))
                maps[level] = joined.view(quadrants.shape[:4]).permute(0, 3, 1, 2)
        return maps[level]

    def _joined(self, embedded: Tensor, depth: int) -> Tensor:
        """Join [4^depth B, D, 1, 1], in the order of `_quartered`, to [B, D, 1, 1]."""
        for head in self.heads[:depth]:
            quadrants = embedded.reshape(-1, 2, 2, self.embedding_dim).permute(0, 3, 1, 2)
            embedded = head(quadrants.contiguous())  # the layout that `_dense_map` passes
        return embedded

    def head(self, size: int) -> nn.Module:
        """The head that joins the quadrants of patches of `size`: [B, D, 2, 2] -> [B, D, 1, 1]."""
        return self.heads[self._depth(size) - 1]

    def _depth(self, size: int) -> int:
        if size not in self.patch_sizes:
            raise ValueError(f"patch size must be one of {self.patch_sizes}, got {size}")
        return self.patch_sizes.index(size)

    def _initialize_variance_preserving(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE, nonlinearity="leaky_relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)


def _in_onednn(
    values: Tensor, layer: nn.Conv2d, stride: tuple[int, ...], activation: str, scalars: list[float]
) -> Tensor:
    """A convolution and its activation, from and to tensors in oneDNN's layout."""
    assert _convolution_in_onednn is not None
    weight, bias, no_padding, groups = layer.weight, layer.bias, [0, 0], 1
    found: Tensor = _convolution_in_onednn(
        values, weight, bias, no_padding, stride, [1, 1], groups, activation, scalars, ""
    )
    return found


def _quartered(patches: Tensor, times: int) -> Tensor:
    """Cut in quarters: [B, 3, K, K] -> [4^times B, 3, K / 2^times, K / 2^times], row by row."""
    for _ in range(times):
        batch, channels, size, _ = patches.shape
        half = size // 2
        patches = patches.reshape(batch, channels, 2, half, 2, half)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, half, half)
    return patches


def _quadrants_of_patches(below: Tensor, step: int, distance: int) -> Tensor:
    """Gather the 2x2 quadrants of each patch from the dense map of the level below.

    below: [N, D, H, W]. step, distance: between patches, and between the quadrants of a patch, in
    cells of that map. Returns [N, I, J, D, 2, 2].
    """
    windows = below.unfold(2, distance + 1, step).unfold(3, distance + 1, step)
    corners = windows[..., ::distance, ::distance]  # [N, D, I, J, 2, 2]
    return corners.permute(0, 2, 3, 1, 4, 5).contiguous()


def load_official_checkpoint(path: str | Path) -> HierarchicalEncoder:
    """Load an encoder published with the paper's implementation (a PyTorch state dict).

    Only tensors are read from the file (`weights_only=True`): nothing in it is executed. Raises
    ValueError if the file is not such a state dict, OSError if it cannot be read.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises many kinds of errors for other files
        raise ValueError(f"{path} is not a PyTorch checkpoint of tensors alone") from error
    if not isinstance(state, Mapping) or "enc.conv8.weight" not in state:
        raise ValueError(f"{path} holds no Patch SVDD encoder in the official layout")
    encoder = HierarchicalEncoder(embedding_dim=state["enc.conv8.weight"].shape[0])
    encoder.load_state_dict(from_official_names(state, encoder))
    return encoder.eval()


def from_official_names(
    state: Mapping[str, Tensor], encoder: HierarchicalEncoder
) -> dict[str, Tensor]:
    """Rename a state dict of the official 64-pixel encoder to the names `encoder` uses."""
    head = encoder.heads[0]
    layers = {f"enc.conv{i}": conv for i, conv in enumerate(encoder.small.convolutions(), start=1)}
    layers |= {"conv1": head.join, "conv2": head.project}  # type: ignore[dict-item]
    ours = {module: name for name, module in encoder.named_modules()}
    renamed = {}
    for official, layer in layers.items():
        for kind in ("weight", "bias"):
            if f"{official}.{kind}" not in state:
                raise ValueError(f"the checkpoint lacks {official}.{kind}")
            renamed[f"{ours[layer]}.{kind}"] = state[f"{official}.{kind}"]
    return renamed
