"""Networks to measure on a GPU: ResNet-50 with random weights, a small MLP, and graphs that test one thing each."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET, IR = 17, 8


class Graph:
    """Collects nodes and weights; `seed` makes every weight the same on every machine."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, array: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, kind: str, inputs: list[str], name: str, **attributes: object) -> str:
        """Appends a node whose output has its name."""
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}:0"], name, **attributes))
        return f"{name}:0"

    def conv(
        self, x: str, name: str, cin: int, cout: int, kernel: int, stride: int = 1, gain: float = 2.0
    ) -> str:
        """A convolution as it is after its BatchNorm was folded in: He-scaled weights and a bias."""
        std = np.sqrt(gain / (cin * kernel * kernel))
        w = self.weight(f"{name}.w", self.rng.normal(0, std, (cout, cin, kernel, kernel)).astype(np.float32))
        b = self.weight(f"{name}.b", self.rng.normal(0, 0.05, cout).astype(np.float32))
        pad = kernel // 2
        return self.add(
            "Conv", [x, w, b], name, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4
        )

    def gemm(self, x: str, name: str, cin: int, cout: int) -> str:
        w = self.weight(f"{name}.w", self.rng.normal(0, np.sqrt(2 / cin), (cin, cout)).astype(np.float32))
        b = self.weight(f"{name}.b", self.rng.normal(0, 0.05, cout).astype(np.float32))
        return self.add("Gemm", [x, w, b], name)

    def model(self, name: str, inputs: list, outputs: list) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, name, inputs, outputs, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def _value(name: str, shape: list[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def resnet50(seed: int = 0) -> onnx.ModelProto:
    """images [batch, 3, 224, 224] → logits [batch, 1000]; 25.5 M weights, 4.1 G multiply-adds a row."""
    g = Graph(seed)
    x = g.add("Relu", [g.conv("images", "stem", 3, 64, 7, 2)], "stem_relu")
    x = g.add("MaxPool", [x], "stem_pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    width = 64
    for stage, (blocks, mid) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        for block in range(blocks):
            name = f"s{stage}b{block}"
            stride = 2 if block == 0 and stage > 0 else 1
            y = g.add("Relu", [g.conv(x, f"{name}_a", width, mid, 1)], f"{name}_a_relu")
            y = g.add("Relu", [g.conv(y, f"{name}_b", mid, mid, 3, stride)], f"{name}_b_relu")
            # A small last gain keeps the sum of sixteen residual branches from growing.
            y = g.conv(y, f"{name}_c", mid, 4 * mid, 1, gain=0.3)
            if block == 0:
                x = g.conv(x, f"{name}_skip", width, 4 * mid, 1, stride, gain=1.0)
            x = g.add("Relu", [g.add("Add", [y, x], f"{name}_add")], f"{name}_relu")
            width = 4 * mid
    x = g.add("GlobalAveragePool", [x], "pool")
    x = g.add("Flatten", [x], "flatten")
    logits = g.gemm(x, "fc", width, 1000)
    g.nodes[-1].output[0] = "logits"
    assert logits == "fc:0"
    return g.model(
        "resnet50", [_value("images", ["batch", 3, 224, 224])], [_value("logits", ["batch", 1000])]
    )


def mlp(seed: int = 1) -> onnx.ModelProto:
    """x [batch, 64] → 256 → 128 → score [batch, 1]."""
    g = Graph(seed)
    x = "x"
    for index, (cin, cout) in enumerate([(64, 256), (256, 128), (128, 1)]):
        x = g.gemm(x, f"fc{index}", cin, cout)
        if index < 2:
            x = g.add("Relu", [x], f"relu{index}")
    g.nodes[-1].output[0] = "score"
    return g.model("mlp", [_value("x", ["batch", 64])], [_value("score", ["batch", 1])])


def tower(seed: int = 6, layers: int = 24) -> onnx.ModelProto:
    """x [batch, 16] → an image of 56×56 → 3×3 convolutions of 64 channels → y [batch, 4]; 2.8 G multiply-adds a row.

    Much to compute, and little to send or to keep.
    """
    g = Graph(seed)
    x = g.gemm("x", "into", 16, 56 * 56)
    x = g.add("Reshape", [x, g.weight("image", np.array([-1, 1, 56, 56], np.int64))], "as_image")
    channels = 1
    for index in range(layers):
        x = g.add("Relu", [g.conv(x, f"conv{index}", channels, 64, 3)], f"relu{index}")
        channels = 64
    x = g.add("Flatten", [g.add("GlobalAveragePool", [x], "pool")], "flatten")
    g.gemm(x, "out", 64, 4)
    g.nodes[-1].output[0] = "y"
    return g.model("tower", [_value("x", ["batch", 16])], [_value("y", ["batch", 4])])


def typed(seed: int = 2) -> onnx.ModelProto:
    """Two inputs and three outputs of several types: embeddings of ids [batch, 4] added to dense [batch, 8].

    sum [batch, 8] float32, best [batch, 1] int64 (position of the largest), positive [batch, 8] bool.
    """
    g = Graph(seed)
    table = g.weight("table", g.rng.normal(size=(50, 8)).astype(np.float32))
    rows = g.add("Gather", [table, "ids"], "gather", axis=0)
    pooled = g.add("ReduceMean", [rows], "pool", axes=[1], keepdims=0)
    g.nodes.append(helper.make_node("Add", [pooled, "dense"], ["sum"], "add"))
    g.nodes.append(helper.make_node("ArgMax", ["sum"], ["best"], "argmax", axis=1, keepdims=1))
    zero = g.weight("zero", np.array(0, np.float32))
    g.nodes.append(helper.make_node("Greater", ["sum", zero], ["positive"], "greater"))
    return g.model(
        "typed",
        [_value("dense", ["batch", 8]), _value("ids", ["batch", 4], TensorProto.INT64)],
        [
            _value("sum", ["batch", 8]),
            _value("best", ["batch", 1], TensorProto.INT64),
            _value("positive", ["batch", 8], TensorProto.BOOL),
        ],
    )


def nonzero() -> onnx.ModelProto:
    """where [2, count] int64: the positions of x [batch, 8] over 0; only the run can tell how many."""
    g = Graph(3)
    zero = g.weight("zero", np.array(0, np.float32))
    over = g.add("Greater", ["x", zero], "greater")
    as_float = g.add("Cast", [over], "as_float", to=TensorProto.FLOAT)
    g.nodes.append(helper.make_node("NonZero", [as_float], ["where"], "nonzero"))
    g.nodes.append(
        helper.make_node("Mul", ["x", g.weight("two", np.array(2, np.float32))], ["twice"], "twice")
    )
    return g.model(
        "nonzero",
        [_value("x", ["batch", 8])],
        [_value("where", [2, "count"], TensorProto.INT64), _value("twice", ["batch", 8])],
    )


def overflow(seed: int = 4) -> onnx.ModelProto:
    """y [batch, 8] = (x · 3000) · 40 / 120000 · W: FP16 overflows between two nodes that must stay FP32."""
    g = Graph(seed)
    scale = g.weight("scale", np.array(3000, np.float32))
    again = g.weight("again", np.array(40, np.float32))
    back = g.weight("back", np.array(1 / 120000, np.float32))
    x = g.gemm("x", "first", 8, 8)
    x = g.add("Mul", [x, scale], "big")
    x = g.add("Mul", [x, again], "bigger")
    x = g.add("Mul", [x, back], "small")
    g.gemm(x, "last", 8, 8)
    g.nodes[-1].output[0] = "y"
    return g.model("overflow", [_value("x", ["batch", 8])], [_value("y", ["batch", 8])])
