"""Small ONNX models, written node by node, for the builder's tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Shape = Sequence[int | str | None]


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.3).astype(np.float32)


def make_model(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, tuple[int, Shape | None]],
    outputs: Mapping[str, tuple[int, Shape | None]],
    constants: Mapping[str, np.ndarray] | None = None,
    opset: int = 17,
    ir_version: int = 8,
    constants_as_inputs: bool = False,
    domains: Mapping[str, int] | None = None,
) -> ModelProto:
    """inputs, outputs: name → (element type, shape)."""
    initializers = [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    graph_inputs = [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()]
    if constants_as_inputs:
        graph_inputs += [
            helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in initializers
        ]
    graph = helper.make_graph(
        list(nodes),
        "test",
        graph_inputs,
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in outputs.items()],
        initializers,
    )
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(domain, version) for domain, version in (domains or {}).items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def mlp(batch: int | str | None = "batch", width: int = 16, seed: int = 0) -> ModelProto:
    """x [batch, 8] → y [batch, 1]: two layers and a sigmoid."""
    node = helper.make_node
    return make_model(
        [
            node("Gemm", ["x", "w1", "b1"], ["h"]),
            node("Relu", ["h"], ["r"]),
            node("MatMul", ["r", "w2"], ["z"]),
            node("Sigmoid", ["z"], ["y"]),
        ],
        {"x": (TensorProto.FLOAT, [batch, 8])},
        {"y": (TensorProto.FLOAT, [batch, 1])},
        {
            "w1": weights(8, width, seed=seed),
            "b1": weights(width, seed=seed + 1),
            "w2": weights(width, 1, seed=seed + 2),
        },
    )


def old_cnn(batch: int | None = 1) -> ModelProto:
    """The opset-9 habits in one model: weights among the inputs, attributes that became inputs, Dropout."""
    node = helper.make_node
    constants = {
        "w": weights(8, 3, 3, 3),
        "gamma": weights(8, seed=1) + 1,
        "beta": weights(8, seed=2),
        "mean": weights(8, seed=3),
        "variance": np.abs(weights(8, seed=4)) + 1,
        "scales": np.array([1, 1, 2, 2], np.float32),
        "fw": weights(5, 8, seed=5),
        "fb": weights(5, seed=6),
    }
    return make_model(
        [
            node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            node("BatchNormalization", ["c", "gamma", "beta", "mean", "variance"], ["n"]),
            node("Relu", ["n"], ["r"]),
            node("Dropout", ["r"], ["d"], ratio=0.3),
            node("Upsample", ["d", "scales"], ["u"], mode="nearest"),
            node("Clip", ["u"], ["k"], min=0.0, max=6.0),
            node("Pad", ["k"], ["p"], pads=[0, 0, 1, 1, 0, 0, 1, 1], value=0.5),
            node("Slice", ["p"], ["s"], starts=[1, 1], ends=[-1, 100], axes=[2, 3]),
            node("GlobalAveragePool", ["s"], ["g"]),
            node("Constant", [], ["shape"], value=numpy_helper.from_array(np.array([1, 8], np.int64))),
            node("Reshape", ["g", "shape"], ["f"]),
            node("Gemm", ["f", "fw", "fb"], ["logits"], transB=1),
            node("Softmax", ["logits"], ["y"]),
        ],
        {"x": (TensorProto.FLOAT, [batch, 3, 16, 16])},
        {"y": (TensorProto.FLOAT, [batch, 5])},
        constants,
        opset=9,
        ir_version=3,
        constants_as_inputs=True,
        domains={"ai.onnx.ml": 1},
    )


def save(model: ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def run(model: ModelProto | Path, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(None, dict(feeds))


def check(model: ModelProto) -> None:
    """ONNX's own judgement, full type and shape inference included."""
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model), full_check=True)
