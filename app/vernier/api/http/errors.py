"""From errors to answers: the table stands on the classes of vernier.errors, this file only writes it down."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from vernier.api.formats.codecs import JSON, encode_error
from vernier.errors import (
    BodyTooLarge,
    HeadTooLarge,
    InvalidHttp,
    Overloaded,
    QueueFull,
    RequestError,
    RequestTimeout,
    VernierError,
)

logger = logging.getLogger(__name__)

INTERNAL_MESSAGE = "the service failed on this request; the log has the details under the request's id"


def error_headers(error: VernierError) -> dict[str, str]:
    """Retry-After in whole seconds, rounded up, for refusals that a retry can mend; and an end of the
    connection where the rest of a body would have to be read only to be thrown away."""
    if isinstance(error, QueueFull | Overloaded):
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, BodyTooLarge | RequestTimeout | HeadTooLarge | InvalidHttp):
        return {"connection": "close"}
    return {}


def describe_error(error: BaseException) -> tuple[int, str, str]:
    """HTTP status, message and code. Anything outside RequestError is `internal`, without details."""
    if isinstance(error, RequestError):
        return error.http_status, error.message, error.code
    code = error.code if isinstance(error, VernierError) and error.http_status == 499 else "internal"
    return (499 if code == "cancelled" else 500), INTERNAL_MESSAGE, code


class ErrorResponse(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]
    code: str


def answer_error(error: BaseException) -> ErrorResponse:
    """What every protocol writes for an error. Logs it when it is ours."""
    status, message, code = describe_error(error)
    if status == 500:
        logger.error("request failed", exc_info=error)
    headers = error_headers(error) if isinstance(error, VernierError) else {}
    return ErrorResponse(status, encode_error(message, code), headers, code)


def error_response(error: BaseException) -> Response:
    status, body, headers, _ = answer_error(error)
    return Response(body, status, headers, media_type=JSON)


#: What Starlette raises by itself: status → code and what to do.
_ROUTING = {
    404: ("not_found", "there is nothing at {path}; see /docs for the routes"),
    405: ("method_not_allowed", "{path} does not take {method}; see /docs for the methods"),
}


def install_error_handlers(app: FastAPI) -> None:
    async def on_vernier(request: Request, error: Exception) -> Response:
        return error_response(error)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code, text = _ROUTING.get(error.status_code, ("invalid_request", str(error.detail)))
        message = text.format(path=request.scope["path"], method=request.method)
        return Response(
            encode_error(message, code), error.status_code, dict(error.headers or {}), media_type=JSON
        )

    app.add_exception_handler(VernierError, on_vernier)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_vernier)
