"""uvicorn with nothing behind it: PORT (echo|drain). The limit of what a Python server over ASGI can do."""

from __future__ import annotations

import sys
from typing import Any

import uvicorn

HEAD = {"type": "http.response.start", "status": 200}


async def body_of(receive: Any) -> bytes:
    message = await receive()
    if not message["more_body"]:
        return message["body"]
    parts = [message["body"]]
    while message["more_body"]:
        message = await receive()
        parts.append(message["body"])
    return b"".join(parts)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body = await body_of(receive)
    length = str(len(body)).encode()
    await send({**HEAD, "headers": [(b"content-type", b"application/json"), (b"content-length", length)]})
    await send({"type": "http.response.body", "body": body})


async def drain(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body as one piece of bytes, as a server with a model behind it must, and answers two bytes."""
    await body_of(receive)
    await send({**HEAD, "headers": [(b"content-type", b"application/json"), (b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"[]"})


if __name__ == "__main__":
    uvicorn.run(
        {"echo": echo, "drain": drain}[sys.argv[2]],
        host="127.0.0.1",
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        lifespan="off",
        access_log=False,
        log_level="warning",
    )
