"""Shapes of a model's inputs: the `--shape` option, names for nameless dimensions, ranges for each.

A dynamic dimension that an exporter left without a name, or with one that a machine made up
(`unk__7`, `s42`, `?`), gets a name that a person can read: `batch` when it leads every input,
`<input>_dim<axis>` otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from onnx import GraphProto, TensorProto, ValueInfoProto

from vernier.errors import BuildError
from vernier.package.manifest import DimRange
from vernier.tensors import Dim, TensorSpec, dtype_from_onnx

#: Batches of inputs up to this many elements a row go to 256 rows by default, larger ones to 64.
_SMALL_ROW = 1 << 16
_MACHINE_MADE = re.compile(
    r"(unk_*|unknown_*|s|u|dim_?|dyn(amic)?_?(axes|axis|dim)?_*|DynamicDimension\.)\d+|\?|None|-1|"
)


@dataclass(frozen=True)
class ShapeRange:
    """The smallest, the usual and the largest shape of one input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


def parse_shape(text: str) -> tuple[str, ShapeRange]:
    """Reads `ids=1x26:64x26:512x26` (min:opt:max), `ids=1x26:512x26` (min:max) or `ids=8x26`.

    The name ends at the last `=`, because tensor names may hold one. Raises BuildError.
    """
    name, _, sizes = text.rpartition("=")
    try:
        shapes = [tuple(int(size) for size in part.split("x")) for part in sizes.split(":")]
    except ValueError:
        shapes = []
    if not name or not 1 <= len(shapes) <= 3 or any(size < 1 for shape in shapes for size in shape):
        raise BuildError(
            f"--shape {text} is not of the form name=1x26:64x26:512x26 (min:opt:max, sizes from 1 up)"
        )
    low, opt, high = shapes[0], shapes[-2 if len(shapes) == 3 else -1], shapes[-1]
    if not len(low) == len(opt) == len(high) or any(
        not a <= b <= c for a, b, c in zip(low, opt, high, strict=True)
    ):
        raise BuildError(
            f"--shape {text}: give three shapes of one rank with min <= opt <= max in every dimension"
        )
    return name, ShapeRange(low, opt, high)


def check_types(graph: GraphProto) -> None:
    """Raises BuildError for an input or output that cannot be sent as numbers."""
    if not graph.input:
        raise BuildError("the model has no inputs: its answer is a constant, so there is nothing to serve")
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            if not value.type.HasField("tensor_type"):
                raise BuildError(
                    f"{kind} '{value.name}' is a {value.type.WhichOneof('value') or 'nameless'} value; only "
                    f"tensors are served: export it with tensor {kind}s (scikit-learn: options={{'zipmap': False}})"
                )
            number = value.type.tensor_type.elem_type
            if number == TensorProto.STRING:
                raise BuildError(
                    f"{kind} '{value.name}' holds strings; numbers and booleans are served: "
                    f"move the text processing out of the model and export it again"
                )
            try:
                dtype_from_onnx(number)
            except KeyError:
                name = TensorProto.DataType.Name(number).lower()
                raise BuildError(
                    f"{kind} '{value.name}' holds {name}, which clients cannot send: add a Cast to the model"
                ) from None


def _dims(value: ValueInfoProto) -> list[int | str]:
    """Fixed sizes as int; dynamic ones by their name, which may be empty. Sizes below 1 mean dynamic."""
    sizes: list[int | str] = []
    for dim in value.type.tensor_type.shape.dim:
        sizes.append(dim.dim_value if dim.dim_value > 0 else dim.dim_param.strip())
    return sizes


def _is_nameless(dim: int | str) -> bool:
    return isinstance(dim, str) and _MACHINE_MADE.fullmatch(dim) is not None


def state_shapes(graph: GraphProto, shapes: Mapping[str, ShapeRange]) -> None:
    """Gives inputs of unknown rank the rank of their `--shape`. Raises BuildError when there is none."""
    for value in graph.input:
        if value.type.tensor_type.HasField("shape"):
            continue
        if value.name not in shapes:
            raise BuildError(
                f"input '{value.name}' has no shape in the model: give it with --shape {value.name}=min:opt:max"
            )
        given = shapes[value.name]
        for low, high in zip(given.min, given.max, strict=True):
            dim = value.type.tensor_type.shape.dim.add()
            if low == high:
                dim.dim_value = low
        value.type.tensor_type.shape.SetInParent()


