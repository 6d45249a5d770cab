"""Finds the dimensions, such as a clip's frames, along which requests may be padded to share a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from app.build.probe import Probe, padding_is_harmless
from app.errors import BuildError
from app.package.manifest import Batching, DimRange, SequenceDim
from app.tensors import TensorSpec

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
    notes: list[str],
) -> tuple[SequenceDim, ...]:
    """The dimensions whose padding with zeros leaves every answer as it is.

    Args:
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
        if padding_is_harmless(probe, sizes | {dim: middle}, dim, lengths, crop, dims[dim].max):
            buckets = sorted(set((wanted or {}).get(dim) or default_sequence_buckets(dims[dim])))
            if not dims[dim].min <= buckets[0] <= buckets[-1] <= dims[dim].max:
                raise BuildError(f"--sequence {dim}: buckets must lie in {dims[dim].min} to {dims[dim].max}")
            found.append(
                SequenceDim(
                    dim=dim, buckets=buckets, crop_outputs=bool(crop), lengths_input=lengths, mask_input=mask
                )
            )
            notes.append(
                f"padding '{dim}' with zeros changes no answer: requests of any length share batches"
            )
        elif wanted is not None:
            raise BuildError(
                f"--sequence {dim}: padding with zeros changes the answers; mask the padding inside the model "
                f"(with a lengths or mask input), or leave the option out"
            )
    return tuple(found)


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
