"""Engine packages for GPU tests and benchmarks, with every variant in both lowerings.

    python -m benchmarks.gpu.packages OUT

Calibration here is plain min-max: what is measured is speed and the runtime's own error, not the
builder's skill. Needs onnx and ONNX Runtime; run it in the builder's Python, the measuring itself
needs neither.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from benchmarks.gpu import networks
from vernier.builder.lowering.lower import Recipe, lower
from vernier.builder.lowering.quantized import INT8_MAX, QuantizedWeight, round_scale
from vernier.builder.nodes.placement import QuantizableNode, quantizable_nodes
from vernier.package.golden import GoldenVectors, save_golden
from vernier.package.integrity import entries_of
from vernier.package.manifest import Manifest, dump_manifest
from vernier.package.plans import BELOW_10
from vernier.tensors import Arrays, dtype_from_onnx

ROOT = Path(__file__).resolve().parents[2]

#: How far each variant may stray on the golden vectors; wide enough for random weights.
BUDGETS = {
    "fp32": {"rel_l2": 1e-4},
    "tf32": {"rel_l2": 5e-3},
    "fp16": {"rel_l2": 2e-2},
    "int8": {"rel_l2": 1.5e-1},
}


def run_fp32(model: onnx.ModelProto, inputs: Arrays) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def activation_scales(
    model: onnx.ModelProto, nodes: list[QuantizableNode], inputs: Arrays
) -> dict[str, float]:
    """Largest magnitude / 127 of every activation that gets a Q/DQ pair."""
    names = {name for node in nodes for name in node.activations}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    outputs = {o.name for o in probe.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=n) for n in sorted(names - outputs - set(inputs)))
    found = {**run_fp32(probe, inputs), **inputs}
    return {name: float(round_scale(np.abs(found[name]).max() / INT8_MAX)) for name in names}


def nearest_weight(model: onnx.ModelProto, node: QuantizableNode) -> QuantizedWeight | None:
    """Rounded to the nearest with one scale per output channel."""
    if node.weight is None:
        return None
    tensor = next(t for t in model.graph.initializer if t.name == node.weight)
    weight = onnx.numpy_helper.to_array(tensor)
    axis = 0 if node.op_type == "Conv" else 1
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scales = round_scale(np.abs(weight).max(axis=others) / INT8_MAX)
    shaped = scales.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    values = np.clip(np.rint(weight / shaped), -INT8_MAX, INT8_MAX).astype(np.int8)
    return QuantizedWeight(values, scales, axis)


def recipes(model: onnx.ModelProto, inputs: Arrays, fp32: frozenset[str]) -> dict[str, Recipe]:
    """fp16, and int8 with fp16 for the rest."""
    nodes = quantizable_nodes(model)
    weights = {n.name: w for n in nodes if (w := nearest_weight(model, n)) is not None}
    usable = [n for n in nodes if n.name not in fp32 and (n.weight is not None or n.op_type == "Add")]
    return {
        "fp16": Recipe(base="fp16", fp32=fp32),
        "int8": Recipe(
            base="fp16",
            int8=frozenset(n.name for n in usable),
            fp32=fp32,
            ranges=activation_scales(model, usable, inputs),
            weights=weights,
        ),
    }


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def _tensor(value: onnx.ValueInfoProto) -> dict[str, object]:
    return {
        "name": value.name,
        "dtype": dtype_from_onnx(value.type.tensor_type.elem_type),
        "shape": _shape(value),
    }


def write_package(
    engines: Path,
    name: str,
    model: onnx.ModelProto,
    inputs: Arrays,
    dims: Mapping[str, tuple[int, int, int]],
    buckets: list[int],
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8"),
    fp32: frozenset[str] = frozenset(),
) -> Path:
    """Writes `engines/<name>/1`; `inputs` become its golden vectors.

    dims: dimension → (min, opt, max); fp32: nodes that stay FP32 in every variant.
    """
    package = engines / name / "1"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    onnx.save(model, package / "fp32.onnx")
    variants: dict[str, dict[str, object]] = {
        p: {"precision": p, "files": ["fp32.onnx"], "budget": BUDGETS[p]}
        for p in ("fp32", "tf32")
        if p in precisions
    }
    wanted = [p for p in precisions if p not in variants]
    for precision, recipe in recipes(model, inputs, fp32).items() if wanted else ():
        if precision not in wanted:
            continue
        onnx.save(lower(model, recipe, "strong"), package / f"{precision}.onnx")
        onnx.save(lower(model, recipe, "trt8"), package / f"{precision}.trt8.onnx")
        variants[precision] = {
            "precision": precision,
            "files": [f"{precision}.onnx"],
            "lowerings": {BELOW_10: [f"{precision}.trt8.onnx"]},
            "budget": BUDGETS[precision],
        }
    save_golden(package / "golden.npz", GoldenVectors(inputs, run_fp32(model, inputs)))
    ranges = {d: dict(zip(("min", "opt", "max"), r, strict=True)) for d, r in dims.items()}
    manifest = Manifest.model_validate(
        {
            "name": name,
            "version": 1,
            "created": "2026-11-23T00:00:00Z",
            "source_sha256": "0" * 64,
            "inputs": [_tensor(i) for i in model.graph.input],
            "outputs": [_tensor(o) for o in model.graph.output],
            "dims": ranges,
            "batching": {"kind": "dynamic", "dim": "batch", "buckets": buckets},
            "variants": variants,
            "golden": "golden.npz",
            "files": {p: e.model_dump() for p, e in entries_of(package).items()},
        }
    )
    (package / "manifest.json").write_text(dump_manifest(manifest))
    return package


def example(engines: Path, name: str, folder: str, dims: Mapping[str, tuple[int, int, int]]) -> Path | None:
    """A package of one of the examples; None where it was not trained yet."""
    source = ROOT / "examples" / folder
    if not (source / "model.onnx").is_file():
        return None
    model = onnx.shape_inference.infer_shapes(onnx.load(source / "model.onnx"))
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    with np.load(source / "calibration.npz", allow_pickle=False) as archive:
        inputs = {i.name: archive[i.name][:16] for i in model.graph.input}
    return write_package(engines, name, model, inputs, dims, [1, 8, 64, 256])


def write_all(engines: Path, large: bool) -> list[Path]:
    """The tests' packages, and with `large` those that only the benchmark needs."""
    rng = np.random.default_rng(5)
    small, rows = {"batch": (1, 16, 64)}, 16
    x8 = rng.normal(size=(rows, 8)).astype(np.float32)
    typed = {"dense": x8, "ids": rng.integers(0, 50, (rows, 4))}
    x64 = rng.normal(size=(rows, 64)).astype(np.float32)
    written = [
        write_package(engines, "typed", networks.typed(), typed, small, [1, 16, 64], ("fp32",)),
        write_package(engines, "nonzero", networks.nonzero(), {"x": x8}, small, [1, 16, 64], ("fp32",)),
        write_package(
            engines, "overflow", networks.overflow(), {"x": x8}, small, [1, 16, 64], ("fp32", "fp16"),
            frozenset({"big", "bigger", "small"}),
        ),
        write_package(
            engines, "mlp", networks.mlp(), {"x": x64}, {"batch": (1, 64, 256)}, [1, 8, 64, 256],
            ("fp32", "tf32", "fp16", "int8"),
        ),
    ]  # fmt: skip
    if large:
        images = rng.normal(size=(8, 3, 224, 224)).astype(np.float32)
        written.append(
            write_package(
                engines, "resnet50", networks.resnet50(), {"images": images}, {"batch": (1, 64, 256)},
                [1, 8, 16, 32, 64, 128, 256], ("fp32", "tf32", "fp16", "int8"),
            )
        )  # fmt: skip
        x16 = rng.normal(size=(rows, 16)).astype(np.float32)
        written.append(
            write_package(
                engines, "tower", networks.tower(), {"x": x16}, {"batch": (1, 64, 64)}, [1, 8, 16, 32, 64],
                ("fp32", "fp16"),
            )
        )  # fmt: skip
        more = [
            example(engines, "ranker", "recommender", {"batch": (1, 64, 512)}),
            example(engines, "keywords", "speech", {"batch": (1, 16, 64), "frames": (10, 100, 200)}),
        ]
        written += [package for package in more if package is not None]
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="only what the tests need")
    arguments = parser.parse_args()
    for path in write_all(arguments.out, large=not arguments.small):
        print(path)
