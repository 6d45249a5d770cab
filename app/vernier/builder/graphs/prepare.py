"""Turns any ONNX file into the form that quantization, TensorRT and the service expect, and proves it equal.

The order matters: old opsets are raised before anything is folded, shapes are inferred before shape
computations are folded, and the batch axis is examined last, on the finished graph, by running it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto

from vernier.builder.graphs import opset, shapes, simplify
from vernier.builder.graphs.axes import Wishes, examine
from vernier.builder.graphs.batchnorm import fold_batch_norms
from vernier.builder.graphs.opset_lower import lower_opset
from vernier.builder.graphs.probe import TOLERANCE
from vernier.builder.graphs.shapes import ShapeRange
from vernier.builder.graphs.store import all_graphs, read_model
from vernier.builder.graphs.widen import widen
from vernier.errors import BuildError
from vernier.package.manifest import Batching, DimRange, SequenceDim
from vernier.tensors import Arrays, TensorSpec

#: Readers in the field end here: ONNX Runtime 1.18, TensorRT 10.
MAX_IR_VERSION = 10
_MIN_IR_VERSION = 8
WIDENED = (
    "the model was narrower than FP32; its weights are FP32 now, and each variant narrows them by itself"
)
#: A model that came in FP16 or BF16 rounds after every node where its FP32 form does not.
HALF_TOLERANCE = 0.05


@dataclass(frozen=True)
class PreparedModel:
    """A model whose form and behaviour are known.

    model: opset 17 where its operators allow it, shapes inferred, constants folded into initializers,
        BatchNormalization folded into weights, every node named; weights are held in `raw_data`.
    inputs, outputs: in graph order, dynamic dimensions named.
    dims: the range of every named dimension of the inputs.
    notes: what was changed or found out, for the report.
    """

    model: ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, DimRange]
    batching: Batching
    sequence: tuple[SequenceDim, ...]
    source_sha256: str
    notes: tuple[str, ...]


def prepare(
    path: Path,
    shapes_given: Mapping[str, ShapeRange],
    work: Path,
    *,
    max_batch: int | None = None,
    sequence: Mapping[str, Sequence[int]] | None = None,
    pad_values: Mapping[str, float] | None = None,
    example: Arrays | None = None,
) -> PreparedModel:
    """Reads, cleans and examines the model at `path`.

    Args:
        shapes_given: `--shape` by input name.
        work: a folder for large temporary files.
        max_batch: the largest batch, where the model's batch is dynamic and no shape says so.
        sequence: the buckets wanted per sequence dimension; an empty mapping wants none, None lets
            every dimension be padded whose padding proves harmless.
        pad_values: what inputs of dynamic length are padded with, by input name; 0 for the others.
        example: some rows of real data by input name; the model is examined on them rather than on
            random numbers, and unnamed sizes are learned from them.

    Raises:
        BuildError: the file is not a whole ONNX model, or one that cannot be served.
    """
    model, source_sha256 = read_model(path)
    notes: list[str] = []
    model = clean(model, shapes_given, notes)
    _require_known_operators(model)
    wishes = Wishes(shapes_given, max_batch, sequence, example, pad_values or {})
    axes = examine(model, path, work, wishes, notes, HALF_TOLERANCE if WIDENED in notes else TOLERANCE)
    return PreparedModel(
        model=axes.model,
        inputs=axes.inputs,
        outputs=axes.outputs,
        dims=axes.dims,
        batching=axes.batching,
        sequence=axes.sequence,
        source_sha256=source_sha256,
        notes=tuple(notes),
    )


def clean(model: ModelProto, shapes_given: Mapping[str, ShapeRange], notes: list[str]) -> ModelProto:
    """The part that needs no run: one opset, one form for constants, shapes, names. Adds to `notes`."""
    before = opset.opset_of(model)
    model.ir_version = max(_MIN_IR_VERSION, min(model.ir_version, MAX_IR_VERSION))
    if model.functions:
        model = simplify.inline_functions(model)
        notes.append("the model's own functions were inlined")
    graph = model.graph
    del model.training_info[:]
    if dropped := simplify.drop_initializer_inputs(graph):
        notes.append(f"{dropped} weights were listed as inputs too and are no longer")
    shapes.check_types(graph)
    shapes.state_shapes(graph, shapes_given)
    notes.extend(shapes.name_dims(graph))
    _drop_unused_opsets(model, notes)
    simplify.constants_to_initializers(graph)
    simplify.infer_shapes(model)
    if before < opset.TARGET_OPSET:
        opset.raise_opset(model, opset.TARGET_OPSET)
    elif before > opset.TARGET_OPSET:
        lower_opset(model, range(opset.TARGET_OPSET, before))
    after = opset.opset_of(model)
    if after != before:
        notes.append(f"opset {before} became {after}")
    if widen(model):
        notes.append(WIDENED)
    simplify.drop_no_ops(graph)
    simplify.drop_unused(graph)
    simplify.infer_shapes(model)
    if folded := simplify.fold_constants(model):
        notes.append(f"{folded} nodes that depend on constants only were folded")
        simplify.infer_shapes(model)
    if folded := fold_batch_norms(model):
        notes.append(f"{folded} BatchNormalization nodes were folded into the weights before them")
        simplify.infer_shapes(model)
    simplify.name_nodes(model)
    return model


def _drop_unused_opsets(model: ModelProto, notes: list[str]) -> None:
    """Some exporters import domains that no node uses, and strict parsers refuse the model for it."""
    used = {_domain(node.domain) for graph in all_graphs(model.graph) for node in graph.node} | {""}
    versions: dict[str, int] = {}
    for entry in model.opset_import:
        domain = _domain(entry.domain)
        if domain not in used:
            notes.append(f"the unused operator set '{domain}' was dropped")
        else:
            versions[domain] = max(entry.version, versions.get(domain, 0))
    if not versions.get(""):
        versions[""] = opset.TARGET_OPSET
    del model.opset_import[:]
    model.opset_import.extend(
        onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()
    )


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _require_known_operators(model: ModelProto) -> None:
    """Raises BuildError for operators that belong to no operator set known here."""
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    for graph in all_graphs(model.graph):
        for node in graph.node:
            # Other domains (com.microsoft, a plugin's) are for ONNX Runtime to judge.
            if _domain(node.domain) == "" and node.op_type not in known:
                raise _unsupported(node.op_type, "ai.onnx", node.name)


def _unsupported(operator: str, domain: str, node: str) -> BuildError:
    return BuildError(
        f"the model uses the operator {domain}::{operator} (node '{node}'), which ONNX Runtime does not support: "
        f"export the model with standard operators, or replace that part of it"
    )
