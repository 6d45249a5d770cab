"""Runs a model and shows the values inside it, batch by batch, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from onnx import ModelProto, TensorProto, helper

from vernier.builder import sessions
from vernier.builder.graphs.shapes import specs
from vernier.builder.graphs.store import copy_model
from vernier.builder.parallel import AT_ONCE, in_order
from vernier.builder.samples.data import Samples, Subset, feeds
from vernier.tensors import Array, Arrays

Digest = TypeVar("Digest")

#: What the values of all batches in memory may take, in bytes.
BATCH_BYTES = 256 << 20
_MAX_ROWS = 64


class IntermediateOutputs:
    """A session that returns the float values `names` of the top-level graph.

    Raises BuildError when ONNX Runtime cannot load the model.
    """

    def __init__(self, model: ModelProto, names: Iterable[str]) -> None:
        self._specs = specs(model.graph.input)
        inputs = {spec.name for spec in self._specs}
        wanted = list(dict.fromkeys(names))
        self._fed = [name for name in wanted if name in inputs]
        self._made = [name for name in wanted if name not in inputs]
        exposed = copy_model(model)
        del exposed.graph.output[:]
        exposed.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self._made
        )
        if not self._made:  # a graph needs an output
            exposed.graph.output.extend(model.graph.output[:1])
        self._session = sessions.load(exposed, optimize=True)

    def _run(self, feed: Arrays) -> Arrays:
        values = {name: feed[name] for name in self._fed}
        if self._made:
            outputs = sessions.run(self._session, self._made, feed, "the model fails on the calibration data")
            values.update(zip(self._made, outputs, strict=True))
        return values

    def rows(self, samples: Samples, limit_bytes: int = BATCH_BYTES) -> int:
        """How many samples fit in one batch, judged by a run of the first."""
        feed, count = next(feeds(_first(samples), self._specs, 1))
        values = self._run(feed)
        size = sum(array.nbytes for array in [*values.values(), *feed.values()]) // max(count, 1)
        return max(1, min(_MAX_ROWS, limit_bytes // (AT_ONCE * max(size, 1))))

    def digests(
        self, samples: Samples, rows: int, digest: Callable[[Arrays, int, int], Digest]
    ) -> Iterator[tuple[Digest, int]]:
        """What `digest` makes of each batch, and how many samples the batch holds, in order.

        Batches are run and digested beside one another: `digest` gets value name → array, the number of
        samples and the batch's index, and changes nothing outside.
        """

        def run(numbered: tuple[int, tuple[Arrays, int]]) -> tuple[Digest, int]:
            index, (feed, count) = numbered
            return digest(self._run(feed), count, index), count

        yield from in_order(run, enumerate(feeds(samples, self._specs, rows)))


def _first(samples: Samples) -> Samples:
    return Subset(samples, np.zeros(1, np.int64))


def evenly(count: int, most: int) -> Array:
    """At most `most` of the indices below `count`, evenly spread and in order."""
    if count <= most:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, most).round().astype(np.int64))
