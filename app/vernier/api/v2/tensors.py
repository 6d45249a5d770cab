"""Tensors as the Open Inference Protocol names, sizes and lays them out; REST and gRPC alike."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from vernier.api.formats.codecs import Body
from vernier.api.formats.json_tensors import tensor_from_json
from vernier.errors import InvalidJson, WrongDtype, WrongShape, shown
from vernier.tensors import (
    DTYPES,
    Array,
    TensorSpec,
    bind_dims,
    numpy_dtype,
    protocol_dtype,
    require_finite,
    shape_text,
)

#: NumPy dtype → the protocol's name.
DATATYPES = {numpy_dtype(name): protocol_dtype(name) for name in DTYPES}
#: Datatypes that the protocol knows; no tensor of a model has one of the last two.
_KNOWN = frozenset(DATATYPES.values()) | {"BF16", "BYTES"}
#: No tensor holds this number of bytes, and products of dimensions below it overflow nowhere.
_MAX_BYTES = 2**40


def require_datatype(spec: TensorSpec, datatype: object) -> None:
    """Raises WrongDtype unless `datatype` is the protocol's name of the model's own dtype."""
    expected = protocol_dtype(spec.dtype)
    if datatype == expected:
        return
    if not isinstance(datatype, str) or datatype not in _KNOWN:
        named = shown(datatype) if isinstance(datatype, str) else "what is sent"
        raise WrongDtype(
            f"input '{spec.name}': {named} is no datatype of the protocol; this input takes {expected}"
        )
    raise WrongDtype(
        f"input '{spec.name}' is sent as {datatype}, but the model takes {expected}: convert it before sending"
    )


def read_shape(spec: TensorSpec, shape: object) -> tuple[int, ...]:
    """The shape that a client sends. Raises InvalidJson when it is none, WrongShape for an impossible rank or size."""
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise InvalidJson(
            f"the shape of input '{spec.name}' must be a list of integers, 0 or more, such as [1, 64]"
        )
    sizes = tuple(shape)
    if len(sizes) != len(spec.shape):
        bind_dims(spec, sizes, {})
    if prod(max(size, 1) for size in sizes) * numpy_dtype(spec.dtype).itemsize > _MAX_BYTES:
        raise WrongShape(f"input '{spec.name}' is larger than any request may be; send fewer rows")
    return sizes


def tensor_from_raw(spec: TensorSpec, shape: tuple[int, ...], data: Body) -> Array:
    """A view of little-endian bytes in C order. Raises WrongShape, WrongDtype, NonFiniteInput."""
    dtype = numpy_dtype(spec.dtype)
    size = prod(shape) * dtype.itemsize
    if len(data) != size:
        raise WrongShape(
            f"input '{spec.name}' of shape {shape_text(shape)} and {spec.dtype} takes {size} bytes, "
            f"but {len(data)} are sent"
        )
    if dtype == np.bool_ and size and np.frombuffer(data, np.uint8).max() > 1:
        raise WrongDtype(f"input '{spec.name}' takes bool; each byte must be 0 or 1")
    array: Array = np.frombuffer(data, dtype).reshape(shape)
    require_finite(spec.name, array)
    return array if array.flags.aligned else array.copy()


def tensor_from_values(spec: TensorSpec, shape: tuple[int, ...], values: Any) -> Array:
    """Numbers of JSON, nested as the shape says or in one flat list.

    Raises WrongShape, and what `tensor_from_json` raises.
    """
    array = tensor_from_json(spec, values)
    if array.shape == shape:
        return array
    is_empty = (
        not array.size and array.shape == shape[: array.ndim]
    )  # lists cannot say what stands in no list
    if array.size != prod(shape) or not (array.ndim == 1 or is_empty):
        raise WrongShape(
            f"the data of input '{spec.name}' has shape {shape_text(array.shape)}; send it as {shape_text(shape)}, "
            f"or as one flat list of {prod(shape)} numbers"
        )
    return array.reshape(shape)


def raw_bytes(array: Array) -> bytes:
    """Little-endian, in C order, whatever the array's strides."""
    return array.tobytes()
