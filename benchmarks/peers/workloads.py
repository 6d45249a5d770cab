"""The models and requests that every server gets, and the right answers to them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

SMALL = (64, 256, 128, 1)
#: How many of the small network's numbers are the first of two inputs.
USER = 16
IMAGE = (3, 224, 224)


@dataclass(frozen=True)
class Workload:
    """
    Attributes:
        name: json, binary or large.
        title: in words.
        model: the ONNX file; its input is x, its output y, the first dimension of both the batch.
        x, y: some requests and their right answers, one row a request.
    """

    name: str
    title: str
    model: Path
    x: np.ndarray
    y: np.ndarray


def workload(name: str, folder: Path) -> Workload:
    """Writes the model of a workload below `folder`, and computes the answers with ONNX Runtime."""
    rng = np.random.default_rng(7)
    if name == "large":
        model, x = last_pixels(), rng.normal(size=(4, *IMAGE))
        title = "600 KB: a 3×224×224 float32 image in binary, next to nothing to compute"
    else:
        model, x = small_network(), rng.normal(size=(16, SMALL[0])).round(6)
        title = f"a {'→'.join(map(str, SMALL))} network, one row a request, in {'JSON' if name == 'json' else 'binary'}"
    path = folder / f"{'last_pixels' if name == 'large' else 'mlp'}.onnx"
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rows = x.astype(np.float32)
    return Workload(name, title, path, rows, session.run(None, {"x": rows})[0])


def small_network() -> onnx.ModelProto:
    """The multilayer perceptron of the small workloads, [batch, 64] to [batch, 1]."""
    rng = np.random.default_rng(1)
    nodes, weights, last = [], [], "x"
    for layer, (wide, narrow) in enumerate(pairwise(SMALL)):
        w = rng.normal(size=(wide, narrow), scale=wide**-0.5).astype(np.float32)
        weights += [numpy_helper.from_array(w, f"w{layer}")]
        weights += [numpy_helper.from_array(rng.normal(size=narrow).astype(np.float32), f"b{layer}")]
        is_last = layer == len(SMALL) - 2
        made = "y" if is_last else f"h{layer}"
        nodes.append(helper.make_node("Gemm", [last, f"w{layer}", f"b{layer}"], [made], f"gemm{layer}"))
        if not is_last:
            nodes.append(helper.make_node("Relu", [made], [f"r{layer}"], f"relu{layer}"))
        last = f"r{layer}"
    return _model(nodes, weights, (SMALL[0],), (SMALL[-1],))


def two_inputs() -> onnx.ModelProto:
    """The small network with its input in two pieces, user [batch, 16] and item [batch, 48]."""
    model = small_network()
    sizes = {"user": USER, "item": SMALL[0] - USER}
    del model.graph.input[:]
    model.graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in sizes.items()
    )
    model.graph.node.insert(0, helper.make_node("Concat", list(sizes), ["x"], "concat", axis=1))
    return model


def last_pixels() -> onnx.ModelProto:
    """[batch, 3, 224, 224] to its last two numbers [batch, 2]: shows that the whole input came, and costs nothing."""
    start, stop = (IMAGE[0] - 1, IMAGE[1] - 1, IMAGE[2] - 2), IMAGE
    weights = [
        numpy_helper.from_array(np.array(values, np.int64), name)
        for name, values in (("start", start), ("stop", stop), ("axes", (1, 2, 3)))
    ]
    nodes = [
        helper.make_node("Slice", ["x", "start", "stop", "axes"], ["corner"], "corner"),
        helper.make_node("Flatten", ["corner"], ["y"], "flatten"),
    ]
    return _model(nodes, weights, IMAGE, (2,))


def _model(
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    x: tuple[int, ...],
    y: tuple[int, ...],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "peers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *x])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *y])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
