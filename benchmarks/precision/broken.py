"""Models that are built to break in reduced precision, each in a way that has broken real ones.

All answer correctly in FP32. A build must either keep that or refuse; a package that passes its gate
and is wrong on other data of the same kind is a failure of the build.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH, HIDDEN, CLASSES, PIXELS = 32, 64, 6, 12


@dataclass(frozen=True)
class Trap:
    """A model and its data.

    what: what breaks it, for people.
    draw: (count, seed) → input array.
    """

    name: str
    what: str
    model: onnx.ModelProto
    draw: Callable[[int, int], Array]


class _Graph:
    """Collects nodes and constants; every method returns the name of its result."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: Array) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def linear(self, x: str, inputs: int, outputs: int, scale: Array | float = 1.0) -> str:
        """MatMul with random weights; `scale` is for all of them or, as [inputs, 1], for each row."""
        weight = self.random.normal(size=(inputs, outputs)) * np.sqrt(2 / inputs) * scale
        return self.node("MatMul", x, self.constant(weight))

    def conv(self, x: str, inputs: int, outputs: int, scale: Array | float = 1.0) -> str:
        weight = self.random.normal(size=(outputs, inputs, 3, 3)) * np.sqrt(2 / inputs / 9) * scale
        return self.node("Conv", x, self.constant(weight), pads=[1, 1, 1, 1])

    def times(self, x: str, factor: Array | float) -> str:
        return self.node("Mul", x, self.constant(np.asarray(factor)))

    def model(self, result: str, shape: list[int | str]) -> onnx.ModelProto:
        self.nodes.append(helper.make_node("Identity", [result], ["y"], name="answer"))
        graph = helper.make_graph(
            self.nodes,
            "trap",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES])],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _rows(count: int, seed: int) -> Array:
    return np.random.default_rng([seed, 11]).normal(size=(count, WIDTH)).astype(np.float32)


def _images(count: int, seed: int) -> Array:
    return np.random.default_rng([seed, 12]).normal(size=(count, 3, PIXELS, PIXELS)).astype(np.float32)


def _one_wide_channel() -> Trap:
    """Channel 0 is a thousand times as large as its neighbours, and no more important."""
    g = _Graph(1)
    wide = np.ones(16)
    wide[0] = 1000.0
    x = g.node("Relu", g.conv("x", 3, 16, wide[:, None, None, None]))
    x = g.node("Relu", g.conv(x, 16, 16, 1 / wide[None, :, None, None]))
    x = g.node("Flatten", g.node("GlobalAveragePool", g.node("Relu", g.conv(x, 16, 16))))
    return Trap(
        "wide channel",
        "one channel a thousand times as large as the others",
        g.model(g.linear(x, 16, CLASSES), [3, PIXELS, PIXELS]),
        _images,
    )


def _large_logits() -> Trap:
    g = _Graph(2)
    x = g.node("Relu", g.linear("x", WIDTH, HIDDEN))
    x = g.node("Relu", g.linear(x, HIDDEN, HIDDEN))
    x = g.node("Softmax", g.linear(x, HIDDEN, CLASSES, 12.0), axis=1)
    return Trap("large logits", "a softmax over logits of ±60", g.model(x, [WIDTH]), _rows)


def _over_65504() -> Trap:
    g = _Graph(3)
    x = g.node("Relu", g.linear("x", WIDTH, HIDDEN, 1e5))
    x = g.node("Relu", g.linear(x, HIDDEN, HIDDEN))
    return Trap(
        "overflow", "activations far over 65,504", g.model(g.linear(x, HIDDEN, CLASSES, 1e-5), [WIDTH]), _rows
    )


def _rare_overflow() -> Trap:
    """About one sample in three hundred is forty times as loud; only those pass 65,504."""

    def draw(count: int, seed: int) -> Array:
        loud = np.random.default_rng([seed, 13]).random((count, 1)) < 1 / 300
        return (_rows(count, seed) * np.where(loud, 40.0, 1.0)).astype(np.float32)

    g = _Graph(4)
    x = g.node("Relu", g.linear("x", WIDTH, HIDDEN, 1500.0))
    x = g.node("Relu", g.linear(x, HIDDEN, HIDDEN))
    x = g.node("Tanh", g.linear(x, HIDDEN, CLASSES, 1 / 20000.0))
    return Trap("rare overflow", "activations over 65,504 in one sample of 300", g.model(x, [WIDTH]), draw)


def _tiny_weights() -> Trap:
    g = _Graph(5)
    x = g.node("Relu", g.linear("x", WIDTH, HIDDEN, 1e-9))
    x = g.times(x, 1e9)
    return Trap(
        "tiny weights",
        "weights of 1e-9, under FP16's smallest number",
        g.model(g.linear(x, HIDDEN, CLASSES), [WIDTH]),
        _rows,
    )


def _tiny_activations() -> Trap:
    """FP16 has three bits left for numbers of 1e-7 and none below 3e-8."""
    g = _Graph(6)
    x = g.times(g.node("Relu", g.linear("x", WIDTH, HIDDEN)), 1e-7)
    x = g.times(g.linear(x, HIDDEN, HIDDEN), 1e7)
    x = g.linear(g.node("Relu", x), HIDDEN, CLASSES)
    return Trap("tiny activations", "activations of 1e-7 between two layers", g.model(x, [WIDTH]), _rows)


def _long_sum() -> Trap:
    g = _Graph(7)
    x = g.node("Relu", g.conv("x", 3, 16, 1000.0))
    axes = "axes"
    g.constants.append(numpy_helper.from_array(np.array([2, 3], np.int64), axes))
    x = g.times(g.node("ReduceSum", x, axes, keepdims=0), 1 / (1000.0 * PIXELS * PIXELS))
    return Trap(
        "long sum",
        "a sum of many numbers that passes 65,504 although each is small",
        g.model(g.linear(x, 16, CLASSES), [3, PIXELS, PIXELS]),
        _images,
    )


def _dead_channels() -> Trap:
    """Half of the channels are always zero, so their weights and ranges have no scale."""
    g = _Graph(8)
    alive = np.arange(16) % 2 == 0
    x = g.node("Relu", g.conv("x", 3, 16, alive[:, None, None, None].astype(float)))
    x = g.node("Relu", g.conv(g.times(x, 1.0), 16, 16))
    dead = g.node("Relu", g.conv(g.times("x", 0.0), 3, 16))
    x = g.node("Flatten", g.node("GlobalAveragePool", g.node("Add", x, dead)))
    return Trap(
        "dead channels",
        "channels and a whole branch that are always zero",
        g.model(g.linear(x, 16, CLASSES), [3, PIXELS, PIXELS]),
        _images,
    )


def traps() -> list[Trap]:
    """Every model of this module."""
    return [
        _one_wide_channel(),
        _large_logits(),
        _over_65504(),
        _rare_overflow(),
        _tiny_weights(),
        _tiny_activations(),
        _long_sum(),
        _dead_channels(),
    ]
