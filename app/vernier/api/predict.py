"""POST /v1/predict as an ASGI route: what `uvicorn vernier.main:app` serves, and what connections leave to it."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from vernier.api.body import read_body, wait_for_disconnect
from vernier.api.codecs import (
    JSON,
    LONG_BYTES,
    RAW,
    Body,
    PredictRequest,
    encode_answer,
    media_type_of,
    read_envelope,
)
from vernier.api.errors import describe_error, error_response
from vernier.api.identity import header_value, new_id
from vernier.api.schemas import EXAMPLE, PredictAnswer, PredictBody, error_responses
from vernier.api.service import Predictions, Prepared
from vernier.border.awaited import AwaitedAnswer
from vernier.border.batch import Answer, RequestBatch
from vernier.border.catalogue import ServedModel
from vernier.errors import Cancelled
from vernier.logs import request_id
from vernier.settings import Settings

router = APIRouter(tags=["prediction"])

_BODY = {
    "required": True,
    "content": {
        JSON: {"schema": PredictBody.model_json_schema(), "example": EXAMPLE},
        RAW: {"schema": {"type": "string", "format": "binary"}},
    },
}


async def _answer(request: Request, model: ServedModel, prepared: Prepared, arrived: float) -> Answer:
    """Runs the prediction and gives it up when the client goes away.

    The request is submitted in the same turn of the loop in which its model was resolved, so that a model
    that is replaced meanwhile has either admitted it or was not the one resolved.
    """
    arrays, rows, outputs, precision, priority, deadline = prepared
    awaited = AwaitedAnswer()
    deadlines = None if deadline is None else (deadline,)
    batch = RequestBatch(arrays, (rows,), outputs, precision, priority, (arrived,), deadlines, awaited)
    model.scheduler.submit(batch)
    future = awaited.future
    gone = asyncio.ensure_future(wait_for_disconnect(request))
    try:
        await asyncio.wait((future, gone), return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        raise Cancelled("the client disconnected before its answer was ready")
    finally:
        gone.cancel()
        if not future.done():
            model.scheduler.cancel(batch, 0)


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
    state = request.app.state
    predictions: Predictions = state.predictions
    settings: Settings = state.settings
    arrived = predictions.clock()
    model: ServedModel | None = None
    identity = request.headers.get("x-request-id") or new_id()
    token = request_id.set(identity)
    precision = ""
    code = "ok"
    try:
        body = await read_body(request, settings.max_body_bytes, settings.body_timeout_s)
        content_type = request.headers.get("content-type", "")
        if len(body) > LONG_BYTES and media_type_of(content_type) == JSON:

            def seen(envelope: PredictRequest, found: ServedModel | None) -> None:
                nonlocal identity, model
                identity, model = envelope.id or identity, found

            longs: list[Body] = [body]
            del body
            envelope, inputs = await predictions.read_long(longs, arrived, seen)
        else:
            envelope, inputs = read_envelope(content_type, request.query_params, body)
        identity = envelope.id or identity
        request_id.set(identity)
        model = predictions.repository.resolve(envelope.model, envelope.version)
        prepared = predictions.prepare(envelope, inputs, model, arrived)
        answer = await _answer(request, model, prepared, arrived)
        precision = answer.precision
        payload = encode_answer(identity, model.name, model.version, answer)
        response = Response(payload, media_type=JSON)
    except Exception as error:  # every failure is answered here, so that its code is counted
        response = error_response(error)
        code = describe_error(error)[2]
    finally:
        request_id.reset(token)
    response.headers["x-request-id"] = header_value(identity)
    if model is None:
        state.metrics.responded_without_model(code)
    else:
        model.metrics.responded(code, precision, model.runtime, predictions.clock() - arrived)
    return response
