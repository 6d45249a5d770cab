"""Clients that connect and say nothing, or say it a byte at a time: given up, and nobody else waits for them."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import httpx

from tests.support.load import ROW
from tests.support.packages import write_package
from tests.support.server import free_port, serve

PREDICT = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n"
HEALTH = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"


class Slow(threading.Thread):
    """Sends `opening` at once, then `rest` a byte at a time for ever, until the service ends the connection."""

    def __init__(self, port: int, opening: bytes, rest: bytes) -> None:
        super().__init__()
        self.answer = b""
        self.seconds = 0.0
        self._rest = rest
        self._connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        self._connection.sendall(opening)
        self.start()

    def run(self) -> None:
        began = time.monotonic()
        self._connection.settimeout(0.05)
        sent = 0
        with self._connection:
            while time.monotonic() - began < 20:
                try:
                    if self._rest:
                        self._connection.sendall(self._rest[sent % len(self._rest)].to_bytes())
                        sent += 1
                    chunk = self._connection.recv(65536)
                    if not chunk:
                        break
                    self.answer += chunk
                except TimeoutError:
                    continue
                except OSError:
                    break
        self.seconds = time.monotonic() - began


def test_whoever_dawdles_is_given_up_and_others_are_answered(engines: Path, tmp_path: Path) -> None:
    write_package(engines)
    side = free_port()
    settings = {
        "body_timeout_s": "1",
        "keep_alive_timeout_s": "2",
        "metrics_port": str(side),
    }
    with (
        serve(engines, tmp_path / "log", health_port=side, **settings) as server,
        httpx.Client(base_url=server.url, timeout=10) as other,
    ):
        slow = {
            "head": Slow(server.port, b"", PREDICT + b"x-more: " + b"y" * 5000),
            "second head": Slow(server.port, HEALTH + PREDICT, b"x-more: " + b"y" * 5000),
            "body": Slow(server.port, PREDICT + b"\r\n", b" " * 99),
            "empty lines": Slow(server.port, b"", b"\r\n"),
            "nothing": Slow(server.port, b"", b""),
            "head on the health port": Slow(side, b"", HEALTH[:-2] + b"x-more: " + b"y" * 5000),
        }
        while any(client.is_alive() for client in slow.values()):
            assert other.post("/v1/predict", json={"inputs": ROW}).status_code == 200
        for client in slow.values():
            client.join()
        late = {name for name, client in slow.items() if client.seconds > 10}
        assert not late
        assert slow["nothing"].answer == b""
        for name in slow.keys() - {"nothing"}:
            assert b"HTTP/1.1 408" in slow[name].answer, (name, slow[name].answer)
            assert b'"code":"request_timeout"' in slow[name].answer.replace(b": ", b":"), name
        assert server.get("/v2/health/ready").status_code == 200


def test_a_head_that_is_slow_and_in_time_is_answered(engines: Path, tmp_path: Path) -> None:
    write_package(engines)
    body = b'{"inputs": {"x": [[1, 2, 3, 4]]}}'
    head = PREDICT.replace(b"100", b"%d" % len(body)) + b"\r\n"
    with (
        serve(engines, tmp_path / "log", body_timeout_s="3") as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection,
    ):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for turn in range(2):  # the second head on the same connection has its own time
            for piece in (head[:7], head[7:40], head[40:], body[:5], body[5:]):
                connection.sendall(piece)
                time.sleep(0.4)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200"), turn
