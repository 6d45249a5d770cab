"""Inference requests of the Open Inference Protocol: bytes and headers to an envelope and inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vernier.api.formats.codecs import (
    MAX_PRIORITY,
    TOO_LONG_MS,
    Body,
    Inputs,
    PredictRequest,
    RawInputs,
    parse_json,
)
from vernier.api.v2.tensors import read_shape, require_datatype, tensor_from_raw, tensor_from_values
from vernier.border.signature import Signature
from vernier.errors import InvalidJson, MissingInput, UnsupportedMediaType, shown
from vernier.tensors import Array, Arrays

#: Tells how many bytes of a body are JSON; binary tensors follow.
HEADER_LENGTH = "inference-header-content-length"

#: Triton counts priorities from 1, the highest, and takes 0 for the default.
PRIORITY_LEVELS = 2 * MAX_PRIORITY + 1
DEFAULT_PRIORITY = MAX_PRIORITY + 1
_MAX_LENGTH_DIGITS = 20


@dataclass(slots=True)
class InferRequest(PredictRequest):
    """The envelope of an inference request.

    Attributes:
        binary: whether outputs are answered as bytes; `binary_outputs` has those that say otherwise, by name.
    """

    binary: bool = False
    binary_outputs: dict[str, bool] = field(default_factory=dict)

    def is_binary(self, output: str) -> bool:
        return self.binary_outputs.get(output, self.binary)


def json_bytes(header_length: str | None, body_bytes: int) -> int | None:
    """How many bytes of the body are JSON, by the header; None when all are. Raises InvalidJson."""
    if header_length is None:
        return None
    digits = header_length.strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _MAX_LENGTH_DIGITS):
        raise InvalidJson("the Inference-Header-Content-Length header is not a number of bytes")
    if int(digits) > body_bytes:
        raise InvalidJson(
            f"the Inference-Header-Content-Length header says {int(digits)}, but the body has {body_bytes} bytes"
        )
    return int(digits)


def parse_infer(
    body: Body, header_bytes: int | None, model: str | None, version: str | None
) -> tuple[InferRequest, Inputs]:
    """The request of `POST /v2/models/{model}/infer`.

    Args:
        header_bytes: how many bytes of the body are JSON, behind which binary tensors follow; None when all are, 0 when
            the body is the bytes of the model's only input.

    Raises:
        InvalidJson, MissingInput, NonFiniteInput, UnsupportedMediaType
    """
    if header_bytes == 0:
        return InferRequest(model, version, binary=True), RawInputs(body)
    stop = len(body) if header_bytes is None else header_bytes
    if not stop:
        raise InvalidJson('the body is empty; send a JSON object such as {"inputs": […]}')
    data = parse_json(bytes(memoryview(body)[:stop]))
    if not isinstance(data, dict):
        raise InvalidJson('the body must be a JSON object such as {"inputs": […]}')
    request = InferRequest(model, version, id=_text(data, "id"))
    read_parameters(request, _object(data, "parameters"))
    _read_outputs(request, data.get("outputs"))
    inputs = data.get("inputs")
    if inputs is None:
        raise MissingInput('\'inputs\' is missing; send {"inputs": [{"name": …, "shape": […], …}]}')
    return request, TensorInputs(_tensors(inputs, memoryview(body)[stop:]))


def read_parameters(request: InferRequest, parameters: Mapping[str, Any]) -> None:
    """Takes what the protocol's extensions and this service define; a client's own parameters mean nothing.

    Raises:
        InvalidJson, UnsupportedMediaType
    """
    if parameters.get("sequence_id") not in (None, 0, ""):
        raise UnsupportedMediaType("models here keep no state between requests; leave out 'sequence_id'")
    request.priority = _priority(parameters.get("priority", 0))
    request.timeout_ms = _timeout_ms(parameters.get("timeout", 0))
    request.precision = _text(parameters, "precision")
    request.binary = _flag(parameters, "binary_data_output") or False


def _priority(value: object) -> int:
    """Ours, which is larger for what goes first, of Triton's, which is 1 for that and 0 for the default."""
    if type(value) is not int or value < 0:
        raise InvalidJson(
            f"'priority' must be an integer: 0 for the default, else 1 (first) to {PRIORITY_LEVELS} (last)"
        )
    return max(DEFAULT_PRIORITY - value, -MAX_PRIORITY) if value else 0


