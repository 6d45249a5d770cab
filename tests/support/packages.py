"""Small real packages, written without the builder, so that the service can be tested apart from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from vernier.package.golden import GoldenVectors, save_golden
from vernier.package.integrity import entries_of
from vernier.package.manifest import Manifest, dump_manifest
from vernier.tensors import dtype_from_onnx, numpy_dtype

WIDTH = 4


def mlp_model(seed: int = 0, batch: int | str = "batch", bend: str | None = None) -> onnx.ModelProto:
    """y = softmax(relu(x W1 + b1) W2), x [batch, 4], and z = 2 x; deterministic in `seed`.

    bend: how a bad variant differs: `clip` limits x to ±3 on its way to z, `overflow` makes z infinite for
        |x| over 3.4. Both are right for the golden vectors.
    """
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.normal(size=(WIDTH, 16)).astype(np.float32),
        "b1": rng.normal(size=16).astype(np.float32),
        "w2": rng.normal(size=(16, 3)).astype(np.float32),
        "two": np.array(2.0, np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h0"], "first"),
        helper.make_node("Add", ["h0", "b1"], ["h1"], "bias"),
        helper.make_node("Relu", ["h1"], ["h2"], "relu"),
        helper.make_node("MatMul", ["h2", "w2"], ["h3"], "second"),
        helper.make_node("Softmax", ["h3"], ["y"], "softmax", axis=-1),
        helper.make_node("Mul", ["bent", "two"], ["z"], "double"),
    ]
    if bend == "clip":
        weights |= {"low": np.array(-3.0, np.float32), "high": np.array(3.0, np.float32)}
        nodes.insert(0, helper.make_node("Clip", ["x", "low", "high"], ["bent"], "bend"))
    elif bend == "overflow":
        weights |= {"huge": np.array(1e38, np.float32)}
        nodes.insert(0, helper.make_node("Mul", ["x", "huge"], ["large"], "bend"))
        nodes.insert(1, helper.make_node("Div", ["large", "huge"], ["bent"], "unbend"))
    else:
        nodes.insert(0, helper.make_node("Identity", ["x"], ["bent"], "keep"))
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, WIDTH])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, [batch, WIDTH]),
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def slow_model(layers: int = 60, width: int = 512) -> onnx.ModelProto:
    """z = x W W … W [batch, 4] through a wide middle: some milliseconds a row of pure computation."""
    rng = np.random.default_rng(0)
    square = (rng.normal(size=(width, width)) / np.sqrt(width)).astype(np.float32)
    weights = {
        "into": rng.normal(size=(WIDTH, width)).astype(np.float32),
        "square": square,
        "out": rng.normal(size=(width, WIDTH)).astype(np.float32),
    }
    nodes = [helper.make_node("MatMul", ["x", "into"], ["h0"], "into")]
    for i in range(layers):
        nodes.append(helper.make_node("MatMul", [f"h{i}", "square"], [f"m{i}"], f"layer{i}"))
        nodes.append(helper.make_node("Tanh", [f"m{i}"], [f"h{i + 1}"], f"tanh{i}"))
    nodes.append(helper.make_node("MatMul", [f"h{layers}", "out"], ["z"], "out"))
    graph = helper.make_graph(
        nodes,
        "slow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def ends_model(width: int) -> onnx.ModelProto:
    """z [batch, 3] = twice the first, the middle and the last number of x [batch, width]: large rows, quick batches."""
    weights = {"ends": np.array([0, width // 2, width - 1]), "two": np.array(2.0, np.float32)}
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["x", "ends"], ["some"], "pick", axis=1),
            helper.make_node("Mul", ["some", "two"], ["z"], "double"),
        ],
        "ends",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def pair_model() -> onnx.ModelProto:
    """z [batch, 3] = item [batch, 3] times user [batch]."""
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Unsqueeze", ["user", "axes"], ["column"], "column"),
            helper.make_node("Mul", ["item", "column"], ["z"], "times"),
        ],
        "pair",
        [
            helper.make_tensor_value_info("user", floats, ["batch"]),
            helper.make_tensor_value_info("item", floats, ["batch", 3]),
        ],
        [helper.make_tensor_value_info("z", floats, ["batch", 3])],
        [numpy_helper.from_array(np.array([1], np.int64), "axes")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def echo_model(dtypes: Sequence[str]) -> onnx.ModelProto:
    """Gives back every input: `in_<dtype>` [batch, 3] as `out_<dtype>`."""
    kinds = {dtype: helper.np_dtype_to_tensor_dtype(numpy_dtype(dtype)) for dtype in dtypes}
    graph = helper.make_graph(
        [helper.make_node("Identity", [f"in_{dtype}"], [f"out_{dtype}"], dtype) for dtype in dtypes],
        "echo",
        [helper.make_tensor_value_info(f"in_{d}", kind, ["batch", 3]) for d, kind in kinds.items()],
        [helper.make_tensor_value_info(f"out_{d}", kind, ["batch", 3]) for d, kind in kinds.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def run_reference(model: onnx.ModelProto | Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ONNX Runtime itself, one thread, nothing of ours."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _shape(value_info: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value_info.type.tensor_type.shape.dim]


def _dtype(value_info: onnx.ValueInfoProto) -> str:
    return dtype_from_onnx(value_info.type.tensor_type.elem_type)


def write_package(
    engines: Path,
    name: str = "mlp",
    version: int = 1,
    model: onnx.ModelProto | None = None,
    variants: dict[str, onnx.ModelProto] | None = None,
    **changes: Any,
) -> Path:
    """Writes `engines/<name>/<version>` with golden vectors and returns its path.

    variants: further precisions, each held to a relative L2 error of 1 % on every sample.
    """
    model = model or mlp_model()
    package = engines / name / str(version)
    package.mkdir(parents=True)
    onnx.save(model, package / "fp32.onnx")
    for precision, variant in (variants or {}).items():
        onnx.save(variant, package / f"{precision}.onnx")
    batch = _shape(model.graph.input[0])[0]
    rows = batch if isinstance(batch, int) else 4
    rng = np.random.default_rng(7)
    golden = {
        i.name: rng.normal(size=(rows, *map(int, _shape(i)[1:]))).astype(numpy_dtype(_dtype(i)))
        if _dtype(i).startswith("float")
        else rng.integers(0, 2, (rows, *map(int, _shape(i)[1:]))).astype(numpy_dtype(_dtype(i)))
        for i in model.graph.input
    }
    save_golden(package / "golden.npz", GoldenVectors(golden, run_reference(model, golden)))
    tensor = {
        "inputs": [{"name": i.name, "dtype": _dtype(i), "shape": _shape(i)} for i in model.graph.input],
        "outputs": [{"name": o.name, "dtype": _dtype(o), "shape": _shape(o)} for o in model.graph.output],
    }
    dynamic = isinstance(batch, str)
    fields: dict[str, Any] = {
        "name": name,
        "version": version,
        "created": "2026-01-01T00:00:00Z",
        "source_sha256": "0" * 64,
        **tensor,
        "dims": {batch: {"min": 1, "opt": 8, "max": 16}} if dynamic else {},
        "batching": (
            {"kind": "dynamic", "dim": batch, "buckets": [1, 2, 4, 8, 16]}
            if dynamic
            else {"kind": "fixed", "size": batch}
        ),
        "variants": {
            "fp32": {"precision": "fp32", "files": ["fp32.onnx"], "budget": {}},
            **{
                p: {"precision": p, "files": [f"{p}.onnx"], "budget": {"rel_l2.max": 0.01}}
                for p in variants or {}
            },
        },
        "golden": "golden.npz",
        "files": {p: e.model_dump() for p, e in entries_of(package, skip=["manifest.json"]).items()},
    }
    manifest = Manifest.model_validate({**fields, **changes})
    (package / "manifest.json").write_text(dump_manifest(manifest))
    return package
