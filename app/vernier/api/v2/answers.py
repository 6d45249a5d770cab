"""Answers of the Open Inference Protocol: a computed prediction to bytes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import orjson

from vernier.api.formats.codecs import JSON, RAW
from vernier.api.v2.requests import HEADER_LENGTH, InferRequest
from vernier.api.v2.tensors import DATATYPES, raw_bytes
from vernier.border.batch import Answer


class InferAnswer(NamedTuple):
    body: bytes
    headers: dict[str, str]


def encode_infer(
    request: InferRequest, request_id: str, model: str, version: str, answer: Answer
) -> InferAnswer:
    """The body and its headers; binary outputs follow the JSON in the order in which it names them."""
    binary: list[bytes] = []
    outputs: list[dict[str, Any]] = []
    for name, array in answer.outputs.items():
        entry: dict[str, Any] = {"name": name, "datatype": DATATYPES[array.dtype], "shape": list(array.shape)}
        if request.is_binary(name):
            binary.append(raw_bytes(array))
            entry["parameters"] = {"binary_data_size": array.nbytes}
        else:
            entry["data"] = np.ascontiguousarray(array).reshape(-1)
        outputs.append(entry)
    text = orjson.dumps(
        {
            "id": request_id,
            "model_name": model,
            "model_version": version,
            "parameters": {"precision": answer.precision},
            "outputs": outputs,
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )
    if not binary:
        return InferAnswer(text, {"content-type": JSON})
    return InferAnswer(b"".join([text, *binary]), {"content-type": RAW, HEADER_LENGTH: str(len(text))})