def _timeout_ms(value: object) -> float | None:
    if type(value) is not int or value < 0:
        raise InvalidJson("'timeout' must be an integer number of microseconds; 0 asks for none")
    return min(value, int(TOO_LONG_MS) * 1000) / 1e3 if value else None


def _text(data: Mapping[str, Any], name: str) -> str | None:
    value = data.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidJson(f"'{name}' must be a string")
    return value


def _flag(data: Mapping[str, Any], name: str) -> bool | None:
    value = data.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidJson(f"'{name}' must be true or false")
    return value


def _object(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = data.get(name)
    if value is not None and not isinstance(value, dict):
        raise InvalidJson(f"'{name}' must be an object")
    return value or {}


def _entries(value: object, name: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise InvalidJson(f"'{name}' must be a list of objects, each with a 'name'")
    names = [_text(entry, "name") for entry in value]
    for entry_name in names:
        if entry_name is None:
            raise InvalidJson(f"an entry of '{name}' has no 'name'")
    if len(set(names)) != len(names):
        raise InvalidJson(f"'{name}' names a tensor twice")
    return value


def refuse_shared_memory(parameters: Mapping[str, Any]) -> None:
    """Raises UnsupportedMediaType when a tensor lies in a region that the client has registered elsewhere."""
    if "shared_memory_region" in parameters:
        raise UnsupportedMediaType(
            "shared memory regions are not served here; send the tensor in the request"
        )


def refuse_classification(parameters: Mapping[str, Any]) -> None:
    """Raises UnsupportedMediaType when the answer shall be labels."""
    if parameters.get("classification") not in (None, 0):
        raise UnsupportedMediaType("classification is not served here; ask for the output's numbers")


def _read_outputs(request: InferRequest, outputs: object) -> None:
    if outputs is None:
        return
    names: list[str] = []
    for entry in _entries(outputs, "outputs"):
        parameters = _object(entry, "parameters")
        refuse_shared_memory(parameters)
        refuse_classification(parameters)
        binary = _flag(parameters, "binary_data")
        if binary is not None:
            request.binary_outputs[entry["name"]] = binary
        names.append(entry["name"])
    request.outputs = names or None  # an empty list asks for all


@dataclass(slots=True)
class SentTensor:
    """An input before it is known what the model takes. Exactly one of `raw` and `values` holds its data."""

    name: str
    datatype: object
    shape: object
    raw: Body | None
    values: Any = None

    def decode(self, signature: Signature) -> Array:
        """Raises RequestError."""
        spec = signature.input(self.name)
        require_datatype(spec, self.datatype)
        shape = read_shape(spec, self.shape)
        if self.raw is not None:
            return tensor_from_raw(spec, shape, self.raw)
        return tensor_from_values(spec, shape, self.values)


def _tensors(inputs: object, binary: memoryview) -> Sequence[SentTensor]:
    tensors: list[SentTensor] = []
    at = 0
    for entry in _entries(inputs, "inputs"):
        parameters = _object(entry, "parameters")
        refuse_shared_memory(parameters)
        name, size = entry["name"], parameters.get("binary_data_size")
        raw: Body | None = None
        if size is not None:
            if type(size) is not int or size < 0 or "data" in entry:
                raise InvalidJson(
                    f"input {shown(name)}: 'binary_data_size' must be a number of bytes, and then there is no 'data'"
                )
            if size > len(binary) - at:
                raise InvalidJson(
                    f"input {shown(name)} has {size} bytes, but only {len(binary) - at} are left in the body; "
                    f"is the Inference-Header-Content-Length header right?"
                )
            raw = binary[at : at + size]
            at += size
        elif "data" not in entry:
            raise MissingInput(f"input {shown(name)} has neither 'data' nor a 'binary_data_size' parameter")
        tensors.append(SentTensor(name, entry.get("datatype"), entry.get("shape"), raw, entry.get("data")))
    if at != len(binary):
        raise InvalidJson(f"{len(binary) - at} bytes of the body belong to no input")
    return tensors


@dataclass(slots=True)
class TensorInputs:
    """Inputs of an inference request. Bytes are looked at for NaN when they are decoded; JSON holds none."""

    finite: ClassVar[bool] = True
    tensors: Sequence[SentTensor]

    def decode(self, signature: Signature) -> Arrays:
        return {tensor.name: tensor.decode(signature) for tensor in self.tensors}
