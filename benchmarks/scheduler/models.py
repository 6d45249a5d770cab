"""The models under load, built by the builder as anybody's would be."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, save

from vernier.builder.pipeline import build
from vernier.builder.progress import NoProgress
from vernier.builder.request import BuildRequest

FEATURES = 16


@dataclass(frozen=True)
class Workload:
    """A stack of layers: x [batch, 16] → y [batch, 4].

    Attributes:
        kind: `dense`: weights that no cache holds, so that larger batches pay and everything else finds
            its caches cold; `conv`: 3×3 convolutions on 28×28, arithmetic and small weights.
        layers, width: of the stack; the width in neurons or channels.
        max_batch: its largest batch, the one that it is measured at.
    """

    name: str
    kind: str
    layers: int
    width: int
    max_batch: int


#: A batch takes a few milliseconds of one core, or some dozens.
MIDDLE = Workload("middle", "dense", layers=14, width=1024, max_batch=8)
HEAVY = Workload("heavy", "dense", layers=24, width=1024, max_batch=16)
CONV = Workload("conv", "conv", layers=4, width=64, max_batch=8)
WORKLOADS = (MIDDLE, HEAVY, CONV)


def package(workload: Workload, engines: Path) -> Path:
    """The workload's package under `engines`, built on first use."""
    folder = engines / workload.name / "1"
    if folder.is_dir():
        return folder
    engines.mkdir(parents=True, exist_ok=True)
    path = engines / f"{workload.name}.onnx"
    save(_dense(workload) if workload.kind == "dense" else _conv(workload), path)
    try:
        return build(
            BuildRequest(model=path, name=workload.name, out=engines, max_batch=workload.max_batch),
            NoProgress(),
        ).package
    finally:
        path.unlink()


def _conv(workload: Workload) -> ModelProto:
    rng = np.random.default_rng(0)
    width, side = workload.width, 28
    weights = {
        "into": rng.standard_normal((FEATURES, side * side)) / 4,
        "out": rng.standard_normal((width, 4)) / np.sqrt(width),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "into"], ["flat"]),
        helper.make_node("Reshape", ["flat", "image"], ["h0"]),
    ]
    channels = 1
    for i in range(workload.layers + 1):
        weights[f"w{i}"] = rng.standard_normal((width, channels, 3, 3)) / np.sqrt(9 * channels)
        nodes.append(helper.make_node("Conv", [f"h{i}", f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"h{i + 1}"]))
        channels = width
    nodes += [
        helper.make_node("GlobalAveragePool", [f"h{workload.layers + 1}"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("MatMul", ["features", "out"], ["y"]),
    ]
    constants = [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()]
    constants.append(numpy_helper.from_array(np.array([-1, 1, side, side], np.int64), "image"))
    return _model(nodes, constants)


def _dense(workload: Workload) -> ModelProto:
    rng = np.random.default_rng(0)
    sizes = [FEATURES, *[workload.width] * workload.layers, 4]
    nodes, weights = [], []
    for i, (rows, columns) in enumerate(pairwise(sizes)):
        matrix = (rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{i}"))
        last = i == len(sizes) - 2
        nodes.append(helper.make_node("MatMul", [f"h{i}" if i else "x", f"w{i}"], ["y" if last else f"m{i}"]))
        if not last:
            nodes.append(helper.make_node("Tanh", [f"m{i}"], [f"h{i + 1}"]))
    return _model(nodes, weights)


def _model(nodes: list[NodeProto], weights: list[TensorProto]) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
