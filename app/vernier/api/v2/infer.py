"""POST /v2/models/{name}/infer: predictions by the Open Inference Protocol."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from vernier.api.formats.codecs import Body
from vernier.api.formats.long_json import LongFormat
from vernier.api.formats.schemas import error_responses
from vernier.api.http.body import require_identity_coding
from vernier.api.http_prediction import HttpPrediction
from vernier.api.v2.answers import encode_infer
from vernier.api.v2.requests import HEADER_LENGTH, InferRequest, json_bytes, parse_infer

router = APIRouter(prefix="/v2/models/{name}", tags=["Open Inference Protocol"])

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_ERRORS = error_responses(400, 404, 413, 415, 429, 500, 503, 504)


@router.post("/infer", responses=_ERRORS, openapi_extra=_BODY, summary="Run a model, its newest version")
async def infer(request: Request, name: str) -> Response:
    """JSON, or JSON with binary tensors behind it (`Inference-Header-Content-Length`), both ways."""
    return await _infer(request, name, None)


@router.post(
    "/versions/{version}/infer", responses=_ERRORS, openapi_extra=_BODY, summary="Run one version of a model"
)
async def infer_version(request: Request, name: str, version: str) -> Response:
    return await _infer(request, name, version)


async def _infer(request: Request, name: str, version: str | None) -> Response:
    headers = request.headers
    prediction = HttpPrediction(request)

    async def work() -> Response:
        require_identity_coding(headers.get("content-encoding"))
        body = await prediction.body()
        header_bytes = json_bytes(headers.get(HEADER_LENGTH), len(body))
        form = LongFormat("infer", InferRequest, (header_bytes, name, version))
        bodies: list[Body] = [body]
        del body
        envelope, inputs = await prediction.parse(parse_infer, bodies, form, header_bytes)
        answer = await prediction.answer(envelope, inputs)
        assert isinstance(envelope, InferRequest)
        model = prediction.served
        encoded = encode_infer(envelope, prediction.identity, model.name, model.version, answer)
        return Response(encoded.body, headers=encoded.headers)

    return await prediction.respond(work)
