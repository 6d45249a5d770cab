"""JSON arrays to tensors: a short cut without a Python object for each number, and the judge of the rest.

simdjson parses the text once, and an array of numbers is copied out of it as one buffer. Only what is
beyond doubt is taken that way. For anything else (text, null, booleans, ragged lists, numbers that do not
fit, a key twice) the short cut gives None, and the careful decoder takes it or refuses it in words. So one
decoder judges, and a client cannot tell which way its numbers went.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextvars import Context
from itertools import chain
from typing import Any, Literal, cast

import numpy as np
from simdjson import Array as JsonArray
from simdjson import Object, Parser

from vernier.border.signature import Signature
from vernier.errors import NonFiniteInput, WrongDtype, WrongShape
from vernier.tensors import DTYPES, Array, Arrays, TensorSpec, numpy_dtype

#: A parser keeps the memory of the largest document that it saw.
_KEPT_BYTES = 8 * 2**20
_LONG = 2**14
_CHUNK = 2**16
#: Characters between brackets on average, from which on looking for each is quicker than counting all.
_SPARSE = 1024
_BRACKET = ord("[")
#: NumPy's arrays have no more dimensions.
_MAX_DEPTH = 64
_MAX_SHOWN = 128

_parser = Parser()

#: In here a number too large for its type raises; `np.errstate` around each decoding costs more than all the rest.
_strict = Context()
_strict.run(np.seterr, over="raise")


def parse_fields(body: bytes | bytearray, most: int) -> dict[str, Any] | None:
    """The fields of a JSON object of at most `most` fields; None when the careful parser must look.

    Values are text, numbers, booleans, None, or simdjson's Object and Array. These borrow the parser's
    memory: use them up before the next call.
    """
    if body[:1] == b"\xef":
        return None  # simdjson skips a byte order mark, which is not JSON
    try:
        document = _parse(body)
        if not isinstance(document, Object) or len(document) > most:
            return None
        fields = {name: document[name] for name in document}
    except (ValueError, RuntimeError, KeyError):
        return None
    return fields if len(fields) == len(document) else None


def _parse(body: bytes | bytearray) -> Any:
    """Raises ValueError when the body is not JSON, RuntimeError when simdjson cannot tell."""
    global _parser
    if len(body) > _KEPT_BYTES:
        return Parser().parse(body)
    try:
        return _parser.parse(body)
    except RuntimeError:  # something still refers to the last document, as a traceback does
        _parser = Parser()
        return _parser.parse(body)


#: How numbers come out of simdjson: the kind of buffer, its dtype, and the dtype that they get.
NumberFormat = tuple[Literal["d", "i", "u"], np.dtype[Any], np.dtype[Any]]


def _way(dtype: str) -> NumberFormat:
    target = numpy_dtype(dtype)
    if target.kind == "f":
        return "d", np.dtype(np.float64), target
    if target == np.uint64:
        return "u", target, target
    return "i", np.dtype(np.int64), target


NUMBER_FORMATS: dict[str, NumberFormat] = {dtype: _way(dtype) for dtype in DTYPES if dtype != "bool"}


def count_lists(body: bytes | bytearray) -> int:
    """How many `[` a text holds."""
    if len(body) < _LONG:
        return body.count(b"[")
    count, at, most, find = 0, -1, len(body) // _SPARSE, body.find
    while count < most:  # the quickest way while they are far apart, as in front of long rows
        at = find(b"[", at + 1)
        if at < 0:
            return count
        count += 1
    text = np.frombuffer(body, np.uint8)
    for start in range(at + 1, len(text), _CHUNK):  # five times as quick, with a mask that stays in the cache
        count += int(np.count_nonzero(text[start : start + _CHUNK] == _BRACKET))
    return count


def decode_numbers(inputs: Object, brackets: int, signature: Signature) -> Arrays | None:
    """The tensors of an object from input name to nested lists; None when the careful decoder must look.

    Args:
        brackets: how many `[` the text holds for these inputs. Only when every one of them opens a list
            that was looked at can no list hide among the numbers.
    """
    try:
        return _strict.run(_decode, inputs, brackets, signature)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, FloatingPointError):
        return None
    except RuntimeError:  # another thread is in there
        return None


def decode_lists(
    texts: Sequence[bytes | bytearray | memoryview], way: NumberFormat
) -> tuple[Array, list[int]] | None:
    """What stands between the brackets of lists: all numbers, and how many of them each list has; None when in doubt.

    A text may hold several lists, with `],[` between them. All are parsed as one text, in which every `[` must open one
    of the lists that were found: then none lies in another, and none begins in one text and ends in the next.
    """
    try:
        lists = _parse(b"[[" + b"],[".join(texts) + b"]]")
        lengths = list(map(len, lists))
        if not _hold_only(texts, len(lengths)):
            return None
        numbers = _strict.run(_to_dtype, lists, way)
    except (TypeError, ValueError, AttributeError, FloatingPointError, RuntimeError):
        return None
    return None if numbers is None else (numbers, lengths)


def _hold_only(texts: Sequence[bytes | bytearray | memoryview], lists: int) -> bool:
    """Whether there is no bracket in the texts but between so many lists."""
    together = b"".join(texts)
    if b"[" not in together and b"]" not in together:  # most often, and quicker to find out than to count
        return True
    return together.count(b"[") == lists - len(texts)


def _to_dtype(value: Any, way: NumberFormat) -> Array | None:
    """All numbers of nested lists, in order; None, or FloatingPointError, when one does not fit its dtype.

    Raises TypeError, ValueError, AttributeError when there is something else among them.
    """
    buffer, wide, target = way
    numbers = np.frombuffer(value.as_buffer(of_type=buffer), wide)
    if target is wide:
        return numbers
    narrow = numbers.astype(target)
    return narrow if buffer == "d" or (narrow == numbers).all() else None


def _decode(inputs: Object, brackets: int, signature: Signature) -> Arrays | None:
    specs = signature.inputs
    if len(inputs) > len(specs):
        return None
    arrays: Arrays = {}
    for name in specs if len(inputs) == len(specs) else tuple(inputs):
        spec = specs[name]
        value: Any = inputs[name]
        shape, lists = _shape(value, len(spec.shape))
        if not lists:
            return None
        brackets -= lists
        numbers = _to_dtype(value, NUMBER_FORMATS[spec.dtype])
        if numbers is None:
            return None
        arrays[name] = numbers.reshape(shape)
    return arrays if not brackets and len(arrays) == len(inputs) else None


def _shape(value: Any, rank: int) -> tuple[list[int], int]:
    """The shape of even lists, and how many lists they are; 0 when they are not even.

    Raises TypeError, IndexError when they are not of this rank.
    """
    shape = [len(value)]
    inner = value
    lists = count = 1
    for _ in range(rank - 1):
        inner = inner[0]
        count *= shape[-1]
        lists += count
        shape.append(len(inner))
    return (shape, lists) if rank and (count == 1 or _even(value, shape, 1)) else (shape, 0)


def _even(value: Any, shape: list[int], level: int) -> bool:
    if not set(map(len, value)) <= {shape[level]}:
        return False
    return level + 1 == len(shape) or all(_even(row, shape, level + 1) for row in value)


# --- the careful decoder --------------------------------------------------------------------------
def decode_values(inputs: Mapping[str, Any], signature: Signature, holds_booleans: bool = True) -> Arrays:
    """Nested Python lists to tensors; see `tensor_from_json`. Raises UnknownInput too."""
    return {
        name: tensor_from_json(signature.input(name), value, holds_booleans) for name, value in inputs.items()
    }


def _holds_boolean(value: Any) -> bool:
    if isinstance(value, list):
        return any(_holds_boolean(item) for item in value)
    return isinstance(value, bool)


def tensor_from_json(spec: TensorSpec, value: Any, holds_booleans: bool = True) -> Array:
    """Nested lists to an array of the spec's dtype.

    Args:
        holds_booleans: False when the caller knows that no `true` or `false` stands in the text.

    Raises:
        WrongShape: ragged lists.
        WrongDtype: text, null, booleans among numbers, fractions for integers, out of range.
        NonFiniteInput: a number too large for the dtype.
    """
    _require_numbers(spec, value)
    array = np.array(value)
    target = numpy_dtype(spec.dtype)
    kind = array.dtype.kind
    if array.size == 0:
        return array.astype(target)
    if kind == "O":
        raise WrongDtype(
            f"input '{spec.name}' takes {spec.dtype}, but holds an integer out of range; send numbers only"
        )
    if target.kind == "b":
        if kind != "b":
            raise WrongDtype(f"input '{spec.name}' takes bool; send true or false, not numbers")
        return array
    if kind == "b" or (holds_booleans and _holds_boolean(value)):
        raise WrongDtype(f"input '{spec.name}' takes {spec.dtype}, but holds true or false; send numbers")
    if target.kind == "f":
        return _to_float(spec, array, target)
    if kind == "f" and target == np.uint64:
        array = _without_rounding(value, array)
    return _to_integer(spec, array, target)


def _without_rounding(value: Any, rounded: Array) -> Array:
    """NumPy makes floats of integers that straddle int64 and uint64; this keeps them integers."""
    exact = np.array(value, dtype=object)
    if all(type(item) is int and 0 <= item < 2**64 for item in exact.flat):
        return exact.astype(np.uint64)
    return rounded


_NUMBERS = {int, float, bool}
_LISTS = {list, JsonArray}


def judge_in_place(inputs: Object, signature: Signature) -> Arrays | None:
    """Refuses, in simdjson's memory, what the careful decoder would need much more memory to refuse.

    Returns arrays that hold no numbers and take no memory when the shape of an input is wrong for certain, so that
    `Signature.check` can say so; None when the careful decoder must look.
    """
    if len(inputs) > len(signature.inputs):  # a key may come twice, and the last one counts
        return None
    shapes: Arrays = {}
    fit = True
    for name in inputs:
        spec = signature.input(name)
        shape = _require_numbers(spec, inputs[name])
        shapes[name] = np.broadcast_to(np.zeros((), numpy_dtype(spec.dtype)), shape)
        pairs = zip(shape, spec.shape, strict=False)
        fit &= len(shape) == len(spec.shape) and all(isinstance(d, str) or n == d for n, d in pairs)
    return None if fit else shapes


def _require_numbers(spec: TensorSpec, value: Any) -> list[int]:
    """The shape of even lists of numbers or booleans, all at one depth: NumPy makes large arrays of anything else.

    Looks at the lists level by level, without a copy of any level, and at the speed of C.
    """
    if type(value) not in _LISTS:
        if type(value) not in _NUMBERS:
            raise _odd(spec, value)
        return []
    shape = [len(value)]
    depth = 0
    while True:
        kinds = set(map(type, _level(value, depth)))
        if not kinds:
            return shape
        if not kinds & _LISTS:
            break
        lengths = set(map(len, _level(value, depth))) if kinds <= _LISTS else set()
        if len(lengths) != 1 or depth >= _MAX_DEPTH - 1:
            raise WrongShape(
                f"input '{spec.name}' is ragged: its lists differ in length; "
                f"pad them to one shape {spec.describe_shape()}"
            )
        shape += lengths
        depth += 1
    if not kinds <= _NUMBERS:
        raise _odd(spec, next(item for item in _level(value, depth) if type(item) not in _NUMBERS))
    return shape


def _level(value: Any, depth: int) -> Iterable[Any]:
    """The items of nested lists `depth` levels down."""
    for _ in range(depth):
        value = chain.from_iterable(value)
    return cast(Iterable[Any], value)


def _odd(spec: TensorSpec, item: Any) -> WrongDtype:
    shown = repr(item[:_MAX_SHOWN]) if isinstance(item, str) else "null" if item is None else "an object"
    return WrongDtype(f"input '{spec.name}' takes {spec.dtype}, but holds {shown}; send numbers only")


def _to_float(spec: TensorSpec, array: Array, target: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        converted = array.astype(target)
    if not np.isfinite(converted).all():
        position = [int(i) for i in np.argwhere(~np.isfinite(converted))[0]]
        raise NonFiniteInput(
            f"input '{spec.name}' holds a number at {position} that is too large for {spec.dtype}; "
            f"send finite numbers within its range"
        )
    return converted


def _to_integer(spec: TensorSpec, array: Array, target: np.dtype[Any]) -> Array:
    if array.dtype.kind == "f":
        raise WrongDtype(f"input '{spec.name}' takes {spec.dtype}, but holds fractions; send integers")
    bounds = np.iinfo(target)
    low, high = array.min(), array.max()
    if int(low) < bounds.min or int(high) > bounds.max:
        raise WrongDtype(
            f"input '{spec.name}' holds an integer out of range: {spec.dtype} goes from {bounds.min} to {bounds.max}"
        )
    return array.astype(target)
