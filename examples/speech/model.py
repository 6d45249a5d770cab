"""The keyword spotter: a depthwise-separable temporal CNN with attention pooling.

Every operator has a native TensorRT layer. Convolutions are two-dimensional over [channels, 1, frames],
since TensorRT wraps one-dimensional ones in reshapes, which come between a Q/DQ pair and its convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.speech.features import BANDS

CHANNELS = 128
DILATIONS = (1, 1, 2, 2, 4, 4)
KERNEL = 7
DROPOUT = 0.1
_NEVER = 1.0e4  # a score this low gets no attention, and it is still far from FP16's largest number


class Block(nn.Module):
    """Depthwise over time, pointwise over channels, and the input added back."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        padding = (KERNEL - 1) // 2 * dilation
        self.depthwise = nn.Conv2d(
            channels,
            channels,
            (1, KERNEL),
            padding=(0, padding),
            dilation=(1, dilation),
            groups=channels,
            bias=False,
        )
        self.depthwise_norm = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = torch.relu(self.depthwise_norm(self.depthwise(x)))
        y = self.pointwise_norm(self.pointwise(y))
        # What a convolution sees beyond the end must be the zeros it sees in an unpadded clip.
        return torch.relu(x + y) * mask


class KeywordSpotter(nn.Module):
    """Log-mel features [batch, frames, 40] and their lengths [batch] to logits [batch, classes].

    Frames at and after `lengths` have no influence on the result.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(BANDS, CHANNELS, (1, 5), padding=(0, 2), bias=False)
        self.stem_norm = nn.BatchNorm2d(CHANNELS)
        self.blocks = nn.ModuleList(Block(CHANNELS, dilation) for dilation in DILATIONS)
        self.attention = nn.Conv2d(CHANNELS, 1, 1)
        self.dropout = nn.Dropout(DROPOUT)
        self.classify = nn.Linear(CHANNELS, classes)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        positions = torch.arange(features.shape[1], dtype=torch.int64, device=features.device)
        valid = positions.unsqueeze(0) < lengths.unsqueeze(1)
        mask = valid.to(features.dtype).unsqueeze(1).unsqueeze(1)  # [batch, 1, 1, frames]
        x = features.transpose(1, 2).unsqueeze(2) * mask
        x = torch.relu(self.stem_norm(self.stem(x))) * mask
        for block in self.blocks:
            x = block(x, mask)
        scores = self.attention(x) * mask + (mask - 1.0) * _NEVER
        pooled = (x * torch.softmax(scores, dim=3)).sum(dim=(2, 3))
        return self.classify(self.dropout(pooled))


class WithProbabilities(nn.Module):
    """The exported form: softmax in the graph."""

    def __init__(self, spotter: KeywordSpotter) -> None:
        super().__init__()
        self.spotter = spotter

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        return torch.softmax(self.spotter(features, lengths), dim=1)
