"""Which heads the fast path takes, and that it never reads one otherwise than the ordinary parser."""

from __future__ import annotations

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.fast.head import Heads, read_head

LIMIT = 1000


def block(
    *lines: str, target: str = "/v1/predict", method: str = "POST", version: str = "1.1", length: str = "10"
) -> bytes:
    fixed = [f"{method} {target} HTTP/{version}", "host: x"]
    counted = [f"content-length: {length}"] if length else []
    return "\r\n".join([*fixed, *counted, *lines, "", ""]).encode("latin-1")


def test_a_plain_head_is_read_whole() -> None:
    head = read_head(
        block("Content-Type: application/json", "X-Request-ID: abc", "Authorization: Bearer key"), LIMIT
    )
    assert head is not None
    assert (head.length, head.keep_alive, head.envelope) == (10, True, None)
    assert (head.request_id, head.token, head.target) == ("abc", "key", "/v1/predict")


def test_the_query_of_a_raw_body_is_its_envelope() -> None:
    target = "/v1/predict?model=m&outputs=y,z&priority=2"
    head = read_head(block("content-type: application/octet-stream", target=target), LIMIT)
    assert head is not None
    assert head.envelope is not None
    assert (head.envelope.model, head.envelope.outputs, head.envelope.priority) == ("m", ["y", "z"], 2)


def test_a_client_may_ask_for_the_end_of_the_connection() -> None:
    head = read_head(block("connection: close"), LIMIT)
    assert head is not None
    assert not head.keep_alive


@pytest.mark.parametrize(
    "unusual",
    [
        block("expect: 100-continue"),
        block("transfer-encoding: chunked", length=""),
        block("transfer-encoding: chunked"),
        block("connection: upgrade", "upgrade: websocket"),
        block("content-length: 11"),
        block("content-type: text/xml"),
        block(length="1001"),
        block(length="-1"),
        block(length="99999999999999999999999"),
        block(version="1.0"),
        block(method="PUT"),
        block(target="/v1/predict/"),
        block(target="/v1/predictions"),
        block(target="/v1/%70redict"),
        block("content-type: application/octet-stream", target="/v1/predict?priority=99"),
        block("bad header"),
        block("x: a\x00b"),
        block() + b"x",
        block()[:-1],
        b"\r\n\r\n",
        b"",
    ],
)
def test_what_is_unusual_is_left_to_the_ordinary_path(unusual: bytes) -> None:
    assert Heads(LIMIT).find(unusual) is None


def test_a_known_head_is_not_read_again_and_their_number_is_bounded() -> None:
    heads = Heads(LIMIT)
    first = heads.find(block())
    assert first is not None
    assert heads.find(block()) is first
    for n in range(2000):
        assert heads.find(block(f"x-request-id: {n}")) is not None
    assert len(heads.known) <= 512
    large = block("x-filler: " + "f" * 3000)
    assert heads.find(large) is not None
    assert large not in heads.known


class _Reader:
    """What llhttp says, with the body of one message."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    def on_message_begin(self) -> None:
        self.bodies.append(b"")

    def on_body(self, body: bytes) -> None:
        self.bodies[-1] += body


LINES = st.sampled_from(
    [
        "content-length: 3", "content-length: 0", "content-length:  7 ", "Content-Length: +3", "content-length: 3, 3",
        "content-length : 3", "transfer-encoding: identity", "transfer-encoding:", "x: y\r\n content-length: 9",
        "connection: close", "te: trailers", "x: \x01", "content-type: application/json", "content-encoding: gzip",
    ]
)  # fmt: skip


@settings(max_examples=400)
@given(st.lists(LINES, max_size=4), st.binary(max_size=12))
def test_the_body_is_what_the_ordinary_parser_takes_for_it(lines: list[str], tail: bytes) -> None:
    head_block = block(*lines, length="")
    head = read_head(head_block, LIMIT)
    if head is None or len(tail) < head.length:
        return
    reader = _Reader()
    parser = httptools.HttpRequestParser(reader)
    parser.feed_data(head_block + tail[: head.length])
    assert reader.bodies == [tail[: head.length]]
