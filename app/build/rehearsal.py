"""A model whose activations are quantized at will from run to run, without loading it anew.

Every activation passes through a branch: with a scale it goes through a Q/DQ pair, without one it is
left alone. ONNX Runtime runs only the branch that is taken, so what is off costs one copy.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from app.build.data import Samples, feeds, has_no_batch_axis, rows_of
from app.build.opset import value_names
from app.build.placement import QuantizableNode
from app.build.probe import RunFailed, open_session
from app.build.shapes import specs
from app.errors import BuildError
from app.tensors import Array, Arrays

_ZERO = "vernier.rehearsal.zero"


class Rehearsal:
    """`model` with a switch at every activation that `nodes` would read quantized.

    Raises BuildError when ONNX Runtime cannot load the result.
    """

    def __init__(self, model: ModelProto, nodes: Iterable[QuantizableNode]) -> None:
        chosen = {node.name: set(node.activations) for node in nodes}
        self.activations = tuple(dict.fromkeys(a for names in chosen.values() for a in sorted(names)))
        self._specs = specs(model.graph.input)
        taken = value_names(model)
        self._scales = {a: _fresh(f"scale of {a}", taken) for a in self.activations}
        switched = {a: _fresh(f"{a} or quantized", taken) for a in self.activations}
        copy = ModelProto()
        copy.CopyFrom(model)
        graph = copy.graph
        graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), _ZERO))
        for name in self._scales.values():
            graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
        made = {output for node in model.graph.node for output in node.output}
        nodes_out = [
            n for a in self.activations if a not in made for n in _switch(a, self._scales[a], switched[a])
        ]
        for node in graph.node:
            own = chosen.get(node.name, set())
            for position, name in enumerate(node.input):
                if name in own:
                    node.input[position] = switched[name]
            nodes_out.append(node)
            for name in node.output:
                if name in switched:
                    nodes_out.extend(_switch(name, self._scales[name], switched[name]))
        kept = []
        for node in nodes_out:
            kept.append(NodeProto())
            kept[-1].CopyFrom(node)
        del graph.node[:]
        graph.node.extend(kept)
        with tempfile.TemporaryDirectory(prefix="vernier-rehearsal-") as work:
            try:
                self._session = open_session(copy, Path(work), threads=os.cpu_count() or 1)
            except RunFailed as error:
                raise BuildError(f"ONNX Runtime cannot load the model: {error}") from error
        self._float_outputs = [
            o.name for o in model.graph.output if o.type.tensor_type.elem_type == TensorProto.FLOAT
        ]

    def run(self, samples: Samples, rows: int, scales: Mapping[str, float]) -> Arrays:
        """Float outputs for every sample; activations without a scale in `scales` stay in FP32.

        Raises BuildError when there is nothing to compare: no float output, or one whose size depends on
        the data.
        """
        if not self._float_outputs:
            raise BuildError("the model has no float output to compare")
        fed = {name: np.array(scales.get(a, 0.0), np.float32) for a, name in self._scales.items()}
        alone = has_no_batch_axis(samples, self._specs)
        parts: list[list[Array]] = [[] for _ in self._float_outputs]
        for feed, count in feeds(samples, self._specs, rows):
            outputs = self._session.run(self._float_outputs, {**feed, **fed})
            for kept, output in zip(parts, rows_of(outputs, count, alone), strict=True):
                if output.ndim == 0 or len(output) != count or not output.size:
                    raise BuildError("an output's size depends on the data, so it cannot be compared")
                kept.append(output)
        return {n: _flat(p) for n, p in zip(self._float_outputs, parts, strict=True)}


def _flat(parts: list[Array]) -> Array:
    """[samples, elements]; outputs whose size changes from batch to batch are cut to the smallest."""
    flat = [p.reshape(len(p), -1) for p in parts]
    width = min(p.shape[1] for p in flat)
    joined: Array = np.concatenate([p[:, :width] for p in flat])
    return joined


def _fresh(hint: str, taken: set[str]) -> str:
    while hint in taken:
        hint += "_"
    taken.add(hint)
    return hint


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
