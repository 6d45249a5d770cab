"""Bytes to validated tensors and answers to bytes, for the v1 protocol.

JSON in, JSON out; numbers go to their tensor's dtype only when nothing is lost in kind: text, null,
booleans among numbers, fractions for integers and integers out of range are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from app.errors import InvalidJson, MissingInput, NonFiniteInput, UnsupportedMediaType, WrongDtype, WrongShape
from app.serving.signature import Signature
from app.tensors import Array, Arrays, TensorSpec, numpy_dtype

MAX_PRIORITY = 9


@dataclass(frozen=True, slots=True)
class PredictRequest:
    """The envelope of a prediction. `inputs` are still JSON values; `timeout_ms` None means none asked for."""

    inputs: Mapping[str, Any]
    model: str | None = None
    version: str | None = None
    outputs: Sequence[str] | None = None
    precision: str | None = None
    priority: int = 0
    timeout_ms: float | None = None
    id: str | None = None
    holds_booleans: bool = False


_FIELDS = ("model", "inputs", "version", "outputs", "precision", "priority", "timeout_ms", "id")


def parse_json(body: bytes) -> Any:
    """Raises InvalidJson; NonFiniteInput when the fault is a bare NaN or Infinity."""
    if not body:
        raise InvalidJson('the body is empty; send JSON such as {"model": "name", "inputs": {…}}')
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if b"NaN" in body or b"Infinity" in body:
            raise NonFiniteInput(
                "the body holds NaN or Infinity, which JSON does not have; send finite numbers only"
            ) from error
        raise InvalidJson(f"the body is not valid JSON: {error}; mend it and send it again") from error


def _text(value: Any, field: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise InvalidJson(f"'{field}' must be a string, not {type(value).__name__}")


def parse_predict(body: bytes) -> PredictRequest:
    """The envelope of `POST /v1/predict`. Raises InvalidJson, MissingInput, NonFiniteInput."""
    data = parse_json(body)
    if not isinstance(data, dict):
        raise InvalidJson('the body must be a JSON object such as {"model": "name", "inputs": {…}}')
    if not data.keys() <= set(_FIELDS):
        unknown = ", ".join(f"'{name}'" for name in data if name not in _FIELDS)
        raise InvalidJson(f"unknown field {unknown}; the fields are {', '.join(_FIELDS)}")
    inputs = data.get("inputs")
    if inputs is None:
        raise MissingInput('\'inputs\' is missing; send {"inputs": {"<name>": [[…]]}}')
    if not isinstance(inputs, dict):
        raise InvalidJson("'inputs' must be an object from input name to nested lists of numbers")
    outputs = data.get("outputs")
    if outputs is not None and not (isinstance(outputs, list) and all(isinstance(o, str) for o in outputs)):
        raise InvalidJson("'outputs' must be a list of output names")
    priority = data.get("priority") or 0
    if type(priority) is not int or not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidJson(f"'priority' must be an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}")
    version = data.get("version")
    version = str(version) if type(version) is int else version
    return PredictRequest(
        inputs=inputs,
        model=_text(data.get("model"), "model"),
        version=_text(version, "version"),
        outputs=outputs,
        precision=_text(data.get("precision"), "precision"),
        priority=priority,
        timeout_ms=parse_timeout(data.get("timeout_ms")),
        id=_text(data.get("id"), "id"),
        holds_booleans=b"true" in body or b"false" in body,
    )


def parse_timeout(value: Any) -> float | None:
    """Milliseconds, zero included. Raises InvalidJson."""
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value < 1e9:
        raise InvalidJson("'timeout_ms' must be a number of milliseconds, 0 or more")
    return float(value)


def decode_inputs(request: PredictRequest, signature: Signature) -> Arrays:
    """JSON values to arrays of the model's dtypes; shapes are checked by `Signature.check`."""
    return {
        name: tensor_from_json(signature.input(name), value, request.holds_booleans)
        for name, value in request.inputs.items()
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
    try:
        array = np.array(value)
    except ValueError as error:
        raise WrongShape(
            f"input '{spec.name}' is ragged: its lists differ in length; pad them to one shape {spec.describe_shape()}"
        ) from error
    target = numpy_dtype(spec.dtype)
    kind = array.dtype.kind
    if array.size == 0:
        return array.astype(target)
    if kind in "USO":
        raise WrongDtype(
            f"input '{spec.name}' takes {spec.dtype}, but holds {_first_odd(value)}; send numbers only"
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


def _first_odd(value: Any) -> str:
    if isinstance(value, list):
        odd = (found for found in map(_first_odd, value) if found)
        return next(odd, "")
    if value is None:
        return "null"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "an integer out of range" if isinstance(value, int) and not -(2**63) <= value < 2**64 else ""
    return "an object" if isinstance(value, dict) else f"{value!r}"


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


def tensor_from_bytes(body: bytes, signature: Signature) -> Arrays:
    """A raw body: the little-endian bytes of the model's only input, with one dynamic dimension at most.

    Raises UnsupportedMediaType when the model has several inputs, WrongShape when the size does not fit.
    """
    if len(signature.inputs) != 1:
        raise UnsupportedMediaType(
            f"model '{signature.model}' has {len(signature.inputs)} inputs; a raw body can hold one. Send JSON"
        )
    (spec,) = signature.inputs.values()
    wire: list[Any] = list(spec.shape)
    if signature.fixed_batch is not None and wire:
        wire[0] = "batch"
    free = [i for i, d in enumerate(wire) if isinstance(d, str)]
    if len(free) > 1:
        raise UnsupportedMediaType(
            f"input '{spec.name}' has shape {spec.describe_shape()} with several dynamic dimensions, "
            f"which raw bytes cannot tell apart; send JSON"
        )
    dtype = numpy_dtype(spec.dtype)
    known = int(np.prod([d for d in wire if isinstance(d, int)], dtype=np.int64)) * dtype.itemsize
    if not body or len(body) % known or (not free and len(body) != known):
        raise WrongShape(
            f"the body has {len(body)} bytes; input '{spec.name}' {spec.describe_shape()} of {spec.dtype} "
            f"takes {'a multiple of ' if free else ''}{known}"
        )
    shape = [len(body) // known if isinstance(d, str) else d for d in wire]
    return {spec.name: np.frombuffer(body, dtype).reshape(shape)}


def encode_answer(
    *,
    request_id: str,
    model: str,
    version: str,
    precision: str,
    outputs: Arrays,
    queue_s: float,
    compute_s: float,
    batch_size: int,
) -> bytes:
    """The body of a successful prediction; times in milliseconds, rounded to a microsecond."""
    return orjson.dumps(
        {
            "id": request_id,
            "model": model,
            "version": version,
            "precision": precision,
            "outputs": {name: np.ascontiguousarray(array) for name, array in outputs.items()},
            "timing": {
                "queue_ms": round(queue_s * 1e3, 3),
                "compute_ms": round(compute_s * 1e3, 3),
                "batch_size": batch_size,
            },
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


def encode_error(message: str, code: str) -> bytes:
    return orjson.dumps({"error": message, "code": code})
