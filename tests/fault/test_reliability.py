"""What production does to a service: killed processes, full queues, slow and idle clients, a clock that jumps."""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.load import ROW, Load, settled
from tests.support.packages import mlp_model, slow_model, write_package
from tests.support.server import Server, administrator, serve
from tests.support.wire import Wire, request

X = ROW["x"]


def wait_until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    limit = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_killed_service_starts_again_from_the_same_packages(engines: Path, tmp_path: Path) -> None:
    """How long it takes stands in docs/reliability.md; a test must not depend on the machine's speed."""
    write_package(engines, "quick", variants={"fp16": mlp_model(), "int8": mlp_model()})
    write_package(engines, "slow", model=slow_model(layers=10))

    def seen(server: Server) -> tuple[Any, list[Any]]:
        """What readiness promises: every model, every variant, and that each executes."""
        models = [server.get(f"/v1/models/{name}").json() for name in ("quick", "slow")]
        loaded = [[(v["precision"], v["active"]) for v in model["variants"]] for model in models]
        answers = [server.predict(ROW, model="slow")]
        answers += [server.predict(ROW, model="quick", precision=p) for p in ("fp32", "fp16", "int8")]
        assert [a.status_code for a in answers] == [200] * 4
        return loaded, [a.json()["outputs"] for a in answers]

    with serve(engines, tmp_path / "log") as server:
        before = seen(server)
        load = Load(server, "slow", clients=4)
        load.wait_for(10)
        server.process.kill()
        server.process.wait()
        load.stop()
    with serve(engines, tmp_path / "log2") as server:
        assert seen(server) == before
        assert server.log.count('"model loaded"') == 2


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(engines: Path, tmp_path: Path) -> None:
    write_package(engines, "slow", model=slow_model())
    with serve(engines, tmp_path / "log", queue_limit="4", slots="1") as server:
        body = {"model": "slow", "inputs": {"x": X * 16}}
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            responses = await asyncio.gather(*(client.post("/v1/predict", json=body) for _ in range(64)))
        by_status = {status: [r for r in responses if r.status_code == status] for status in (200, 429)}
        assert len(by_status[200]) + len(by_status[429]) == 64
        assert by_status[200]
        assert by_status[429]
        assert by_status[429][0].json()["code"] == "queue_full"
        assert int(by_status[429][0].headers["retry-after"]) >= 1
        assert server.metric("vernier_rejected_total", reason="queue_full") == len(by_status[429])
        settled(server, "slow")


def test_requests_refused_together_have_their_own_ids_and_are_counted_one_by_one(
    engines: Path, tmp_path: Path
) -> None:
    write_package(engines, "slow", model=slow_model(layers=200))
    row = json.dumps({"model": "slow", "inputs": ROW}).encode()
    long = request(json.dumps({"model": "slow", "inputs": {"x": X * 16}}).encode())
    settings = {"queue_limit": "4", "slots": "1"}
    with serve(engines, tmp_path / "log", **settings) as server, ExitStack() as stack:
        blockers = [stack.enter_context(Wire(server, 60)) for _ in range(5)]
        clients = {f"client-{i}": stack.enter_context(Wire(server, 60)) for i in range(40)}
        for identity, client in clients.items():  # so that their heads and the form of their bodies are known
            client.send(request(row, x_request_id=identity))
            assert client.reply().status == 200
        for admitted, blocker in enumerate(blockers, len(clients) + 1):
            blocker.send(long)
            wait_until(
                lambda: server.metric("vernier_requests_admitted_total", model="slow") == admitted  # noqa: B023
            )
        for identity, client in clients.items():
            client.send(request(row, x_request_id=identity))
        replies = {identity: client.reply() for identity, client in clients.items()}
        refused = [reply for reply in replies.values() if reply.status == 429]
        assert refused
        assert {reply.status for reply in replies.values()} <= {200, 429}
        assert {reply.headers["x-request-id"] for reply in replies.values()} == set(replies)
        assert all(reply.headers["x-request-id"] == identity for identity, reply in replies.items())
        assert {reply.json()["code"] for reply in refused} == {"queue_full"}
        assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
        assert all(int(reply.headers["content-length"]) == len(reply.body) for reply in refused)
        assert server.metric("vernier_rejected_total", reason="queue_full") == len(refused)
        assert server.metric("vernier_requests_total", code="queue_full") == len(refused)
        assert [blocker.reply().status for blocker in blockers] == [200] * 5
        settled(server, "slow")


def test_inputs_are_not_read_where_there_is_no_room_for_them_and_everything_else_is_checked(
    engines: Path, tmp_path: Path
) -> None:
    write_package(engines, "slow", model=slow_model(layers=200))
    long = request(
        json.dumps({"model": "slow", "inputs": {"x": X * 400}}).encode()
    )  # many batches, a place in the queue
    text = request(json.dumps({"model": "slow", "inputs": {"x": [["a", "b", "c", "d"]]}}).encode())
    nobody = request(json.dumps({"model": "nobody", "inputs": ROW}).encode())
    settings = {"queue_limit": "1", "slots": "1"}
    with serve(engines, tmp_path / "log", **settings) as server, ExitStack() as stack:
        blocker, client = [stack.enter_context(Wire(server, 60)) for _ in range(2)]
        blocker.send(long)
        wait_until(lambda: server.metric("vernier_requests_admitted_total", model="slow") == 1)
        statuses = []
        for message in (text, nobody, text):
            client.send(message)
            statuses.append(client.reply().status)
        assert blocker.reply().status == 200
        client.send(text)
        last = client.reply()
        assert statuses[1] == 404
        assert statuses[0] == 429
        assert (last.status, last.json()["code"]) == (400, "wrong_dtype")
        assert server.metric("vernier_rejected_total", model="slow") == statuses.count(429)


