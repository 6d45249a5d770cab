"""Finds out by running it what a model does along its axes.

Whether rows are independent, whether padding changes an answer, which sizes run: file formats claim
such things, and claims are wrong often enough. What is not confirmed here is not used: a wrong
belief about the batch axis would hand one client another client's answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import ModelProto

from vernier.builder.graphs.store import INLINE_LIMIT_BYTES, weight_bytes, write_model
from vernier.engine.ort import exact_int8, first_line
from vernier.tensors import Array, Arrays, TensorSpec, numpy_dtype

#: Two runs of the same rows may differ by this share of the output's largest value: other shapes
#: choose other kernels, which round differently.
TOLERANCE = 1e-4

#: Made-up ids are below the first of these that the model takes.
_MORE_IDS = (97, 11)


class RunFailed(Exception):
    """ONNX Runtime refused to load or run the model; the text is its first line."""


def open_session(
    model: ModelProto | Path, work: Path, threads: int = 1, optimize: bool = True
) -> ort.InferenceSession:
    """A CPU session; models too large for one message go through a file in `work`."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    exact_int8(options)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source: Any
    if isinstance(model, Path):
        source = str(model)
    elif weight_bytes(model) > INLINE_LIMIT_BYTES:
        work.mkdir(parents=True, exist_ok=True)
        source = str(write_model(model, work / "probe.onnx")[0])
    else:
        source = model.SerializeToString()
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise RunFailed(first_line(error)) from error


class Probe:
    """Runs a model on made-up inputs, or on rows of real ones.

    Args:
        example: rows of real data by input name, first axis the sample; used when it has every input.
    """

    def __init__(
        self, session: ort.InferenceSession, inputs: Sequence[TensorSpec], example: Arrays | None = None
    ) -> None:
        self._session = session
        self._inputs = inputs
        self._example = example if example and all(s.name in example for s in inputs) else None
        self.has_example = self._example is not None
        self._ids: dict[str, int] = {}
        self.output_names = [o.name for o in session.get_outputs()]

    def inputs(self, sizes: Mapping[str, int], seed: int = 0) -> Arrays:
        """Arrays of these sizes: real rows, wrapped around and cut, or small random numbers."""
        return {spec.name: self._array(spec, sizes, seed) for spec in self._inputs}

    def _array(self, spec: TensorSpec, sizes: Mapping[str, int], seed: int) -> Array:
        shape = tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
        dtype = numpy_dtype(spec.dtype)
        if self._example is not None:
            real = self._example[spec.name]
            if real.ndim == len(shape) + 1:  # the model has no batch axis: the first one counts samples
                real = real[seed % len(real)]
            if real.ndim == len(shape) and all(real.shape):
                wanted = [np.arange(size) % have for size, have in zip(shape, real.shape, strict=True)]
                if shape:  # other rows for another seed
                    wanted[0] = (np.arange(shape[0]) + seed * shape[0]) % real.shape[0]
                values = real[np.ix_(*wanted)] if shape else real
                return self._capped(spec, np.asarray(values, dtype), sizes)
        # A text's hash differs between processes; this must not.
        rng = np.random.default_rng([seed, *spec.name.encode()])
        if dtype.kind == "f":
            return rng.standard_normal(shape).astype(dtype)
        if dtype.kind == "b" or "mask" in spec.name.lower():
            return np.ones(shape, dtype)
        # Indices, ids and lengths: 1 lies inside nearly every table and every sequence.
        low, high = (1, 2) if "len" in spec.name.lower() else (0, self._ids.get(spec.name, 2))
        return rng.integers(low, high, shape).astype(dtype)

    def _capped(self, spec: TensorSpec, values: Array, sizes: Mapping[str, int]) -> Array:
        """Lengths must not pass the sequence they measure."""
        if values.dtype.kind not in "iu" or "len" not in spec.name.lower():
            return values
        longest = [sizes[d] for s in self._inputs for d in s.shape[1:] if isinstance(d, str)]
        return np.minimum(values, np.asarray(max(longest), values.dtype)) if longest else values

    def widen_ids(self, sizes: Mapping[str, int]) -> None:
        """From now on, made-up whole numbers take more values than 0 and 1, as far as each input allows.

        Where padding is a value like any other, rows that hold little else do not show what it does.
        """
        for spec in self._inputs if self._example is None else ():
            if numpy_dtype(spec.dtype).kind not in "iu":
                continue
            for high in _MORE_IDS:
                self._ids[spec.name] = high
                if self.runs(sizes):
                    break
                del self._ids[spec.name]

    def pad(self, feeds: Arrays, dim: str, size: int, values: Mapping[str, float]) -> Arrays:
        """`feeds` continued along `dim` up to `size`, with an input's value in `values` or zeros."""
        padded = {}
        for spec in self._inputs:
            array = feeds[spec.name]
            widths = [(0, size - n if d == dim else 0) for d, n in zip(spec.shape, array.shape, strict=True)]
            padded[spec.name] = np.pad(array, widths, constant_values=values.get(spec.name, 0))
        return padded

    def run(self, feeds: Arrays) -> list[Array]:
        """Outputs in graph order. Raises RunFailed."""
        try:
            return [np.asarray(o) for o in self._session.run(None, feeds)]
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise RunFailed(first_line(error)) from error

    def runs(self, sizes: Mapping[str, int]) -> bool:
        try:
            self.run(self.inputs(sizes))
        except RunFailed:
            return False
        return True


