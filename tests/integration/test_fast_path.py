"""HTTP as it comes off the wire, against the service's own connections and against uvicorn's with the ASGI route.

The two must not be told apart, but where a test says so.
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.test_bad_input import settled
from tests.support.packages import mlp_model, pair_model, slow_model, write_package
from tests.support.server import Server, serve
from tests.support.wire import Reply, Wire, chunked, request

RAW = "application/octet-stream"


def body(n: int) -> bytes:
    return b'{"model": "mlp", "inputs": {"x": [[%d, 2, 3, 4]]}, "outputs": ["z"], "id": "%d"}' % (n, n)


def assert_answers(reply: Reply, n: int) -> None:
    assert reply.status == 200, reply.body
    answer = reply.json()
    assert (answer["id"], answer["outputs"]["z"]) == (str(n), [[2.0 * n, 4.0, 6.0, 8.0]])
    assert reply.headers["x-request-id"] == str(n)


def test_two_requests_in_one_segment_are_answered_in_order(mlp_server: Server) -> None:
    with Wire(mlp_server) as wire:
        wire.send(request(body(1)) + request(body(2)))
        assert_answers(wire.reply(), 1)
        assert_answers(wire.reply(), 2)


def test_many_requests_of_all_kinds_are_answered_in_order(mlp_server: Server) -> None:
    """Far more than may be under way at once, with refusals and other routes among them."""
    sent = []
    expected = []
    for n in range(300):
        kind = n % 10
        if kind == 3:
            sent.append(request(target="/v1/models/none", method="GET"))
            expected.append((404, "unknown_model"))
        elif kind == 5:
            sent.append(request(b"{"))
            expected.append((400, "invalid_json"))
        elif kind == 7:
            sent.append(chunked(body(n)))
            expected.append((200, str(n)))
        else:
            sent.append(request(body(n)))
            expected.append((200, str(n)))
    with Wire(mlp_server) as wire:
        writer = threading.Thread(target=wire.send, args=(b"".join(sent),))
        writer.start()
        found = []
        for _ in sent:
            reply = wire.reply()
            found.append((reply.status, reply.json().get("code", reply.json().get("id"))))
        writer.join()
    assert found == expected


def test_a_request_may_come_byte_by_byte(mlp_server: Server) -> None:
    with Wire(mlp_server) as wire:
        for n in range(2):
            wire.send(*(bytes([byte]) for byte in request(body(n))))
            assert_answers(wire.reply(), n)


@pytest.mark.parametrize("kind", ["json", "raw", "chunked"])
def test_a_request_may_be_cut_anywhere(mlp_server: Server, kind: str) -> None:
    x = np.arange(8, dtype="<f4").reshape(2, 4)
    data = {
        "json": request(body(1)),
        "raw": request(x.tobytes(), "/v1/predict?model=mlp&outputs=z", content_type=RAW),
        "chunked": chunked(body(1)),
    }[kind]
    with Wire(mlp_server) as wire:
        for cut in range(1, len(data), 3):
            wire.send(data[:cut], data[cut:])
            reply = wire.reply()
            if kind == "raw":
                assert reply.json()["outputs"]["z"] == (2 * x).tolist()
            else:
                assert_answers(reply, 1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_how_a_stream_is_cut_does_not_matter(mlp_server: Server, data: st.DataObject) -> None:
    makers = [
        lambda n: request(body(n)),
        lambda n: chunked(body(n), trailer=b"x-checksum: 1\r\n"),
        lambda n: request(body(n), x_filler="f" * 3000),
        lambda n: b"\r\n" + request(body(n)),
    ]
    kinds = data.draw(st.lists(st.sampled_from(makers), min_size=1, max_size=6))
    stream = b"".join(make(n) for n, make in enumerate(kinds))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=12)))
    with Wire(mlp_server) as wire:
        wire.send(*(stream[a:b] for a, b in itertools.pairwise([0, *cuts, len(stream)])))
        for n in range(len(kinds)):
            assert_answers(wire.reply(), n)


@pytest.mark.parametrize("pause_s", [0.0, 0.005], ids=["together", "one by one"])
def test_a_large_body_may_come_in_pieces_of_any_size(mlp_server: Server, pause_s: float) -> None:
    x = np.random.default_rng(0).normal(size=(10_000, 4)).astype("<f4")
    data = request(x.tobytes(), "/v1/predict?model=mlp&outputs=z", content_type=RAW) + request(body(1))
    sizes = [40_000, 1, 100, 33_000, 35_000, 7, 32_767, 32_768]
    with Wire(mlp_server) as wire:
        at = 0
        for size in [*sizes, len(data)]:
            wire.send(data[at : at + size])
            time.sleep(pause_s)
            at += size
        np.testing.assert_array_equal(np.array(wire.reply().json()["outputs"]["z"], np.float32), 2 * x)
        assert_answers(wire.reply(), 1)


def test_expect_100_continue_is_answered_before_the_body(mlp_server: Server) -> None:
    whole = request(body(1), expect="100-continue")
    head = whole[: -len(body(1))]
    with Wire(mlp_server) as wire:
        wire.send(head)
        assert wire.reply().status == 100
        wire.send(body(1))
        assert_answers(wire.reply(), 1)
        wire.send(request(body(2)))
        assert_answers(wire.reply(), 2)


def test_expect_100_continue_of_a_body_over_the_limit_is_refused_without_it(mlp_server: Server) -> None:
    with Wire(mlp_server) as wire:
        wire.send(request(expect="100-continue").replace(b"content-length: 0", b"content-length: 1000000"))
        assert wire.reply().json()["code"] == "body_too_large"
        assert wire.ended()


def test_connection_close_is_honoured(mlp_server: Server) -> None:
    with Wire(mlp_server) as wire:
        wire.send(request(body(1)) + request(body(2), connection="close") + request(body(3)))
        first, second = wire.reply(), wire.reply()
        assert_answers(first, 1)
        assert_answers(second, 2)
        assert "connection" not in first.headers
        assert second.headers["connection"] == "close"
        assert wire.ended()


def test_http_1_0_is_answered_and_closed(mlp_server: Server) -> None:
    with Wire(mlp_server) as wire:
        wire.send(request(body(1), version="1.0"))
        assert_answers(wire.reply(), 1)
        assert wire.ended()


@pytest.mark.parametrize("size", [4_000, 20_000, 50_000])
def test_large_headers_are_read(mlp_server: Server, size: int) -> None:
    with Wire(mlp_server) as wire:
        wire.send(request(body(1), x_filler="f" * size))
        assert_answers(wire.reply(), 1)


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nhost x\r\n\r\n",
        b"POST /v1/predict HTTP/9.9\r\nhost: x\r\n\r\n",
        b"POST\x00 /v1/predict HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)
def test_a_head_that_two_parsers_could_read_differently_is_refused(mlp_server: Server, head: bytes) -> None:
    with Wire(mlp_server) as wire:
        wire.send(head + body(1))
        assert wire.reply().status == 400
        assert wire.ended()


def test_other_routes_share_the_connection(mlp_server: Server) -> None:
    with Wire(mlp_server) as wire:
        for n in range(5):
            wire.send(request(body(n)))
            assert_answers(wire.reply(), n)
            wire.send(request(target="/v2/health/ready", method="GET"))
            assert wire.reply().json() == {"ready": True}
            wire.send(request(target="/v1/predict", method="GET"))
            assert wire.reply().json()["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("sent", "shown"),
    [("abc-1", "abc-1"), ("a b", "a b"), ("é", "%C3%A9"), ("a\r\nset-cookie: b", "a%0D%0Aset-cookie%3A%20b")],
)
def test_an_id_cannot_break_out_of_its_header(mlp_server: Server, sent: str, shown: str) -> None:
    data = orjson.dumps({"model": "mlp", "inputs": {"x": [[1, 2, 3, 4]]}, "id": sent})
    with Wire(mlp_server) as wire:
        wire.send(request(data, x_request_id="from-the-header"))
        reply = wire.reply()
        assert (reply.json()["id"], reply.headers["x-request-id"]) == (sent, shown)
        wire.send(request(body(1).replace(b', "id": "1"', b""), x_request_id="from-the-header"))
        assert wire.reply().json()["id"] == "from-the-header"


def test_a_client_that_leaves_within_its_body_is_counted_as_cancelled(mlp_server: Server) -> None:
    def cancelled() -> float:
        return mlp_server.metric("vernier_requests_total", code="cancelled")

    before = cancelled()
    for cut in (-1, -20):
        with Wire(mlp_server) as wire:
            wire.send(request(body(1))[:cut])
    limit = time.monotonic() + 10
    while cancelled() < before + 2:
        assert time.monotonic() < limit
        time.sleep(0.02)
    settled(mlp_server)


def test_a_client_that_does_not_read_is_not_read_from(mlp_server: Server) -> None:
    """Its answers wait, the others' do not, and all of them come when it reads."""
    x = np.random.default_rng(0).normal(size=(3000, 4)).astype("<f4")
    data = request(x.tobytes(), "/v1/predict?model=mlp", content_type=RAW)
    count = 500  # 24 MB, more than the sockets' buffers hold
    with Wire(mlp_server) as wire:
        sent = []

        def send() -> None:
            for n in range(count):
                wire.send(data)
                sent.append(n)

        writer = threading.Thread(target=send)
        writer.start()
        seen = -1
        while seen != len(sent):  # until it cannot send any more
            seen = len(sent)
            time.sleep(1.0)
        assert seen < count, "the server took more than it could answer"
        assert mlp_server.predict({"x": [[1, 2, 3, 4]]}, model="mlp").status_code == 200
        for _ in range(count):
            z = np.array(orjson.loads(wire.reply().body)["outputs"]["z"], np.float32)
            np.testing.assert_array_equal(z, 2 * x)
        writer.join(10)
    settled(mlp_server)


