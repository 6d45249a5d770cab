"""POST /v1/predict as an ASGI route: what `uvicorn vernier.main:app` serves, and what connections leave to it."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from vernier.api.formats.codecs import (
    JSON,
    LONG_BYTES,
    RAW,
    Body,
    encode_answer,
    media_type_of,
    read_envelope,
)
from vernier.api.formats.schemas import EXAMPLE, PredictAnswer, PredictBody, error_responses
from vernier.api.http_prediction import HttpPrediction

router = APIRouter(tags=["prediction"])

_BODY = {
    "required": True,
    "content": {
        JSON: {"schema": PredictBody.model_json_schema(), "example": EXAMPLE},
        RAW: {"schema": {"type": "string", "format": "binary"}},
    },
}


@router.post(
    "/v1/predict",
    response_model=PredictAnswer,
    responses=error_responses(400, 404, 413, 415, 429, 500, 503, 504),
    openapi_extra={"requestBody": _BODY},
    summary="Run a model on a batch of inputs",
)
async def predict(request: Request) -> Response:
    """Numbers in, numbers out. Rows of one request may be computed in several batches, and one batch
    may hold rows of several requests; every caller gets its own rows in its own order."""
    prediction = HttpPrediction(request)

    async def work() -> Response:
        body = await prediction.body()
        content_type = request.headers.get("content-type", "")
        if len(body) > LONG_BYTES and media_type_of(content_type) == JSON:
            longs: list[Body] = [body]
            del body
            envelope, inputs = await prediction.read_long(longs)
        else:
            envelope, inputs = read_envelope(content_type, request.query_params, body)
        answer = await prediction.answer(envelope, inputs)
        model = prediction.served
        payload = encode_answer(prediction.identity, model.name, model.version, answer)
        return Response(payload, media_type=JSON)

    return await prediction.respond(work)
