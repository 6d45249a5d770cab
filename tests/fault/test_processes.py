"""Processes that are killed under load: no wrong answer, no lost connection of a living front, books that balance."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.load import settled
from tests.support.packages import slow_model, write_package
from tests.support.server import Server, administrator, serve
from tests.support.wire import Wire, request

CLIENTS = 12


def children(server: Server) -> dict[str, list[int]]:
    """Role → process ids, by their command lines."""
    found: dict[str, list[int]] = {}
    for pid in Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except FileNotFoundError:  # it has just ended
            continue
        if b"vernier.processes.child" in words:
            role = words[words.index(b"vernier.processes.child") + 1].decode()
            found.setdefault(role, []).append(int(pid))
    return found


class Clients:
    """Threads that each ask one thing after the other on a connection, and check every answer.

    Attributes:
        codes: of the answers; `ok`, an error's code, or `wrong`.
        broken: connections that ended without an answer, each replaced by a new one.
    """

    def __init__(self, server: Server, count: int = CLIENTS, **fields: object) -> None:
        self.codes: Counter[str] = Counter()
        self.broken = 0
        self._server = server
        self._fields = fields
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        asked = 0
        while not self._stop.is_set():
            try:
                with Wire(self._server, 30) as wire:
                    while not self._stop.is_set():
                        asked += 1
                        self._ask(wire, number + asked / 1000)
            except (EOFError, OSError):
                with self._lock:
                    self.broken += 1
                time.sleep(0.02)

    def _ask(self, wire: Wire, x: float) -> None:
        fields = {"model": "mlp", "inputs": {"x": [[x, 0.0, 0.0, 0.0]]}, **self._fields}
        wire.send(request(json.dumps(fields).encode()))
        reply = wire.reply()
        body = reply.json()
        code = body.get("code", "ok")
        if reply.status == 200 and abs(body["outputs"]["z"][0][0] - 2 * x) > 1e-4 * max(1, x):
            code = "wrong"
        with self._lock:
            self.codes[code] += 1

    def wait_for(self, answers: int) -> None:
        wanted = self.codes["ok"] + answers
        limit = time.monotonic() + 30
        while self.codes["ok"] < wanted:
            assert time.monotonic() < limit, (self.codes, self.broken)
            time.sleep(0.01)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(40)
            assert not thread.is_alive()


@contextmanager
def clients_of(server: Server, count: int = CLIENTS, **fields: object) -> Iterator[Clients]:
    clients = Clients(server, count, **fields)
    try:
        yield clients
    finally:
        clients.stop()


def await_children(server: Server, role: str, count: int, without: set[int]) -> None:
    limit = time.monotonic() + 15
    while len(set(children(server).get(role, ())) - without) < count:
        assert time.monotonic() < limit, children(server)
        time.sleep(0.02)


def await_connection(server: Server, front: int) -> None:
    """Returns when this front has taken a connection."""
    limit = time.monotonic() + 30
    connections = []
    while not _inet_sockets(front):
        assert time.monotonic() < limit
        connections.append(socket.create_connection(("127.0.0.1", server.port)))
        time.sleep(0.05)
    for connection in connections:
        connection.close()


@pytest.fixture
def server(engines: Path, tmp_path: Path) -> Iterator[Server]:
    write_package(engines, "mlp")
    with serve(engines, tmp_path / "log", fronts="2") as server:
        yield server
        if server.process.poll() is None:
            settled(server, "mlp")


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_an_engine_process_that_is_killed_costs_no_answer_and_no_connection(
    server: Server, times: int
) -> None:
    with clients_of(server) as clients:
        for _ in range(times):
            clients.wait_for(100)
            (engine,) = children(server)["engine"]
            os.kill(engine, signal.SIGKILL)
            await_children(server, "engine", 1, {engine})
        clients.wait_for(100)
        assert server.metric("vernier_process_restarts_total", role="engine") == times
        began = time.monotonic()
        server.wait_until("/v2/health/ready", 200)
        assert time.monotonic() - began < 5
    assert set(clients.codes) == {"ok"}
    assert clients.broken == 0


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_front_that_is_killed_costs_the_connections_of_others_nothing(server: Server, times: int) -> None:
    with clients_of(server) as clients:
        for _ in range(times):
            clients.wait_for(100)
            before = clients.broken
            fronts = children(server)["front"]
            limit = time.monotonic() + 10
            while (
                sum(map(_inet_sockets, fronts)) < CLIENTS
            ):  # until those that had broken are connected again
                assert time.monotonic() < limit
                time.sleep(0.02)
            held = _inet_sockets(fronts[0])
            os.kill(fronts[0], signal.SIGKILL)
            await_children(server, "front", 2, {fronts[0]})
            clients.wait_for(100)
            assert clients.broken - before <= held
    assert server.metric("vernier_process_restarts_total", role="front") == times
    assert server.metrics()["vernier_process_restarts_total"][0] == ({"role": "engine"}, 0)
    assert set(clients.codes) == {"ok"}


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_with_two_engine_processes_the_service_stays_ready_when_one_is_killed(
    engines: Path, tmp_path: Path, times: int
) -> None:
    write_package(engines, "mlp")
    with serve(engines, tmp_path / "log", fronts="2", engine_processes="2") as server:
        with clients_of(server) as clients:
            for at in range(times):
                clients.wait_for(100)
                both = children(server)["engine"]
                assert len(both) == 2
                os.kill(both[at % 2], signal.SIGKILL)
                clients.wait_for(50)
                assert server.get("/v2/health/ready").status_code == 200
                await_children(server, "engine", 2, {both[at % 2]})
                limit = time.monotonic() + 15
                while len(active_devices(server)) < 2:  # the new one serves, too
                    assert time.monotonic() < limit
                    time.sleep(0.05)
            clients.wait_for(100)
        assert set(clients.codes) == {"ok"}
        assert clients.broken == 0
        assert server.metric("vernier_process_restarts_total", role="engine") == times
        settled(server, "mlp")


def active_devices(server: Server) -> set[str]:
    """The engine processes that tell which precision is active."""
    return {labels["device"] for labels, _ in server.metrics().get("vernier_precision_active", [])}


def test_both_engine_processes_compute_and_are_administered_together(engines: Path, tmp_path: Path) -> None:
    write_package(engines, "slow", model=slow_model(layers=400))
    setting, headers = administrator(tmp_path)
    inputs = {"x": [[0.1] * 4] * 50}
    with serve(engines, tmp_path / "log", fronts="1", engine_processes="2", **setting) as server:
        began = [_cpu_seconds(pid) for pid in children(server)["engine"]]
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda _: server.predict(inputs), range(80)))
        assert {reply.status_code for reply in replies} == {200}
        spent = [_cpu_seconds(pid) - old for pid, old in zip(children(server)["engine"], began, strict=True)]
        assert min(spent) > 0.2 * max(spent), spent
        unload = f"{server.url}/v2/repository/models/slow"
        assert httpx.post(f"{unload}/unload", headers=headers).is_success
        assert server.predict({"x": [[1.0] * 4]}).status_code == 503
        assert httpx.post(f"{unload}/load", headers=headers).is_success
        assert {server.predict({"x": [[1.0] * 4]}).status_code for _ in range(8)} == {200}


def test_what_was_unloaded_by_hand_stays_so_when_the_engine_process_is_killed(
    engines: Path, tmp_path: Path
) -> None:
    write_package(engines, "mlp")
    write_package(engines, "other")
    setting, headers = administrator(tmp_path)
    with serve(engines, tmp_path / "log", fronts="1", **setting) as server:
        other = f"{server.url}/v2/repository/models/other"
        assert httpx.post(f"{other}/unload", headers=headers).is_success
        for served in ({"mlp"}, {"mlp", "other"}):
            (engine,) = children(server)["engine"]
            os.kill(engine, signal.SIGKILL)
            await_children(server, "engine", 1, {engine})
            assert server.predict({"x": [[1.0] * 4]}, model="mlp").status_code == 200
            server.wait_until("/v2/health/ready", 200)
            assert {model["name"] for model in server.get("/v1/models").json()["models"]} == served
            assert httpx.post(f"{other}/load", headers=headers).is_success


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_front_without_an_engine_process_holds_as_many_rows_as_the_queue_and_refuses_others(
    engines: Path, tmp_path: Path
) -> None:
    write_package(engines, "mlp")
    with serve(engines, tmp_path / "log", fronts="1", queue_limit="4") as server:
        wires = [Wire(server, 30) for _ in range(9)]
        (engine,) = children(server)["engine"]
        os.kill(engine, signal.SIGKILL)
        time.sleep(0.1)  # the front has heard of it, and the next one has only begun to start
        body = json.dumps({"model": "mlp", "inputs": {"x": [[1.0] * 4]}}).encode()
        for wire in wires:
            wire.send(request(body))
        replies = [wire.reply() for wire in wires]
        told = Counter((reply.status, reply.json().get("code", "ok")) for reply in replies)
        # those that were read together are held or refused together
        assert set(told) == {(200, "ok"), (503, "engine_restarting")}
        assert told[200, "ok"] <= 4
        for wire in wires:
            wire.socket.close()


def test_a_front_that_hangs_is_replaced(server: Server) -> None:
    hanging = children(server)["front"][0]
    await_connection(server, hanging)  # one that has not started yet may take longer
    os.kill(hanging, signal.SIGSTOP)
    await_children(server, "front", 2, {hanging})
    with clients_of(server, 4) as clients:
        clients.wait_for(20)
    assert "does not answer" in server.log


def test_the_service_ends_when_its_supervisor_is_killed(engines: Path, tmp_path: Path) -> None:
    write_package(engines, "mlp")
    with serve(engines, tmp_path / "log", fronts="2", drain_timeout_s="5") as server:
        pids = [pid for each in children(server).values() for pid in each]
        assert len(pids) == 3
        server.process.kill()
        server.process.wait()
        limit = time.monotonic() + 15
        while any(_runs(pid) for pid in pids):
            assert time.monotonic() < limit
            time.sleep(0.05)


#: Becomes the first process of a PID namespace, as in a container.
AS_PID_1 = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def _can_unshare() -> bool:
    return shutil.which("unshare") is not None and not subprocess.run([*AS_PID_1, "true"]).returncode


@pytest.mark.skipif(not _can_unshare(), reason="needs root and unshare")
def test_as_the_first_process_of_a_container_it_hears_sigterm_and_leaves_no_zombie(
    engines: Path, tmp_path: Path
) -> None:
    write_package(engines, "mlp", model=slow_model(layers=2))
    with serve(engines, tmp_path / "log", fronts="1", prefix=AS_PID_1) as server:
        (supervisor,) = _descendants(server.process.pid, deep=False)
        # long enough for a helper process, and refused; the helper stays
        assert server.predict({"x": [[1.0, 0.0, 0.0, 0.0]] * 100_000}).status_code in (200, 400, 429)
        (front,) = [p for p in _descendants(supervisor) if b"child\0front" in _command(p)]
        helpers = _descendants(front)
        assert len(helpers) == 1
        os.kill(front, signal.SIGKILL)
        limit = time.monotonic() + 15
        while Path(f"/proc/{helpers[0]}").exists() or Path(f"/proc/{front}").exists():
            assert time.monotonic() < limit
            time.sleep(0.05)
        server.wait_until("/v2/health/ready", 200)
        os.kill(supervisor, signal.SIGTERM)
        assert server.wait(20) == 0


def _descendants(pid: int, deep: bool = True) -> list[int]:
    own = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    own += [int(p) for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()]
    own = sorted(set(own))
    return own + [p for child in own for p in _descendants(child)] if deep else own


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_sigterm_loses_no_request_that_was_taken(engines: Path, tmp_path: Path, times: int) -> None:
    write_package(engines, "mlp")
    for number in range(times):
        log = tmp_path / f"log{number}"
        with serve(engines, log, fronts="2", drain_delay_s="0.3") as server, clients_of(server) as clients:
            clients.wait_for(200)
            server.terminate()
            assert server.wait(20) == 0
            clients.stop()
        assert set(clients.codes) <= {"ok", "draining"}
        stopped = [json.loads(line) for line in log.read_text().splitlines() if '"stopped"' in line]
        totals = stopped[-1]["requests"]["mlp/1"]
        assert totals["admitted"] == totals["answered"]
        # an answer may be lost with its connection, but none is admitted and not answered
        assert totals["answered"] >= clients.codes["ok"]


def test_what_waits_beyond_the_limit_is_told_to_come_back(engines: Path, tmp_path: Path) -> None:
    """While the engine process starts anew, which a broken package holds up here."""
    write_package(engines, "mlp", model=slow_model(layers=2))
    with serve(engines, tmp_path / "log", fronts="1", queue_limit="4") as server:
        (engine,) = children(server)["engine"]
        os.kill(engine, signal.SIGSTOP)  # it takes nothing and does not die: requests wait in its socket
        wires = [Wire(server, 30) for _ in range(3)]
        body = json.dumps({"model": "mlp", "inputs": {"x": [[1.0] * 4]}}).encode()
        for wire in wires:
            wire.send(request(body))
        time.sleep(0.2)
        os.kill(engine, signal.SIGKILL)
        assert [wire.reply().status for wire in wires] == [200] * 3
        for wire in wires:
            wire.socket.close()


def test_a_request_that_kills_the_engine_process_takes_nobody_with_it(engines: Path, tmp_path: Path) -> None:
    """Killed each time while it computes; the request is tried twice and then told, others are answered."""
    write_package(engines, "slow", model=slow_model(layers=400))
    write_package(engines, "mlp")
    with serve(engines, tmp_path / "log", fronts="1") as server:
        poison = Wire(server, 60)
        poison.send(request(json.dumps({"model": "slow", "inputs": {"x": [[0.1] * 4] * 4000}}).encode()))
        with clients_of(server, 4) as clients:
            for _ in range(2):
                engine = children(server)["engine"][0]
                limit = time.monotonic() + 20
                while not server.metric("vernier_inflight_requests", model="slow"):
                    assert time.monotonic() < limit
                    time.sleep(0.02)
                server.wait_until("/v2/health/ready", 200)
                time.sleep(0.3)
                os.kill(engine, signal.SIGKILL)
                await_children(server, "engine", 1, {engine})
            reply = poison.reply()
            clients.wait_for(50)
        assert (reply.status, reply.json()["code"]) == (500, "internal")
        assert set(clients.codes) == {"ok"}
        settled(server, "slow")
        poison.socket.close()


def test_connections_are_spread_evenly_over_fronts(engines: Path, tmp_path: Path) -> None:
    write_package(engines, "mlp")
    with serve(engines, tmp_path / "log", fronts="2") as server:
        connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
        try:
            time.sleep(0.5)
            held = [_inet_sockets(pid) for pid in children(server)["front"]]
            assert abs(held[0] - held[1]) <= 4, held
            assert sum(held) >= 40
        finally:
            for connection in connections:
                connection.close()


def _inet_sockets(pid: int) -> int:
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            name = os.readlink(fd)
        except FileNotFoundError:
            continue
        if name.startswith("socket:["):
            inodes.add(name[8:-1])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[9] in inodes and row[3] == "01" for row in rows)
