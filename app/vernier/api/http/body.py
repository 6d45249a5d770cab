"""Reading a request's body within limits of size and time, on the ASGI path."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.types import Message

from vernier.errors import BodyTooLarge, Cancelled, InvalidJson, RequestTimeout, UnsupportedMediaType

#: Longer ones are over every limit; Python's int() raises ValueError from 4,300 digits on.
_MAX_LENGTH_DIGITS = 20


def too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the body is larger than {limit_bytes} bytes; send fewer rows in a request, "
        f"or raise VERNIER_MAX_BODY_BYTES on the service"
    )


def body_timed_out(timeout_s: float) -> RequestTimeout:
    return RequestTimeout(
        f"the body did not arrive within {timeout_s:g} s; send it faster or in smaller requests"
    )


def disconnected_early() -> Cancelled:
    return Cancelled("the client disconnected while sending its body")


def require_identity_coding(content_encoding: str | None) -> None:
    """Raises UnsupportedMediaType for a body that is compressed."""
    if content_encoding is not None and content_encoding.strip().lower() not in ("", "identity"):
        raise UnsupportedMediaType("compressed bodies are not read here; send it without Content-Encoding")


async def read_body(request: Request, limit_bytes: int, timeout_s: float) -> bytes:
    """The whole body.

    Raises:
        BodyTooLarge: announced or found larger than `limit_bytes`; the rest is not read.
        RequestTimeout: it did not arrive within `timeout_s`.
        Cancelled: the client disconnected.
    """
    announced = request.headers.get("content-length")
    if announced is not None:
        if not (announced.isascii() and announced.isdigit()):
            raise InvalidJson("the Content-Length header is not a number")
        if len(announced) > _MAX_LENGTH_DIGITS or int(announced) > limit_bytes:
            raise too_large(limit_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            return await _collect(request, limit_bytes)
    except TimeoutError:
        raise body_timed_out(timeout_s) from None


async def _collect(request: Request, limit_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message: Message = await request.receive()
        if message["type"] == "http.disconnect":
            raise disconnected_early()
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit_bytes:
            raise too_large(limit_bytes)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def wait_for_disconnect(request: Request) -> None:
    """Returns when the client has gone away; call it after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
