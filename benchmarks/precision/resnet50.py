"""A network of ResNet-50's exact size (He et al. 2015) with random weights, for timing alone.

Residual branches start near zero and activations are normalized, so that ranges look like those of a
trained network; what it answers means nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
EXPANSION = 4


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * EXPANSION
        self.reduce = _conv(inputs, width, 1)
        self.spread = _conv(width, width, 3, stride)
        self.expand = _conv(width, outputs, 1)
        nn.init.constant_(self.expand[1].weight, 0.2)
        self.shortcut = (
            _conv(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.spread(torch.relu(self.reduce(x))))
        return torch.relu(self.expand(y) + self.shortcut(x))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class ResNet50(nn.Module):
    """Images [batch, 3, 224, 224] to logits [batch, classes]."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = _conv(3, 64, 7, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks: list[nn.Module] = []
        width_in = 64
        for width, depth, stride in STAGES:
            for index in range(depth):
                blocks.append(Bottleneck(width_in, width, stride if index == 0 else 1))
                width_in = width * EXPANSION
        self.blocks = nn.Sequential(*blocks)
        self.classify = nn.Linear(width_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(torch.relu(self.stem(x))))
        return self.classify(x.mean(dim=(2, 3)))
