"""A service for connections without an engine: answers that tell which bytes were understood, after a virtual while."""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from tests.simulation.virtual import VirtualLoop
from vernier.api.auth.guarding import GuardMiddleware
from vernier.api.auth.security import Guard, Key, digest_of
from vernier.api.http.errors import answer_error, error_response
from vernier.api.http.identity import Identities, new_id
from vernier.errors import Cancelled
from vernier.front.buffers import BodyBufferPool
from vernier.front.connection import Connection, plain_protocol
from vernier.front.limits import ByteBudget
from vernier.front.request import InferenceRequest
from vernier.front.response_heads import ResponseHeads
from vernier.settings import Settings

KEY = "the-right-key"
MAX_BODY_BYTES = 300_000
REQUEST_S, IDLE_S = 5.0, 20.0
BUDGET_BYTES = 4 * 2**20
_WAIT = re.compile(rb"wait=(\d+)")
_SIZE = re.compile(rb"size=(\d+)")


def digest(body: Any) -> bytes:
    return hashlib.sha256(bytes(body)).hexdigest()[:16].encode()


def answer_of(body: Any) -> bytes:
    """What is answered to a prediction: its digest, and as many bytes as its first ones ask for."""
    size = _SIZE.search(bytes(body[:64]))
    return digest(body) + b"." * (int(size[1]) if size else 0)


class Intake:
    """Answers predictions in any order, as engines do."""

    def __init__(self, loop: VirtualLoop, heads: ResponseHeads) -> None:
        self._loop = loop
        self._heads = heads
        self.clock = loop.time
        self.begun = self.abandoned = 0
        self._large: list[InferenceRequest] = []

    def begin(self, request: InferenceRequest) -> None:
        self.begun += 1
        waits = _WAIT.search(bytes(request.body[:64]))
        self._loop.call_later(int(waits[1]) / 1000 if waits else 0.0, self._answer, request)

    begin_long = begin

    def submit_large(self) -> None: ...

    def _answer(self, request: InferenceRequest) -> None:
        if request.settled:
            return
        request.identity = new_id()
        payload = answer_of(request.body)
        message = None
        if len(payload) < 1000:
            head = self._heads.make(
                request.connection.default_headers, 200, len(payload), request.identity, {}
            )
            message = head + payload
        request.settle(message, payload)
        request.connection.send_ready()

    def refuse(self, request: InferenceRequest, error: Exception) -> None:
        request.identity = new_id()
        refusal = answer_error(error)
        defaults = request.connection.default_headers
        (message,) = self._heads.refused_all(defaults, refusal, Identities([request.identity]))
        request.settle(message, refusal=refusal)

    def abandon(self, request: InferenceRequest) -> None:
        if not request.settled:
            self.abandoned += 1
            self.refuse(request, Cancelled("gone"))


async def application(scope: Any, receive: Any, send: Any) -> None:
    """The routes beside predictions: some read their body and some do not."""
    path = scope["path"]
    body = b""
    if path in ("/echo", "/slow"):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            if not message["more_body"]:
                break
    if path == "/slow":
        await asyncio.sleep(0.3)
    if path == "/fail":
        raise ValueError("as it was asked to")
    if path == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in range(5):
            await asyncio.sleep(0.01)
            await send({"type": "http.response.body", "body": b"%d" % part * 20_000, "more_body": part < 4})
        return
    status = 200 if path in ("/echo", "/slow", "/early") else 404
    payload = digest(body)
    headers = [(b"content-length", str(len(payload)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": payload})


class Drain:
    draining = False


class Service:
    """What all connections of a simulated process share."""

    def __init__(self, loop: VirtualLoop, guarded: bool) -> None:
        self.loop = loop
        self.drain = Drain()
        self.guard = Guard(
            keys=[Key("one", digest_of(KEY), concurrent=1000)] if guarded else [], clock=loop.time
        )
        self.state = ServerState()
        self.budget = ByteBudget(BUDGET_BYTES)
        settings = Settings(
            max_body_bytes=MAX_BODY_BYTES, body_timeout_s=REQUEST_S, keep_alive_timeout_s=IDLE_S
        )
        base: Any = plain_protocol(settings, self.drain, self.budget)

        class Simulated(base):  # type: ignore[misc]
            intake = Intake(loop, base.responses)
            memory = BodyBufferPool(2**20)

        Simulated.guard = self.guard if guarded else None
        self.intake: Intake = Simulated.intake
        self._class = Simulated
        self._config = uvicorn.Config(
            GuardMiddleware(application, self.guard), log_config=None, lifespan="off"
        )
        self._config.load()

    def connection(self) -> Connection:
        made: Connection = self._class(self._config, self.state, {}, self.loop)
        return made

    def at_rest(self) -> dict[str, Any]:
        """What must be zero once all clients are gone."""
        return {
            "bytes": self.budget.used,
            "connections": len(self.state.connections),
            "tasks": len(self.state.tasks),
            "permits": sum(self.guard.counts._running.values()),
        }


__all__ = ["answer_of", "digest", "error_response"]