def test_clients_that_give_up_cost_nothing_more_and_the_books_balance(engines: Path, tmp_path: Path) -> None:
    """They leave once all of them are admitted: one that leaves earlier may never have been seen by the service."""
    clients = 20
    write_package(engines, "slow", model=slow_model(layers=2000))
    body = json.dumps({"model": "slow", "inputs": {"x": X * 16}}).encode()
    with serve(engines, tmp_path / "log", slots="1") as server, ExitStack() as stack:
        connections = [stack.enter_context(Wire(server)) for _ in range(clients)]
        for connection in connections:
            connection.send(request(body))
        wait_until(lambda: server.metric("vernier_requests_admitted_total", model="slow") == clients)
        stack.close()
        settled(server, "slow")
        cancelled = server.metric("vernier_requests_ended_total", outcome="cancelled")
        computed = server.metric("vernier_batch_size_count", model="slow")
        assert cancelled > 0
        assert clients - cancelled <= computed < clients
        assert server.metric("vernier_requests_ended_total", outcome="failed") == 0


async def test_requests_that_run_out_of_time_are_told_so_and_the_books_balance(
    engines: Path, tmp_path: Path
) -> None:
    write_package(engines, "slow", model=slow_model())
    with serve(engines, tmp_path / "log", slots="1") as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            responses = await asyncio.gather(
                *(
                    client.post(
                        "/v1/predict", json={"model": "slow", "inputs": {"x": X * 16}, "timeout_ms": 1 + i}
                    )
                    for i in range(40)
                )
            )
        assert {r.status_code for r in responses} <= {200, 429, 504}
        assert any(r.status_code != 200 for r in responses)
        settled(server, "slow")
        assert server.metric("vernier_requests_ended_total", outcome="failed") == 0


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_idle_connections_do_not_keep_others_waiting(engines: Path, tmp_path: Path, count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count + 200:
        pytest.fail(f"this test needs {count + 200} open files; raise `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 200), hard))
    write_package(engines)
    try:
        with serve(engines, tmp_path / "log") as server:
            idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(count)]
            try:
                for _ in range(20):
                    assert server.predict(ROW).status_code == 200
            finally:
                for connection in idle:
                    connection.close()
            assert server.predict(ROW).status_code == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_package_that_changes_on_disk_while_it_is_served_goes_on_serving(
    engines: Path, tmp_path: Path
) -> None:
    package = write_package(engines)
    with serve(engines, tmp_path / "log") as server:
        before = server.predict(ROW, outputs=["y"]).json()["outputs"]
        shutil.rmtree(package)
        for _ in range(50):
            response = server.predict(ROW, outputs=["y"])
            assert response.status_code == 200
            assert response.json()["outputs"] == before


def test_a_model_is_unloaded_under_load_and_no_admitted_request_is_lost(
    engines: Path, tmp_path: Path
) -> None:
    write_package(engines, "leaving", model=slow_model(layers=10))
    write_package(engines, "staying")
    settings, admin = administrator(tmp_path)
    with serve(engines, tmp_path / "log", **settings) as server:
        url = f"{server.url}/v2/repository/models/leaving"
        leaving, staying = Load(server, "leaving", clients=6), Load(server, "staying", clients=2)
        for _ in range(3):
            leaving.wait_for(30)
            assert httpx.post(f"{url}/unload", headers=admin, timeout=30).status_code == 200
            leaving.wait_for(10)
            assert httpx.post(f"{url}/load", headers=admin, timeout=30).status_code == 200
        leaving.wait_for(30)
        leaving.stop()
        staying.stop()
        assert leaving.broken == staying.broken == []
        assert set(staying.statuses) == {200}
        assert {body["code"] for body in leaving.bodies} <= {"unknown_model", "draining"}
        assert leaving.statuses.count(404) > 0
        settled(server, "leaving")
        settled(server, "staying")


def test_a_model_that_is_loaded_again_and_again_takes_no_more_memory(engines: Path, tmp_path: Path) -> None:
    weights = write_package(engines, "heavy", model=slow_model(layers=10)) / "fp32.onnx"
    settings, admin = administrator(tmp_path)
    with serve(engines, tmp_path / "log", **settings) as server:

        def reload(times: int) -> float:
            for _ in range(times):
                response = httpx.post(
                    f"{server.url}/v2/repository/models/heavy/load", headers=admin, timeout=30
                )
                assert response.status_code == 200, response.text
            return server.metric("process_resident_memory_bytes")

        before = reload(5)
        assert reload(25) - before < 2 * weights.stat().st_size
