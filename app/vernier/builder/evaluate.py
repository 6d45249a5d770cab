"""Runs a graph over samples and returns its answers: the one way in which the builder gets outputs.

Graph optimizations are off, since ONNX Runtime's would fuse Q/DQ pairs in its own way and so judge
another model than the one in the file. With `as_on_gpu`, FP16 and BF16 are emulated (see
`vernier.builder.lowering.emulate`); without it a graph runs as ONNX Runtime serves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from vernier.builder import sessions
from vernier.builder.lowering.emulate import emulate
from vernier.builder.parallel import in_order, rows_each
from vernier.builder.progress import Advance
from vernier.builder.samples.data import Samples, feeds, has_no_batch_axis, rows_of
from vernier.errors import BuildError
from vernier.tensors import Array, Arrays, TensorSpec

#: Samples are run so many at a time, fewer when one sample is large.
_ROWS = 32
_BATCH_BYTES = 1 << 20

_DTYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16", "tensor(bool)": "bool",
    **{f"tensor({kind}{bits})": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}  # fmt: skip


def concatenated(parts: Sequence[Arrays]) -> Arrays:
    """The answers to several parts of the samples, one below the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Evaluator:
    """A loaded graph that can be run over any samples.

    Args:
        as_on_gpu: emulate FP16 and BF16; needs the model in memory. Otherwise `optimize` decides
            whether ONNX Runtime may rewrite the graph, as it does when serving.

    Raises:
        BuildError: ONNX Runtime refuses the graph.
    """

    def __init__(
        self,
        model: ModelProto | Path,
        *,
        as_on_gpu: bool = True,
        optimize: bool = False,
    ) -> None:
        if as_on_gpu and isinstance(model, ModelProto):
            model = emulate(model)
        self._session = sessions.load(model, optimize=optimize, what="graph")
        self.inputs = tuple(_spec(argument) for argument in self._session.get_inputs())
        self.output_names = [output.name for output in self._session.get_outputs()]

    def run(self, samples: Samples, rows: int | None = None, advance: Advance | None = None) -> Arrays:
        """Every output for every sample, samples first.

        Args:
            rows: how many samples a batch holds; by default up to 32, by their size.

        Raises:
            BuildError: a run fails, there are no samples, or an output's shape differs between batches.
        """
        if len(samples) == 0:
            raise BuildError("there are no samples to evaluate on: give at least a few dozen")
        alone = has_no_batch_axis(samples, self.inputs)
        parts: list[list[Array]] = [[] for _ in self.output_names]
        each = rows or rows_each(batch_rows(samples), len(samples))
        for outputs, count in in_order(self._answer, feeds(samples, self.inputs, each)):
            for kept, output in zip(parts, rows_of(outputs, count, alone), strict=True):
                kept.append(output)
            if advance is not None:
                advance(count)
        return {
            name: _joined(name, arrays, len(samples))
            for name, arrays in zip(self.output_names, parts, strict=True)
        }

    def _answer(self, batch: tuple[Arrays, int]) -> tuple[Sequence[Array], int]:
        feed, count = batch
        outputs = sessions.run(self._session, None, feed, "the graph failed on the evaluation data")
        return [np.asarray(output) for output in outputs], count


def run_model(
    model: ModelProto | Path, samples: Samples, *, as_on_gpu: bool = True, optimize: bool = False
) -> Arrays:
    """The outputs of a graph that is run once; see `Evaluator`."""
    return Evaluator(model, as_on_gpu=as_on_gpu, optimize=optimize).run(samples)


def batch_rows(samples: Samples) -> int:
    """How many samples to run at a time, so that a batch of inputs stays within some megabytes."""
    one = sum(array.nbytes for array in samples.take([0]).values())
    return max(1, min(_ROWS, _BATCH_BYTES // max(1, one)))


def _joined(name: str, arrays: Sequence[Array], samples: int) -> Array:
    if len({array.shape[1:] for array in arrays}) > 1 or any(array.ndim == 0 for array in arrays):
        raise BuildError(
            f"output '{name}' changes its shape from sample to sample, so variants cannot be compared: "
            f"evaluate the outputs before such a step (non-maximum suppression, say), or remove it"
        )
    joined = np.concatenate(arrays)
    if len(joined) != samples:
        raise BuildError(
            f"output '{name}' has {len(joined)} rows for {samples} samples: its first dimension must be the batch"
        )
    return joined


def _spec(argument: Any) -> TensorSpec:
    if argument.type not in _DTYPES:
        raise BuildError(
            f"input '{argument.name}' is a {argument.type}, which cannot be served: use a number type"
        )
    shape = tuple(
        d if isinstance(d, int) else str(d or f"{argument.name}_{i}") for i, d in enumerate(argument.shape)
    )
    return TensorSpec(argument.name, _DTYPES[argument.type], shape)
