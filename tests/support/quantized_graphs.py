"""Small graphs for the tests of quantization, and a second, independent way to run them quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tests.unit.builder.models import run
from vernier.builder.graphs.graph import GraphView
from vernier.builder.graphs.prepare import clean
from vernier.builder.graphs.simplify import infer_shapes
from vernier.builder.lowering.lower import Recipe
from vernier.builder.lowering.quantized import QuantizedWeight, round_scale
from vernier.builder.nodes.placement import (
    QuantizableNode,
    quantizable_nodes,
    shortcut,
    weight_axis,
    weight_position,
)
from vernier.builder.quantizing.weights import quantize_weights

Draw = Callable[[Sequence[str]], str]


class Grower:
    """Grows a graph from an image input by drawing operators; every value has a known shape."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.value = "x"
        self.shape = (2, 4, 6, 6)
        self.older: list[tuple[str, tuple[int, ...]]] = []

    def constant(self, *shape: int) -> str:
        name = f"k{len(self.constants)}"
        fan_in = max(1, int(np.prod(shape[1:])))
        values = self.random.standard_normal(shape) / np.sqrt(fan_in)
        self.constants[name] = values.astype(np.float32)
        return name

    def add(self, op: str, inputs: Sequence[str], shape: Sequence[int], **attributes: object) -> None:
        self.older.append((self.value, self.shape))
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=f"n{len(self.nodes)}", **attributes))
        self.value, self.shape = out, tuple(shape)

    def choices(self) -> list[str]:
        always = ["relu", "tanh", "scale", "residual", "concat", "softmax"]
        if len(self.shape) == 4:
            return [*always, "conv", "depthwise", "grouped", "deconv", "deconv_grouped", "pool", "flatten"]
        return [*always, "norm", "matmul", "gemm", "gemm_t", "gemm_left", "attention", "shared", "transposed"]

    def grow(self, kind: str) -> None:
        getattr(self, f"_{kind}")()

    # --- anywhere
    def _relu(self) -> None:
        self.add("Relu", [self.value], self.shape)

    def _tanh(self) -> None:
        self.add("Tanh", [self.value], self.shape)

    def _scale(self) -> None:
        self.add("Mul", [self.value, self.constant(1)], self.shape)

    def _softmax(self) -> None:
        self.add("Softmax", [self.value], self.shape, axis=1)

    def _residual(self) -> None:
        same = [name for name, shape in self.older if shape == self.shape]
        self.add("Add", [self.value, same[-1] if same else self.value], self.shape)

    def _concat(self) -> None:
        shape = (self.shape[0], 2 * self.shape[1], *self.shape[2:])
        if shape[1] <= 16:
            self.add("Concat", [self.value, self.value], shape, axis=1)

    # --- images
    def _conv(self) -> None:
        n, c, h, w = self.shape
        out = int(self.random.integers(1, 9))
        inputs = [self.value, self.constant(out, c, 3, 3)]
        if self.random.random() < 0.5:
            inputs.append(self.constant(out))
        self.add("Conv", inputs, (n, out, h, w), pads=[1] * 4)

    def _depthwise(self) -> None:
        c = self.shape[1]
        self.add("Conv", [self.value, self.constant(c, 1, 3, 3)], self.shape, pads=[1] * 4, group=c)

    def _grouped(self) -> None:
        n, c, h, w = self.shape
        if c % 2 == 0:
            self.add("Conv", [self.value, self.constant(4, c // 2, 1, 1)], (n, 4, h, w), group=2)

    def _deconv(self) -> None:
        n, c, h, w = self.shape
        if h <= 6:
            weight = self.constant(c, 3, 2, 2)
            self.add("ConvTranspose", [self.value, weight], (n, 3, 2 * h, 2 * w), strides=[2, 2])

    def _deconv_grouped(self) -> None:
        n, c, h, w = self.shape
        if c % 2 == 0:
            weight = self.constant(c, 2, 1, 1)
            self.add("ConvTranspose", [self.value, weight], (n, 4, h, w), group=2)

    def _pool(self) -> None:
        n, c, h, w = self.shape
        if h >= 2:
            self.add("MaxPool", [self.value], (n, c, h // 2, w // 2), kernel_shape=[2, 2], strides=[2, 2])

    def _flatten(self) -> None:
        n, c = self.shape[:2]
        self.add("GlobalAveragePool", [self.value], (n, c, 1, 1))
        self.add("Flatten", [self.value], (n, c))

    # --- matrices
    def _norm(self) -> None:
        width = self.shape[1]
        inputs = [self.value, self.constant(width), self.constant(width)]
        self.add("LayerNormalization", inputs, self.shape, axis=-1)

    def _matmul(self) -> None:
        n, width = self.shape
        self.add("MatMul", [self.value, self.constant(width, 5)], (n, 5))

    def _gemm(self) -> None:
        n, width = self.shape
        inputs = [self.value, self.constant(width, 6), self.constant(6)]
        self.add("Gemm", inputs, (n, 6), alpha=0.7, beta=1.3)

    def _gemm_t(self) -> None:
        n, width = self.shape
        self.add("Gemm", [self.value, self.constant(6, width)], (n, 6), transB=1)

    def _gemm_left(self) -> None:
        n, width = self.shape
        self.add(
            "Gemm", [self.constant(n, 3), self.value], (3, width), transA=1, transB=0
        ) if n == 3 else None

    def _attention(self) -> None:
        n, width = self.shape
        source = self.value
        self.add("Gemm", [source, source], (n, n), transB=1)
        self.add("Softmax", [self.value], (n, n))
        self.add("MatMul", [self.value, source], (n, width))

    def _shared(self) -> None:
        n, width = self.shape
        weight = self.constant(width, width)
        self.add("MatMul", [self.value, weight], (n, width))
        self.add("Gemm", [self.value, weight], (n, width), transB=1)

    def _transposed(self) -> None:
        n, width = self.shape
        weight, before = self.constant(7, width), (self.value, self.shape)
        self.add("Transpose", [weight], (width, 7), perm=[1, 0])
        turned = self.value
        self.value, self.shape = before
        self.add("MatMul", [self.value, turned], (n, 7))

    def finish(self) -> ModelProto:
        """The graph of all nodes so far; the last value and one from the middle are its outputs."""
        values = {name: shape for name, shape in [*self.older, (self.value, self.shape)] if name != "x"}
        names = list(dict.fromkeys([list(values)[len(values) // 2], self.value]))
        graph = helper.make_graph(
            self.nodes,
            "grown",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 6, 6])],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, values[n]) for n in names],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        # What `prepare` does, but for folding: weights behind a Transpose must be found as they are.
        weights = {
            n.input[0] for n in self.nodes if n.op_type == "Transpose" and n.input[0] in self.constants
        }
        return clean(model, {}, []) if not weights else _named(model)

    @property
    def image(self) -> np.ndarray:
        return self.random.standard_normal((2, 4, 6, 6)).astype(np.float32)


def _named(model: ModelProto) -> ModelProto:
    infer_shapes(model)
    return model


def values_of(model: ModelProto, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every float value of the top-level graph."""
    wide = ModelProto()
    wide.CopyFrom(model)
    known = {o.name for o in wide.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in known:
                wide.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    names = [o.name for o in wide.graph.output]
    return {**feed, **dict(zip(names, run(wide, feed), strict=True))}


def largest_ranges(nodes: Sequence[QuantizableNode], values: Mapping[str, np.ndarray]) -> dict[str, float]:
    names = {a for node in nodes for a in node.activations}
    return {name: float(round_scale(np.abs(values[name]).max() / 127)) for name in names}


def full_recipe(model: ModelProto, feed: Mapping[str, np.ndarray], base: str = "fp32") -> Recipe:
    """Every quantizable node in INT8, ranges from `feed`, weights rounded to the nearest."""
    nodes = quantizable_nodes(model)
    weights = quantize_weights(model, nodes, None, "nearest")
    ranges = largest_ranges(nodes, values_of(model, feed))
    return Recipe(base, frozenset(n.name for n in nodes), ranges=ranges, weights=weights)


def fake_quantized(array: np.ndarray, scale: float) -> np.ndarray:
    return (np.clip(np.rint(array / np.float32(scale)), -128, 127) * np.float32(scale)).astype(np.float32)


def run_by_hand(model: ModelProto, recipe: Recipe, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`model` as `recipe` with base FP32 means it, node by node, with NumPy doing the quantization."""
    view = GraphView(model)
    values: dict[str, np.ndarray] = dict(feed)
    values.update({name: numpy_helper.to_array(t) for name, t in view.constants.items()})
    quantizable = {node.name: node for node in quantizable_nodes(model)}
    for node in view.nodes:
        inputs = {name: values[name] for name in node.input if name}
        shift = None
        renamed = NodeProto()
        renamed.CopyFrom(node)
        for position in _quantized_positions(view, node, recipe, quantizable):
            name = node.input[position]
            renamed.input[position] = f"{name} quantized {position}"
            weight = recipe.weights.get(node.name)
            if weight is not None and position == weight_position(view, node):
                inputs[renamed.input[position]] = _by_hand(weight, weight_axis(view, node))
                shift = weight.bias_correction
            else:
                inputs[renamed.input[position]] = fake_quantized(values[name], recipe.ranges[name])
        outputs = run(_alone(renamed, inputs), {n: a for n, a in inputs.items() if n in renamed.input})
        if shift is not None:
            channel = 1 if node.op_type in ("Conv", "ConvTranspose") else outputs[0].ndim - 1
            shape = [-1 if axis == channel else 1 for axis in range(outputs[0].ndim)]
            outputs[0] = outputs[0] + shift.reshape(shape)
        values.update(zip(node.output, outputs, strict=True))
    return {name: values[name] for name in view.outputs}


def _by_hand(weight: QuantizedWeight, axis: int | None) -> np.ndarray:
    moved = np.moveaxis(weight.values.astype(np.float32), axis or 0, -1) * weight.scales
    return np.moveaxis(moved, -1, axis or 0)


def _quantized_positions(
    view: GraphView, node: NodeProto, recipe: Recipe, quantizable: Mapping[str, QuantizableNode]
) -> list[int]:
    if node.name not in recipe.int8:
        return []
    if node.op_type == "Add":
        found = shortcut(view, node)
        return [found[0]] if found and found[1].name in recipe.int8 else []
    return [0, 1]


def _alone(node: NodeProto, inputs: Mapping[str, np.ndarray]) -> ModelProto:
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in inputs.items()
        if n in node.input
    ]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in node.output]
    graph = helper.make_graph([node], "one", infos, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
