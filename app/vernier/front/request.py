"""A prediction of a connection, from its head to its answer."""

from __future__ import annotations

import asyncio
from typing import Protocol

from vernier.api.formats.codecs import Body
from vernier.api.http.errors import ErrorResponse
from vernier.api.v2.requests import InferRequest
from vernier.border.batch import RequestBatch
from vernier.border.catalogue import ServedModel
from vernier.front.buffers import BufferSlice
from vernier.front.heads import Head
from vernier.front.limits import Releasable
from vernier.front.response_heads import Headers


class RequestConnection(Protocol):
    """Where requests come from and answers go."""

    loop: asyncio.AbstractEventLoop

    @property
    def default_headers(self) -> Headers:
        """uvicorn's own, of which the date is one; a new list whenever they change."""
        ...

    def send_ready(self) -> None:
        """Sends the answers that are there, in the order of their requests."""
        ...


class InferenceRequest:
    """Belongs to the event loop's thread.

    Args:
        text: holds the body, which begins at `start`.
        came: when its first byte was seen, in seconds on the service's clock.
        permit: released with the answer.
        buffer: where a large body lies.

    Attributes:
        identity: the request's id; empty until it is known.
        model: the model that it asks; None until it is known.
        infer: the envelope of an inference request, once it has been read; None for `/v1/predict`.
        batch, index: where it stands at the border; None before it is submitted.
        settled: whether there is an answer.
        message: the answer, head and body, for a connection that stays open; None when its connection puts it together.
        payload: the answer's body, when there is no message.
        refusal: the answer's status and headers when it is an error.
    """

    __slots__ = (
        "batch",
        "buffer",
        "came",
        "connection",
        "head",
        "identity",
        "index",
        "infer",
        "message",
        "model",
        "payload",
        "permit",
        "refusal",
        "settled",
        "start",
        "text",
    )

    def __init__(
        self,
        connection: RequestConnection,
        head: Head,
        text: Body,
        start: int,
        came: float,
        permit: Releasable | None = None,
        buffer: BufferSlice | None = None,
    ) -> None:
        self.connection = connection
        self.head = head
        self.text = text
        self.start = start
        self.came = came
        self.permit = permit
        self.buffer = buffer
        self.identity = ""
        self.model: ServedModel | None = None
        self.infer: InferRequest | None = None
        self.batch: RequestBatch | None = None
        self.index = 0
        self.settled = False
        self.message: bytes | None = None
        self.payload = b""
        self.refusal: ErrorResponse | None = None

    @property
    def body(self) -> Body:
        return self.text[self.start :] if self.start else self.text

    def forget_body(self) -> None:
        """Nobody reads it any more."""
        self.text = b""
        self.start = 0
        self.buffer = None

    def settle(
        self, message: bytes | None, payload: bytes = b"", refusal: ErrorResponse | None = None
    ) -> None:
        """Takes the answer, which its connection sends in its turn."""
        self.settled = True
        self.message = message
        self.payload = payload
        self.refusal = refusal
        self.batch = None
        if self.permit is not None:
            self.permit.release()
