"""Takes out of a graph what does not depend on its inputs or does nothing.

Constants become initializers, because quantization recognises a weight by that alone; constant
branches are run once, here, by ONNX Runtime itself, so that the folded value is the one that the
model would have computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vernier.builder.graphs.probe import open_session
from vernier.builder.graphs.store import all_graphs, copy_node, skeleton, subgraphs, unused_name

#: Their answers differ from run to run.
RANDOM = {
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"),
}
#: Folding them would undo a quantization that the model brought with it.
_QUANTIZED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
#: A folded value may take this much, or twice the constants that it came from.
_FOLD_LIMIT_BYTES = 1 << 20


def reads(node: NodeProto) -> Iterable[str]:
    """The values that a node reads, those inside its subgraphs included."""
    yield from (name for name in node.input if name)
    for body in subgraphs(node):
        for inner in body.node:
            yield from reads(inner)
        yield from (output.name for output in body.output)


def uses(graph: GraphProto) -> Counter[str]:
    """How often each value is read; being a graph output counts as once."""
    counts = Counter(name for node in graph.node for name in reads(node))
    counts.update(output.name for output in graph.output)
    return counts


def keep_nodes(graph: GraphProto, nodes: Iterable[NodeProto]) -> None:
    """Replaces the node list of `graph`."""
    kept = [copy_node(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def infer_shapes(model: ModelProto) -> None:
    """Writes what ONNX's shape inference finds into `model.graph.value_info` and into bare outputs."""
    small = skeleton(model)
    del small.graph.value_info[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(small, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError):
        return  # wrong shape claims surface when the model runs; then ONNX Runtime names the node
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred.graph.value_info)
    for mine, found in zip(model.graph.output, inferred.graph.output, strict=True):
        mine.type.CopyFrom(found.type)


def inline_functions(model: ModelProto) -> ModelProto:
    """Replaces calls of the model's own functions by their bodies."""
    if not model.functions:
        return model
    weights = {t.name: t for t in model.graph.initializer}
    flat: ModelProto = onnx.inliner.inline_local_functions(skeleton(model), convert_version=True)
    for tensor in flat.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL and tensor.name in weights:
            tensor.CopyFrom(weights[tensor.name])
    return flat


def constants_to_initializers(graph: GraphProto) -> None:
    """Turns Constant nodes and sparse initializers of the outer graph into plain initializers."""
    kept = []
    for node in graph.node:
        tensor = _constant_of(node) if node.op_type == "Constant" else None
        if tensor is None:
            kept.append(node)
            continue
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
    keep_nodes(graph, kept)
    for sparse in graph.sparse_initializer:
        values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
        dense = np.zeros(tuple(sparse.dims), values.dtype)
        flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), dense.shape)
        dense.reshape(-1)[flat] = values
        graph.initializer.append(numpy_helper.from_array(dense, sparse.values.name))
    del graph.sparse_initializer[:]


def _constant_of(node: NodeProto) -> TensorProto | None:
    attribute = node.attribute[0]
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        if value.data_type == TensorProto.STRING:
            return None
        return numpy_helper.from_array(numpy_helper.to_array(value))
    dtypes = {
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }
    if attribute.name in dtypes:
        return numpy_helper.from_array(np.asarray(value, dtypes[attribute.name]))
    return None


def drop_initializer_inputs(graph: GraphProto) -> int:
    """Old exporters list every weight among the inputs too. Returns how many were taken off."""
    weights = {t.name for t in graph.initializer}
    inputs = [i for i in graph.input if i.name not in weights]
    dropped = len(graph.input) - len(inputs)
    if dropped:
        kept = [onnx.ValueInfoProto.FromString(i.SerializeToString()) for i in inputs]
        del graph.input[:]
        graph.input.extend(kept)
    return dropped


def drop_no_ops(graph: GraphProto) -> None:
    """Removes Identity, inference-time Dropout and casts of a type to itself."""
    types = {v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.value_info, *graph.output]}
    types.update({t.name: t.data_type for t in graph.initializer})
    fixed = (
        {i.name for i in graph.input} | {t.name for t in graph.initializer} | {o.name for o in graph.output}
    )
    counts = uses(graph)
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        if not _is_no_op(node, types, counts):
            kept.append(node)
            continue
        source, result = renamed.get(node.input[0], node.input[0]), node.output[0]
        if result not in {o.name for o in graph.output}:
            renamed[result] = source
        elif source in fixed:
            kept.append(node)
        else:
            # The producer takes the output's name; whoever read the producer reads the output instead.
            renamed[source] = result
            fixed.add(result)
    rename_values(kept, renamed)
    keep_nodes(graph, kept)


