"""POST /v1/predict on the ordinary ASGI path."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from fastapi import APIRouter, Request, Response

from app.api.body import read_body, wait_for_disconnect
from app.api.codecs import PredictRequest, encode_answer, parse_predict, parse_timeout
from app.api.errors import JSON, describe_error, error_response
from app.api.schemas import EXAMPLE, PredictAnswer, PredictBody, error_responses
from app.api.service import Predictions, Prepared
from app.errors import Cancelled, EngineError, InvalidJson, UnsupportedMediaType, VernierError
from app.logs import request_id
from app.serving.repository import LoadedModel
from app.serving.request import Answer, PendingRequest
from app.settings import Settings

router = APIRouter(tags=["prediction"])

_BODY = {
    "required": True,
    "content": {
        JSON: {"schema": PredictBody.model_json_schema(), "example": EXAMPLE},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}


def _raw_envelope(query: Any) -> PredictRequest:
    """The envelope of a raw body stands in the query string."""
    priority = query.get("priority", "0")
    timeout = query.get("timeout_ms")
    try:
        return PredictRequest(
            inputs={},
            model=query.get("model"),
            version=query.get("version"),
            outputs=query["outputs"].split(",") if "outputs" in query else None,
            precision=query.get("precision"),
            priority=int(priority),
            timeout_ms=None if timeout is None else parse_timeout(float(timeout)),
            id=query.get("id"),
        )
    except ValueError as error:
        raise InvalidJson(f"a number in the query string cannot be read: {error}") from error


def read_envelope(media_type: str, query: Any, body: bytes) -> tuple[PredictRequest, bytes | None]:
    """The envelope, and the raw input's bytes when the body is one. Raises UnsupportedMediaType."""
    if media_type in (JSON, "", "application/x-www-form-urlencoded"):  # the last is what curl -d sends
        return parse_predict(body), None
    if media_type == "application/octet-stream":
        return _raw_envelope(query), body
    raise UnsupportedMediaType(
        f"cannot read '{media_type}'; send application/json, or application/octet-stream for a single input"
    )


class _AwaitedRequest(PendingRequest):
    """A pending request that resolves a future."""

    __slots__ = ("future",)

    def __init__(self, prepared: Prepared, future: asyncio.Future[Answer]) -> None:
        super().__init__(
            prepared.inputs,
            prepared.rows,
            prepared.outputs,
            prepared.precision,
            prepared.priority,
            prepared.deadline,
        )
        self.future = future

    def done(self, answer: Answer | None, error: VernierError | None) -> None:
        if self.future.done():
            return
        if answer is not None:
            self.future.set_result(answer)
        else:
            self.future.set_exception(error or EngineError("a request ended without an answer"))


async def _answer(request: Request, prepared: Prepared) -> Answer:
    """Runs the prediction and gives it up when the client goes away.

    The request is submitted in the same turn of the loop in which its model was resolved, so that a model
    that is replaced meanwhile has either admitted it or was not the one resolved.
    """
    future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    pending = _AwaitedRequest(prepared, future)
    prepared.model.scheduler.submit(pending)
    gone = asyncio.ensure_future(wait_for_disconnect(request))
    try:
        await asyncio.wait((future, gone), return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        raise Cancelled("the client disconnected before its answer was ready")
    finally:
        gone.cancel()
        if not future.done():
            prepared.model.scheduler.cancel(pending)


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
    model: LoadedModel | None = None
    identity = request.headers.get("x-request-id") or secrets.token_hex(8)
    token = request_id.set(identity)
    precision = ""
    code = "ok"
    try:
        body = await read_body(request, settings.max_body_bytes, settings.body_timeout_s)
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        envelope, raw = read_envelope(media_type, request.query_params, body)
        identity = envelope.id or identity
        request_id.set(identity)
        model = predictions.repository.resolve(envelope.model, envelope.version)
        prepared = predictions.prepare(envelope, model, arrived, raw)
        answer = await _answer(request, prepared)
        precision = answer.precision
        payload = encode_answer(
            request_id=identity,
            model=model.name,
            version=model.version,
            precision=precision,
            outputs=answer.outputs,
            queue_s=answer.queue_s,
            compute_s=answer.compute_s,
            batch_size=answer.batch_size,
        )
        response = Response(payload, media_type=JSON)
    except Exception as error:  # every failure is answered here, so that its code is counted
        response = error_response(error)
        code = describe_error(error)[2]
    finally:
        request_id.reset(token)
    response.headers["x-request-id"] = identity
    if model is None:
        state.metrics.responded_without_model(code)
    else:
        model.metrics.responded(code, precision, model.runtime, predictions.clock() - arrived)
    return response
