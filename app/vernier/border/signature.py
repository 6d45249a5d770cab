"""What a model takes and gives, and the one check that stands between the codecs and the queue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from vernier.errors import MissingInput, UnknownInput, UnknownOutput, UnsupportedMediaType, WrongShape
from vernier.package.manifest import Manifest
from vernier.tensors import (
    Arrays,
    Dim,
    TensorSpec,
    bind_dims,
    check_range,
    numpy_dtype,
    require_dtype,
    require_finite,
)


@dataclass(frozen=True)
class RawLayout:
    """How plain bytes become the only input.

    Attributes:
        shape: −1 stands for the dimension that the number of bytes tells, if there is one.
        unit_bytes: the bytes of everything but that dimension.
    """

    spec: TensorSpec
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    unit_bytes: int


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs by name in graph order, with the ranges of their named dimensions.

    Attributes:
        batch_dim: name of the batch dimension; None when the model has a fixed batch or none.
        fixed_batch: the fixed batch size, else None.
        ranges: dimension name → (min, max). The batch has no upper bound here: larger requests are split.
        derived: inputs that a request may leave out, with the dimension that they tell of: the lengths
            of a padded dimension (filled with its size), or its mask (filled with ones).
    """

    model: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    ranges: dict[str, tuple[int, int]]
    batch_dim: str | None
    fixed_batch: int | None
    derived: dict[str, str]

    @classmethod
    def of(cls, manifest: Manifest) -> Signature:
        batching = manifest.batching
        batch_dim = batching.dim if batching.kind == "dynamic" else None
        ranges = {name: bounds for name, bounds in manifest.input_dims().items() if name != batch_dim}
        return cls(
            model=manifest.name,
            inputs={spec.name: spec for spec in manifest.input_specs()},
            outputs={spec.name: spec for spec in manifest.output_specs()},
            ranges=ranges,
            batch_dim=batch_dim,
            fixed_batch=batching.size if batching.kind == "fixed" else None,
            derived={
                name: rule.dim
                for rule in manifest.sequence
                for name in (rule.lengths_input, rule.mask_input)
                if name is not None
            },
        )

    def input(self, name: str) -> TensorSpec:
        """Raises UnknownInput."""
        try:
            return self.inputs[name]
        except KeyError:
            raise UnknownInput(
                f"model '{self.model}' has no input '{name}'; its inputs are {_names(self.inputs)}"
            ) from None

    @property
    def has_batch(self) -> bool:
        """Whether requests can lie below each other along a batch axis."""
        return self.batch_dim is not None or self.fixed_batch is not None

    @cached_property
    def raw_layout(self) -> RawLayout:
        """Raises UnsupportedMediaType when bytes alone do not tell the inputs."""
        if len(self.inputs) != 1:
            raise UnsupportedMediaType(
                f"model '{self.model}' has {len(self.inputs)} inputs; a raw body can hold one. Send JSON"
            )
        (spec,) = self.inputs.values()
        shape = list(spec.wire_shape)
        if self.fixed_batch is not None and shape:
            shape[0] = -1
        if shape.count(-1) > 1:
            raise UnsupportedMediaType(
                f"input '{spec.name}' has shape {spec.describe_shape()} with several dynamic dimensions, "
                f"which raw bytes cannot tell apart; send JSON"
            )
        dtype = numpy_dtype(spec.dtype)
        unit = dtype.itemsize * prod(size for size in shape if size != -1)
        return RawLayout(spec, dtype, tuple(shape), unit)

    @cached_property
    def _plan(self) -> tuple[tuple[str, TensorSpec, np.dtype[Any], tuple[Dim, ...] | None], ...]:
        """Name, spec, dtype, and the sizes after the batch where all of them are fixed."""
        plan = []
        for name, spec in self.inputs.items():
            tail = spec.shape[1:]
            plain = self.batch_dim is not None and spec.shape[:1] == (self.batch_dim,)
            fixed = plain and all(isinstance(dim, int) for dim in tail)
            plan.append((name, spec, numpy_dtype(spec.dtype), tail if fixed else None))
        return tuple(plan)

    def check(self, arrays: Arrays, finite: bool = False) -> int:
        """Validates a whole request, adds what may be left out, and returns its rows.

        Rows are the size of the batch dimension; 1 for a model whose tensors share no batch axis.

        Args:
            finite: the caller knows that no array holds NaN or an infinity, as of arrays out of JSON.

        Raises:
            MissingInput, UnknownInput, WrongDtype, WrongShape, NonFiniteInput
        """
        if len(arrays) != len(self.inputs) or arrays.keys() != self.inputs.keys():
            for name in arrays:
                self.input(name)
            missing = [name for name in self.inputs if name not in arrays and name not in self.derived]
            if missing:
                raise MissingInput(
                    f"model '{self.model}' also needs {_names(missing)}; send every one of {_names(self.inputs)}"
                )
        dims: dict[str, int] = {}
        batch_dim = self.batch_dim
        rows = 0
        for name, spec, dtype, tail in self._plan:
            array = arrays.get(name)
            if array is None:
                continue
            shape = array.shape
            if array.dtype != dtype:
                require_dtype(spec, array)
            if tail is not None and batch_dim is not None and shape and shape[1:] == tail and not dims:
                dims[batch_dim] = shape[0]  # the most frequent case of the next
            elif self.fixed_batch is None:
                bind_dims(spec, shape, dims)
            else:
                rows = self._bind_fixed(spec, shape, rows, dims)
            if not finite:
                require_finite(name, array)
        if self.ranges:
            check_range(dims, self.ranges)
        if batch_dim is not None:
            rows = dims[batch_dim]
        elif self.fixed_batch is None:
            rows = 1
        if rows < 1:
            raise WrongShape(f"the request to model '{self.model}' has no rows; send at least one")
        if len(arrays) != len(self.inputs):
            self._derive(arrays, {**dims, str(self.batch_dim): rows}, rows)
        return rows

    def _derive(self, arrays: Arrays, dims: dict[str, int], rows: int) -> None:
        """Lengths tell that every row is as long as the request's array; a mask, that all of it counts."""
        for name, dim in self.derived.items():
            if name in arrays:
                continue
            spec = self.inputs[name]
            if dim not in dims:
                raise MissingInput(
                    f"model '{self.model}' needs '{name}' unless an input has the dimension '{dim}'"
                )
            masks = dim in spec.shape
            shape = [dims[d] if isinstance(d, str) else d for d in spec.shape]
            if self.fixed_batch is not None:
                shape[0] = rows
            arrays[name] = np.full(shape, 1 if masks else dims[dim], numpy_dtype(spec.dtype))

    def _bind_fixed(self, spec: TensorSpec, shape: Sequence[int], rows: int, dims: dict[str, int]) -> int:
        """A fixed batch is padded and split by the service, so clients may send any number of rows."""
        sample = TensorSpec(spec.name, spec.dtype, ("batch", *spec.shape[1:]))
        bound = {**dims, **({"batch": rows} if rows else {})}
        bind_dims(sample, shape, bound)
        rows = bound.pop("batch")
        dims.update(bound)
        return rows

    def select_outputs(self, names: Sequence[str] | None) -> tuple[str, ...]:
        """The asked outputs, or all of them. Raises UnknownOutput."""
        if names is None:
            return tuple(self.outputs)
        for name in names:
            if name not in self.outputs:
                raise UnknownOutput(
                    f"model '{self.model}' has no output '{name}'; its outputs are {_names(self.outputs)}"
                )
        return tuple(names)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
