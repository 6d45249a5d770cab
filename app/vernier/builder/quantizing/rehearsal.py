"""A model whose activations are quantized at will from run to run, without loading it anew.

Every activation passes through a branch: with a scale it goes through a Q/DQ pair, without one it is
left alone. ONNX Runtime runs only the branch that is taken, so what is off costs one copy. What comes before the
first activation that is quantized is not run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vernier.builder.graphs.opset import value_names
from vernier.builder.graphs.simplify import keep_nodes
from vernier.builder.graphs.store import unused_name
from vernier.builder.nodes.placement import QuantizableNode
from vernier.builder.nodes.segments import Chain, cut
from vernier.builder.samples.data import Samples
from vernier.errors import BuildError
from vernier.tensors import Arrays

_ZERO = "vernier.qdq.zero"


class SwitchableQdq:
    """`model` with a switch at every activation that `nodes` would read quantized.

    Raises BuildError when ONNX Runtime cannot load the result.
    """

    def __init__(self, model: ModelProto, nodes: Iterable[QuantizableNode]) -> None:
        chosen = {node.name: set(node.activations) for node in nodes}
        self.activations = tuple(dict.fromkeys(a for names in chosen.values() for a in sorted(names)))
        taken = value_names(model)
        self._scales = {a: unused_name(f"scale of {a}", taken) for a in self.activations}
        switched = {a: unused_name(f"{a} or quantized", taken) for a in self.activations}
        pieces = cut(model)
        #: Activation → the first piece that has a switch for it.
        self._first: dict[str, int] = {}
        for index, piece in enumerate(pieces):
            for name in _add_switches(piece, chosen, self._scales, switched):
                self._first.setdefault(name, index)
        self._chain = Chain(pieces, model, optimize=True)
        self._float_outputs = [
            o.name for o in model.graph.output if o.type.tensor_type.elem_type == TensorProto.FLOAT
        ]

    def remember(self, samples: Samples, rows: int) -> Arrays:
        """Runs in FP32, at most `rows` samples at a time, what `run` will run again.

        Returns the float outputs, [samples, elements]. Raises BuildError when there is nothing to compare:
        no float output, or one whose size depends on the data.
        """
        if not self._float_outputs:
            raise BuildError("the model has no float output to compare")
        return self._compared(self._chain.remember(samples, rows, self._fed({})), len(samples))

    def run(self, scales: Mapping[str, float]) -> Arrays:
        """The same with these activations quantized; those without a scale stay in FP32."""
        first = min((self._first[a] for a in scales if a in self._first), default=0)
        outputs = self._chain.run(first, {}, self._fed(scales))
        return self._compared(outputs, len(next(iter(outputs.values()))))

    def _fed(self, scales: Mapping[str, float]) -> Arrays:
        return {name: np.array(scales.get(a, 0.0), np.float32) for a, name in self._scales.items()}

    def _compared(self, outputs: Arrays, samples: int) -> Arrays:
        found = {name: outputs[name] for name in self._float_outputs}
        if any(len(array) != samples or not array.size for array in found.values()):
            raise BuildError("an output's size depends on the data, so it cannot be compared")
        return {name: array.reshape(samples, -1) for name, array in found.items()}


def _add_switches(
    piece: ModelProto,
    chosen: Mapping[str, set[str]],
    scales: Mapping[str, str],
    switched: Mapping[str, str],
) -> list[str]:
    """Lets the nodes `chosen` read their activations through a switch, in place; returns these activations."""
    graph = piece.graph
    read = dict.fromkeys(a for n in graph.node for a in n.input if a in chosen.get(n.name, ()))
    made = {output for node in graph.node for output in node.output}
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), _ZERO))
    graph.input.extend(helper.make_tensor_value_info(scales[a], TensorProto.FLOAT, []) for a in read)
    nodes = [n for a in read if a not in made for n in _switch(a, scales[a], switched[a])]
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in chosen.get(node.name, ()):
                node.input[position] = switched[name]
        nodes.append(node)
        for name in node.output:
            if name in read:
                nodes.extend(_switch(name, scales[name], switched[name]))
    keep_nodes(graph, nodes)
    return list(read)


def _switch(name: str, scale: str, out: str) -> list[NodeProto]:
    """out = scale > 0 ? dequantize(quantize(name)) : name."""
    on = f"{out}: on"
    quantized, plain = f"{out}: quantized", f"{out}: plain"
    body = [
        helper.make_node("QuantizeLinear", [name, scale, _ZERO], [f"{out}: int8"]),
        helper.make_node("DequantizeLinear", [f"{out}: int8", scale, _ZERO], [quantized]),
    ]
    result = helper.make_tensor_value_info(quantized, TensorProto.FLOAT, None)
    branch = helper.make_graph(body, "quantized", [], [result])
    result = helper.make_tensor_value_info(plain, TensorProto.FLOAT, None)
    other = helper.make_graph([helper.make_node("Identity", [name], [plain])], "plain", [], [result])
    return [
        helper.make_node("Cast", [scale], [on], to=TensorProto.BOOL),
        helper.make_node("If", [on], [out], then_branch=branch, else_branch=other),
    ]


def damage(reference: Arrays, outputs: Arrays) -> float:
    """How far outputs are off: their error in units of each output's own spread.

    Per sample, the largest of the outputs' RMS errors; over samples the fourth-power mean, in which an error
    that breaks one answer weighs more than the same amount spread over all of them, and which, unlike
    the worst sample alone, is much the same on other samples.
    """
    worst = np.zeros(1)
    for name, expected in reference.items():
        spread = float(np.std(expected, dtype=np.float64)) or 1.0
        off = outputs[name].astype(np.float64) - expected
        off = np.where(np.isfinite(off), off, np.where(np.isfinite(expected), np.inf, 0.0))
        per_sample = np.sqrt(np.mean(np.square(off), axis=1)) / spread if off.size else np.zeros(len(off))
        worst = np.maximum(worst, per_sample)
    return float(np.mean(worst**4) ** 0.25)
