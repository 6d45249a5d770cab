"""The rows that a weight is multiplied with: im2col at chosen output positions, for any convolution."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from onnx import NodeProto

from vernier.builder.graphs.graph import attribute
from vernier.builder.nodes.placement import CONVOLUTIONS
from vernier.tensors import Array


def operand_rows(
    node: NodeProto, activation: Array, kernel: Sequence[int], position: int, most: int, seed: int
) -> Array | None:
    """Rows of the matrix product that `node` is, drawn at random where there are more than `most`.

    Args:
        activation: the node's other operand, samples first.
        kernel: shape of the weight as the node reads it.
        position: which input the weight is (a right operand is 1).
        most: rows per sample at most.

    Returns:
        float32 [groups, rows, columns], the columns in the order of a weight whose output channels were
        moved to the front; None for forms that are not supported.
    """
    random = np.random.default_rng(seed)
    if node.op_type in CONVOLUTIONS:
        return _patches(node, activation, kernel, most, random)
    if position != 1 or len(kernel) != 2:
        return None
    if node.op_type == "Gemm" and attribute(node, "transA", 0):
        activation = activation.T
    rows = activation.reshape(-1, activation.shape[-1])
    limit = most * (activation.shape[0] if activation.ndim > 1 else 1)
    if len(rows) > limit:
        rows = rows[np.sort(random.choice(len(rows), limit, replace=False))]
    return np.ascontiguousarray(rows[None])


def _patches(
    node: NodeProto, x: Array, kernel: Sequence[int], most: int, random: np.random.Generator
) -> Array | None:
    groups = int(attribute(node, "group", 1))
    transposed = node.op_type == "ConvTranspose"
    spatial, window = x.shape[2:], list(kernel[2:])
    strides = list(attribute(node, "strides", [1] * len(window)))
    dilations = list(attribute(node, "dilations", [1] * len(window)))
    if transposed and (groups > 1 or _text(node, "auto_pad") not in ("", "NOTSET") or _sized(node)):
        return None
    begin, sizes = _geometry(node, spatial, window, strides, dilations)
    places = prod(sizes)
    if places <= 0:
        return None
    flat = np.arange(places) if places <= most else np.sort(random.choice(places, most, replace=False))
    index = np.zeros((len(flat), 1), np.int64)
    valid = np.ones((len(flat), 1), bool)
    for axis, at in enumerate(np.unravel_index(flat, sizes)):
        offsets = np.arange(window[axis]) * dilations[axis]
        if transposed:
            reach = at[:, None] + begin[axis] - offsets[None, :]
            source, exact = reach // strides[axis], reach % strides[axis] == 0
        else:
            source = at[:, None] * strides[axis] - begin[axis] + offsets[None, :]
            exact = np.ones(source.shape, bool)
        inside = exact & (source >= 0) & (source < spatial[axis])
        source = np.clip(source, 0, spatial[axis] - 1)
        index = (index[:, :, None] * spatial[axis] + source[:, None, :]).reshape(len(flat), -1)
        valid = (valid[:, :, None] & inside[:, None, :]).reshape(len(flat), -1)
    channels = x.shape[1]
    gathered = x.reshape(len(x), channels, -1)[:, :, index] * valid
    # [samples, channels, places, window] → [groups, samples · places, channels / groups · window]
    grouped = gathered.reshape(len(x), groups, channels // groups, len(flat), -1)
    return np.ascontiguousarray(grouped.transpose(1, 0, 3, 2, 4)).reshape(groups, len(x) * len(flat), -1)


def _text(node: NodeProto, name: str) -> str:
    value = attribute(node, name, b"")
    return value.decode() if isinstance(value, bytes) else str(value)


def _sized(node: NodeProto) -> bool:
    return bool(attribute(node, "output_shape", []))


def _geometry(
    node: NodeProto, spatial: Sequence[int], window: list[int], strides: list[int], dilations: list[int]
) -> tuple[list[int], list[int]]:
    """Padding before each spatial axis, and the output's size along it."""
    count = len(window)
    pads = list(attribute(node, "pads", [0] * (2 * count)))
    reach = [(w - 1) * d + 1 for w, d in zip(window, dilations, strict=True)]
    if node.op_type == "ConvTranspose":
        extra = list(attribute(node, "output_padding", [0] * count))
        sizes = [
            strides[i] * (spatial[i] - 1) + extra[i] + reach[i] - pads[i] - pads[i + count]
            for i in range(count)
        ]
        return pads[:count], sizes
    auto = _text(node, "auto_pad")
    if auto.startswith("SAME"):
        sizes = [-(-spatial[i] // strides[i]) for i in range(count)]
        total = [max((sizes[i] - 1) * strides[i] + reach[i] - spatial[i], 0) for i in range(count)]
        return [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in total], sizes
    if auto == "VALID":
        pads = [0] * (2 * count)
    sizes = [(spatial[i] + pads[i] + pads[i + count] - reach[i]) // strides[i] + 1 for i in range(count)]
    return pads[:count], sizes
