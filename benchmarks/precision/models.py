"""The architectures: a residual CNN, a depthwise-separable CNN, a transformer encoder, an LSTM."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.precision.data import GRID, LENGTH, SHAPES, STATES, TOKENS


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _conv(inputs, outputs, 3, stride), _conv(outputs, outputs, 3)
        self.shortcut = nn.Identity() if inputs == outputs else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResidualCnn(nn.Module):
    """Pictures [batch, 3, 24, 24] to class probabilities [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 16, 3)
        widths = ((16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
        self.blocks = nn.Sequential(*(Residual(*width) for width in widths))
        self.classify = nn.Linear(64, len(SHAPES))

    def logits(self, x: Tensor) -> Tensor:
        return self.classify(self.blocks(F.relu(self.stem(x))).mean(dim=(2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).softmax(dim=1)


class Separable(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = _conv(inputs, inputs, 3, stride, inputs)
        self.pointwise = _conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.pointwise(F.relu6(self.depthwise(x))))


class SeparableDetector(nn.Module):
    """Crowds [batch, 1, 48, 48] to the probability of a ring in each of 36 cells [batch, 36]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(1, 16, 3, 2)
        widths = ((16, 24, 1), (24, 32, 2), (32, 48, 1), (48, 64, 2), (64, 64, 1), (64, 64, 1))
        self.blocks = nn.Sequential(*(Separable(*width) for width in widths))
        self.upscale = nn.ConvTranspose2d(64, 32, 2, 2)
        self.head = nn.Conv2d(32, 1, 2, 2)

    def logits(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(F.relu(self.upscale(x))).reshape(-1, GRID * GRID)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).sigmoid()


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.join = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            f(x).reshape(-1, LENGTH, self.heads, self.size).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        weights = (query @ key.transpose(2, 3) / self.size**0.5).softmax(dim=3)
        return self.join((weights @ value).transpose(1, 2).reshape(-1, LENGTH, self.heads * self.size))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.narrow(F.gelu(self.widen(self.between(x))))


class Transformer(nn.Module):
    """Tokens [batch, 32] to logits of the hidden states [batch, 32, 8]."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, width)
        self.places = nn.Parameter(torch.randn(LENGTH, width) * 0.1)
        self.layers = nn.Sequential(*(EncoderLayer(width, heads) for _ in range(layers)))
        self.last, self.classify = nn.LayerNorm(width), nn.Linear(width, STATES)

    def logits(self, x: Tensor) -> Tensor:
        return self.classify(self.last(self.layers(self.tokens(x) + self.places)))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)


class Recurrent(nn.Module):
    """Oscillations [batch, 48, 1] to the value two steps ahead [batch, 1]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.widen = nn.Linear(1, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 1))

    def logits(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(self.widen(x).relu())
        return self.head(states[:, -1])

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)
