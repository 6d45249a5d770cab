"""What the bytes of a connection say in HTTP/1.1: the head of a request, and where its body ends.

One reading for every route. A head is read by llhttp (httptools), in its strict mode and up to its blank line only; how
long the body is follows from the head alone, so an `Upgrade`, which is ignored here, changes nothing. Bodies are
delimited here, where their bytes are counted. Whatever two servers could read differently ends the connection.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import httptools

from vernier.errors import HeadTooLarge, InvalidHttp

END = b"\r\n\r\n"
#: Tells a client to send the body that it announced; any client must be ready to see it and pass over it.
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

#: From the first byte of a request line to the blank line.
MAX_HEAD_BYTES = 64 * 1024
#: Behind the last chunk of a body.
MAX_TRAILER_BYTES = 8 * 1024
#: A chunk's size may have this many digits: more than any body has.
_SIZE_DIGITS = 15
_MAX_LINE_BYTES = 1024
#: What chunks may take beyond their bytes and as many bytes again: a body in chunks of one byte costs a loop's time.
_MAX_FRAMING_BYTES = 256 * 1024
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_SIZE = re.compile(
    rb"([0-9A-Fa-f]{1,%d})(?:;%b(?:=(?:%b|\"(?:[^\"\\\x00-\x1f\x7f]|\\[\t -~])*\"))?)*"
    % (_SIZE_DIGITS, _TOKEN, _TOKEN)
)
#: Not one that says again how long the body is.
_TRAILER = re.compile(rb"(?!content-length:|transfer-encoding:)%b:[\t -~\x80-\xff]*" % _TOKEN, re.IGNORECASE)

Piece = bytes | memoryview


@dataclass(slots=True)
class MessageHead:
    """The head of a request.

    Attributes:
        target: as it was sent. path, query: its parts, still escaped.
        version: "1.0" or "1.1".
        headers: with names in lower case.
        length: of the body in bytes; None when it comes in chunks.
        keep_alive: whether the client lets the connection stay open.
        expects_continue: whether it waits for "100 Continue" before it sends the body.
        is_upgrade: whether it asks for another protocol, and gets an answer in this one.
    """

    method: str
    target: bytes
    path: bytes
    query: bytes
    version: str
    headers: list[tuple[bytes, bytes]]
    length: int | None
    keep_alive: bool
    expects_continue: bool
    is_upgrade: bool

    def header(self, name: bytes) -> str | None:
        """The first of this name, as in Starlette."""
        return next((value.decode("latin-1") for known, value in self.headers if known == name), None)


def read_head(block: bytes) -> MessageHead:
    """The head that `block` is, its blank line included. Raises InvalidHttp."""
    seen = _Listener()
    parser = seen.parser
    try:
        parser.feed_data(block)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError as error:
        raise _invalid(str(error)) from error
    if not seen.complete or seen.messages != 1 or seen.has_body:
        raise _invalid("it does not end where it should")
    version, method, headers = parser.get_http_version(), parser.get_method(), seen.headers
    if version not in ("1.0", "1.1"):
        raise _invalid("only HTTP/1.0 and HTTP/1.1 are spoken here")
    codings = _values(headers, b"transfer-encoding")
    if codings and (codings != [b"chunked"] or version == "1.0"):
        raise _invalid("'Transfer-Encoding' must be 'chunked' alone, in HTTP/1.1")
    try:
        url = httptools.parse_url(seen.url)
    except httptools.HttpParserError as error:
        raise _invalid(str(error)) from error
    if method == b"CONNECT" or url.path is None:
        raise _invalid("its target is no path")
    return MessageHead(
        method=method.decode("ascii"),
        target=seen.url,
        path=url.path,
        query=url.query or b"",
        version=version,
        headers=headers,
        length=None if codings else _length(headers),
        keep_alive=seen.keep_alive and version == "1.1",
        expects_continue=version == "1.1" and b"100-continue" in _values(headers, b"expect"),
        is_upgrade=seen.is_upgrade,
    )


def _invalid(why: str) -> InvalidHttp:
    return InvalidHttp(f"this is no HTTP request that can be read in one way only: {why}")


class _Listener:
    def __init__(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.messages = 0
        self.complete = self.keep_alive = self.is_upgrade = self.has_body = False

    def on_message_begin(self) -> None:
        self.messages += 1

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.rstrip(b" \t")))  # llhttp leaves what stands behind it

    def on_headers_complete(self) -> None:
        self.complete = True
        self.keep_alive = self.parser.should_keep_alive()
        self.is_upgrade = self.parser.should_upgrade()

    def on_body(self, body: bytes) -> None:
        self.has_body = True


def _values(headers: Sequence[tuple[bytes, bytes]], wanted: bytes) -> list[bytes]:
    return [value.strip().lower() for name, value in headers if name == wanted]


def _length(headers: Sequence[tuple[bytes, bytes]]) -> int:
    """llhttp has seen to it that there is one at most, of digits and below 2**64."""
    return next((int(value) for name, value in headers if name == b"content-length"), 0)


class PartialHead:
    """The beginning of a head that comes in pieces. What cannot become one is refused at once, not when it is late."""

    __slots__ = ("_bytes", "_parser", "skipped")

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._parser = httptools.HttpRequestParser(_NoListener())
        self.skipped = 0

    def __len__(self) -> int:
        return len(self._bytes)

    def skip(self, nbytes: int) -> None:
        """Counts empty lines before a request. Raises HeadTooLarge."""
        self.skipped += nbytes
        self._require_room(0)

    def add(self, data: bytes) -> bytes | None:
        """All that has come when the head ends in `data`, else None. Raises InvalidHttp, HeadTooLarge."""
        known = self._bytes
        before = len(known)
        known += data
        stop = known.find(END, max(0, before - len(END) + 1), MAX_HEAD_BYTES)
        if stop >= 0:
            return bytes(known)
        self._require_room(len(known))
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise _invalid("it does not end where it should") from None
        except httptools.HttpParserError as error:
            raise _invalid(str(error)) from error
        return None

    def _require_room(self, nbytes: int) -> None:
        if self.skipped + nbytes >= MAX_HEAD_BYTES:
            raise HeadTooLarge(
                f"the head of the request is longer than {MAX_HEAD_BYTES} bytes; send less in headers"
            )


class _NoListener:
    pass


class LengthBody:
    """A body of known length."""

    __slots__ = ("missing",)

    def __init__(self, length: int) -> None:
        self.missing = length

    @property
    def done(self) -> bool:
        return self.missing == 0

    def feed(self, data: bytes) -> tuple[Sequence[Piece], bytes]:
        """What of `data` belongs to the body, and what follows it."""
        missing = self.missing
        if len(data) <= missing:
            self.missing = missing - len(data)
            return (data,), b""
        self.missing = 0
        return (memoryview(data)[:missing],), data[missing:]


class ChunkedBody:
    """A body in chunks, with its extensions and trailers read, checked and dropped."""

    __slots__ = ("_between", "_framing", "_left", "_line", "_size", "_trailers", "done")

    def __init__(self) -> None:
        self.done = False
        self._size = 0  # of what has been announced
        self._left = 0  # of the chunk
        self._line = b""  # that has begun
        self._between: Literal["size", "end", "trailers"] = "size"  # what the next line is
        self._framing = 0
        self._trailers = 0

    def feed(self, data: bytes) -> tuple[Sequence[Piece], bytes]:
        """What of `data` belongs to the body, and what follows it. Raises InvalidHttp, HeadTooLarge."""
        pieces: list[Piece] = []
        view, at, stop = memoryview(data), 0, len(data)
        while at < stop and not self.done:
            if self._left:
                piece = view[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                continue
            end = data.find(b"\n", at) + 1
            line = self._line + data[at : end or stop]
            at = end or stop
            self._require_room(line)
            if end:
                self._line = b""
                self._read(line)
            else:
                self._line = line
        return pieces, data[at:]

    def _require_room(self, line: bytes) -> None:
        if self._between == "trailers":
            is_long = self._trailers + len(line) > MAX_TRAILER_BYTES
        else:
            is_long = len(line) > _MAX_LINE_BYTES
        if is_long:
            raise HeadTooLarge(
                f"a line between chunks is longer than {_MAX_LINE_BYTES} bytes, or trailers than {MAX_TRAILER_BYTES}"
            )

    def _read(self, line: bytes) -> None:
        if not line.endswith(b"\r\n"):
            raise _invalid("a line between chunks ends without CR")
        line = line[:-2]
        if self._between == "size":
            self._read_size(line)
        elif self._between == "end":
            if line:
                raise _invalid("a chunk is longer than its size")
            self._between = "size"
        else:
            self._trailers += len(line) + 2
            self.done = not line
            if line and _TRAILER.fullmatch(line) is None:
                raise _invalid("what stands behind the last chunk is no header")

    def _read_size(self, line: bytes) -> None:
        found = _SIZE.fullmatch(line)
        if found is None:
            raise _invalid("a chunk has no size")
        self._left = left = int(found[1], 16)
        self._size += left
        self._framing += len(line) + 4
        if self._framing > _MAX_FRAMING_BYTES + self._size:
            raise _invalid("its chunks are too small; send larger ones")
        self._between = "end" if left else "trailers"
