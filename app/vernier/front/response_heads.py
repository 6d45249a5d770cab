"""Responses as bytes: the same headers as the ordinary path, put together once a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import repeat

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from vernier.api.auth.guarding import SECURITY_HEADERS
from vernier.api.formats.codecs import JSON
from vernier.api.http.errors import ErrorResponse
from vernier.api.http.identity import Identities, header_value
from vernier.api.http.messages import END
from vernier.front.answer_bodies import Bodies

Headers = Sequence[tuple[bytes, bytes]]

#: Longer bodies are written beside their head and not copied behind it.
LONG_BODY = 64 * 1024

_BEFORE_LENGTH, _BEFORE_ID = b"content-length: ", b"\r\nx-request-id: "
_ALWAYS: Headers = ((b"content-type", JSON.encode()), *SECURITY_HEADERS)


class ResponseHeads:
    """Belongs to the event loop's thread; shared by all connections."""

    def __init__(self) -> None:
        self._defaults: Headers | None = None
        self._common = b""
        self._untyped = b""  # the same without a content type
        self._before_length = b""  # the beginning of a good answer

    def ok_all(self, defaults: Headers, bodies: Bodies, ids: Identities) -> list[bytes] | None:
        """Good answers, head and body, for connections that stay open; None when a body is long.

        Args:
            defaults: uvicorn's own headers, of which the date is one; a new list whenever they change.
        """
        if defaults is not self._defaults:
            self._renew(defaults)
        lengths = bodies.lengths()
        if max(lengths) >= LONG_BODY:
            return None
        head = (
            repeat(self._before_length),
            map(_digits, lengths),
            repeat(_BEFORE_ID),
            ids.headers,
            repeat(END),
        )
        return list(map(b"".join, zip(*head, *bodies.columns(), strict=False)))

    def refused_all(self, defaults: Headers, refusal: ErrorResponse, ids: Identities) -> list[bytes]:
        """An error, head and body, for connections that stay open."""
        head = self.make(defaults, refusal.status, len(refusal.body), "", refusal.headers)
        before = head.removesuffix(END)
        after = END + refusal.body
        return [before + its_id + after for its_id in ids.headers]

    def make(
        self,
        defaults: Headers,
        status: int,
        length: int,
        request_id: str,
        headers: Mapping[str, str],
    ) -> bytes:
        """Everything before the body of any answer.

        Args:
            length: of the body, in bytes.
            headers: further ones; a content type takes the place of JSON's.
        """
        if defaults is not self._defaults:
            self._renew(defaults)
        lines = [(name.encode(), value.encode()) for name, value in headers.items()]
        common = self._untyped if "content-type" in headers else self._common
        first = STATUS_LINE[status] + common + _lines(lines)
        shown_id = header_value(request_id).encode()
        return b"".join((first, _BEFORE_LENGTH, _digits(length), _BEFORE_ID, shown_id, END))

    def _renew(self, defaults: Headers) -> None:
        self._defaults = defaults
        self._common = _lines([*defaults, *_ALWAYS])
        self._untyped = _lines([*defaults, *SECURITY_HEADERS])
        self._before_length = STATUS_LINE[200] + self._common + _BEFORE_LENGTH


@lru_cache(4096)
def _digits(length: int) -> bytes:
    return b"%d" % length


def _lines(headers: Headers) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])
