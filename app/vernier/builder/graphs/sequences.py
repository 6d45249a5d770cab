"""Finds the dimensions, such as a clip's frames, along which requests may be padded to share a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vernier.builder.graphs.probe import Probe, padding_is_harmless
from vernier.errors import BuildError
from vernier.package.manifest import Batching, DimRange, SequenceDim
from vernier.tensors import TensorSpec, numpy_dtype

_SMALLEST_BUCKET = 16


def default_sequence_buckets(sizes: DimRange) -> list[int]:
    """16, 32, 64 … up to and including the largest size."""
    buckets = []
    size = max(_SMALLEST_BUCKET, sizes.min)
    while size < sizes.max:
        buckets.append(size)
        size *= 2
    return [*buckets, sizes.max]


def find_sequences(
    probe: Probe,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    dims: Mapping[str, DimRange],
    batching: Batching,
    wanted: Mapping[str, Sequence[int]] | None,
    pad_values: Mapping[str, float],
    notes: list[str],
) -> tuple[SequenceDim, ...]:
    """The dimensions whose padding leaves every answer as it is.

    Args:
        pad_values: from `--pad-value`: input name → what it is padded with; 0 for the others.
        wanted: buckets per dimension from `--sequence` (no buckets: the default ones); None looks at
            every dimension, an empty mapping at none.

    Raises:
        BuildError: a wanted dimension does not exist, or padding it changes answers.
    """
    free = [d for d in dims if d != batching.dim]
    for name in wanted or {}:
        if name not in free:
            raise BuildError(
                f"--sequence names '{name}', but the model has {', '.join(free) or 'no dynamic dimension'}"
            )
    _check_pad_values(inputs, free, pad_values)
    found: list[SequenceDim] = []
    if batching.kind == "none":
        return ()
    sizes = {name: r.opt for name, r in dims.items()}
    if batching.dim is not None:
        sizes[batching.dim] = 2
    for dim in free if wanted is None else wanted:
        lengths, mask = _lengths_input(inputs, batching), _mask_input(inputs, dim, batching)
        crop = {o.name: o.shape.index(dim) for o in outputs if dim in o.shape}
        # In the middle of the range, so that there is room for padding.
        middle = max(dims[dim].min, dims[dim].opt // 2)
        own = {s.name: pad_values[s.name] for s in inputs if dim in s.shape and s.name in pad_values}
        padded_with = _padded_with(own)
        if padding_is_harmless(probe, sizes | {dim: middle}, dim, lengths, crop, dims[dim].max, own):
            buckets = sorted(set((wanted or {}).get(dim) or default_sequence_buckets(dims[dim])))
            if not dims[dim].min <= buckets[0] <= buckets[-1] <= dims[dim].max:
                raise BuildError(f"--sequence {dim}: buckets must lie in {dims[dim].min} to {dims[dim].max}")
            found.append(
                SequenceDim(
                    dim=dim,
                    buckets=buckets,
                    pad_values=own,
                    crop_outputs=bool(crop),
                    lengths_input=lengths,
                    mask_input=mask,
                )
            )
            notes.append(
                f"padding '{dim}' with {padded_with} changes no answer: requests of any length share batches"
            )
        elif wanted is not None:
            raise BuildError(
                f"--sequence {dim}: padding with {padded_with} changes the answers; mask the padding inside the "
                f"model (with a lengths or mask input), name what it takes for padding (--pad-value), or leave "
                f"the option out"
            )
    return tuple(found)


def _padded_with(values: Mapping[str, float]) -> str:
    """For people: `zeros`, or `zeros (ids with 1)`."""
    own = ", ".join(f"{name} with {value:g}" for name, value in values.items())
    return f"zeros ({own})" if own else "zeros"


def _check_pad_values(
    inputs: Sequence[TensorSpec], free: Sequence[str], pad_values: Mapping[str, float]
) -> None:
    """Raises BuildError for a value that its input cannot be padded with."""
    padded = {spec.name: spec for spec in inputs if any(dim in free for dim in spec.shape)}
    for name, value in pad_values.items():
        if name not in padded:
            raise BuildError(
                f"--pad-value names '{name}', but the inputs of dynamic length are {', '.join(padded) or 'none'}"
            )
        dtype = numpy_dtype(padded[name].dtype)
        if dtype.kind != "f" and (value != int(value) or dtype.type(value) != value):
            raise BuildError(
                f"--pad-value {name}={value:g} is no {padded[name].dtype}, which the input holds"
            )


def _lengths_input(inputs: Sequence[TensorSpec], batching: Batching) -> str | None:
    """The input that says how much of each row is real: whole numbers, one a row, `len` in its name."""
    for spec in inputs:
        one_a_row = len(spec.shape) == 1 or (len(spec.shape) == 2 and spec.shape[1] == 1)
        if spec.dtype in ("int32", "int64") and one_a_row and "len" in spec.name.lower():
            return spec.name
    return None


def _mask_input(inputs: Sequence[TensorSpec], dim: str, batching: Batching) -> str | None:
    for spec in inputs:
        if len(spec.shape) == 2 and spec.shape[1] == dim and "mask" in spec.name.lower():
            return spec.name
    return None
