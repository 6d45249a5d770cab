"""What a tensor is allowed to be: element types, named dimensions, and checking an array against both.

A shape is a tuple whose entries are an `int` (fixed) or a `str` (a named dynamic dimension, shared
by every tensor of the model that uses the name). NumPy only, so that every layer can import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any, Dict, Mapping, Sequence, Tuple, Union

import numpy as np

from vernier.errors import NonFiniteInput, WrongDtype, WrongShape

Dim = Union[int, str]
Array = np.ndarray[Any, np.dtype[Any]]
Arrays = Dict[str, Array]

#: name → (NumPy type, ONNX TensorProto.DataType, Open Inference Protocol name)
_DTYPES: Dict[str, Tuple[type, int, str]] = {
    "float32": (np.float32, 1, "FP32"),
    "uint8": (np.uint8, 2, "UINT8"),
    "int8": (np.int8, 3, "INT8"),
    "uint16": (np.uint16, 4, "UINT16"),
    "int16": (np.int16, 5, "INT16"),
    "int32": (np.int32, 6, "INT32"),
    "int64": (np.int64, 7, "INT64"),
    "bool": (np.bool_, 9, "BOOL"),
    "float16": (np.float16, 10, "FP16"),
    "float64": (np.float64, 11, "FP64"),
    "uint32": (np.uint32, 12, "UINT32"),
    "uint64": (np.uint64, 13, "UINT64"),
}
DTYPES: Tuple[str, ...] = tuple(_DTYPES)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy type of a dtype name such as `float32`. KeyError for a name outside `DTYPES`."""
    return np.dtype(_DTYPES[name][0])


def protocol_dtype(name: str) -> str:
    """The Open Inference Protocol's name, such as `FP32`."""
    return _DTYPES[name][2]


def dtype_from_onnx(elem_type: int) -> str:
    """The dtype name of an ONNX element type; KeyError when tensors of it cannot be served."""
    for name, (_, number, _) in _DTYPES.items():
        if number == elem_type:
            return name
    raise KeyError(elem_type)


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype name and shape of one input or output. Entries of `shape` are int or dimension name."""

    name: str
    dtype: str
    shape: Tuple[Dim, ...]

    @property
    def wire_shape(self) -> Tuple[int, ...]:
        """The shape as clients see it: −1 for every dynamic dimension."""
        return tuple(-1 if isinstance(d, str) else d for d in self.shape)

    def describe_shape(self) -> str:
        """For messages: `[batch, 64]`."""
        return "[" + ", ".join(str(d) for d in self.shape) + "]"


def shape_text(shape: Sequence[int]) -> str:
    """For messages: `[2, 64]`."""
    return "[" + ", ".join(str(d) for d in shape) + "]"


#: Elements above which passes without a temporary array are quicker than one with it.
_MANY = 4096
#: The bits of a float16's infinities; every NaN lies above, seen as an integer of its sign.
_HALF_INFINITY, _HALF_MINUS_INFINITY = 0x7C00, 0xFC00


def is_finite(array: Array) -> bool:
    """Whether a floating-point array holds neither NaN nor infinities."""
    if array.size > _MANY:  # without a mask in memory
        if array.flags.c_contiguous:
            flat = array.reshape(-1)
            if flat.dtype == np.float16:  # whose arithmetic is slow
                return bool(
                    np.maximum.reduce(flat.view(np.int16)) < _HALF_INFINITY
                    and np.maximum.reduce(flat.view(np.uint16)) < _HALF_MINUS_INFINITY
                )
            # The quickest pass there is, without warnings and without BLAS, which would start threads. Once a sum
            # is not finite it stays so; that of finite numbers can overflow, and says nothing then.
            if isfinite(np.einsum("i->", flat)):
                return True
        # a NaN is both the least and the largest
        return bool(
            np.minimum.reduce(array, axis=None) > -np.inf and np.maximum.reduce(array, axis=None) < np.inf
        )
    # Looking for a zero byte takes half the time of `.all()`, which small arrays notice.
    return b"\0" not in np.isfinite(array).tobytes()


def require_finite(name: str, array: Array) -> None:
    """Raises NonFiniteInput when a floating-point array holds NaN or an infinity."""
    if array.dtype.kind == "f" and not is_finite(array):
        position = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise NonFiniteInput(
            f"input '{name}' holds {array[position]} at {list(position)}; send finite numbers only"
        )


def bind_dims(spec: TensorSpec, shape: Sequence[int], dims: Dict[str, int]) -> None:
    """Checks `shape` against `spec` and adds the sizes of its named dimensions to `dims` in place.

    Raises:
        WrongShape: another rank, another fixed size, or a name already bound to another size.
    """
    if len(shape) != len(spec.shape):
        raise WrongShape(
            f"input '{spec.name}' has shape {shape_text(shape)}, but the model takes "
            f"{spec.describe_shape()}: send {len(spec.shape)} dimensions, the first of them the batch"
        )
    for size, dim in zip(shape, spec.shape):
        expected = dims.setdefault(dim, size) if isinstance(dim, str) else dim
        if size != expected:
            what = f"'{dim}' is {expected} in another input" if isinstance(dim, str) else f"it must be {dim}"
            raise WrongShape(
                f"input '{spec.name}' has shape {shape_text(shape)}, but the model takes "
                f"{spec.describe_shape()}: {what}"
            )


def check_range(dims: Mapping[str, int], allowed: Mapping[str, Tuple[int, int]]) -> None:
    """Raises WrongShape when a named dimension is outside its (min, max), both inclusive."""
    for name, size in dims.items():
        low, high = allowed.get(name, (0, size))
        if not low <= size <= high:
            raise WrongShape(f"dimension '{name}' is {size}; this model takes {low} to {high}")


def require_dtype(spec: TensorSpec, array: Array) -> None:
    """Raises WrongDtype unless `array` has exactly the dtype of `spec`."""
    if array.dtype != numpy_dtype(spec.dtype):
        raise WrongDtype(
            f"input '{spec.name}' holds {array.dtype.name}, but the model takes {spec.dtype}: "
            f"convert it before sending"
        )