def name_dims(graph: GraphProto) -> list[str]:
    """Names every dynamic dimension of the inputs, in place, in the outputs too where they share it.

    Returns a note for each name that was made.
    """
    rows = [_dims(value) for value in graph.input]
    taken = {dim for dims in rows for dim in dims if isinstance(dim, str) and not _is_nameless(dim)}
    leading = {dims[0] for dims in rows if dims}
    named = {dim for dim in leading if isinstance(dim, str) and not _is_nameless(dim)}
    shared = all(dims and isinstance(dims[0], str) for dims in rows) and len(named) <= 1
    batch = next(iter(named)) if named else _fresh("batch", taken)
    renamed: dict[str, str] = {}
    notes = []
    for value, dims in zip(graph.input, rows, strict=True):
        for axis, dim in enumerate(dims):
            if not _is_nameless(dim):
                continue
            old = str(dim)
            if axis == 0 and shared:
                new = batch
            elif old in renamed:
                new = renamed[old]
            else:
                new = _fresh(f"{value.name}_dim{axis}", taken)
            if old not in ("", "?", "None", "-1"):
                renamed[old] = new
            taken.add(new)
            value.type.tensor_type.shape.dim[axis].dim_param = new
            notes.append(f"dimension {axis} of input '{value.name}' had no name; it is called '{new}' here")
    for value in graph.output:
        for proto in value.type.tensor_type.shape.dim:
            if proto.dim_param in renamed:
                proto.dim_param = renamed[proto.dim_param]
    return notes


def _fresh(name: str, taken: Iterable[str]) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}{number}"
    return candidate


def specs(values: Iterable[ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes in graph order; a dimension that is still nameless gets a name."""
    found = []
    for value in values:
        shape: list[Dim] = [
            f"{value.name}_dim{axis}" if _is_nameless(dim) else dim for axis, dim in enumerate(_dims(value))
        ]
        found.append(TensorSpec(value.name, dtype_from_onnx(value.type.tensor_type.elem_type), tuple(shape)))
    return tuple(found)


def given_ranges(inputs: Sequence[TensorSpec], shapes: Mapping[str, ShapeRange]) -> dict[str, DimRange]:
    """What `--shape` says about each named dimension. Raises BuildError on what the model contradicts."""
    by_name = {spec.name: spec for spec in inputs}
    ranges: dict[str, DimRange] = {}
    for name, given in shapes.items():
        if name not in by_name:
            raise BuildError(f"--shape names '{name}', but the model's inputs are {', '.join(by_name)}")
        spec = by_name[name]
        if len(given.min) != len(spec.shape):
            raise BuildError(
                f"--shape {name} has {len(given.min)} dimensions, but the model takes {spec.describe_shape()}"
            )
        for dim, low, opt, high in zip(spec.shape, given.min, given.opt, given.max, strict=True):
            if isinstance(dim, int):
                if not low == opt == high == dim:
                    raise BuildError(
                        f"--shape {name} wants {low} to {high} where the model takes {dim} only "
                        f"({spec.describe_shape()}): export the model with that dimension dynamic"
                    )
                continue
            wanted = DimRange(min=low, opt=opt, max=high)
            if ranges.setdefault(dim, wanted) != wanted:
                raise BuildError(
                    f"--shape gives dimension '{dim}' two ranges; every input that has it needs the same"
                )
    return ranges


def row_elements(inputs: Sequence[TensorSpec], ranges: Mapping[str, DimRange]) -> int:
    """Elements of one row of all inputs together, at the usual sizes."""
    usual = {name: sizes.opt for name, sizes in ranges.items()}
    return sum(
        prod(dim if isinstance(dim, int) else usual.get(dim, 1) for dim in spec.shape[1:]) for spec in inputs
    )


def default_max_batch(inputs: Sequence[TensorSpec], ranges: Mapping[str, DimRange]) -> int:
    return 256 if row_elements(inputs, ranges) <= _SMALL_ROW else 64


def batch_range(max_batch: int) -> DimRange:
    return DimRange(min=1, opt=max(1, max_batch // 4), max=max_batch)


def candidate_sizes(spec: TensorSpec, axis: int, observed: int | None) -> tuple[list[int], int, list[int]]:
    """Sizes to try for a dimension nobody gave a range for: smallest first, the usual, largest first.

    With calibration data the usual size is the observed one and the largest twice that; without,
    images get 224 and sequences 128.
    """
    if observed is None:
        observed = 224 if len(spec.shape) == 4 and axis >= 2 else 128
    larger = [size for size in (2 * observed, observed) if size >= 1]
    smaller = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size < observed] + [observed]
    return smaller, observed, larger
