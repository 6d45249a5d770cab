"""What a client may do to a connection, on every route and port: each limit with a client that goes beyond it."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from tests.integration.test_bad_input import settled
from tests.support.packages import write_package
from tests.support.server import Server, free_port, serve
from tests.support.wire import Reply, Wire, request
from vernier.api.auth.security import digest_of

KEY = "front-ends-key"
BODY = b'{"model": "mlp", "inputs": {"x": [[1, 2, 3, 4]]}}'
RAW = "application/octet-stream"
MIB = 2**20


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, int]]:
    """A service, and its operations port."""
    root = tmp_path_factory.mktemp("limits")
    (root / "engines").mkdir()
    write_package(root / "engines", "mlp")
    side = free_port()
    settings = {"metrics_port": str(side), "keep_alive_timeout_s": "2", "body_timeout_s": "5"}
    settings |= {"queue_limit": "1000000"}  # its bodies hold thousands of rows each
    with serve(root / "engines", root / "log", health_port=side, **settings) as server:
        yield server, side
        assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("guarded")
    (root / "engines").mkdir()
    write_package(root / "engines", "mlp")
    keys = root / "keys.toml"
    keys.write_text(f'[[key]]\nname = "front"\nsha256 = "{digest_of(KEY)}"\nconcurrent = 4\n')
    with serve(root / "engines", root / "log", api_keys_file=str(keys)) as server:
        yield server


def connect(port: int) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), timeout=20)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def flood(port: int, opening: bytes, more: bytes, seconds: float = 8) -> tuple[int, bytes, float]:
    """Sends `more` until the service ends the connection. Bytes sent, all that came back, seconds."""
    sent, answer, began = 0, b"", time.monotonic()
    with connect(port) as client:
        client.settimeout(0.5)
        with suppress(OSError):
            client.sendall(opening)
            while time.monotonic() - began < seconds:
                client.sendall(more)
                sent += len(more)
        with suppress(OSError):
            while part := client.recv(65536):
                answer += part
    return sent, answer, time.monotonic() - began


def over(answer: bytes) -> tuple[int, bool]:
    """The status of the only answer, and whether it says that the connection ends."""
    assert answer.count(b"HTTP/1.1 ") == 1, answer[:500]
    return int(answer.split()[1]), b"connection: close" in answer.lower()


LINES = b"".join(b"x-%06d: %b\r\n" % (n, b"a" * 240) for n in range(64))
#: What never ends: how it begins, how it goes on, the statuses that it may get.
ENDLESS = {
    "headers of a GET": (b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n", LINES, {431}),
    "headers of a prediction": (b"POST /v1/predict HTTP/1.1\r\nhost: x\r\n", LINES, {431}),
    "one header": (b"GET /v2/health/live HTTP/1.1\r\nx-a: ", b"a" * 16384, {431}),
    "a URL": (b"GET /v2/health/live?", b"a" * 16384, {431}),
    "empty lines": (b"", b"\r\n" * 8192, {431}),
    "trailers of a GET": (
        b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n",
        LINES,
        {200, 431},
    ),
    "trailers of a prediction": (
        b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n",
        LINES,
        {431, 404, 405},
    ),
    "an extension of a chunk": (
        b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2;a=",
        b"a" * 16384,
        {431, 404, 405},
    ),
    "chunks of a GET": (
        b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n",
        b"4000\r\n" + b"a" * 16384 + b"\r\n",
        {200},
    ),
    "a body of a GET": (
        b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\ncontent-length: 64000000000\r\n\r\n",
        b"a" * 16384,
        {200},
    ),
}


@pytest.mark.parametrize("where", ["service", "operations"])
@pytest.mark.parametrize("name", ENDLESS)
def test_what_never_ends_is_ended(service: tuple[Server, int], name: str, where: str) -> None:
    server, side = service
    opening, more, statuses = ENDLESS[name]
    before = server.memory_bytes
    _, answer, seconds = flood(server.port if where == "service" else side, opening, more)
    status, closes = over(answer) if answer else (0, True)
    assert status in statuses | {0}, answer[:300]  # 0: the reset was quicker than the answer
    assert closes
    assert seconds < 7
    assert server.memory_bytes - before < 16 * MIB
    settled(server)


@pytest.mark.parametrize("head", ["wrong key", "no key"])
def test_the_same_holds_behind_a_refusal(guarded: Server, head: str) -> None:
    key = b"x-api-key: wrong\r\n" if head == "wrong key" else b""
    for opening, more in (
        (b"POST /v1/predict HTTP/1.1\r\nhost: x\r\n%bcontent-length: 64000000000\r\n\r\n", b"a" * 65536),
        (
            b"POST /v1/predict HTTP/1.1\r\nhost: x\r\n%btransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n",
            LINES,
        ),
        (b"GET /v1/models HTTP/1.1\r\nhost: x\r\n%btransfer-encoding: chunked\r\n\r\n0\r\n", LINES),
    ):
        before = guarded.memory_bytes
        _, answer, seconds = flood(guarded.port, opening % key, more)
        status, closes = over(answer) if answer else (401, True)
        assert status == 401 or (more == LINES and status == 431)
        assert closes
        assert seconds < 7
        assert guarded.memory_bytes - before < 16 * MIB


EARLY = {
    413: request(target="/v1/predict").replace(b"content-length: 0", b"content-length: 64000000000"),
    404: request(target="/nothing").replace(b"content-length: 0", b"content-length: 64000000000"),
    405: request(target="/v1/predict", method="PUT").replace(
        b"\r\n\r\n", b"\r\ncontent-length: 64000000000\r\n\r\n"
    ),
}


@pytest.mark.parametrize("status", EARLY)
@pytest.mark.parametrize("how", ["quickly", "slowly"])
def test_an_early_answer_is_read_and_the_rest_of_the_body_is_not(
    service: tuple[Server, int], status: int, how: str
) -> None:
    """The client gets its answer whatever it still sends, and is cut off after 256 KiB or two seconds."""
    server, _ = service
    with Wire(server) as wire:
        wire.send(EARLY[status])
        began, sent = time.monotonic(), 0
        if how == "quickly":
            wire.send(b"a" * 100_000)  # less than is thrown away
        reply = wire.reply()
        assert (reply.status, reply.headers["connection"]) == (status, "close")
        piece = b"a" * 65536 if how == "quickly" else b"a"
        with pytest.raises(OSError):
            while time.monotonic() - began < 10:
                wire.send(piece)
                sent += len(piece)
                time.sleep(0.01 if how == "slowly" else 0)
        assert time.monotonic() - began < 6
        assert sent < 16 * MIB  # most of it lies in the buffers of the sockets
    settled(server)


def test_the_next_request_is_answered_only_when_the_body_before_it_was_read(guarded: Server) -> None:
    refused = request(BODY, x_api_key="wrong")
    with Wire(guarded) as wire:  # the body came with the head: read, and thrown away
        wire.send(refused + request(BODY, x_api_key=KEY))
        first = wire.reply()
        assert (first.status, first.headers.get("connection")) == (401, None)
        assert wire.reply().status == 200
    with Wire(
        guarded
    ) as wire:  # the body comes later: the connection ends, and no body is taken for a request
        wire.send(refused[: -len(BODY)])
        first = wire.reply()
        assert (first.status, first.headers["connection"]) == (401, "close")
        wire.send(request(BODY, x_api_key=KEY))
        assert wire.ended()


def test_a_wrong_key_is_refused_before_its_body_on_every_route(guarded: Server) -> None:
    for target in ("/v1/predict", "/v1/%70redict", "/v1/models"):
        with Wire(guarded) as wire:
            wire.send(request(target=target, x_api_key="wrong").replace(b"length: 0", b"length: 1000000"))
            assert wire.reply().status == 401


def test_permits_come_back_however_requests_end(guarded: Server) -> None:
    """Four at once: more are refused, and afterwards all four are there again."""
    good = request(BODY, x_api_key=KEY)
    for _ in range(3):
        with ExitStack() as stack:
            wires = [stack.enter_context(Wire(guarded)) for _ in range(5)]
            for wire in wires[:4]:
                wire.send(good[:-5])
            time.sleep(0.2)
            wires[4].send(good)
            assert wires[4].reply().json()["code"] == "rate_limited"
            wires[0].send(good[-5:])  # answered
            assert wires[0].reply().status == 200
            wires[1].socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            wires[1].socket.close()  # reset
            wires[2].send(b"]" * 5)  # refused
            assert wires[2].reply().status == 400
        time.sleep(0.2)
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(guarded)) for _ in range(4)]
        for wire in wires:
            wire.send(good[:-5])
        time.sleep(0.2)
        for wire in wires:
            wire.send(good[-5:])
            assert wire.reply().status == 200


# --- upgrades -------------------------------------------------------------------------------------
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
def test_an_upgrade_is_ignored_and_its_body_is_the_requests(
    service: tuple[Server, int], upgrade: str, split: bool
) -> None:
    server, _ = service
    hidden = request(target="/v1/models", method="GET")
    with Wire(server) as wire:
        for body, status in ((BODY, 200), (hidden, 400)):
            whole = request(body, connection="Upgrade", upgrade=upgrade)
            wire.send(whole[: -len(body)])
            if split:
                time.sleep(0.05)
            wire.send(body)
            assert wire.reply().status == status
        wire.send(request(target="/v2/health/live", method="GET", connection="Upgrade", upgrade=upgrade))
        assert wire.reply().json() == {"live": True}


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_may_offer_http_2(service: tuple[Server, int]) -> None:
    server, _ = service
    command = ["curl", "-s", "--http2", "-d", BODY.decode(), "-H", "content-type: application/json"]
    done = subprocess.run([*command, f"{server.url}/v1/predict"], capture_output=True, check=True)
    assert json.loads(done.stdout)["outputs"]["z"] == [[2.0, 4.0, 6.0, 8.0]]


# --- one reading for every route ------------------------------------------------------------------
CASES = {
    "trailing space": (["content-length: LENGTH  "], 200),
    "tab": (["content-length:\tLENGTH"], 200),
    "zeros": (["content-length: 000LENGTH"], 200),
    "twice": (["content-length: LENGTH", "content-length: LENGTH"], 400),
    "list": (["content-length: LENGTH, LENGTH"], 400),
    "sign": (["content-length: +LENGTH"], 400),
    "empty": (["content-length: "], 400),
    "space before colon": (["content-length : LENGTH"], 400),
    "both": (["content-length: LENGTH", "transfer-encoding: chunked"], 400),
    "both, the other way": (["transfer-encoding: chunked", "content-length: LENGTH"], 400),
    "gzip": (["transfer-encoding: gzip, chunked"], 400),
    "identity": (["transfer-encoding: identity", "content-length: LENGTH"], 400),
    "folded": (["content-length: LENGTH", "x-a: b", " c"], 400),
    "bare LF": (["content-length: LENGTH", "x-a: b\nx-c: d"], 400),
    "bare CR": (["content-length: LENGTH", "x-a: b\rc"], 400),
    "NUL": (["content-length: LENGTH", "x-a: b\0c"], 400),
}


@pytest.mark.parametrize("name", CASES)
def test_framing_is_read_alike_on_every_route(service: tuple[Server, int], name: str) -> None:
    """Twice: the second time a head may be known by its bytes."""
    server, side = service
    lines, status = CASES[name]
    for target, port, own in (
        ("POST /v1/predict", server.port, 200),
        ("POST /v1/%70redict", server.port, 200),
        ("GET /v2/health/live", server.port, 200),
        ("GET /v2/health/live", side, 200),
        ("PUT /v1/predict", server.port, 405),
    ):
        head = "\r\n".join(
            [f"{target} HTTP/1.1", "host: x", "content-type: application/json", *lines, "", ""]
        )
        data = head.replace("LENGTH", str(len(BODY))).encode() + BODY
        for _ in range(2):
            with connect(port) as client:
                client.sendall(
                    data + (request(target="/v2/health/ready", method="GET") if status == 200 else b"")
                )
                client.settimeout(5)
                answer = b""
                while not answer.endswith(b'{"ready":true}' if status == 200 else b"}"):
                    part = client.recv(65536)
                    assert part, answer
                    answer += part
            assert int(answer.split()[1]) == (own if status == 200 else status), (name, target, answer[:200])
            if status == 200:
                assert answer.count(b"HTTP/1.1 ") == 2  # the next request began where the body ended


@pytest.mark.parametrize("target", ["/v1/predict", "/v1/%70redict", "/nothing"])
def test_who_closes_the_sending_side_is_answered(service: tuple[Server, int], target: str) -> None:
    server, _ = service
    for _ in range(5):
        with Wire(server) as wire:
            wire.send(request(BODY, target) * 2)
            wire.socket.shutdown(socket.SHUT_WR)
            for _ in range(2):
                assert wire.reply().status == (404 if target == "/nothing" else 200)
            assert wire.ended()


def test_who_closes_the_sending_side_and_waits_long_is_answered_too(tmp_path: Path, engines: Path) -> None:
    """It is asked whether it is still there with a "100 Continue", which every client must pass over."""
    from tests.support.packages import slow_model

    write_package(engines, "slow", model=slow_model())
    rows = [[0.1, 0.2, 0.3, 0.4]] * 400
    ask = request(json.dumps({"model": "slow", "inputs": {"x": rows}}).encode())
    with serve(engines, tmp_path / "log", slots="1") as server, Wire(server) as wire:
        wire.send(ask)
        wire.socket.shutdown(socket.SHUT_WR)
        reply = wire.reply()
        while reply.status == 100:
            reply = wire.reply()
        assert (reply.status, len(reply.json()["outputs"]["z"])) == (200, 400)
        assert wire.ended()


# --- memory ---------------------------------------------------------------------------------------
def raw(rows: int) -> bytes:
    return request(np.zeros((rows, 4), "<f4").tobytes(), "/v1/predict?model=mlp&outputs=z", content_type=RAW)


def test_the_bytes_of_all_connections_together_are_bounded(engines: Path, tmp_path: Path) -> None:
    """Forty clients that send all but the last byte of a large body each."""
    write_package(engines)
    size, limit = 16 * MIB, 64 * MIB
    head = request(target="/v1/predict?model=mlp", content_type=RAW).replace(
        b"length: 0", b"length: %d" % size
    )
    with serve(engines, tmp_path / "log", max_inflight_bytes=str(limit)) as server, ExitStack() as stack:
        before = server.memory_bytes
        answers: list[Reply | None] = []
        for _ in range(40):
            wire = stack.enter_context(Wire(server))
            wire.socket.settimeout(1)
            with suppress(OSError):
                wire.send(head, *[b"\0" * MIB] * (size // MIB - 1), b"\0" * (MIB - 1))
            try:
                answers.append(wire.reply())
            except TimeoutError:
                answers.append(None)
            except (OSError, EOFError):
                pass
        refused = [reply for reply in answers if reply is not None]
        assert answers.count(None) <= 4
        assert len(refused) > 20
        assert {(reply.status, reply.json()["code"]) for reply in refused} == {(503, "overloaded")}
        assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
        assert server.memory_bytes - before < limit + 32 * MIB
        assert server.predict({"x": [[1, 2, 3, 4]]}).status_code == 200  # small ones are answered still
        stack.close()
        time.sleep(0.5)
        with Wire(server) as wire:  # and all the room is there again
            wire.send(raw(MIB))
            assert wire.reply().status == 200
        settled(server)


def test_what_never_fits_is_refused_before_it_is_sent(engines: Path, tmp_path: Path) -> None:
    write_package(engines)
    with serve(engines, tmp_path / "log", max_inflight_bytes="100000") as server:
        for expect in ({}, {"expect": "100-continue"}):
            with Wire(server) as wire:
                wire.send(request(**expect).replace(b"length: 0", b"length: 100001"))
                reply = wire.reply()
                assert (reply.status, reply.json()["code"]) == (503, "overloaded")
                assert reply.headers["connection"] == "close"
        with Wire(server) as wire:
            wire.send(raw(6000))
            assert wire.reply().status == 200


def test_clients_that_never_read_are_bounded_and_cut_off(service: tuple[Server, int]) -> None:
    server, _ = service
    before = server.memory_bytes
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server)) for _ in range(20)]
        taken = 0
        for wire in wires:
            wire.socket.settimeout(0.5)
            with suppress(OSError):
                for _ in range(200):
                    wire.send(raw(18_000))  # 288 KB, answered with more
                    taken += 1
        assert taken < 20 * 100
        assert server.memory_bytes - before < 200 * MIB
        assert server.predict({"x": [[1, 2, 3, 4]]}).status_code == 200
        time.sleep(5)  # longer than they may take to read on
        for wire in wires:
            with pytest.raises(OSError):
                for _ in range(100):
                    wire.send(raw(18_000))
    settled(server)


def test_what_is_small_and_never_read_is_cut_off_when_the_connection_ends(
    service: tuple[Server, int],
) -> None:
    server, _ = service
    time.sleep(3)  # until the connections of other tests are gone
    before = server.open_files
    with connect(server.port) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(1)
        with suppress(OSError):
            for _ in range(3000):
                client.sendall(request(target="/v1/models", method="GET") * 10)
        limit = time.monotonic() + 20
        while server.open_files > before:  # the service has let go of it
            assert time.monotonic() < limit
            with suppress(OSError):
                client.sendall(b"GET ")
            time.sleep(0.1)
