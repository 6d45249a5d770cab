"""One call of gRPC: who makes it, what it may take, and how an error leaves it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import grpc

from vernier.api.auth.doors import admit, permission_of
from vernier.api.auth.security import Guard, Permit, token_of
from vernier.api.http.errors import describe_error, error_headers
from vernier.errors import VernierError

logger = logging.getLogger(__name__)

#: Of an error's sentence: it travels in a header of at most 8 KB, where a letter of another script takes nine bytes.
_MAX_SENTENCE = 800

Context = Any  # grpc.aio.ServicerContext, which has no types


class CallCharge(Protocol):
    """What a request takes of the bytes that the process may hold, and its permit; both end with `release`."""

    def grow(self, nbytes: int) -> VernierError | None: ...

    def release(self) -> None: ...


class CallAdmission:
    """Lets requests in by key and by size.

    Args:
        charge: makes one for a request with this permit.
    """

    def __init__(self, guard: Guard, charge: Callable[[Permit], CallCharge]) -> None:
        self._guard = guard
        self._charge = charge

    @contextmanager
    def request(self, method: str, context: Context, nbytes: int) -> Iterator[None]:
        """Held while the request lasts, whose bytes it counts. Raises RequestError."""
        found = metadata_of(context)
        token = token_of(found.get("authorization"), found.get("x-api-key"))
        charge = self._charge(admit(self._guard, permission_of(method), token))
        try:
            refusal = charge.grow(nbytes)
            if refusal is not None:
                raise refusal
            yield
        finally:
            charge.release()


def metadata_of(context: Context) -> dict[str, str]:
    """The texts that came with the call; the first of a name counts."""
    found: dict[str, str] = {}
    for name, value in context.invocation_metadata() or ():
        if isinstance(value, str):
            found.setdefault(name, value)
    return found


def sentence_of(error: BaseException) -> str:
    """What a client is told; the log has the rest when the fault is ours."""
    status, message, _ = describe_error(error)
    if status == 500:
        logger.error("request failed", exc_info=error)
    return message if len(message) <= _MAX_SENTENCE else message[:_MAX_SENTENCE] + "…"


async def abort(context: Context, error: BaseException) -> None:
    """Ends the call with the error's status, sentence, code and Retry-After. Always raises."""
    _, _, code = describe_error(error)
    ours = error if isinstance(error, VernierError) else VernierError("")
    trailer = [("code", code)]
    if "retry-after" in (headers := error_headers(ours)):
        trailer.append(("retry-after", headers["retry-after"]))
    await context.abort(grpc.StatusCode[ours.grpc_status], sentence_of(error), tuple(trailer))
