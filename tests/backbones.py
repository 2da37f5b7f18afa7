"""Small backbones with the interface of timm's `features_only=True`."""

from itertools import pairwise

import torch
from torch import nn


class Plain(nn.Module):
    """Maps of strides 4, 8 and 16, padded symmetrically, with 6, 8 and 10 channels."""

    def __init__(self, seed=0, channels=(6, 8, 10)):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [3, 6, *channels]
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(sizes)
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, images):
        maps, values = [], images
        for layer in self.layers:
            values = torch.relu(layer(values))
            maps.append(values)
        return maps[1:]


class PadsBySize(Plain):
    """Pads as TensorFlow's "same": by the size, so that odd sizes move the cells."""

    def forward(self, images):
        maps, values = [], images
        for layer in self.layers:
            pads = []
            for size in (values.shape[3], values.shape[2]):
                total = max(0, (-(-size // 2) - 1) * 2 + 3 - size)
                pads += [total // 2, total - total // 2]
            padded = nn.functional.pad(values, pads)
            values = torch.relu(nn.functional.conv2d(padded, layer.weight, layer.bias, stride=2))
            maps.append(values)
        return maps[1:]


class SeesAll(Plain):
    """Scales all maps by a mean over the whole image, as squeeze-and-excitation does."""

    def forward(self, images):
        return [
            values * values.mean(dim=(2, 3), keepdim=True) for values in super().forward(images)
        ]