def test_a_wave_of_clients_gets_each_its_own_answer(mlp_server: Server) -> None:
    """Bodies that arrive together and differ in their numbers only, one of them bad, some clients gone."""

    def ask(n: int) -> bytes:
        numbers = {0: b"1e99", 1: b'"x"'}.get(n % 20, b"%d" % n)
        return request(b'{"model": "mlp", "inputs": {"x": [[%b, 2, 3, 4]]}}' % numbers.rjust(4))

    admitted = mlp_server.metric("vernier_requests_admitted_total")
    wires = [Wire(mlp_server) for _ in range(60)]
    answered = 0
    for turn in range(5):
        for n, wire in enumerate(wires):
            wire.send(ask(n + 7 * turn) + ask(n + 7 * turn + 3))
        for n, wire in enumerate(wires):
            for m in (n + 7 * turn, n + 7 * turn + 3):
                reply = wire.reply()
                if m % 20 > 1:
                    assert reply.json()["outputs"]["z"] == [[2.0 * m, 4.0, 6.0, 8.0]]
                    answered += 1
                else:
                    code = ["non_finite_input", "wrong_dtype"][m % 20]
                    assert (reply.status, reply.json()["code"]) == (400, code)
    for n, wire in enumerate(wires):
        wire.send(ask(n))
        wire.socket.close()
    settled(mlp_server)
    assert mlp_server.metric("vernier_requests_admitted_total") >= admitted + answered
    assert mlp_server.predict({"x": [[1, 2, 3, 4]]}, model="mlp").status_code == 200


