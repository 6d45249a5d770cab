"""A model cut into pieces that run one after another, so that a change in one runs only what follows it.

What is measured of one node at a time (its sensitivity, its range) leaves everything before that node
as it was: the values between pieces are kept, and on average half of the model is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, ValueInfoProto, helper

from vernier.builder import sessions
from vernier.builder.graphs.graph import GraphView
from vernier.builder.graphs.shapes import specs
from vernier.builder.graphs.simplify import reads
from vernier.builder.graphs.store import copy_model
from vernier.builder.nodes.placement import quantizable_nodes, shortcut
from vernier.builder.parallel import in_order, rows_each
from vernier.builder.samples.data import Samples, Subset, feeds, has_no_batch_axis, rows_of
from vernier.errors import BuildError
from vernier.tensors import Array, Arrays

_MAX_SEGMENTS = 16
#: A cut passes through no more values than this: all of them are kept.
_MAX_LIVE = 4
#: What is kept for all samples together; where it is more, runs begin at fewer places.
_KEPT_BYTES = 512 << 20


def cut(model: ModelProto, most: int = _MAX_SEGMENTS) -> list[ModelProto]:
    """The model in at most `most` pieces of about equal work, in order; one piece where no cut is possible.

    Each has the values that it reads as inputs, and as outputs what later pieces read, besides the
    model's own. Nodes can be quantized in their piece exactly where they can in the whole. Pieces are
    copies, a single piece too: callers may change them, and `model` stays as it is.
    """
    return _pieces(model, _places(model, most)) or [copy_model(model)]


def _pieces(model: ModelProto, places: list[int]) -> list[ModelProto]:
    """The pieces that begin at `places`; none where they cannot stand for the whole."""
    if not places:
        return []
    try:
        pieces = [
            _piece(model, start, stop) for start, stop in zip([0, *places], [*places, None], strict=True)
        ]
    except KeyError:  # a value of unknown type would have to pass from one piece to the next
        return []
    found = [(n.name, n.activations, n.weight) for piece in pieces for n in quantizable_nodes(piece)]
    whole = [(n.name, n.activations, n.weight) for n in quantizable_nodes(model)]
    return pieces if found == whole else []


def _places(model: ModelProto, most: int) -> list[int]:
    """Indices of the nodes that a piece starts with."""
    view = GraphView(model)
    macs = {node.name: node.macs for node in quantizable_nodes(model)}
    total = sum(macs.values())
    last_read: dict[str, int] = {}
    apart: set[int] = set()
    for index, node in enumerate(view.nodes):
        last_read.update(dict.fromkeys(reads(node), index))
        found = shortcut(view, node)
        if found is not None:  # the sum and its convolution are quantized together
            apart.update(range(view.makers[found[1].output[0]] + 1, index + 1))
    live: set[str] = set()
    places: list[int] = []
    done = since = 0
    for index, node in enumerate(view.nodes):
        live = {name for name in live if last_read.get(name, -1) >= index}
        far = since * most >= total and done < total
        if index and far and len(live) <= _MAX_LIVE and index not in apart:
            places.append(index)
            since = 0
        live.update(name for name in node.output if name)
        own = macs.get(node.name, 0)
        done, since = done + own, since + own
    return places


def _piece(model: ModelProto, start: int, stop: int | None) -> ModelProto:
    """Nodes `start` to `stop`. KeyError when a value between pieces has no known type."""
    graph = model.graph
    nodes, later = graph.node[start:stop], graph.node[stop:] if stop is not None else []
    made = {name for node in nodes for name in node.output if name}
    read = {name for node in nodes for name in reads(node)}
    later_read = {name for node in later for name in reads(node)}
    weights = {tensor.name for tensor in graph.initializer}
    known: dict[str, ValueInfoProto] = {
        v.name: v for v in [*graph.value_info, *graph.input, *graph.output] if v.type.HasField("tensor_type")
    }
    own = {output.name for output in graph.output}
    piece = ModelProto()
    piece.CopyFrom(_bare(model))
    piece.graph.node.extend(nodes)
    piece.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in read)
    piece.graph.input.extend(known[name] for name in sorted(read - made - weights))
    piece.graph.output.extend(known[name] for name in sorted(made & (later_read | own)))
    inside = made - later_read - own
    piece.graph.value_info.extend(v for v in graph.value_info if v.name in inside)
    return piece


def _bare(model: ModelProto) -> ModelProto:
    """Everything but the graph."""
    bare = helper.make_model(helper.make_graph([], model.graph.name, [], []))
    del bare.opset_import[:]
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    bare.ir_version = model.ir_version
    return bare


@dataclass(frozen=True)
class _Batch:
    """One batch: the values that pass between pieces, and how many real samples it holds."""

    values: Arrays
    real: int


class Chain:
    """Sessions of all `pieces` of a model, and the values between them for some samples.

    Pieces may have inputs that the `whole` model lacks; `fed` brings those at each run.

    Raises BuildError when ONNX Runtime cannot load or run a piece.
    """

    def __init__(self, pieces: Sequence[ModelProto], whole: ModelProto, *, optimize: bool = False) -> None:
        self._sessions = [sessions.load(piece, optimize=optimize) for piece in pieces]
        self._outputs = [output.name for output in whole.graph.output]
        self._inputs = specs(whole.graph.input)
        self._needed = _needed(pieces, {name for piece in pieces for name in _names(piece.graph.output)})
        #: Pieces that a run may begin with.
        self._starts: list[int] = [0]
        self._batches: list[_Batch] = []
        self._alone = False

    def remember(self, samples: Samples, rows: int, fed: Mapping[str, Array] | None = None) -> Arrays:
        """Runs everything, at most `rows` samples at a time, and keeps the values between pieces.

        Between which pieces is a matter of memory. Returns what `run` does.
        """
        self._alone = has_no_batch_axis(samples, self._inputs)
        one, real = next(feeds(Subset(samples, np.zeros(1, np.int64)), self._inputs, 1))
        self._starts = self._affordable(self._pass(one, self._sessions, fed or {}), len(samples) // real)
        kept = {*self._outputs, *one, *(name for start in self._starts for name in self._needed[start])}

        def keep(batch: tuple[Arrays, int]) -> _Batch:
            values = self._pass(batch[0], self._sessions, fed or {})
            return _Batch({name: values[name] for name in kept if name in values}, batch[1])

        each = rows_each(rows, len(samples))
        self._batches = list(in_order(keep, feeds(samples, self._inputs, each)))
        return self._joined(batch.values for batch in self._batches)

    def _affordable(self, values: Arrays, times: int) -> list[int]:
        """Where runs may begin, so that what is kept stays within bounds: the places with the least first."""
        sizes = [sum(values[name].nbytes for name in names) * times for names in self._needed]
        starts, total = [0], 0
        for start in sorted(range(1, len(sizes)), key=lambda i: sizes[i]):
            total += sizes[start]
            if total <= _KEPT_BYTES:
                starts.append(start)
        return sorted(starts)

    def run(self, first: int, other: Mapping[int, Any], fed: Mapping[str, Array] | None = None) -> Arrays:
        """The outputs when pieces are replaced by `other` sessions and `first` is the first that changes.

        Output → array, samples first; arrays whose further sizes differ are flattened and cut.
        """
        begin = max(start for start in self._starts if start <= first)
        again_run = [other.get(i, s) for i, s in enumerate(self._sessions) if i >= begin]

        def again(batch: _Batch) -> Arrays:
            return self._pass(batch.values, again_run, fed or {})

        return self._joined(in_order(again, self._batches))

    @staticmethod
    def _pass(known: Arrays, chain: Sequence[Any], fed: Mapping[str, Array]) -> Arrays:
        """`known` and every value that the sessions make."""
        values = dict(known)
        for session in chain:
            names = [argument.name for argument in session.get_inputs()]
            feed = {name: fed[name] if name in fed else values[name] for name in names}
            made = [output.name for output in session.get_outputs()]
            outputs = sessions.run(session, made, feed, "the model fails on the samples")
            values.update(zip(made, outputs, strict=True))
        return values

    def _joined(self, batches: Iterable[Arrays]) -> Arrays:
        parts: list[list[Array]] = [[] for _ in self._outputs]
        for values, batch in zip(batches, self._batches, strict=True):
            found = [np.asarray(values[name]) for name in self._outputs]
            for kept, output in zip(parts, rows_of(found, batch.real, self._alone), strict=True):
                kept.append(output)
        return dict(zip(self._outputs, map(_join, parts), strict=True))


def _names(values: Iterable[ValueInfoProto]) -> list[str]:
    return [value.name for value in values]


def _needed(pieces: Sequence[ModelProto], made: set[str]) -> list[set[str]]:
    """For each piece, which values of earlier pieces a run needs that begins with it."""
    needed: list[set[str]] = []
    later: set[str] = set()
    for piece in reversed(pieces):
        later = (later - set(_names(piece.graph.output))) | (set(_names(piece.graph.input)) & made)
        needed.insert(0, set(later))
    return needed


def _join(parts: list[Array]) -> Array:
    """[samples, …]; arrays whose further sizes differ are flattened and cut to the smallest."""
    if any(part.ndim == 0 for part in parts):
        raise BuildError("an output has no batch axis, so it cannot be compared")
    if len({part.shape[1:] for part in parts}) > 1:
        parts = [part.reshape(len(part), -1) for part in parts]
        width = min(part.shape[1] for part in parts)
        parts = [part[:, :width] for part in parts]
    joined: Array = np.concatenate(parts)
    return joined
