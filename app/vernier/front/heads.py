"""The head of a prediction: read once by the real HTTP parser, then known by its bytes.

A client on a kept connection sends the same head again and again, so it is looked up. Where heads differ in what means
nothing here (a trace, a cookie, an address) or in the request's id, they are looked up without that. Whatever is known
was read by `vernier.api.http.messages`, which reads all other heads too: the same bytes are never two requests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from starlette.datastructures import QueryParams

from vernier.api.auth.security import token_of
from vernier.api.formats.codecs import JSON, LONG_BYTES, PredictRequest, media_type_of, raw_envelope
from vernier.api.http.messages import END, MessageHead, read_head
from vernier.api.v2.requests import HEADER_LENGTH, json_bytes
from vernier.errors import InvalidHttp, RequestError
from vernier.front.templates import NO_TEMPLATES, TemplateCache

PATH = b"/v1/predict"
#: The Open Inference Protocol's path, with nothing escaped in it.
_INFER = re.compile(rb"/v2/models/([A-Za-z0-9._-]+)(?:/versions/([0-9]+))?/infer")
STARTS = (b"POST " + PATH, b"POST /v2/models/")

_LONGEST_KEPT = 8192
_MOST_KEPT = 512
#: Any of these asks for more than reading a body of known length and answering it.
_UNUSUAL = frozenset((b"transfer-encoding", b"expect", b"upgrade", b"te", b"trailer"))

_VALUE = rb"[!-~](?:[ -~]*[!-~])?"
_REQUEST_ID = re.compile(rb"\r\nx-request-id:[ \t]*(" + _VALUE + rb")(?=\r\n)", re.IGNORECASE)
#: A header that neither llhttp nor anything here looks at.
_MEANS_NOTHING = re.compile(
    rb"(?!content-|inference-|transfer-|connection|proxy-|upgrade|expect|te:|trailer|authorization|x-api-key|x-request-id)"
    rb"[a-z0-9-]+:[ \t]*" + _VALUE,
    re.IGNORECASE,
)
_LENGTH = b"content-length:"


class _Meaning(dict[bytes, bool]):
    """Whether a line of a head means anything to who takes the request; those met lately are known."""

    def __missing__(self, line: bytes) -> bool:
        _make_room(self)
        self[line] = meaning = _MEANS_NOTHING.fullmatch(line) is None
        return meaning


@dataclass(frozen=True, slots=True)
class InferTarget:
    """What the head of an inference request of the Open Inference Protocol says.

    Attributes:
        header_length: how many bytes of the body are JSON, as it was sent; None when all are.
    """

    model: str
    version: str | None
    header_length: str | None

    def json_length(self, body_bytes: int) -> int:
        """How many bytes of JSON there are to read; 0 where the header will be refused."""
        if self.header_length is None:
            return body_bytes
        try:
            return json_bytes(self.header_length, body_bytes) or 0
        except RequestError:
            return 0


@dataclass(slots=True)
class Head:
    """The head of a prediction.

    Attributes:
        target: path and query, for the access log.
        length: of the body, in bytes.
        keep_alive: whether the connection stays open after the answer.
        envelope: of a raw body, out of the query string; None for a JSON body, which holds its own.
        request_id: the client's, if it sent one.
        token: the API key or token, if there is one.
        templates: those of the bodies behind such heads; shared by heads whose bodies may be alike.
        version: of HTTP.
        infer: of an inference request of the Open Inference Protocol; None for `/v1/predict`.
    """

    target: str
    length: int
    keep_alive: bool
    envelope: PredictRequest | None
    request_id: str | None
    token: str | None
    templates: TemplateCache = NO_TEMPLATES
    version: str = "1.1"
    infer: InferTarget | None = None

    def with_id(self, request_id: str | None) -> Head:
        """The same with another id; `dataclasses.replace` takes five times as long."""
        return Head(
            self.target,
            self.length,
            self.keep_alive,
            self.envelope,
            request_id,
            self.token,
            self.templates,
            infer=self.infer,
        )

    def is_long(self, body_bytes: int) -> bool:
        """Whether a body of this size holds so much JSON that reading it would hold up the loop."""
        if body_bytes <= LONG_BYTES or self.envelope is not None:
            return False
        return self.infer is None or self.infer.json_length(body_bytes) > LONG_BYTES


class Heads:
    """Heads by their bytes, the blank line included; `known` are those without an id that came again.

    Args:
        max_body_bytes: longer bodies are not taken.
    """

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self.known: dict[bytes, Head] = {}
        self._meaning = _Meaning()
        self._reduced: dict[tuple[bytes, ...], Head] = {}  # by the lines that mean anything, but for the id
        self._forms: dict[tuple[bytes, ...], TemplateCache] = {}

    def find(self, block: bytes) -> Head | None:
        """None when the head must be read: it is no plain head of a prediction."""
        head = self.known.get(block)
        if head is not None or not block.startswith(STARTS):
            return head
        if len(block) > _LONGEST_KEPT or block.find(END) != len(block) - len(END):
            return plain_head(block, self._max_body_bytes)
        rest, request_id = block, None
        found = _REQUEST_ID.search(block)
        if found is not None:
            rest = block[: found.start()] + block[found.end() :]
            request_id = found[1].decode("ascii")
        meaning, before = self._meaning, len(self._meaning)
        lines = tuple([line for line in rest.split(b"\r\n") if meaning[line]])
        head = self._reduced.get(lines)
        if head is None:
            head = plain_head(block, self._max_body_bytes)
            if head is None or _is_odd(lines):
                return head
            head = replace(head, request_id=None, templates=self._forms_of(head, lines))
            _make_room(self._reduced)
            self._reduced[lines] = head
        if request_id is not None:
            return head.with_id(request_id)
        if len(meaning) == before:  # no line of it is new, so it may come again
            _make_room(self.known)
            self.known[block] = head
        return head

    def _forms_of(self, head: Head, lines: tuple[bytes, ...]) -> TemplateCache:
        """Texts of one template differ in length; raw bodies do not."""
        if head.envelope is None:
            lines = tuple([line for line in lines if not line.lower().startswith(_LENGTH)])
        templates = self._forms.get(lines)
        if templates is None:
            _make_room(self._forms)
            self._forms[lines] = templates = TemplateCache()
        return templates


def _is_odd(lines: tuple[bytes, ...]) -> bool:
    """Whether a line goes on in the next, or there is another id."""
    return any(line.startswith((b" ", b"\t")) or b"x-request-id" in line.lower() for line in lines)


def _make_room(kept: dict[Any, Any]) -> None:
    if len(kept) >= _MOST_KEPT:
        kept.clear()


def plain_head(block: bytes, max_body_bytes: int) -> Head | None:
    """The head in `block` when it is that of a prediction of known length with nothing unusual about it."""
    try:
        message = read_head(block)
    except InvalidHttp:
        return None
    length = message.length
    if message.version != "1.1" or message.is_upgrade or length is None or length > max_body_bytes:
        return None
    return None if any(name in _UNUSUAL for name, _ in message.headers) else prediction_head(message)


def prediction_head(message: MessageHead) -> Head | None:
    """The same as the head of a prediction; None when it is none, or when its body must be read to be refused."""
    if message.method != "POST":
        return None
    if message.path != PATH:
        return _infer_head(message)
    try:
        is_json = media_type_of(message.header(b"content-type") or "") == JSON
        envelope = None if is_json else raw_envelope(QueryParams(message.query))
    except RequestError:
        return None
    return _head(message, envelope, None)


def _infer_head(message: MessageHead) -> Head | None:
    """The head of an inference request; None when the application must look at it."""
    found = _INFER.fullmatch(message.path)
    if found is None or message.header(b"content-encoding") is not None:
        return None
    name, version = found[1].decode("ascii"), found[2]
    target = InferTarget(
        name,
        None if version is None else version.decode("ascii"),
        message.header(HEADER_LENGTH.encode()),
    )
    return _head(message, None, target)


def _head(message: MessageHead, envelope: PredictRequest | None, infer: InferTarget | None) -> Head:
    return Head(
        target=message.target.decode("latin-1"),
        length=message.length or 0,
        keep_alive=message.keep_alive,
        envelope=envelope,
        request_id=message.header(b"x-request-id") or None,
        token=token_of(message.header(b"authorization"), message.header(b"x-api-key")),
        version=message.version,
        infer=infer,
    )
