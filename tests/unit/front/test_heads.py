"""Which heads the fast path takes, and that it never reads one otherwise than the ordinary parser."""

from __future__ import annotations

from dataclasses import replace

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vernier.front.heads import Head, Heads, InferTarget, plain_head

LIMIT = 1000


def block(
    *lines: str, target: str = "/v1/predict", method: str = "POST", version: str = "1.1", length: str = "10"
) -> bytes:
    fixed = [f"{method} {target} HTTP/{version}", "host: x"]
    counted = [f"content-length: {length}"] if length else []
    return "\r\n".join([*fixed, *counted, *lines, "", ""]).encode("latin-1")


def test_a_plain_head_is_read_whole() -> None:
    head = plain_head(
        block("Content-Type: application/json", "X-Request-ID: abc", "Authorization: Bearer key"), LIMIT
    )
    assert head is not None
    assert (head.length, head.keep_alive, head.envelope) == (10, True, None)
    assert (head.request_id, head.token, head.target) == ("abc", "key", "/v1/predict")


def test_the_query_of_a_raw_body_is_its_envelope() -> None:
    target = "/v1/predict?model=m&outputs=y,z&priority=2"
    head = plain_head(block("content-type: application/octet-stream", target=target), LIMIT)
    assert head is not None
    assert head.envelope is not None
    assert (head.envelope.model, head.envelope.outputs, head.envelope.priority) == ("m", ["y", "z"], 2)


def test_an_inference_request_names_its_model_and_how_much_of_it_is_json() -> None:
    target, length = "/v2/models/a.b-c/versions/3/infer", "inference-header-content-length"
    head = plain_head(block(f"{length}: 7", target=target), LIMIT)
    assert head is not None
    assert head.infer == InferTarget("a.b-c", "3", "7")
    assert (head.envelope, head.with_id("x").infer) == (None, head.infer)
    heads = Heads(LIMIT)
    for value in ("7", "7", "8", "7"):  # known by their bytes, but for what means nothing
        found = heads.find(block("x-trace: 5", f"{length}: {value}", target=target))
        assert found is not None
        assert found.infer is not None
        assert found.infer.header_length == value
    many = 2**21
    for value, is_long in (
        (None, True),
        ("9", False),
        (str(many), True),
        ("x", False),
        (str(many + 1), False),
    ):
        assert replace(head, infer=InferTarget("m", None, value)).is_long(many) == is_long, value


@pytest.mark.parametrize(
    "target",
    ["/v2/models/m/infer/", "/v2/models//infer", "/v2/models/%6d/infer", "/v2/models/m/ready", "/v2/models"],
)
def test_other_paths_are_for_the_application(target: str) -> None:
    assert plain_head(block(target=target), LIMIT) is None


def test_compressed_inference_requests_are_for_the_application() -> None:
    assert plain_head(block("content-encoding: gzip", target="/v2/models/m/infer"), LIMIT) is None


def test_a_client_may_ask_for_the_end_of_the_connection() -> None:
    head = plain_head(block("connection: close"), LIMIT)
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
        block(target="/v1/predict?model=m", length="") + block(target="/other", method="POST", length=""),
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
    large = block("x-filler: " + "f" * 9000)
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
    head = plain_head(head_block, LIMIT)
    if head is None or len(tail) < head.length:
        return
    reader = _Reader()
    parser = httptools.HttpRequestParser(reader)
    parser.feed_data(head_block + tail[: head.length])
    assert reader.bodies == [tail[: head.length]]


def test_heads_that_differ_in_what_means_nothing_share_their_forms() -> None:
    heads = Heads(LIMIT)
    first = heads.find(block("user-agent: a", "traceparent: 00-1"))
    for lines in (["traceparent: 00-2"], ["cookie: a=b; c", "Forwarded: for=1"], [], ["x-request-id: 7"]):
        head = heads.find(block(*lines))
        assert head is not None
        assert first is not None
        assert head.templates is first.templates


def test_texts_of_any_length_share_their_forms_and_raw_bodies_do_not() -> None:
    def found(length: str, *lines: str, target: str = "/v1/predict") -> Head:
        head = heads.find(block(*lines, length=length, target=target))
        assert head is not None
        assert head.length == int(length)
        return head

    heads = Heads(LIMIT)
    assert found("10").templates is found("11").templates
    assert found("10").templates is not found("10", "x-api-key: other").templates
    raw, target = "content-type: application/octet-stream", "/v1/predict?model=m"
    assert found("8", raw, target=target).templates is not found("12", raw, target=target).templates
    assert found("8", raw, target=target).templates is found("8", raw, "cookie: a", target=target).templates


def test_every_request_has_its_own_id() -> None:
    heads = Heads(LIMIT)
    for lines, request_id in (
        (["x-request-id: a"], "a"),
        (["X-Request-Id: b c"], "b c"),
        ([], None),
        (["x-request-id: d", "x-request-id: e"], "d"),
        (["x-request-id: f"], "f"),
        (["x-request-id:"], None),
        (["x-request-id: \xe9", "x-request-id: g"], "\xe9"),
        (["x-request-id:h", "x-request-id: i"], "h"),
        (["cookie: x-request-id: j"], None),
        ([], None),
    ):
        head = heads.find(block(*lines))
        assert head is not None, lines
        assert head.request_id == request_id, lines


def test_a_head_that_ends_early_is_not_looked_for_in_the_body_behind_it() -> None:
    """Or a body that begins like a header would be read as a part of the head, and what follows it as the body."""
    heads = Heads(LIMIT)
    whole = block("x-a: 12345678")
    assert heads.find(whole) is not None
    ends_early = whole.replace(b"\r\nx-a: 12345678\r\n\r\n", b"\r\n\r\nx-a: 12345678\r\n")
    assert len(ends_early) == len(whole)
    assert ends_early.index(b"\r\n\r\n") < len(whole) - 4
    assert heads.find(ends_early) is None


VARIED = st.sampled_from(
    [
        "traceparent: 00-1", "traceparent: 00-2", "cookie: a; content-length: 4", "x: y\r\n content-length: 9",
        "x: y\r\n\tz", " folded", "x:y", "x: ", "x : y", "x:  y", "x: y ", "x: \xe9", "x: \x01", "x: \ny", "x: y\r",
        "\rx: y",
        "x-request-id: 1", "X-Request-ID: 2", "x-request-id: \xe9", "x-request-id:3", "x-request-id: 4\r\n 5",
        "content-length: 3", "Content-Length: 3", "content-length: 5", "content-type: application/json",
        "content-type: text/xml", "connection: close", "Connection: keep-alive", "proxy-connection: close",
        "te: trailers",
        "Transfer-Encoding: chunked", "expect: 100-continue", "upgrade: h2c", "trailer: x", "authorization: Bearer 1",
        "x-api-key: 2", "keep-alive: 5", "host: other", "", "x",
    ]
)  # fmt: skip


@settings(max_examples=1500)
@given(st.lists(st.lists(VARIED, max_size=4), min_size=1, max_size=5), st.sampled_from(["", "3"]))
def test_a_head_that_was_seen_with_other_lines_is_read_as_if_it_were_new(
    variants: list[list[str]], length: str
) -> None:
    heads = Heads(LIMIT)
    for lines in variants:
        head_block = block(*lines, length=length)  # with an empty line, it ends before its end
        found, new = heads.find(head_block), plain_head(head_block, LIMIT)
        assert (found is None) == (new is None)
        if found is not None and new is not None:
            assert replace(found, templates=new.templates) == new
