"""A deep learning recommendation model (Naumov et al. 2019, arXiv:1906.00091) and its ONNX export."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn


class Ranker(nn.Module):
    """Click probability of items shown to users.

    Dense features pass a bottom MLP, every categorical field has an embedding table; all pairs of
    the resulting vectors are multiplied, and a top MLP reads the products and the dense vector.

    Args:
        dense_features: width of the `dense` input.
        table_sizes: the largest id of each field. Row 0 of a table answers for unknown ids.
        width: length of an embedding.
    """

    rows: Tensor
    pairs: Tensor

    def __init__(self, dense_features: int, table_sizes: list[int], width: int = 24) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size + 1, width) for size in table_sizes)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.05)
        self.bottom = _mlp([dense_features, 256, 128, width])
        vectors = len(table_sizes) + 1
        self.top = _mlp([width + vectors * (vectors - 1) // 2, 512, 320, 128, 1], last_relu=False)
        self.register_buffer("rows", torch.tensor(table_sizes) + 1, persistent=False)
        left, right = torch.tril_indices(vectors, vectors, offset=-1)
        self.register_buffer("pairs", left * vectors + right, persistent=False)
        self.vectors = vectors

    def interacting(self, dense: Tensor, ids: Tensor) -> Tensor:
        """The vectors [batch, 1 + fields, width] whose products are taken, that of `dense` first."""
        # One stray id must not fail a batch shared with other callers, so it reads the unknown row.
        ids = torch.where((ids > 0) & (ids < self.rows), ids, 0)
        tables = (table(ids[:, i]) for i, table in enumerate(self.tables))
        return torch.stack([self.bottom(dense), *tables], dim=1)

    def logits(self, dense: Tensor, ids: Tensor) -> Tensor:
        """Float32 [batch, features] and int64 [batch, fields] to log odds [batch, 1]."""
        vectors = self.interacting(dense, ids)
        products = torch.matmul(vectors, vectors.transpose(1, 2)).reshape(-1, self.vectors**2)
        return self.top(torch.cat([vectors[:, 0], products[:, self.pairs]], dim=1))

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        """The same to probabilities [batch, 1]."""
        return torch.sigmoid(self.logits(dense, ids))

    @torch.no_grad()
    def equalize(self, dense: Tensor, ids: Tensor) -> None:
        """Rescales the interacting vectors to one range, without changing any score.

        INT8 gives a tensor one scale. Trained freely, the dense vector is ten times as large as the
        embeddings multiplied beside it, which then keep three bits. A positive factor per vector
        passes through the last ReLU and is taken back in the first layer of the top MLP (cross-layer
        equalization, Nagel et al. 2019, arXiv:1906.04721). `dense` and `ids` are samples to measure on.
        """
        vectors = self.interacting(dense, ids)
        peak, typical = vectors.abs().amax((0, 2)), vectors.square().mean((0, 2)).sqrt()
        # Between one peak for all (long tails leave few steps) and one spread for all (the peak clips).
        factors = (peak * typical).rsqrt()
        left, right = torch.tril_indices(self.vectors, self.vectors, offset=-1)
        scaled = vectors * factors[:, None]
        products = torch.matmul(scaled, scaled.transpose(1, 2))[:, left, right]
        # Products grow with the square: one common factor gives them and the dense vector the same peak.
        factors = factors * scaled[:, 0].abs().max() / products.abs().max()
        for table, factor in zip(self.tables, factors[1:], strict=True):
            table.weight *= factor
        last, first = self.bottom[-2], self.top[0]
        last.weight *= factors[0]
        last.bias *= factors[0]
        width = last.out_features
        first.weight[:, :width] /= factors[0]
        first.weight[:, width:] /= factors[left] * factors[right]


def export(model: Ranker, path: Path, dense: Tensor, ids: Tensor) -> None:
    """Writes `model` as ONNX, opset 17, with `batch` free; `dense` and `ids` are an example to trace."""
    with warnings.catch_warnings():
        # Deprecated, yet the only exporter that needs no further package.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            model.cpu().float().eval(),
            (dense, ids),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["dense", "ids"],
            output_names=["score"],
            dynamic_axes={name: {0: "batch"} for name in ("dense", "ids", "score")},
        )


def _mlp(widths: list[int], last_relu: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (inside, outside) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(inside, outside))
        if last_relu or i < len(widths) - 2:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
