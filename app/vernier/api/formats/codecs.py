"""Bytes to validated tensors and answers to bytes, for the v1 protocol.

JSON in, JSON out; numbers go to their tensor's dtype only when nothing is lost in kind: text, null,
booleans among numbers, fractions for integers and integers out of range are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import orjson
from simdjson import Array as JsonArray
from simdjson import Object as JsonObject

from vernier.api.formats.json_tensors import (
    count_lists,
    decode_numbers,
    decode_values,
    judge_in_place,
    parse_fields,
)
from vernier.border.batch import Answer
from vernier.border.signature import Signature
from vernier.errors import InvalidJson, MissingInput, NonFiniteInput, UnsupportedMediaType, WrongShape
from vernier.tensors import Array, Arrays

MAX_PRIORITY = 9
#: No timeout is as long.
TOO_LONG_MS = 1e9
JSON = "application/json"
RAW = "application/octet-stream"

#: Shorter bodies are decoded where they arrive, in a few milliseconds; longer ones in `vernier.api.formats.long_json`.
LONG_BYTES = 2**20

#: The bytes of a request; only raw ones come as a view of memory.
Body = bytes | bytearray | memoryview
Text = bytes | bytearray


class Inputs(Protocol):
    """The inputs of a request, before it is known which model's they are.

    Attributes:
        finite: whether what is decoded holds neither NaN nor infinities for certain.
    """

    finite: ClassVar[bool]

    def decode(self, signature: Signature) -> Arrays:
        """Arrays of the model's dtypes; shapes are checked by `Signature.check`. Raises RequestError."""
        ...


@dataclass(slots=True)
class PredictRequest:
    """The envelope of a prediction. `timeout_ms` None means none asked for."""

    model: str | None = None
    version: str | None = None
    outputs: Sequence[str] | None = None
    precision: str | None = None
    priority: int = 0
    timeout_ms: float | None = None
    id: str | None = None


# --- envelopes ------------------------------------------------------------------------------------
def parse_json(body: Text) -> Any:
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


def parse_predict(body: Body) -> tuple[PredictRequest, Inputs]:
    """The envelope of `POST /v1/predict`. Raises InvalidJson, MissingInput, NonFiniteInput.

    The inputs may borrow the JSON parser's memory: decode them before the next body is parsed.
    """
    if isinstance(body, memoryview):
        body = bytes(body)
    fields = parse_fields(body, len(_READERS))
    if fields is not None:
        inputs, outputs = fields.get("inputs"), fields.get("outputs")
        if isinstance(outputs, JsonArray):
            fields["outputs"] = outputs.as_list()
        if isinstance(inputs, JsonObject):
            return _envelope(fields), NumberInputs(body, inputs, 1 if outputs is not None else 0)
    data = parse_json(body)
    if not isinstance(data, dict):
        raise InvalidJson('the body must be a JSON object such as {"model": "name", "inputs": {…}}')
    envelope = _envelope(data)
    inputs = data.get("inputs")
    if inputs is None:
        raise MissingInput('\'inputs\' is missing; send {"inputs": {"<name>": [[…]]}}')
    if not isinstance(inputs, dict):
        raise InvalidJson("'inputs' must be an object from input name to nested lists of numbers")
    return envelope, ValueInputs(body, inputs)


def _envelope(data: Mapping[str, Any]) -> PredictRequest:
    envelope = PredictRequest()
    for name, value in data.items():
        reader = _READERS.get(name)
        if reader is None:
            unknown = ", ".join(f"'{name}'" for name in data if name not in _READERS)
            raise InvalidJson(f"unknown field {unknown}; the fields are {', '.join(_READERS)}")
        reader(envelope, name, value)
    return envelope


def _read_text(envelope: PredictRequest, name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise InvalidJson(f"'{name}' must be a string")
    setattr(envelope, name, value)


def _read_version(envelope: PredictRequest, name: str, value: Any) -> None:
    _read_text(envelope, name, str(value) if type(value) is int else value)


def _read_outputs(envelope: PredictRequest, name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, list) and all(isinstance(o, str) for o in value)):
        raise InvalidJson("'outputs' must be a list of output names")
    envelope.outputs = value


def _read_priority(envelope: PredictRequest, name: str, value: Any) -> None:
    envelope.priority = _priority(0 if value is None else value)


def _read_timeout(envelope: PredictRequest, name: str, value: Any) -> None:
    envelope.timeout_ms = parse_timeout(value)


def _no_reader(envelope: PredictRequest, name: str, value: Any) -> None:
    """The inputs are no part of the envelope."""


_READERS: dict[str, Callable[[PredictRequest, str, Any], None]] = {
    "model": _read_text,
    "inputs": _no_reader,
    "version": _read_version,
    "outputs": _read_outputs,
    "precision": _read_text,
    "priority": _read_priority,
    "timeout_ms": _read_timeout,
    "id": _read_text,
}