COMPARED = {
    "json": request(body(1)),
    "all outputs": request(b'{"model": "mlp", "inputs": {"x": [[1, 2, 3, 4]]}, "id": "1"}'),
    "raw": request(b"\0" * 32, "/v1/predict?model=mlp&id=1", content_type=RAW),
    "raw of several rows and outputs": request(
        b"\0" * 64, "/v1/predict?model=mlp&outputs=z,y&id=%31&priority=3&timeout_ms=2e4", content_type=RAW
    ),
    "several inputs": request(
        b'{"model": "pair", "id": "1", "inputs": {"item": [[1, 2, 3]], "user": [2]}, "timeout_ms": 20000}'
    ),
    "several inputs and rows": request(
        b'{"model": "pair", "id": "1", "inputs": {"item": [[1, 2, 3], [4, 5, 6]], "user": [2, 3]}}'
    ),
    "an input is missing": request(b'{"model": "pair", "id": "1", "inputs": {"user": [2]}}'),
    "rows that differ": request(
        b'{"model": "pair", "id": "1", "inputs": {"item": [[1, 2, 3]], "user": [2, 2]}}'
    ),
    "its own id, and another in the head": request(body(1), x_request_id="2"),
    "an empty id, and another in the head": request(body(1).replace(b'"1"', b'""'), x_request_id="1"),
    "traced": request(body(1), traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    "no content type": request(body(1)).replace(b"content-type: application/json\r\n", b""),
    "parameters of the type": request(body(1), content_type="Application/JSON; charset=utf-8"),
    "curl": request(body(1), content_type="application/x-www-template-urlencoded"),
    "query that JSON ignores": request(body(1), "/v1/predict?model=other"),
    "wrong shape": request(b'{"model": "mlp", "inputs": {"x": [[1, 2, 3]]}, "id": "1"}'),
    "ragged": request(b'{"model": "mlp", "inputs": {"x": [[1, 2, 3, 4], [1]]}}', x_request_id="1"),
    "not json": request(b"[", x_request_id="1"),
    "empty": request(b"", x_request_id="1"),
    "unknown model": request(b'{"model": "no", "inputs": {}}', x_request_id="1"),
    "deadline": request(b'{"model": "mlp", "inputs": {"x": [[1,2,3,4]]}, "timeout_ms": 0}', x_request_id="1"),
    "raw without model": request(b"\0" * 16, "/v1/predict", content_type=RAW, x_request_id="1"),
    "raw of another size": request(b"\0" * 15, "/v1/predict?model=mlp", content_type=RAW, x_request_id="1"),
    "raw with infinities": request(
        np.full(4, np.inf, "<f4").tobytes(), "/v1/predict?model=mlp", content_type=RAW, x_request_id="1"
    ),
    "raw with a bad number": request(
        b"\0" * 16, "/v1/predict?model=mlp&priority=x", content_type=RAW, x_request_id="1"
    ),
    "xml": request(b"<x/>", content_type="text/xml", x_request_id="1"),
    "over the limit": request(b" " * 200_001, x_request_id="1"),
    "slash": request(body(1), "/v1/predict/"),
    "escaped": request(body(1), "/v1/%70redict"),
    "absolute": request(body(1), "http://test/v1/predict"),
    "put": request(body(1), method="PUT", x_request_id="1"),
    "close": request(body(1), connection="close"),
    "1.0": request(body(1), version="1.0"),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """The same service on its own connections and on uvicorn's."""
    root = tmp_path_factory.mktemp("both")
    (root / "engines").mkdir()
    write_package(root / "engines", "mlp")
    write_package(root / "engines", "other", model=mlp_model(seed=1))
    write_package(root / "engines", "pair", model=pair_model())
    limit = {"max_body_bytes": "200000"}
    with (
        serve(root / "engines", root / "own", **limit) as own,
        serve(root / "engines", root / "uvicorn", uvicorn=True, **limit) as uvicorn,
    ):
        yield [own, uvicorn]


@pytest.mark.parametrize("name", COMPARED)
def test_both_ways_answer_alike(both: list[Server], name: str) -> None:
    """The first time, and when the request is known."""
    seen: list[list[object]] = [[], []]
    for server, replies in zip(both, seen, strict=True):
        for _ in range(3):
            with Wire(server) as wire:
                wire.send(COMPARED[name])
                reply = wire.reply()
            parsed = reply.json() if reply.body else {}
            parsed.pop("timing", None)
            fields = dict(reply.headers)
            for changing in ("date", "content-length", "server"):  # the last is uvicorn's
                fields.pop(changing, None)
            if name == "1.0":  # such a connection ends, whether or not the answer says so
                fields.pop("connection", None)
            if "location" in fields:
                fields["location"] = "elsewhere"
            if reply.status >= 400 and "x-request-id" in fields and fields["x-request-id"] != "1":
                fields["x-request-id"] = "made up"
            replies.append((reply.status, fields, parsed))
    assert seen[0] == seen[1]


def test_both_ways_count_alike(both: list[Server]) -> None:
    seen = []
    for server in both:
        before = server.metrics()
        for data in COMPARED.values():
            with Wire(server) as wire:
                wire.send(data)
                wire.reply()
        after = server.metrics()
        counted = {}
        for name in (
            "vernier_requests_total",
            "vernier_requests_admitted_total",
            "vernier_requests_ended_total",
        ):
            old = {tuple(sorted(labels.items())): value for labels, value in before.get(name, [])}
            for labels, value in after[name]:
                key = tuple(sorted(labels.items()))
                counted[name, key] = value - old.get(key, 0)
        seen.append({key: value for key, value in counted.items() if value})
    assert seen[0] == seen[1]
    assert len(seen[0]) > 8


def test_idle_connections_and_slow_bodies_end_in_time(engines: Path, tmp_path: Path) -> None:
    write_package(engines)
    limits = {"keep_alive_timeout_s": "1", "body_timeout_s": "0.5"}
    with serve(engines, tmp_path / "log", **limits) as server:
        with Wire(server) as wire:
            for n in range(4):
                wire.send(request(body(n)))
                assert_answers(wire.reply(), n)
                time.sleep(0.4)  # together longer than an idle connection may live
            began = time.monotonic()
            assert wire.ended()
            assert 0.3 < time.monotonic() - began < 3
        with Wire(server) as wire:
            wire.send(request(body(1)))
            assert_answers(wire.reply(), 1)
            wire.send(request(body(2))[:-5])
            began = time.monotonic()
            reply = wire.reply()
            assert 0.2 < time.monotonic() - began < 3
            assert (reply.status, reply.json()["code"]) == (408, "request_timeout")
            assert reply.headers["connection"] == "close"
            assert wire.ended()
        assert server.metric("vernier_requests_total", code="request_timeout") == 1


@pytest.fixture(scope="module", params=[False, True], ids=["own", "uvicorn"])
def slow_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model of many milliseconds, so that requests are still under way when something happens to them."""
    root = tmp_path_factory.mktemp("slow")
    (root / "engines").mkdir()
    write_package(root / "engines", "slow", model=slow_model())
    with serve(root / "engines", root / "log", uvicorn=request.param, slots="1") as server:
        yield server


SLOW = b'{"model": "slow", "inputs": {"x": [[0.1, 0.2, 0.3, 0.4]]}}'


@pytest.mark.parametrize("way", ["close", "reset"])
def test_a_client_that_leaves_cancels_what_it_asked_for(slow_server: Server, way: str) -> None:
    before = slow_server.metric("vernier_requests_ended_total", outcome="cancelled")
    large = orjson.dumps({"model": "slow", "inputs": {"x": [[0.1, 0.2, 0.3, 0.4]] * 200}})
    wires = [Wire(slow_server) for _ in range(8)]
    for wire in wires:
        wire.send(request(large))
    limit = time.monotonic() + 20
    while slow_server.metric("vernier_inflight_requests") < 4:
        assert time.monotonic() < limit
    for wire in wires:
        if way == "reset":
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            wire.socket.close()
        else:
            wire.socket.close()
    while slow_server.metric("vernier_inflight_requests"):
        assert time.monotonic() < limit
        time.sleep(0.02)
    assert slow_server.metric("vernier_requests_ended_total", outcome="cancelled") > before
    for wire in wires:
        wire.socket.close()
    settled(slow_server)


def test_a_body_that_is_arriving_at_the_end_is_answered(engines: Path, tmp_path: Path) -> None:
    write_package(engines, "slow", model=slow_model(layers=2))
    with serve(engines, tmp_path / "log") as server:
        with Wire(server) as arriving, Wire(server) as idle, Wire(server) as busy:
            idle.send(request(SLOW))
            assert idle.reply().status == 200
            data = request(SLOW)
            arriving.send(data[:-10])
            busy.send(request(orjson.dumps({"inputs": {"x": [[0.1, 0.2, 0.3, 0.4]] * 400}})))
            time.sleep(0.2)
            server.terminate()
            assert idle.ended()
            reply = busy.reply()
            assert reply.status == 200
            arriving.send(data[-10:])
            reply = arriving.reply()
            assert (reply.status, reply.json()["code"]) == (503, "draining")
            assert reply.headers["connection"] == "close"
            assert arriving.ended()
            assert busy.ended()
        assert server.wait(20) == 0
