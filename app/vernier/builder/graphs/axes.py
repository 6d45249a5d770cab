"""What a model's axes mean: sizes that run, a batch that may be joined, sequences that may be padded.

Everything here is found out by running the model, on rows of real data where there are some.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnx import ModelProto

from vernier.builder.graphs import shapes
from vernier.builder.graphs.fixed_batch import make_batch_dynamic
from vernier.builder.graphs.probe import (
    TOLERANCE,
    Probe,
    RunFailed,
    all_alike,
    fixed_rows_are_independent,
    open_session,
    rows_are_independent,
)
from vernier.builder.graphs.sequences import find_sequences
from vernier.builder.graphs.shapes import ShapeRange
from vernier.engine.base import default_buckets
from vernier.errors import BuildError
from vernier.package.manifest import Batching, DimRange, SequenceDim
from vernier.tensors import Arrays, Dim, TensorSpec

_TRIES = (16, 32, 64, 128, 224, 256, 512, 8, 4, 2, 1)


@dataclass(frozen=True)
class Wishes:
    """What the command line asks of the axes; the fields are explained at `prepare`."""

    shapes: Mapping[str, ShapeRange]
    max_batch: int | None = None
    sequence: Mapping[str, Sequence[int]] | None = None
    example: Arrays | None = None
    pad_values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Axes:
    """The outcome. `model` is another one when its fixed batch could be made dynamic."""

    model: ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, DimRange]
    batching: Batching
    sequence: tuple[SequenceDim, ...]


def examine(
    model: ModelProto,
    original: Path,
    work: Path,
    wishes: Wishes,
    notes: list[str],
    tolerance: float = TOLERANCE,
) -> Axes:
    """Runs the prepared model beside the file it came from; adds what it learns to `notes`.

    Args:
        tolerance: how far the two may differ, as a share of an output's largest value.

    Raises:
        BuildError: the model does not run, gives random answers, differs from its original, or
            cannot take a shape that was asked for.
    """
    inputs = shapes.specs(model.graph.input)
    probe = _open(model, inputs, work, wishes)
    lead = _leading(inputs)
    fixed = lead if isinstance(lead, int) and _all_lead(shapes.specs(model.graph.output), lead) else None
    rewritten = make_batch_dynamic(model, fixed) if fixed else None
    wide_inputs = shapes.specs(rewritten.graph.input) if rewritten else inputs
    given = shapes.given_ranges(wide_inputs, wishes.shapes)
    dims = _ranges(probe, inputs, given, wishes.example)
    sizes = {name: dims[name].opt for name in dims}
    _check_same(original, work, probe, inputs, sizes, wishes, notes, tolerance)

    batch, trouble = (lead, "") if isinstance(lead, str) else (None, "")
    if batch is not None:
        trouble = rows_are_independent(probe, probe, sizes, batch)
        if trouble:
            notes.append(f"requests cannot share a batch: {trouble}")
    elif rewritten is not None and fixed is not None:
        wide = _open(rewritten, wide_inputs, work, wishes)
        new_batch = str(_leading(wide_inputs))
        why_not = rows_are_independent(wide, probe, sizes, new_batch, fixed=fixed)
        if not why_not:
            notes.append(f"the batch was fixed to {fixed}; it is dynamic now, and every row keeps its answer")
            model, inputs, probe, batch, fixed = rewritten, wide_inputs, wide, new_batch, None
        elif new_batch in given and given[new_batch].max != fixed:
            raise BuildError(
                f"the model's batch is fixed to {fixed}: with another one {why_not}; export it again"
            )
        else:
            notes.append(f"the batch stays fixed to {fixed}: with another one {why_not}")

    batching = Batching(kind="none")
    if batch is not None:
        dims[batch] = _batch_range(inputs, dims, given.get(batch), wishes.max_batch)
        if not trouble:
            batching = Batching(kind="dynamic", dim=batch, buckets=default_buckets(dims[batch].max))
    elif fixed is not None and fixed_rows_are_independent(probe, sizes, fixed):
        batching = Batching(kind="fixed", size=fixed, buckets=[fixed])
    elif fixed is not None:
        notes.append(
            f"requests cannot share a batch of {fixed}: a row's answer depends on its place or on other rows"
        )
    outputs = _name_outputs(model, probe, dims, batching.dim)
    sequence = find_sequences(
        probe, inputs, outputs, dims, batching, wishes.sequence, wishes.pad_values, notes
    )
    return Axes(model, inputs, outputs, dims, batching, sequence)


def _open(model: ModelProto, inputs: Sequence[TensorSpec], work: Path, wishes: Wishes) -> Probe:
    try:
        return Probe(open_session(model, work), inputs, wishes.example)
    except RunFailed as error:
        raise _cannot_load(str(error)) from error


def _cannot_load(message: str) -> BuildError:
    """ONNX Runtime names what it does not know in one of two ways."""
    found = re.search(r"Fatal error: (\S+)\(-?\d+\) is not a registered", message) or re.search(
        r"Could not find an implementation for (\S+) node with name '([^']*)'", message
    )
    if found is None:
        return BuildError(f"ONNX Runtime cannot load the model: {message}; export it again, or fix that part")
    operator = found.group(1).split("(")[0].replace(":", "::", 1)
    where = f" (node '{found.group(2)}')" if found.lastindex == 2 else ""
    return BuildError(
        f"the model uses the operator {operator}{where}, which ONNX Runtime does not support: "
        f"export the model with standard operators, or replace that part of it"
    )


def _leading(specs: Sequence[TensorSpec]) -> Dim | None:
    """The first dimension when all inputs have the same one."""
    first = {spec.shape[0] if spec.shape else None for spec in specs}
    return next(iter(first)) if len(first) == 1 else None


def _all_lead(specs: Sequence[TensorSpec], size: int) -> bool:
    return all(spec.shape and spec.shape[0] == size for spec in specs)


def _free_dims(inputs: Sequence[TensorSpec]) -> dict[str, tuple[TensorSpec, int]]:
    """Every named dimension → where it is seen first."""
    found: dict[str, tuple[TensorSpec, int]] = {}
    for spec in inputs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                found.setdefault(dim, (spec, axis))
    return found


def _observed(spec: TensorSpec, axis: int, example: Arrays | None) -> int | None:
    """The size that real data has there; data of a model without a batch has one axis more."""
    if example is None or spec.name not in example:
        return None
    shape = example[spec.name].shape[-len(spec.shape) :]
    return shape[axis] if len(shape) == len(spec.shape) and shape[axis] > 0 else None


def _ranges(
    probe: Probe, inputs: Sequence[TensorSpec], given: Mapping[str, DimRange], example: Arrays | None
) -> dict[str, DimRange]:
    """A range that runs for every dimension but the batch, which is left at 1."""
    batch = _leading(inputs)
    sizes: dict[str, int] = {batch: 1} if isinstance(batch, str) else {}
    candidates = {}
    for dim, (spec, axis) in _free_dims(inputs).items():
        if dim in given and dim != batch:
            sizes[dim] = given[dim].opt
        elif dim != batch:
            candidates[dim] = shapes.candidate_sizes(spec, axis, _observed(spec, axis, example))
            sizes[dim] = candidates[dim][1]
    sizes = _sizes_that_run(probe, sizes, list(candidates))
    ranges = {dim: given[dim] for dim in sizes if dim in given and dim != batch}
    for dim, (smaller, _, larger) in candidates.items():
        usual = sizes[dim]
        low = next((s for s in smaller if s < usual and probe.runs(sizes | {dim: s})), usual)
        high = next((s for s in larger if s > usual and probe.runs(sizes | {dim: s})), usual)
        ranges[dim] = DimRange(min=low, opt=usual, max=high)
    for end in ("min", "max"):
        at_end = sizes | {dim: getattr(r, end) for dim, r in ranges.items() if dim in given}
        _require_run(probe, at_end, f"the {end}imum of --shape")
    if isinstance(batch, str):
        ranges[batch] = DimRange(min=1, opt=1, max=1)
    return ranges


def _sizes_that_run(probe: Probe, sizes: dict[str, int], free: Sequence[str]) -> dict[str, int]:
    if probe.runs(sizes):
        return sizes
    for size in _TRIES if free else ():
        trial = sizes | dict.fromkeys(free, size)
        if probe.runs(trial):
            return trial
    _require_run(probe, sizes, "its usual shape")
    return sizes


def _require_run(probe: Probe, sizes: Mapping[str, int], what: str) -> None:
    feeds = probe.inputs(sizes)
    try:
        probe.run(feeds)
    except RunFailed as error:
        shown = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
        hint = (
            "check --shape"
            if probe.has_example
            else "give --calibration or --eval data, so that it is tried on real rows, or --shape"
        )
        raise BuildError(f"the model does not run at {what} ({shown}): {error}; {hint}") from error


def _check_same(
    original: Path,
    work: Path,
    probe: Probe,
    inputs: Sequence[TensorSpec],
    sizes: Mapping[str, int],
    wishes: Wishes,
    notes: list[str],
    tolerance: float,
) -> None:
    """The prepared model must answer as the file does, and the file as it did before."""
    feeds = probe.inputs(sizes)
    answers = probe.run(feeds)
    try:
        source = Probe(open_session(original, work), inputs, wishes.example)
        expected = source.run(feeds)
    except RunFailed as error:
        notes.append(f"the model runs only in its prepared form, so the two could not be compared ({error})")
        return
    if not all_alike(source.run(feeds), expected):
        raise BuildError(
            "the model answers the same input differently each time, so nothing can be proven about it: "
            "export it in inference mode, without random operators"
        )
    if not all_alike(answers, expected, tolerance):
        raise BuildError(
            "the model changed its answers when its operators were brought up to date; "
            "export it again with opset 17 or later"
        )


def _batch_range(
    inputs: Sequence[TensorSpec], dims: Mapping[str, DimRange], given: DimRange | None, max_batch: int | None
) -> DimRange:
    if given is None:
        return shapes.batch_range(max_batch or shapes.default_max_batch(inputs, dims))
    if max_batch is not None and given.max != max_batch:
        raise BuildError(
            f"--max-batch {max_batch} and --shape (at most {given.max}) disagree: give one of them"
        )
    return given


def _name_outputs(
    model: ModelProto, probe: Probe, dims: Mapping[str, DimRange], batch: str | None
) -> tuple[TensorSpec, ...]:
    """Output shapes in the names of the inputs, learned by two runs where the file does not say."""
    specs = shapes.specs(model.graph.output)
    if not dims:
        return specs
    runs = []
    for step in (0, 1):
        # Sizes that differ from each other, so that each tells its dimension.
        sizes = {
            name: max(r.min, r.opt - step - 2 * place) if name != batch else 2 + step
            for place, (name, r) in enumerate(dims.items())
        }
        try:
            runs.append((sizes, probe.run(probe.inputs(sizes))))
        except RunFailed:
            return specs
    named = []
    for position, spec in enumerate(specs):
        seen = [(sizes, outputs[position].shape) for sizes, outputs in runs]
        shape: list[Dim] = []
        for axis, dim in enumerate(spec.shape if spec.shape else seen[0][1]):
            if isinstance(dim, int) and spec.shape:
                shape.append(dim)
                continue
            matching = [n for n in dims if all(len(s) > axis and sizes[n] == s[axis] for sizes, s in seen)]
            moved = [n for n in matching if len({sizes[n] for sizes, _ in seen}) > 1]
            if axis == 0 and batch in moved:
                shape.append(str(batch))
            elif dim in matching:
                shape.append(dim)
            else:
                shape.append(
                    moved[0] if len(moved) == 1 else f"{spec.name}_dim{axis}" if dim in dims else dim
                )
        named.append(TensorSpec(spec.name, spec.dtype, tuple(shape)))
    return tuple(named)