def _priority(value: Any) -> int:
    if type(value) is not int or not -MAX_PRIORITY <= value <= MAX_PRIORITY:
        raise InvalidJson(f"'priority' must be an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}")
    return value


def parse_timeout(value: Any) -> float | None:
    """Milliseconds, zero included. Raises InvalidJson."""
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value < TOO_LONG_MS:
        raise InvalidJson("'timeout_ms' must be a number of milliseconds, 0 or more")
    return float(value)


def raw_envelope(query: Mapping[str, str]) -> PredictRequest:
    """The envelope of a raw body stands in the query string. Raises InvalidJson."""
    timeout = query.get("timeout_ms")
    try:
        return PredictRequest(
            model=query.get("model"),
            version=query.get("version"),
            outputs=query["outputs"].split(",") if "outputs" in query else None,
            precision=query.get("precision"),
            priority=_priority(int(query.get("priority", "0"))),
            timeout_ms=None if timeout is None else parse_timeout(float(timeout)),
            id=query.get("id"),
        )
    except ValueError as error:
        raise InvalidJson(f"a number in the query string cannot be read: {error}") from error


def media_type_of(content_type: str) -> str:
    """JSON or RAW. Raises UnsupportedMediaType."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type in (JSON, "", "application/x-www-template-urlencoded"):  # the last is what curl -d sends
        return JSON
    if media_type == RAW:
        return RAW
    raise UnsupportedMediaType(f"cannot read '{media_type}'; send {JSON}, or {RAW} for a single input")


def read_envelope(content_type: str, query: Mapping[str, str], body: Body) -> tuple[PredictRequest, Inputs]:
    """Raises UnsupportedMediaType, InvalidJson, MissingInput, NonFiniteInput."""
    if media_type_of(content_type) == JSON:
        return parse_predict(body)
    return raw_envelope(query), RawInputs(body)


# --- inputs ---------------------------------------------------------------------------------------
@dataclass(slots=True)
class NumberInputs:
    """Inputs inside simdjson, to be decoded once. `other_lists`: how many `[` of the body stand outside."""

    finite: ClassVar[bool] = True
    body: Text
    parsed: JsonObject
    other_lists: int

    def decode(self, signature: Signature) -> Arrays:
        parsed = self.parsed
        del self.parsed  # or the parser could not be used again while somebody holds on to the request
        arrays = decode_numbers(parsed, count_lists(self.body) - self.other_lists, signature)
        if arrays is not None:
            return arrays
        if len(self.body) > LONG_BYTES:
            shapes = judge_in_place(parsed, signature)
            if shapes is not None:
                return shapes
        del parsed
        return ValueInputs(self.body, parse_json(self.body)["inputs"]).decode(signature)


@dataclass(slots=True)
class ValueInputs:
    """Inputs as Python lists."""

    finite: ClassVar[bool] = True
    body: Text
    values: Mapping[str, Any]

    def decode(self, signature: Signature) -> Arrays:
        return decode_values(self.values, signature, b"true" in self.body or b"false" in self.body)


@dataclass(slots=True)
class RawInputs:
    """The bytes of the single input."""

    finite: ClassVar[bool] = False
    body: Body

    def decode(self, signature: Signature) -> Arrays:
        return tensor_from_bytes(self.body, signature)


def tensor_from_bytes(body: Body, signature: Signature) -> Arrays:
    """A raw body: the little-endian bytes of the model's only input, with one dynamic dimension at most.

    Raises UnsupportedMediaType when the model has several inputs, WrongShape when the size does not fit.
    """
    layout = signature.raw_layout
    size, unit = len(body), layout.unit_bytes
    if not size or size % unit or (size != unit and -1 not in layout.shape):
        spec = layout.spec
        raise WrongShape(
            f"the body has {size} bytes; input '{spec.name}' {spec.describe_shape()} of {spec.dtype} "
            f"takes {'a multiple of ' if -1 in layout.shape else ''}{unit}"
        )
    return {layout.spec.name: np.frombuffer(body, layout.dtype).reshape(layout.shape)}


# --- answers --------------------------------------------------------------------------------------
def encode_answer(request_id: str, model: str, version: str, answer: Answer) -> bytes:
    """The body of a successful prediction; times in milliseconds, to the microsecond."""
    return orjson.dumps(
        {
            "id": request_id,
            "model": model,
            "version": version,
            "precision": answer.precision,
            "outputs": answer.outputs,
            "timing": {
                "queue_ms": int(answer.queue_s * 1e6) / 1e3,
                "compute_ms": int(answer.compute_s * 1e6) / 1e3,
                "batch_size": answer.batch_size,
            },
        },
        default=_contiguous,
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


def _contiguous(value: Any) -> Array:
    """orjson takes arrays in C order only, of one dimension at least."""
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def encode_error(message: str, code: str) -> bytes:
    return orjson.dumps({"error": message, "code": code})