def _is_no_op(node: NodeProto, types: dict[str, int], counts: Counter[str]) -> bool:
    if node.domain not in ("", "ai.onnx") or not node.input or not node.input[0]:
        return False
    if node.op_type == "Identity":
        return True
    if node.op_type == "Dropout":
        return len(node.input) < 3 and not any(counts[o] for o in node.output[1:])
    if node.op_type == "Cast":
        to = next((a.i for a in node.attribute if a.name == "to"), 0)
        return bool(to) and types.get(node.input[0]) == to
    return False


def rename_values(nodes: Iterable[NodeProto], renamed: Mapping[str, str]) -> None:
    """Gives values other names, inside subgraphs too; a new name may be renamed in turn."""

    def final(name: str) -> str:
        seen = set()
        while name in renamed and name not in seen:
            seen.add(name)
            name = renamed[name]
        return name

    for node in nodes:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                names[position] = final(name)
        for body in subgraphs(node):
            rename_values(body.node, renamed)
            for output in body.output:
                output.name = final(output.name)


def drop_unused(graph: GraphProto) -> None:
    """Removes nodes and initializers from which no output can be reached."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if any(output in needed for output in node.output):
            kept.append(node)
            needed.update(reads(node))
    if len(kept) != len(graph.node):
        keep_nodes(graph, reversed(kept))
    for position in reversed(range(len(graph.initializer))):
        if graph.initializer[position].name not in needed:
            del graph.initializer[position]


def _static_shape(graph: GraphProto) -> dict[str, list[int]]:
    found = {}
    for value in [*graph.input, *graph.value_info]:
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(
            d.HasField("dim_value") and d.dim_value > 0 for d in kind.shape.dim
        ):
            found[value.name] = [d.dim_value for d in kind.shape.dim]
    return found


def fold_constants(model: ModelProto) -> int:
    """Runs what depends on constants only and stores the results. Returns how many nodes went.

    Shapes must have been inferred: a Shape of a fixed size is a constant too.
    """
    graph = model.graph
    weights = {t.name: t for t in graph.initializer}
    outputs = {o.name for o in graph.output}
    static = _static_shape(graph)
    known = set(weights)
    shapes: set[str] = set()
    folded: list[NodeProto] = []
    for node in graph.node:
        if any(o in outputs for o in node.output) or node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "Shape" and node.input[0] in static and not node.attribute:
            graph.initializer.append(
                numpy_helper.from_array(np.asarray(static[node.input[0]], np.int64), node.output[0])
            )
            weights[node.output[0]] = graph.initializer[-1]
            shapes.add(node.output[0])
        elif (
            node.op_type in RANDOM | _QUANTIZED
            or any(True for _ in subgraphs(node))
            or not all(name in known for name in node.input if name)
        ):
            continue
        else:
            folded.append(node)
        known.update(node.output)
    stored: set[str] = set()
    if folded:
        limit = max(
            _FOLD_LIMIT_BYTES, 2 * sum(_bytes(weights, n) for node in folded for n in set(node.input))
        )
        for name, value in _run(model, folded, weights).items():
            if value.nbytes <= limit:
                graph.initializer.append(numpy_helper.from_array(value, name))
                stored.add(name)
    gone = stored | shapes
    if gone:
        keep_nodes(
            graph, [n for n in graph.node if not n.output or not all(o in gone or not o for o in n.output)]
        )
        drop_unused(graph)
    return len(folded) + len(shapes)


def _bytes(weights: dict[str, TensorProto], name: str) -> int:
    return len(weights[name].raw_data) if name in weights else 0


def _run(model: ModelProto, nodes: list[NodeProto], weights: dict[str, TensorProto]) -> dict[str, np.ndarray]:
    """Runs `nodes` alone, fed with the weights that they read, and returns every value that others need."""
    inner = {o for node in nodes for o in node.output if o}
    first_outputs = {node.output[0] for node in nodes}
    others = [node for node in model.graph.node if not node.output or node.output[0] not in first_outputs]
    wanted = sorted(inner & {name for node in others for name in reads(node)})
    feeds = {
        n: numpy_helper.to_array(weights[n]) for node in nodes for n in node.input if n and n not in inner
    }
    graph = helper.make_graph(
        nodes,
        "constants",
        [helper.make_tensor_value_info(n, weights[n].data_type, list(weights[n].dims)) for n in feeds],
        [onnx.ValueInfoProto(name=n) for n in wanted],
    )
    small = helper.make_model(
        graph, opset_imports=list(model.opset_import), ir_version=min(model.ir_version, 10)
    )
    try:
        session = open_session(small, Path(), optimize=False)
        return dict(zip(wanted, session.run(wanted, feeds), strict=True))
    except Exception:  # ONNX Runtime's errors share no base; unfolded constants are still right
        return {}


def name_nodes(model: ModelProto) -> None:
    """Gives every node, those of subgraphs included, a name of its own."""
    taken: set[str] = set()
    for graph in all_graphs(model.graph):
        for node in graph.node:
            hint = node.name or f"{node.op_type}_{node.output[0] if node.output else ''}"
            node.name = unused_name(hint, taken)
