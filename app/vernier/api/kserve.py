"""POST /v1/models/{name}:predict: predictions by KServe's v1 protocol, which Vertex AI's containers speak as well."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from vernier.api.formats.codecs import JSON, Body
from vernier.api.formats.long_json import LongFormat
from vernier.api.formats.schemas import error_responses
from vernier.api.http.body import require_identity_coding
from vernier.api.http_prediction import HttpPrediction
from vernier.api.instances import encode_predictions, parse_instances
from vernier.api.v2.requests import InferRequest

router = APIRouter(tags=["prediction"])

_BODY = {"requestBody": {"required": True, "content": {JSON: {"schema": {"type": "object"}}}}}


@router.post(
    "/v1/models/{name}:predict",
    responses=error_responses(400, 404, 413, 415, 429, 500, 503, 504),
    openapi_extra=_BODY,
    summary="Run a model on instances",
)
async def predict_instances(request: Request, name: str) -> Response:
    """`{"instances": […]}` in, `{"predictions": […]}` out."""
    prediction = HttpPrediction(request)

    async def work() -> Response:
        require_identity_coding(request.headers.get("content-encoding"))
        body: list[Body] = [await prediction.body()]
        form = LongFormat("instances", InferRequest, (name,))
        answer = await prediction.answer(*await prediction.parse(parse_instances, body, form))
        payload = encode_predictions(answer, prediction.served.signature.has_batch)
        return Response(payload, media_type=JSON)

    return await prediction.respond(work)
