"""The models under load, built by the builder as anybody's would be."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper, save

from app.build.pipeline import build
from app.build.progress import NoProgress
from app.build.request import BuildRequest

FEATURES = 16


@dataclass(frozen=True)
class Workload:
    """A stack of dense layers: x [batch, 16] → y [batch, 4].

    Attributes:
        layers, width: of the stack.
        max_batch: its largest batch, the one that it is measured at.
    """

    name: str
    layers: int
    width: int
    max_batch: int


#: A batch takes a few milliseconds of one core, or some dozens.
MIDDLE = Workload("middle", layers=14, width=1024, max_batch=8)
HEAVY = Workload("heavy", layers=24, width=1024, max_batch=16)
WORKLOADS = (MIDDLE, HEAVY)


def package(workload: Workload, engines: Path) -> Path:
    """The workload's package under `engines`, built on first use."""
    folder = engines / workload.name / "1"
    if folder.is_dir():
        return folder
    engines.mkdir(parents=True, exist_ok=True)
    path = engines / f"{workload.name}.onnx"
    save(_stack(workload), path)
    try:
        return build(
            BuildRequest(model=path, name=workload.name, out=engines, max_batch=workload.max_batch),
            NoProgress(),
        ).package
    finally:
        path.unlink()


def _stack(workload: Workload) -> ModelProto:
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
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
