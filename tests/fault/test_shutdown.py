"""SIGTERM under load: readiness turns red first, every admitted request is answered, the process ends in time."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.support.load import ROW, Load
from tests.support.packages import slow_model, write_package
from tests.support.server import Server, free_port, serve
from tests.support.wire import Reply, Wire, request


def final_totals(server: Server) -> dict[str, int]:
    for line in server.log.splitlines():
        record = json.loads(line)
        if record["message"] == "stopped":
            return dict(record["requests"]["slow/1"])
    raise AssertionError(server.log)


@pytest.mark.parametrize(("uvicorn", "status"), [(False, 0), (True, -signal.SIGTERM)], ids=["own", "uvicorn"])
def test_no_admitted_request_fails_and_the_process_ends_in_time(
    engines: Path, tmp_path: Path, uvicorn: bool, status: int
) -> None:
    """uvicorn's own command raises the signal again when it is done, so it ends with the signal's status."""
    write_package(engines, "slow", model=slow_model())
    with serve(engines, tmp_path / "log", uvicorn=uvicorn, drain_timeout_s="20") as server:
        load = Load(server, "slow", clients=16, stop_at_refusal=True)
        load.wait_for(50)
        began = time.monotonic()
        server.terminate()
        load.join()
        assert server.wait(25) == status
        assert time.monotonic() - began < 20
        totals = final_totals(server)
    assert totals["admitted"] == totals["answered"] >= 50
    assert totals["failed"] == totals["expired"] == totals["cancelled"] == 0
    assert all(status in (200, 503) for status in load.statuses)
    assert all(body["code"] == "draining" for body in load.bodies)


def test_readiness_is_red_while_requests_are_still_taken(engines: Path, tmp_path: Path) -> None:
    write_package(engines, "slow", model=slow_model(layers=2))
    with serve(engines, tmp_path / "log", drain_delay_s="2") as server:
        server.terminate()
        response = server.wait_until("/v2/health/ready", 503, timeout_s=1.5)
        assert response.json()["code"] == "draining"
        assert server.predict(ROW).status_code == 200
        assert server.wait(20) == 0


def test_a_second_signal_does_not_wait(engines: Path, tmp_path: Path) -> None:
    write_package(engines, "slow", model=slow_model(layers=2))
    with serve(engines, tmp_path / "log", drain_delay_s="60") as server:
        server.terminate()
        server.wait_until("/v2/health/ready", 503)
        server.terminate()
        assert server.wait(10) == 0


ASK = request(b'{"inputs": {"x": [[1, 2, 3, 4]]}}')
OTHERS = [
    request(target="/v1/models", method="GET"),
    request(target="/nothing", method="GET"),
    request(target="/v1/predict", method="PUT"),
    request(b"{"),
]


class Keeping(threading.Thread):
    """A client that keeps its connection until an answer says that it ends, as HTTP has it."""

    def __init__(self, server: Server, pause_s: float) -> None:
        super().__init__()
        self.statuses: list[int] = []
        self.lost: list[str] = []
        self._server = server
        self._pause_s = pause_s
        self.start()

    def run(self) -> None:
        while True:
            try:
                wire = Wire(self._server)
            except OSError:  # it does not accept any more
                return
            with wire:
                reply: Reply | None = None
                while reply is None or reply.headers.get("connection") != "close":
                    try:
                        wire.send(ASK)
                        reply = wire.reply()
                    except (OSError, EOFError) as error:
                        if reply is None and isinstance(error, ConnectionResetError):
                            return  # it waited in the queue of a socket that was closed, and was never accepted
                        self.lost.append(repr(error))
                        return
                    self.statuses.append(reply.status)
                    time.sleep(self._pause_s)


@pytest.mark.parametrize("pause_s", [0.0, 0.05, 0.4])
def test_no_client_that_honours_connection_close_loses_a_request(
    engines: Path, tmp_path: Path, pause_s: float
) -> None:
    write_package(engines)
    with serve(engines, tmp_path / "log", drain_delay_s="1") as server:
        clients = [Keeping(server, pause_s) for _ in range(24)]
        time.sleep(0.5)
        server.terminate()
        assert server.wait(20) == 0
        for client in clients:
            client.join(10)
        assert [client.lost for client in clients] == [[]] * 24
        assert {status for client in clients for status in client.statuses} == {200}


@pytest.mark.parametrize("settings", [{}, {"metrics_port": ""}], ids=["one port", "two ports"])
def test_every_answer_ends_its_connection_once_readiness_is_red(
    engines: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    write_package(engines)
    side = free_port() if settings else None
    if side is not None:
        settings = {"metrics_port": str(side)}
    with serve(engines, tmp_path / "log", drain_delay_s="3", health_port=side, **settings) as server:
        kept = [Wire(server) for _ in range(5)]
        for wire in kept:
            wire.send(ASK)
            assert "connection" not in wire.reply().headers
        server.terminate()
        server.wait_until("/v2/health/ready", 503)
        assert server.get("/v2/health/live").headers["connection"] == "close"
        for wire, message in zip(kept, [ASK, *OTHERS], strict=True):
            with wire:
                wire.send(message)
                assert wire.reply().headers["connection"] == "close", message
                assert wire.ended()
        assert server.wait(20) == 0


def test_pipelined_requests_that_were_taken_are_answered_before_the_end(
    engines: Path, tmp_path: Path
) -> None:
    write_package(engines, "slow", model=slow_model())
    long = request(json.dumps({"inputs": {"x": [[0.1, 0.2, 0.3, 0.4]] * 200}}).encode())
    with serve(engines, tmp_path / "log", drain_delay_s="2", slots="1") as server, Wire(server) as wire:
        wire.send(long * 8)
        time.sleep(0.1)
        server.terminate()
        replies = []
        while not replies or replies[-1].headers.get("connection") != "close":
            replies.append(wire.reply())
        assert {reply.status for reply in replies} == {200}
        assert wire.ended()
        assert server.wait(20) == 0


def test_an_idle_connection_is_answered_a_moment_longer_than_the_delay(engines: Path, tmp_path: Path) -> None:
    write_package(engines)
    with (
        serve(engines, tmp_path / "log", drain_delay_s="1") as server,
        Wire(server) as wire,
        Wire(server) as idle,
    ):
        wire.send(ASK)
        assert wire.reply().status == 200
        server.terminate()
        while True:  # until it does not accept any more
            try:
                socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
            except OSError:
                break
            time.sleep(0.01)
        wire.send(ASK)
        reply = wire.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert wire.ended()
        began = time.monotonic()
        assert idle.ended()
        assert time.monotonic() - began < 2
        assert server.wait(20) == 0
