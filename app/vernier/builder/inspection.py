"""`build_engine.py inspect`: what a package holds and what was proven about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from rich.console import Group
from rich.table import Table
from rich.text import Text

from vernier.errors import BuildError, PackageError
from vernier.package.integrity import open_package
from vernier.package.manifest import Manifest, VariantEntry

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def open_checked(package: Path) -> Manifest:
    """Reads a package and verifies every hash. Raises BuildError."""
    if not package.is_dir():
        raise BuildError(f"{package} is no folder: give an engine package such as engines/<name>/<version>")
    try:
        return open_package(package.resolve())
    except PackageError as error:
        raise BuildError(error.message) from error


def variant_bytes(manifest: Manifest, variant: VariantEntry) -> int:
    return sum(manifest.files[path].bytes for path in variant.files)


def describe(package: Path, with_nodes: bool = False) -> dict[str, Any]:
    """The package as plain values, for `--json` and for the table. Raises BuildError."""
    manifest = open_checked(package)
    report: dict[str, Any] = manifest.model_dump(exclude={"files"})
    report["verified_files"] = len(manifest.files)
    report["bytes"] = sum(entry.bytes for entry in manifest.files.values())
    for name, variant in manifest.variants.items():
        report["variants"][name]["bytes"] = variant_bytes(manifest, variant)
        if with_nodes:
            report["variants"][name]["nodes"] = node_types(package / variant.files[0])
    return report


def node_types(path: Path) -> dict[str, str]:
    """Weighted node → the type it computes in, read off the graph itself."""
    graph = onnx.load(path, load_external_data=False).graph
    producers = {output: node for node in graph.node for output in node.output}
    types = {t.name: t.data_type for t in graph.initializer}
    types.update({v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.value_info]})
    found = {}
    for node in graph.node:
        if node.op_type not in _WEIGHTED:
            continue
        before = [producers[name] for name in node.input if name in producers]
        dequantized = [n for n in before if n.op_type == "DequantizeLinear"]
        if len(dequantized) >= 2:
            kind = (
                types.get(dequantized[0].input[2]) if len(dequantized[0].input) > 2 else onnx.TensorProto.INT8
            )
            found[node.name] = onnx.TensorProto.DataType.Name(kind or onnx.TensorProto.INT8).lower()
        else:
            kinds = [types[name] for name in node.input if name in types]
            found[node.name] = onnx.TensorProto.DataType.Name(kinds[0]).lower() if kinds else "float"
    return found


def render(report: dict[str, Any]) -> Group:
    """The package for a terminal."""
    head = Text(f"{report['name']} version {report['version']}", style="bold")
    head.append(
        f"   built {report['created']}, {report['verified_files']} files verified, {size_text(report['bytes'])}",
        style="dim",
    )
    tensors = Table("", "tensor", "dtype", "shape", box=None, pad_edge=False)
    for kind in ("inputs", "outputs"):
        for tensor in report[kind]:
            shape = "[" + ", ".join(str(d) for d in tensor["shape"]) + "]"
            tensors.add_row(kind[:-1], Text(tensor["name"]), tensor["dtype"], Text(shape))
    dims = Table("dimension", "min", "opt", "max", box=None, pad_edge=False)
    for name, sizes in report["dims"].items():
        dims.add_row(Text(name), str(sizes["min"]), str(sizes["opt"]), str(sizes["max"]))
    parts: list[Any] = [head, tensors]
    if report["dims"]:
        parts += ["", dims]
    parts += ["", _batching(report), "", _variants(report)]
    for runtime, precision in report["decision"].items():
        parts.append(Text(f"{runtime} serves {precision}"))
    for plan in report["plans"]:
        parts.append(Text(f"plan {plan['path']} ({size_text(plan['bytes'])})"))
    for warning in report["warnings"]:
        parts.append(Text(f"{warning['code']}: {warning['message']}", style="yellow"))
    for name, variant in report["variants"].items():
        if "nodes" in variant:
            parts += ["", _nodes(name, variant["nodes"])]
    return Group(*parts)


def _batching(report: dict[str, Any]) -> Text:
    batching = report["batching"]
    text = {
        "dynamic": f"batches along '{batching['dim']}', buckets {batching['buckets']}",
        "fixed": f"batches of exactly {batching['size']}",
        "none": "requests run alone",
    }[batching["kind"]]
    for sequence in report["sequence"]:
        text += f"; '{sequence['dim']}' is padded to {sequence['buckets']}"
    return Text(text)


def _variants(report: dict[str, Any]) -> Table:
    table = Table(title="variants", title_justify="left")
    for column in ("precision", "size", "nodes", "judged on", "gate", "measured (budget)", "latency ms"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for name, variant in report["variants"].items():
        nodes = ", ".join(f"{count} {kind}" for kind, count in variant["assignment"].items())
        first = True
        for runtime in variant["gates"] or {"": None}:
            gate = variant["gates"].get(runtime)
            latency = variant["latency_ms"].get(runtime, {})
            table.add_row(
                name if first else "",
                size_text(variant["bytes"]) if first else "",
                nodes if first else "",
                runtime,
                "" if gate is None else "pass" if gate["passed"] else "refused",
                "" if gate is None else _judged(gate),
                " ".join(f"{bucket}:{milliseconds_text(ms)}" for bucket, ms in latency.items()),
            )
            first = False
    return table


def _judged(gate: dict[str, Any]) -> str:
    """Each term of the budget with what was measured: `auc@score 0.807 (>=99%)`."""
    parts = []
    for term in gate["budget"]:
        key = term.split(">=")[0].split("<=")[0]
        value = gate["metrics"].get(key)
        parts.append(term if value is None else f"{key} {value:.4g} ({term[len(key) :]})")
    return ", ".join(parts)


def _nodes(name: str, nodes: dict[str, str]) -> Table:
    table = Table("node", "computes in", title=f"{name}: weighted nodes", title_justify="left")
    for node, kind in nodes.items():
        table.add_row(Text(node), kind)
    return table


def size_text(count: int) -> str:
    """`1.44 MB`; decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count / scale:.0f} {unit}"
    return f"{count} B"


def milliseconds_text(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
