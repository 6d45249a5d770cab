"""ModelInfer's messages: bytes to an envelope and inputs, a computed prediction to a message. No calls, no models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from vernier.api.formats.codecs import LONG_BYTES
from vernier.api.grpc.schema import ModelInferRequest, ModelInferResponse, parse
from vernier.api.v2.requests import (
    InferRequest,
    SentTensor,
    TensorInputs,
    read_parameters,
    refuse_classification,
    refuse_shared_memory,
)
from vernier.api.v2.tensors import DATATYPES, raw_bytes, read_shape, require_datatype
from vernier.border.batch import Answer
from vernier.border.signature import Signature
from vernier.errors import BodyTooLarge, RequestError, WrongDtype, WrongShape, shown
from vernier.tensors import Array, TensorSpec, numpy_dtype, require_finite

#: Which field of the contents holds a dtype's numbers, and their dtype there. FP16 has none.
_CONTENTS: dict[str, tuple[str, type]] = {
    "bool": ("bool_contents", np.bool_),
    "int8": ("int_contents", np.int32),
    "int16": ("int_contents", np.int32),
    "int32": ("int_contents", np.int32),
    "int64": ("int64_contents", np.int64),
    "uint8": ("uint_contents", np.uint32),
    "uint16": ("uint_contents", np.uint32),
    "uint32": ("uint_contents", np.uint32),
    "uint64": ("uint64_contents", np.uint64),
    "float32": ("fp32_contents", np.float32),
    "float64": ("fp64_contents", np.float64),
}


def parameters_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as JSON would have them; one without a value is None."""
    values = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        values[name] = None if choice is None else getattr(parameter, choice)
    return values


@dataclass(slots=True)
class _TypedTensor(SentTensor):
    """An input with its numbers in the message's typed fields, which are `values`."""

    def decode(self, signature: Signature) -> Array:
        spec = signature.input(self.name)
        require_datatype(spec, self.datatype)
        return _from_contents(spec, read_shape(spec, self.shape), self.values)


def _from_contents(spec: TensorSpec, shape: tuple[int, ...], contents: Any) -> Array:
    """Raises WrongShape, WrongDtype, NonFiniteInput."""
    if spec.dtype not in _CONTENTS:
        raise WrongDtype(
            f"input '{spec.name}' takes {spec.dtype}, which the contents have no field for; send raw_input_contents"
        )
    name, wide = _CONTENTS[spec.dtype]
    for other, _ in contents.ListFields():
        if other.name != name:
            raise WrongDtype(
                f"input '{spec.name}' takes {spec.dtype} in {name}, but {other.name} are sent; leave them out"
            )
    numbers = getattr(contents, name)
    if len(numbers) != prod(shape):
        raise WrongShape(
            f"input '{spec.name}' of shape {list(shape)} takes {prod(shape)} numbers, but {len(numbers)} are sent"
        )
    array: Array = np.array(numbers, wide)
    narrow: Array = array.astype(numpy_dtype(spec.dtype))
    if not np.array_equal(narrow, array, equal_nan=narrow.dtype.kind == "f"):
        raise WrongDtype(f"input '{spec.name}' holds an integer out of the range of {spec.dtype}")
    require_finite(spec.name, narrow)
    return narrow.reshape(shape)


def parse_model_infer(data: bytes) -> tuple[InferRequest, TensorInputs]:
    """A ModelInferRequest. Outputs are answered as bytes, unless the inputs came in typed fields.

    Raises:
        RequestError, InvalidJson, UnsupportedMediaType, BodyTooLarge, WrongShape
    """
    return read_model_infer(parse(ModelInferRequest, data))


def read_model_infer(message: Any) -> tuple[InferRequest, TensorInputs]:
    """As `parse_model_infer`, of a message."""
    request = InferRequest(message.model_name or None, message.model_version or None, id=message.id or None)
    if request.model is None:
        raise RequestError("'model_name' is missing; name the model")
    read_parameters(request, parameters_of(message.parameters))
    names = []
    for output in message.outputs:
        parameters = parameters_of(output.parameters)
        refuse_shared_memory(parameters)
        refuse_classification(parameters)
        names.append(output.name)
    request.outputs = names or None
    inputs, raw = message.inputs, message.raw_input_contents
    for kind, used in (("inputs", [tensor.name for tensor in inputs]), ("outputs", names)):
        if len(set(used)) != len(used):
            raise RequestError(f"'{kind}' names a tensor twice")
    request.binary = bool(raw) or not inputs
    tensors: list[SentTensor] = []
    typed_bytes = 0
    if raw and len(raw) != len(inputs):
        raise WrongShape(
            f"there are {len(inputs)} inputs, but {len(raw)} raw_input_contents; send one for each"
        )
    for at, tensor in enumerate(inputs):
        refuse_shared_memory(parameters_of(tensor.parameters))
        shape = list(tensor.shape)
        if not raw:
            typed_bytes += tensor.contents.ByteSize()
            tensors.append(_TypedTensor(tensor.name, tensor.datatype, shape, None, tensor.contents))
        elif tensor.HasField("contents"):
            raise RequestError(
                f"input {shown(tensor.name)} has contents beside raw_input_contents; send one of them"
            )
        else:
            tensors.append(SentTensor(tensor.name, tensor.datatype, shape, raw[at]))
    if typed_bytes > LONG_BYTES:
        raise BodyTooLarge(
            f"typed contents may have {LONG_BYTES} bytes in a request, since reading them is slow; "
            f"send raw_input_contents"
        )
    return request, TensorInputs(tensors)


def encode_model_infer(
    request: InferRequest, request_id: str, model: str, version: str, answer: Answer
) -> Any:
    """A ModelInferResponse; all of its outputs are raw or all are typed."""
    message = ModelInferResponse(model_name=model, model_version=version, id=request_id)
    message.parameters["precision"].string_param = answer.precision
    outputs = answer.outputs.items()
    is_raw = request.binary or any(array.dtype.name not in _CONTENTS for _, array in outputs)
    for name, array in outputs:
        tensor = message.outputs.add(name=name, datatype=DATATYPES[array.dtype], shape=array.shape)
        if is_raw:
            message.raw_output_contents.append(raw_bytes(array))
        else:
            field, _ = _CONTENTS[array.dtype.name]
            getattr(tensor.contents, field).extend(np.ascontiguousarray(array).reshape(-1).tolist())
    return message
