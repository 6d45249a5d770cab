"""Long JSON bodies, right and wrong: nobody else waits for them, and a helper that dies costs one request an error."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_bad_input import settled
from tests.support.packages import write_package
from tests.support.server import Server, serve
from tests.support.wire import Reply, Wire, request

MIB = 2**20
#: Large enough to take seconds where the interpreter's lock is held.
SIZE = 32 * MIB
ROW = b"[1.5,1.5,1.5,1.5],"
START = b'{"model":"mlp","outputs":["z"],"inputs":{"x":['


def body(kind: str, size: int = SIZE) -> bytes:
    rows = ROW * (size // len(ROW))
    return {
        "valid": START + rows + ROW[:-1] + b"]}}",
        "null at the end": START + rows + b"[1.5,1.5,1.5,null]]}}",
        "one long row": START + b"[" + b"1.5," * (size // 4) + b"null]]}}",
        "ragged": START + b"[1]," * (size // 4) + b"[1,2]]}}",
        "rows of one": START + b"[1]," * (size // 4) + b"[1]]}}",
        "a key many times": START[: -len(b'"x":[')] + b'"x":[[1.5]],' * (size // 12) + b'"x":[[1.5]]}}',
        "text": START + b"[" + b'"a",' * (size // 4) + b"1]]}}",
        "no JSON": START + rows + b"]}}",
        "a number too large": START + rows + b"[1,2,3,1e39]]}}",
        "another model": (START + rows + ROW[:-1] + b"]}}").replace(b'"mlp"', b'"no"'),
        "a long id": b'{"id":"' + b"i" * size + b'","inputs":{"x":[[1,2,3,4]]}}',
        "deep": b'{"inputs":{"x":' + b"[" * (size // 2) + b"]" * (size // 2) + b"}}",
    }[kind]


CODES = {
    "valid": (200, None),
    "null at the end": (400, "wrong_dtype"),
    "one long row": (400, "wrong_dtype"),
    "ragged": (400, "wrong_shape"),
    "rows of one": (400, "wrong_shape"),
    "a key many times": (400, "wrong_shape"),
    "text": (400, "wrong_dtype"),
    "no JSON": (400, "invalid_json"),
    "a number too large": (400, "non_finite_input"),
    "another model": (404, "unknown_model"),
    "a long id": (400, "invalid_json"),
    "deep": (400, "invalid_json"),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("long")
    (root / "engines").mkdir()
    write_package(root / "engines", "mlp")
    with serve(root / "engines", root / "log", queue_limit="100000000") as server:  # long bodies
        yield server
        assert "Traceback" not in server.log


class Probes(threading.Thread):
    """Asks for health again and again, on a connection of its own."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._ended = threading.Event()
        self._wire = Wire(server)
        self.start()

    def run(self) -> None:
        with self._wire as wire:
            while not self._ended.is_set():
                began = time.monotonic()
                wire.send(request(target="/v2/health/live", method="GET"))
                assert wire.reply().status == 200
                self.seconds.append(time.monotonic() - began)
                time.sleep(0.01)

    def stop(self) -> list[float]:
        self._ended.set()
        self.join()
        return self.seconds


def ask(server: Server, data: bytes) -> Reply:
    with Wire(server, 60) as wire:
        wire.send(request(data))
        return wire.reply()


@pytest.mark.parametrize("kind", [kind for kind in CODES if kind != "valid"])
def test_nobody_waits_for_a_long_body(service: Server, kind: str) -> None:
    data = request(body(kind))
    with Wire(service, 60) as wire:
        probes = Probes(service)
        time.sleep(1)
        wire.send(data)
        reply = wire.reply()
        time.sleep(0.3)
        seconds = sorted(probes.stop())
    assert (reply.status, reply.json().get("code") if reply.status != 200 else None) == CODES[kind]
    assert seconds[len(seconds) * 99 // 100 - 1] < 0.1, seconds[-5:]
    assert seconds[-1] < 0.5, seconds[-5:]
    settled(service)


@pytest.mark.parametrize("kind", CODES)
def test_a_long_body_is_judged_like_a_short_one(service: Server, kind: str) -> None:
    if kind == "a long id":
        pytest.skip("ids may be long in a short body")
    long, short = ask(service, body(kind, MIB + 1000)), ask(service, body(kind, MIB - 1000))
    for reply in (long, short):
        assert (reply.status, reply.json().get("code")) == CODES[kind]
    if kind == "valid":
        assert long.json()["outputs"]["z"][0] == short.json()["outputs"]["z"][0]


def test_its_fields_are_honoured(service: Server) -> None:
    rows = b"[[1,2,3,4]" + b",[1,2,3,4]" * (MIB // 10) + b"]"
    fields = {"id": "mine", "priority": 3, "timeout_ms": 60_000, "outputs": ["y"], "model": "mlp"}
    data = json.dumps({**fields, "inputs": {"x": 0}}).encode().replace(b'"x": 0', b'"x": ' + rows)
    reply = ask(service, data)
    answer = reply.json()
    assert (reply.status, answer["id"], reply.headers["x-request-id"]) == (200, "mine", "mine")
    assert list(answer["outputs"]) == ["y"]
    late = ask(service, data.replace(b'"timeout_ms": 60000', b'"timeout_ms": 0'))
    assert (late.status, late.json()["code"]) == (504, "deadline_exceeded")
    wrong = ask(service, data.replace(b'"y"', b'"q"'))
    assert (wrong.status, wrong.json()["code"], wrong.headers["x-request-id"]) == (
        400,
        "unknown_output",
        "mine",
    )


def helpers(server: Server) -> list[int]:
    return [
        pid for pid in server.processes if b"long_json_helper" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def test_a_helper_that_dies_costs_one_request_an_error(service: Server) -> None:
    assert ask(service, body("valid", 2 * MIB)).status == 200
    (helper,) = helpers(service)
    answers: list[Reply] = []
    asking = threading.Thread(target=lambda: answers.append(ask(service, body("null at the end"))))
    asking.start()
    limit = time.monotonic() + 10
    while Path(f"/proc/{helper}/stat").read_text().split()[2] != "R":
        assert time.monotonic() < limit
        time.sleep(0.001)
    os.kill(helper, signal.SIGKILL)
    asking.join()
    assert (answers[0].status, answers[0].json()["code"]) == (503, "overloaded")
    assert "retry-after" in answers[0].headers
    assert ask(service, body("valid", 2 * MIB)).status == 200
    assert helpers(service) != [helper]


def test_clients_that_leave_and_many_at_once(service: Server) -> None:
    data = request(body("valid", 3 * MIB))
    wires = [Wire(service, 60) for _ in range(8)]
    for wire in wires:
        wire.send(data)
    for wire in wires[::2]:
        wire.socket.close()
    for wire in wires[1::2]:
        with wire:
            assert wire.reply().status == 200
    limit = time.monotonic() + 20
    while service.metric("vernier_inflight_requests"):
        assert time.monotonic() < limit
        time.sleep(0.05)
    settled(service)


@pytest.mark.parametrize("uvicorn", [False, True], ids=["own", "uvicorn"])
def test_helpers_end_with_the_service(engines: Path, tmp_path: Path, uvicorn: bool) -> None:
    write_package(engines)
    with serve(engines, tmp_path / "log", uvicorn=uvicorn) as server:
        assert ask(server, body("valid", 2 * MIB)).status == 200
        (helper,) = helpers(server)
        server.terminate()
        server.wait(20)
        assert not Path(f"/proc/{helper}").exists()
