"""Bodies of Amazon SageMaker's POST /invocations: any of the JSON that the service knows, told by its fields."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from vernier.api.formats.codecs import (
    JSON,
    RAW,
    Body,
    Inputs,
    PredictRequest,
    RawInputs,
    encode_answer,
    parse_json,
    parse_predict,
)
from vernier.api.instances import encode_predictions, parse_instances
from vernier.api.v2.answers import InferAnswer, encode_infer
from vernier.api.v2.requests import HEADER_LENGTH, InferRequest, parse_infer
from vernier.border.batch import Answer
from vernier.border.catalogue import ServedModel
from vernier.errors import UnsupportedMediaType, shown

#: The media type of JSON with binary tensors behind it, which says how many bytes are JSON: SageMaker passes no headers
#: but Content-Type and Accept.
BINARY = "application/vnd.sagemaker-triton.binary+json"
_BINARY = re.compile(re.escape(BINARY) + r"\s*;\s*json-header-size=(\d{1,20})", re.IGNORECASE)


@dataclass(slots=True)
class Invocation(InferRequest):
    """The envelope of an invocation. `form` says which protocol's it is: `predict`, `infer` or `instances`."""

    form: str = "predict"


def header_length(content_type: str) -> str | None:
    """How many bytes of the body are JSON, as text; None when all are or none. Raises UnsupportedMediaType."""
    found = _BINARY.fullmatch(content_type.strip())
    if found is not None:
        return found[1]
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type in (JSON, RAW, ""):
        return None
    raise UnsupportedMediaType(
        f"cannot read {shown(media_type)}; send {JSON}, {BINARY};json-header-size=…, or {RAW} for a single input"
    )


def parse_invocation(body: Body, header_bytes: int | None) -> tuple[PredictRequest, Inputs]:
    """The request for the only model, or for the one that the JSON of `/v1/predict` names. Raises RequestError."""
    envelope: PredictRequest
    inputs: Inputs
    form = "infer"
    if header_bytes is not None:
        envelope, inputs = parse_infer(body, header_bytes, None, None)
    else:
        data = parse_json(bytes(body))
        fields = data if isinstance(data, dict) else {}
        if "instances" in fields:
            form = "instances"
            envelope, inputs = parse_instances(bytes(body), None)
        elif isinstance(fields.get("inputs"), list):
            envelope, inputs = parse_infer(body, None, None, None)
        else:
            form = "predict"
            envelope, inputs = parse_predict(body)
    return Invocation(**asdict(envelope), form=form), inputs


def raw_invocation(body: Body) -> tuple[Invocation, Inputs]:
    """The bytes of the only input of the only model."""
    return Invocation(), RawInputs(body)


def encode_invocation(
    request: Invocation, request_id: str, model: ServedModel, answer: Answer
) -> InferAnswer:
    """The answer in the request's protocol, with its content type."""
    if request.form == "instances":
        return InferAnswer(encode_predictions(answer, model.signature.has_batch), {"content-type": JSON})
    if request.form == "predict":
        return InferAnswer(
            encode_answer(request_id, model.name, model.version, answer), {"content-type": JSON}
        )
    encoded = encode_infer(request, request_id, model.name, model.version, answer)
    size = encoded.headers.get(HEADER_LENGTH)
    if size is None:
        return encoded
    return InferAnswer(encoded.body, {"content-type": f"{BINARY};json-header-size={size}"})
