"""Small graphs with every type explicit, as strongly typed builders want them; written without vernier.builder."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 8


def _quantized_weight(
    name: str, weight: np.ndarray, dtype: type
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    scale = (np.abs(weight).max(axis=(1, 2, 3)) / 127).astype(dtype)
    values = np.clip(np.rint(weight / scale.astype(np.float32)[:, None, None, None]), -127, 127).astype(
        np.int8
    )
    zero = np.zeros(len(scale), np.int8)
    node = helper.make_node(
        "DequantizeLinear", [f"{name}_q", f"{name}_s", f"{name}_z"], [name], f"{name}_dq", axis=0
    )
    arrays = {f"{name}_q": values, f"{name}_s": scale, f"{name}_z": zero}
    return [node], [numpy_helper.from_array(a, n) for n, a in arrays.items()]


def _fake_quantize(source: str, out: str, dtype: type) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    nodes = [
        helper.make_node("QuantizeLinear", [source, f"{out}_s", f"{out}_z"], [f"{out}_q"], f"{out}_quant"),
        helper.make_node("DequantizeLinear", [f"{out}_q", f"{out}_s", f"{out}_z"], [out], f"{out}_dequant"),
    ]
    arrays = {f"{out}_s": np.array(0.05, dtype), f"{out}_z": np.array(0, np.int8)}
    return nodes, [numpy_helper.from_array(a, n) for n, a in arrays.items()]


def residual_model(precision: str, seed: int = 0, channels: int = CHANNELS) -> onnx.ModelProto:
    """x [batch, 8, height, 12] → conv, relu, conv, add, mean → y [batch, 8]; fp32, fp16 or int8 (with fp16)."""
    dtype = np.float32 if precision == "fp32" else np.float16
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []
    current = "x"
    if dtype is np.float16:
        nodes.append(helper.make_node("Cast", ["x"], ["x16"], "to_half", to=TensorProto.FLOAT16))
        current = "x16"
    skip = current
    for index in range(2):
        weight = rng.normal(size=(channels, channels, 3, 3)).astype(np.float32) / 8
        name = f"w{index}"
        if precision == "int8":
            for part in (_quantized_weight(name, weight, dtype), _fake_quantize(current, f"a{index}", dtype)):
                nodes += part[0]
                initializers += part[1]
            current = f"a{index}"
        else:
            initializers.append(numpy_helper.from_array(weight.astype(dtype), name))
        nodes.append(
            helper.make_node("Conv", [current, name], [f"c{index}"], f"conv{index}", pads=[1, 1, 1, 1])
        )
        current = f"c{index}"
        if index == 0:
            nodes.append(helper.make_node("Relu", [current], ["r0"], "relu"))
            current = "r0"
    if precision == "int8":
        part = _fake_quantize(skip, "skip", dtype)
        nodes += part[0]
        initializers += part[1]
        skip = "skip"
    nodes.append(helper.make_node("Add", [current, skip], ["sum"], "residual"))
    nodes.append(helper.make_node("ReduceMean", ["sum"], ["mean"], "pool", axes=[2, 3], keepdims=0))
    last = "mean"
    if dtype is np.float16:
        nodes.append(helper.make_node("Cast", [last], ["y"], "to_float", to=TensorProto.FLOAT))
    else:
        nodes.append(helper.make_node("Identity", [last], ["y"], "out"))
    graph = helper.make_graph(
        nodes,
        f"residual_{precision}",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", channels, "height", 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", channels])],
        initializers,
    )
    opset = 17 if precision == "fp32" else 19
    if opset == 19:  # FP16 scales need 19, where ReduceMean takes its axes as an input
        for node in nodes:
            if node.op_type == "ReduceMean":
                del node.attribute[0]
                node.input.append("axes")
        graph = helper.make_graph(
            nodes, graph.name, list(graph.input), list(graph.output),
            [*initializers, numpy_helper.from_array(np.array([2, 3], np.int64), "axes")],
        )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def with_unknown_operator(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with its `relu` replaced by an operator that nobody has."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for node in changed.graph.node:
        if node.name == "relu":
            node.op_type = "Frobnicate"
    return changed