def alike(left: Array, right: Array, tolerance: float = TOLERANCE) -> bool:
    """Equal in shape and, up to rounding, in values; NaN equals NaN."""
    if left.shape != right.shape:
        return False
    if left.dtype.kind != "f":
        return bool(np.array_equal(left, right))
    if not np.array_equal(np.isfinite(left), np.isfinite(right)):
        return False
    a, b = (np.where(np.isfinite(x), x, 0).astype(np.float64) for x in (left, right))
    scale = max(float(np.abs(b).max(initial=0.0)), 1e-6)
    return bool(np.abs(a - b).max(initial=0.0) <= tolerance * scale)


def all_alike(left: Sequence[Array], right: Sequence[Array], tolerance: float = TOLERANCE) -> bool:
    return len(left) == len(right) and all(alike(a, b, tolerance) for a, b in zip(left, right, strict=True))


def rows_are_independent(
    probe: Probe, alone: Probe, sizes: Mapping[str, int], batch: str, fixed: int = 1
) -> str:
    """Compares three rows in one batch with the same rows in batches of their own.

    Args:
        probe: the model with the dynamic dimension `batch`.
        alone: the model that gives the rows' own answers; it takes batches of `fixed`.
    Returns an empty text when every row got its own answer, else what went wrong.
    """
    rows = 3 * fixed
    feeds = probe.inputs({**sizes, batch: rows})
    try:
        together = probe.run(feeds)
        for output, name in zip(together, probe.output_names, strict=True):
            if output.ndim == 0 or output.shape[0] != rows:
                return f"output '{name}' has no batch axis: it is {list(output.shape)} for a batch of {rows}"
        for start in range(0, rows, fixed):
            part = {name: array[start : start + fixed] for name, array in feeds.items()}
            own = alone.run(part)
            if not all_alike([o[start : start + fixed] for o in together], own):
                return "a row's answer depends on the other rows of its batch"
    except RunFailed as error:
        return f"it does not run with a batch of {rows}: {error}"
    return ""


def fixed_rows_are_independent(probe: Probe, sizes: Mapping[str, int], rows: int) -> bool:
    """Whether a row of a batch of fixed size keeps its answer among other rows and in another place."""
    one, other = probe.inputs(sizes, seed=0), probe.inputs(sizes, seed=1)
    try:
        expected = probe.run(one)
        for row in range(min(rows, 3)):
            place = (row + 1) % rows
            mixed = {name: array.copy() for name, array in other.items()}
            for name, array in one.items():
                mixed[name][place] = array[row]
            moved = probe.run(mixed)
            if not all_alike([o[place] for o in moved], [o[row] for o in expected]):
                return False
    except RunFailed:
        return False
    return True


def padding_is_harmless(
    probe: Probe,
    sizes: Mapping[str, int],
    dim: str,
    lengths_input: str | None,
    crop: Mapping[str, int],
    largest: int,
    pad_values: Mapping[str, float],
) -> bool:
    """Whether padding along `dim` leaves the (cropped) answers as they are.

    Args:
        crop: output name → axis of `dim` in it.
        largest: the most that `dim` may be.
        pad_values: input name → what it is padded with, where that is not 0.
    """
    size = sizes[dim]
    probe.widen_ids(sizes)
    longer_sizes = {min(size + 3, largest), min(2 * size + 1, largest)} - {size}
    for longer in sorted(longer_sizes):
        feeds = probe.inputs(sizes, seed=longer)
        if lengths_input is not None:
            feeds[lengths_input] = np.full_like(feeds[lengths_input], size)
        try:
            plain, wide = probe.run(feeds), probe.run(probe.pad(feeds, dim, longer, pad_values))
        except RunFailed:
            return False
        for position, name in enumerate(probe.output_names):
            if name in crop:
                wide[position] = np.take(wide[position], np.arange(size), axis=crop[name])
        if not all_alike(wide, plain):
            return False
    return bool(longer_sizes)
