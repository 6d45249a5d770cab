"""GET /ping and POST /invocations: what Amazon SageMaker asks of a container."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from vernier.api.formats.codecs import JSON, RAW, Body
from vernier.api.formats.long_json import LongFormat
from vernier.api.formats.schemas import error_responses
from vernier.api.health import ready
from vernier.api.http.body import require_identity_coding
from vernier.api.http_prediction import HttpPrediction
from vernier.api.invocations import (
    BINARY,
    Invocation,
    encode_invocation,
    header_length,
    parse_invocation,
    raw_invocation,
)
from vernier.api.v2.requests import json_bytes

router = APIRouter(tags=["Amazon SageMaker"])

_BINARY_SCHEMA = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {JSON: {"schema": {"type": "object"}}, BINARY: _BINARY_SCHEMA, RAW: _BINARY_SCHEMA},
    }
}

router.get("/ping", summary="As /v2/health/ready")(ready)


@router.post(
    "/invocations",
    responses=error_responses(400, 404, 413, 415, 429, 500, 503, 504),
    openapi_extra=_BODY,
    summary="Run the model",
)
async def invocations(request: Request) -> Response:
    """The JSON of `/v1/predict`, of `/v2/models/{name}/infer` or of `/v1/models/{name}:predict`, told by its fields."""
    headers = request.headers
    prediction = HttpPrediction(request)

    async def work() -> Response:
        require_identity_coding(headers.get("content-encoding"))
        content_type = headers.get("content-type", "")
        length = header_length(content_type)
        body: list[Body] = [await prediction.body()]
        header_bytes = json_bytes(length, len(body[0]))
        if content_type.partition(";")[0].strip().lower() == RAW:
            envelope, inputs = raw_invocation(body.pop())
        else:
            form = LongFormat("invocation", Invocation, (header_bytes,))
            envelope, inputs = await prediction.parse(parse_invocation, body, form, header_bytes)  # type: ignore[assignment]
        answer = await prediction.answer(envelope, inputs)
        encoded = encode_invocation(envelope, prediction.identity, prediction.served, answer)
        return Response(encoded.body, headers=encoded.headers)

    return await prediction.respond(work)
