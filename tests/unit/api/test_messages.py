"""Where heads and bodies end, and that llhttp would not read the same bytes in another way."""

from __future__ import annotations

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vernier.api.http.messages import (
    MAX_HEAD_BYTES,
    MAX_TRAILER_BYTES,
    ChunkedBody,
    LengthBody,
    PartialHead,
    read_head,
)
from vernier.errors import HeadTooLarge, InvalidHttp

CHUNKED_HEAD = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"


def head(*lines: str, first: str = "POST /a HTTP/1.1") -> bytes:
    return "\r\n".join([first, "host: x", *lines, "", ""]).encode("latin-1")


def test_a_head_is_read_whole() -> None:
    found = read_head(head("Content-Length: 12 ", "X-A: b", first="POST /a%20b?c=d HTTP/1.1"))
    assert (found.method, found.path, found.query, found.version) == ("POST", b"/a%20b", b"c=d", "1.1")
    assert (found.length, found.keep_alive, found.is_upgrade) == (12, True, False)
    assert found.header(b"x-a") == "b"


def test_an_upgrade_changes_nothing_about_the_body() -> None:
    found = read_head(head("connection: upgrade", "upgrade: h2c", "content-length: 5"))
    assert (found.is_upgrade, found.length) == (True, 5)
    assert read_head(head("connection: upgrade", "upgrade: h2c", "transfer-encoding: chunked")).length is None


def test_who_expects_to_be_told_to_go_on() -> None:
    assert read_head(head("expect: 100-Continue", "content-length: 5")).expects_continue
    assert not read_head(head("expect: 200-ok")).expects_continue
    assert not read_head(head("expect: 100-continue", first="POST / HTTP/1.0")).expects_continue


def test_http_1_0_never_keeps_the_connection() -> None:
    assert not read_head(head("connection: keep-alive", first="GET / HTTP/1.0")).keep_alive
    assert not read_head(head("connection: x, Close")).keep_alive


@pytest.mark.parametrize(
    "block",
    [
        head("content-length: 5", "content-length: 5"),
        head("content-length: 5", "transfer-encoding: chunked"),
        head("transfer-encoding: chunked", "content-length: 5"),
        head("transfer-encoding: gzip, chunked"),
        head("transfer-encoding: chunked", "transfer-encoding: chunked"),
        head("transfer-encoding: identity"),
        head("transfer-encoding: chunked", first="POST / HTTP/1.0"),
        head("content-length: +5"),
        head("content-length: "),
        head("content-length: 5, 5"),
        head("content-length: 18446744073709551616"),
        head("content-length : 5"),
        head("x: a", " folded: b"),
        head("x: a\x00b"),
        head("x: a\nb"),
        head("x: a\rb"),
        head("no colon"),
        head(first="GET / HTTP/2.0"),
        head(first="GET / HTTP/1.2"),
        head(first="CONNECT a:1 HTTP/1.1"),
        head(first="GET /\xe9 HTTP/1.1"),
        b"GET /\r\n\r\n",
        head() + b"x",
        head()[:-1],
        head() + head(),
    ],
)
def test_what_two_servers_could_read_differently_is_refused(block: bytes) -> None:
    with pytest.raises(InvalidHttp):
        read_head(block)


def test_a_head_may_come_in_pieces() -> None:
    block = head("content-length: 5")
    for cut in range(1, len(block)):
        partial = PartialHead()
        assert partial.add(block[:cut]) is None
        assert partial.add(block[cut:] + b"more") == block + b"more"


def test_what_cannot_become_a_head_is_refused_before_it_ends() -> None:
    for start in (b"GET / HTTP/1.1\nhost", b"\x16\x03\x01\x02", b"GET / HTTP/1.1\r\nhost: x\r\n folded"):
        with pytest.raises(InvalidHttp):
            PartialHead().add(start)


