"""The head of a request: read once by the real HTTP parser, then known by its bytes.

A client on a kept connection sends the same head again and again, so the fast path looks it up. Whether a
head is plain enough for the fast path is decided by what llhttp says of it, the parser of the ordinary
path: both can never see two different requests in the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import httptools
from starlette.datastructures import QueryParams

from app.api.codecs import JSON, PredictRequest, media_type_of, raw_envelope
from app.api.forms import Form
from app.api.security import token_of
from app.errors import RequestError

PATH = b"/v1/predict"
START = b"POST " + PATH
END = b"\r\n\r\n"

_LONGEST_KEPT = 2048
_MOST_KEPT = 512
#: Any of these asks for more than reading a body of known length and answering it.
_UNUSUAL = frozenset((b"transfer-encoding", b"expect", b"upgrade", b"te", b"trailer"))


@dataclass(slots=True)
class Head:
    """A head that the fast path takes.

    Attributes:
        target: path and query, for the access log.
        length: of the body, in bytes.
        keep_alive: whether the connection stays open after the answer.
        envelope: of a raw body, out of the query string; None for a JSON body, which holds its own.
        request_id: the client's, if it sent one.
        token: the API key or token, if there is one.
        form: that of the last body, if it had one.
        patience: how often bodies may differ in form before it is not looked for any more.
    """

    target: str
    length: int
    keep_alive: bool
    envelope: PredictRequest | None
    request_id: str | None
    token: str | None
    form: Form | None = None
    patience: int = 8


class Heads:
    """Heads by their bytes, the blank line included; `known` are those met lately.

    Args:
        max_body_bytes: longer bodies are not taken.
    """

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self.known: dict[bytes, Head] = {}

    def find(self, block: bytes) -> Head | None:
        """None when the ordinary path must take the request."""
        head = self.known.get(block)
        if head is None and block.startswith(START):
            head = read_head(block, self._max_body_bytes)
            if head is not None and len(block) <= _LONGEST_KEPT:
                if len(self.known) >= _MOST_KEPT:
                    self.known.clear()
                self.known[block] = head
        return head


def read_head(block: bytes, max_body_bytes: int) -> Head | None:
    """The head in `block`, which ends with a blank line; None when the ordinary path must take it."""
    seen = _Listener()
    try:
        seen.parser.feed_data(block)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    headers = seen.headers
    if not seen.is_plain or seen.has_body or headers.keys() & _UNUSUAL:
        return None
    length = int(headers.get(b"content-length", b"0"))
    url = httptools.parse_url(seen.url)
    if url.path != PATH or length > max_body_bytes or seen.complete != (length == 0):
        return None
    try:
        is_json = media_type_of(_text(headers, b"content-type") or "") == JSON
        envelope = None if is_json else raw_envelope(QueryParams(url.query or b""))
    except RequestError:
        return None
    return Head(
        target=seen.url.decode("latin-1"),
        length=length,
        keep_alive=seen.keep_alive,
        envelope=envelope,
        request_id=_text(headers, b"x-request-id") or None,
        token=token_of(_text(headers, b"authorization"), _text(headers, b"x-api-key")),
    )


def _text(headers: dict[bytes, bytes], name: bytes) -> str | None:
    value = headers.get(name)
    return None if value is None else value.decode("latin-1")


class _Listener:
    """Of a header that comes twice the first counts, as in Starlette."""

    def __init__(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.url = b""
        self.headers: dict[bytes, bytes] = {}
        self.is_plain = self.keep_alive = self.complete = self.has_body = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.setdefault(name.lower(), value)

    def on_headers_complete(self) -> None:
        parser = self.parser
        self.keep_alive = parser.should_keep_alive()
        self.is_plain = (
            parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and not parser.should_upgrade()
        )

    def on_body(self, body: bytes) -> None:
        self.has_body = True

    def on_message_complete(self) -> None:
        self.complete = True