def test_a_head_and_empty_lines_before_it_are_bounded() -> None:
    partial = PartialHead()
    with pytest.raises(HeadTooLarge):
        for _ in range(MAX_HEAD_BYTES // 100 + 3):
            partial.add(b"GET / HTTP/1.1\r\n" if not len(partial) else b"x: " + b"y" * 95 + b"\r\n")
    assert len(partial) < MAX_HEAD_BYTES + 100
    lines = PartialHead()
    with pytest.raises(HeadTooLarge):
        for _ in range(MAX_HEAD_BYTES // 1000 + 1):
            lines.skip(1000)


def test_a_body_of_known_length_ends_where_it_says() -> None:
    body = LengthBody(5)
    pieces, rest = body.feed(b"abc")
    assert (b"".join(pieces), rest, body.done) == (b"abc", b"", False)
    pieces, rest = body.feed(b"deGET /")
    assert (b"".join(pieces), rest, body.done) == (b"de", b"GET /", True)


def read_chunks(data: bytes, step: int) -> tuple[bytes, bytes, bool]:
    """Body, what follows it, and whether it has ended, of bytes that come `step` at a time."""
    body, found = ChunkedBody(), b""
    for at in range(0, len(data), step):
        pieces, rest = body.feed(data[at : at + step])
        found += b"".join(pieces)
        if body.done:
            return found, rest + data[at + step :], True
    return found, b"", False


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_chunks_are_read_however_they_are_cut(step: int) -> None:
    data = b'5;a=b;c="d e"\r\nhello\r\n6\r\n world\r\n0\r\nx-a: b\r\n\r\nGET / '
    assert read_chunks(data, step) == (b"hello world", b"GET / ", True)


BAD_CHUNKS = [
    b"zz\r\n", b"\r\n", b"5\n", b"-1\r\n", b"0x5\r\n", b"5 \r\nhello\r\n", b"5\r\nhelloX\r\n", b"5;a b\r\n",
    b"f" * 17 + b"\r\n", b"0\r\nno header\r\n", b"0\r\n folded: x\r\n", b"0\r\ncontent-length: 5\r\n",
    b"0\r\nTransfer-Encoding: chunked\r\n",
]  # fmt: skip


@pytest.mark.parametrize("data", BAD_CHUNKS)
def test_bad_chunks_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidHttp):
        read_chunks(data, 1000)


def test_chunk_lines_trailers_and_tiny_chunks_are_bounded() -> None:
    with pytest.raises(HeadTooLarge):
        read_chunks(b"5;a=" + b"b" * 2000, 100)
    with pytest.raises(HeadTooLarge):
        read_chunks(b"0\r\n" + b"x-a: b\r\n" * (MAX_TRAILER_BYTES // 8 + 1), 1000)
    with pytest.raises(HeadTooLarge):
        read_chunks(b"0\r\nx-a: " + b"b" * MAX_TRAILER_BYTES, 1000)
    with pytest.raises(InvalidHttp, match="too small"):
        read_chunks(b"1\r\na\r\n" * 100_000, 64 * 1024)


class Llhttp:
    def __init__(self) -> None:
        self.body = b""
        self.messages = 0

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.messages += 1


PIECES = st.sampled_from(
    [b"1", b"a", b"0", b"5", b"\r\n", b"\n", b"\r", b";", b"=", b'"', b" ", b"x:", b":", b"hello", b"\t", b"\x01",
     b"\\"]
)  # fmt: skip
SOUND = st.sampled_from(
    [
        b"5\r\nhello\r\n0\r\n\r\n",
        b'5;a="b c";d\r\nhello\r\n3\r\nabc\r\n0;x\r\n\r\n',
        b"1\r\na\r\n0\r\nx: y\r\n\r\n",
    ]
)


@settings(max_examples=1500)
@given(SOUND, st.lists(st.tuples(st.integers(0, 60), PIECES), max_size=3), st.integers(1, 50))
def test_whatever_chunks_are_accepted_llhttp_reads_alike(
    sound: bytes, edits: list[tuple[int, bytes]], step: int
) -> None:
    data = sound
    for at, piece in edits:
        data = data[:at] + piece + data[at + len(piece) // 2 :]
    try:
        body, rest, done = read_chunks(data, step)
    except (InvalidHttp, HeadTooLarge):
        return
    if not done:
        return
    seen = Llhttp()
    parser = httptools.HttpRequestParser(seen)
    parser.feed_data(CHUNKED_HEAD + data[: len(data) - len(rest)])
    assert (seen.body, seen.messages) == (body, 1)
