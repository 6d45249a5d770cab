"""Small predictions between their arrival and the end of their turn of the loop, when something else happens.

The service and its model are real; only the transport is not, so that a test decides what comes in which turn.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import ref

import orjson
import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from tests.support.packages import pair_model, write_package
from tests.support.wire import request
from vernier.errors import QueueFull
from vernier.front import response_heads
from vernier.front.connection import Connection, service_protocol
from vernier.main import create_app
from vernier.serving.scheduling.execution import Execution
from vernier.serving.scheduling.inline import Inline
from vernier.settings import Settings

MANY = 5
#: Rows of each, together not more than the model's largest batch.
ALIKE, DIFFERENT = (1,) * MANY, (3, 1, 4, 2, 1)


class Recorder(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closed = False
        self.broken = False

    def write(self, data: Any) -> None:
        if self.broken:
            raise RuntimeError("the transport is broken")
        self.sent += data

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name, default)

    def is_closing(self) -> bool:
        return self.closed

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None:
        self.closed = True

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return False

    def answers(self) -> list[tuple[bytes, Any]]:
        """Heads and bodies so far."""
        found, rest = [], self.sent
        while rest:
            head, rest = rest.split(b"\r\n\r\n", 1)
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            found.append((head, orjson.loads(rest[:length])))
            rest = rest[length:]
        return found


def predict(*x: float, close: bool = False) -> bytes:
    body = orjson.dumps({"model": "mlp", "inputs": {"x": [x]}})
    return request(body, connection="close") if close else request(body)


class Service:
    """Connections to one service in this process."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self.app = app
        self._protocol = service_protocol(
            app.state.predictions, app.state.metrics, app.state.guard, settings, app.state.lifecycle
        )
        self._config = Config(app, http="httptools", log_config=None)
        self._config.load()
        self.state = ServerState()

    def connect(self) -> tuple[Connection, Recorder]:
        connection, wire = self._protocol(self._config, self.state, {}), Recorder()
        connection.connection_made(wire)
        return connection, wire

    async def known(self) -> tuple[Connection, Recorder]:
        """A connection that has had answers, so that its requests have a template."""
        connection, wire = self.connect()
        for _ in range(2):
            connection.data_received(predict(1.0, 2.0, 3.0, 4.0))
            await until(lambda: bool(wire.sent))
            wire.sent = b""
        connection.data_received(predict(1.0, 2.0, 3.0, 4.0))
        assert connection._due
        await until(lambda: bool(wire.sent))
        assert not connection._due
        wire.sent = b""
        return connection, wire

    def responses(self, code: str) -> float:
        model = self.app.state.repository.resolve("mlp", None)
        return float(model.metrics._codes.get(code, 0))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest.fixture(params=["at once", "by a worker"])
async def service(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Service]:
    if request.param == "by a worker":
        monkeypatch.setattr(Inline, "worth_having", lambda *_: False)
    write_package(tmp_path, "mlp")
    write_package(tmp_path, "pair", model=pair_model())
    settings = Settings(engines_dir=tmp_path, monitor_share=0.0, slots=1)
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        async with asyncio.timeout(30):
            while app.state.repository.not_ready_reason() is not None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        yield Service(app, settings)


async def test_each_gets_its_own_answer(service: Service) -> None:
    connections = [await service.known() for _ in range(MANY)]
    before, answered = service.responses("ok"), service.state.total_requests
    for number, (connection, _) in enumerate(connections):
        connection.data_received(predict(number, 0.0, 0.0, 0.0))
    await until(lambda: all(wire.sent for _, wire in connections))
    for number, (_, wire) in enumerate(connections):
        ((head, body),) = wire.answers()
        assert body["outputs"]["z"] == [[2.0 * number, 0.0, 0.0, 0.0]]
        assert f"x-request-id: {body['id']}".encode() in head
    assert len({wire.answers()[0][1]["id"] for _, wire in connections}) == MANY
    assert service.responses("ok") == before + MANY
    assert service.state.total_requests == answered + MANY


class Asks:
    """Requests of one client, each its own in what clients tell apart."""

    def __init__(self, model: str = "mlp") -> None:
        self._model = model

    def __call__(self, number: int, timeout_ms: float | None = None, **headers: str) -> bytes:
        fields: dict[str, Any] = {"model": self._model, "id": f"r-{number}"}
        if timeout_ms is not None:
            fields["timeout_ms"] = timeout_ms
        one = {"x": [[number, 0.0, 0.0, 0.0]]}
        two = {"item": [[number, 0.0, 0.0]], "user": [2.0]}
        fields["inputs"] = one if self._model == "mlp" else two
        return request(orjson.dumps(fields), **headers)

    @staticmethod
    def answer(body: Any) -> float:
        return float(body["outputs"]["z"][0][0])


@pytest.mark.parametrize("model", ["mlp", "pair"])
@pytest.mark.parametrize("timeout_ms", [None, 5000])
async def test_what_each_has_for_itself_does_not_part_them(
    service: Service, model: str, timeout_ms: float | None
) -> None:
    """An id, a trace, a deadline, several inputs: all of one turn still make one batch."""
    connections, ask = [service.connect() for _ in range(MANY)], Asks(model)
    for turn in range(3):
        for at, (connection, wire) in enumerate(connections):
            wire.sent = b""
            own = None if timeout_ms is None else timeout_ms + at + turn
            connection.data_received(ask(at + 10 * turn, own, traceparent=f"00-{turn}-{at}"))
        await until(lambda: all(wire.sent for _, wire in connections))
        for at, (_, wire) in enumerate(connections):
            ((head, body),) = wire.answers()
            assert (body["id"], ask.answer(body)) == (f"r-{at + 10 * turn}", 2.0 * (at + 10 * turn))
            assert f"x-request-id: {body['id']}".encode() in head
    assert [wire.answers()[0][1]["timing"]["batch_size"] for _, wire in connections] == [MANY] * MANY


async def test_a_deadline_that_has_passed_costs_only_its_own_request(service: Service) -> None:
    (first, wire), (late, refused), ask = service.connect(), service.connect(), Asks()
    for timeouts_ms in ((5000, 5000), (5000, 0), (5000, 5000)):
        for connection, to, timeout_ms in ((first, wire, timeouts_ms[0]), (late, refused, timeouts_ms[1])):
            to.sent = b""
            connection.data_received(ask(3, timeout_ms))
        await until(lambda: bool(wire.sent and refused.sent))
        assert ask.answer(wire.answers()[0][1]) == 6.0
        code = refused.answers()[0][1].get("code")
        assert code == ("deadline_exceeded" if timeouts_ms[1] == 0 else None)


async def test_a_client_may_ask_several_models_in_turns(service: Service) -> None:
    connections = [(*service.connect(), Asks(model)) for model in ("mlp", "pair") * MANY]
    for turn in range(4):
        for at, (connection, wire, ask) in enumerate(connections):
            wire.sent = b""
            connection.data_received(ask(at + turn))
        await until(lambda: all(wire.sent for _, wire, _ in connections))
        for at, (_, wire, ask) in enumerate(connections):
            assert ask.answer(wire.answers()[0][1]) == 2.0 * (at + turn)
    sizes = [wire.answers()[0][1]["timing"]["batch_size"] for _, wire, _ in connections]
    assert sizes == [MANY] * len(connections)


async def test_requests_of_any_number_of_rows_make_batches_together(service: Service) -> None:
    """The largest batch of this model has 16 rows, so they make several."""
    connections = [service.connect() for _ in range(9)]
    sizes: list[int] = []
    for turn in range(3):
        for at, (connection, wire) in enumerate(connections):
            wire.sent = b""
            rows = [[at + 10.0 * row, 0.0, 0.0, 0.0] for row in range(1 + (at + turn) % 4)]
            connection.data_received(request(orjson.dumps({"model": "mlp", "inputs": {"x": rows}})))
        await until(lambda: all(wire.sent for _, wire in connections))
        sizes = []
        for at, (_, wire) in enumerate(connections):
            ((_, body),) = wire.answers()
            z = body["outputs"]["z"]
            assert [row[0] for row in z] == [2 * (at + 10.0 * row) for row in range(1 + (at + turn) % 4)]
            sizes.append(body["timing"]["batch_size"])
    assert sum(1 / size for size in sizes) < len(sizes) / 2  # most had company
    assert max(sizes) <= 16


async def test_more_rows_than_a_batch_holds_are_answered_whole(service: Service) -> None:
    connection, wire = service.connect()
    for count in (2, 2, 40):
        wire.sent = b""
        rows = [[float(row), 0.0, 0.0, 0.0] for row in range(count)]
        connection.data_received(request(orjson.dumps({"model": "mlp", "inputs": {"x": rows}})))
        await until(lambda: bool(wire.sent))
        ((_, body),) = wire.answers()
        assert [row[0] for row in body["outputs"]["z"]] == [2.0 * row for row in range(count)]


@pytest.mark.parametrize("with_timeout", [False, True])
@pytest.mark.parametrize("where", ["refusal", "submit"])
async def test_an_error_of_ours_is_answered_to_all_whom_it_struck(
    service: Service, monkeypatch: pytest.MonkeyPatch, where: str, with_timeout: bool
) -> None:
    connections, ask = [service.connect() for _ in range(MANY)], Asks()
    timeout_ms = 5000 if with_timeout else None
    for connection, wire in connections:
        connection.data_received(ask(1, timeout_ms))
        await until(lambda wire=wire: bool(wire.sent))  # type: ignore[misc]
        wire.sent = b""

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("no memory left")

    scheduler = service.app.state.repository.resolve("mlp", None).scheduler
    with monkeypatch.context() as patched:
        patched.setattr(scheduler, where, fail)
        for connection, _ in connections:
            connection.data_received(ask(1, timeout_ms))
        await until(lambda: all(wire.sent for _, wire in connections))
    for connection, wire in connections:
        ((head, body),) = wire.answers()
        assert head.startswith(b"HTTP/1.1 500")
        assert body["code"] == "internal"
        wire.sent = b""
        connection.data_received(ask(2, timeout_ms))
    await until(lambda: all(wire.sent for _, wire in connections))
    assert [ask.answer(wire.answers()[0][1]) for _, wire in connections] == [4.0] * MANY


async def test_what_comes_before_the_answer_waits_for_it(service: Service) -> None:
    connection, wire = await service.known()
    connection.data_received(predict(1.0, 0.0, 0.0, 0.0))
    connection.data_received(predict(2.0, 0.0, 0.0, 0.0) + predict(3.0, 0.0, 0.0, 0.0)[:-5])
    await until(lambda: len(wire.answers()) == 2)
    connection.data_received(predict(3.0, 0.0, 0.0, 0.0)[-5:])
    await until(lambda: len(wire.answers()) == 3)
    assert [body["outputs"]["z"][0][0] for _, body in wire.answers()] == [2.0, 4.0, 6.0]


async def test_another_route_behind_it_is_answered_after_it(service: Service) -> None:
    connection, wire = await service.known()
    connection.data_received(predict(1.0, 0.0, 0.0, 0.0))
    connection.data_received(b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n")
    await until(lambda: wire.sent.count(b"HTTP/1.1 ") == 2)
    first, second = wire.answers()
    assert first[1]["outputs"]["z"] == [[2.0, 0.0, 0.0, 0.0]]
    assert second[1]["code"] == "not_found"


@pytest.mark.parametrize("then", ["another route", "shutdown"])
async def test_one_that_is_refused_at_once_is_answered_whatever_comes_behind_it(
    service: Service, then: str
) -> None:
    connection, wire = await service.known()
    wrong = request(b'{"model": "mlp", "inputs": {"nothing": [[1]]}}')
    connection.data_received(wrong)
    await until(lambda: bool(wire.sent))
    connection.data_received(wrong)
    assert connection._due
    if then == "shutdown":
        connection.shutdown()
        await until(lambda: wire.closed)
    else:
        connection.data_received(request(method="GET", target="/nothing"))
        await until(lambda: wire.sent.count(b"HTTP/1.1 ") == 3)
        assert wire.answers()[2][1]["code"] == "not_found"
    assert [body["code"] for _, body in wire.answers()[:2]] == ["unknown_input"] * 2


async def test_a_lost_connection_costs_the_others_nothing(service: Service) -> None:
    (lost, silent), (other, wire) = await service.known(), await service.known()
    before, lost_before = service.responses("ok"), service.responses("cancelled")
    lost.data_received(predict(1.0, 0.0, 0.0, 0.0))
    other.data_received(predict(2.0, 0.0, 0.0, 0.0))
    lost.connection_lost(None)
    await until(lambda: bool(wire.sent))
    assert not silent.sent
    assert wire.answers()[0][1]["outputs"]["z"] == [[4.0, 0.0, 0.0, 0.0]]
    assert service.responses("ok") == before + 1
    assert service.responses("cancelled") == lost_before + 1


async def test_one_that_cannot_be_written_to_costs_the_others_nothing(service: Service) -> None:
    (broken, at_fault), (other, wire) = await service.known(), await service.known()
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    at_fault.broken = True
    broken.data_received(predict(1.0, 0.0, 0.0, 0.0))
    other.data_received(predict(2.0, 0.0, 0.0, 0.0))
    await until(lambda: bool(wire.sent))
    assert "broken" in str(told[0]["exception"])


async def test_it_is_answered_before_a_shutdown_closes_the_connection(service: Service) -> None:
    connection, wire = await service.known()
    connection.data_received(predict(1.0, 0.0, 0.0, 0.0))
    connection.shutdown()
    assert not wire.closed
    await until(lambda: wire.closed)
    ((head, body),) = wire.answers()
    assert b"connection: close" in head
    assert body["outputs"]["z"] == [[2.0, 0.0, 0.0, 0.0]]


async def test_a_connection_is_not_idle_while_it_waits(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, wire = await service.known()
    monkeypatch.setattr(type(connection), "idle_s", 0.0)
    connection.data_received(predict(1.0, 0.0, 0.0, 0.0))
    connection._look_after()
    assert not wire.closed
    await until(lambda: bool(wire.sent))
    await until(lambda: wire.closed)  # the timeout is still watched


async def test_a_client_that_does_not_read_is_not_read_from(service: Service) -> None:
    connection, wire = await service.known()
    connection.data_received(predict(1.0, 0.0, 0.0, 0.0))
    connection.pause_writing()
    connection.data_received(predict(2.0, 0.0, 0.0, 0.0))
    await until(lambda: len(wire.answers()) == 1)
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(wire.answers()) == 1
    connection.resume_writing()
    await until(lambda: len(wire.answers()) == 2)


async def test_the_last_of_a_connection_closes_it(service: Service) -> None:
    connection, wire = await service.known()
    connection.data_received(predict(1.0, 0.0, 0.0, 0.0, close=True))
    await until(lambda: wire.closed)
    assert b"connection: close" in wire.answers()[0][0]


async def test_it_is_logged_like_any_other(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    connection, wire = await service.known()
    connection.access_log = True
    with caplog.at_level(logging.INFO, "uvicorn.access"):
        connection.data_received(predict(1.0, 0.0, 0.0, 0.0))
        assert connection._due
        await until(lambda: bool(wire.sent))
    assert [record.getMessage() for record in caplog.records] == [
        '127.0.0.1:1 - "POST /v1/predict HTTP/1.1" 200'
    ]


async def test_long_answers_get_their_heads_one_by_one(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections = [await service.known() for _ in range(MANY)]
    monkeypatch.setattr(response_heads, "LONG_BODY", 10)
    before = service.responses("ok")
    for number, (connection, _) in enumerate(connections):
        connection.data_received(predict(number, 0.0, 0.0, 0.0))
    await until(lambda: all(wire.sent for _, wire in connections))
    for number, (_, wire) in enumerate(connections):
        assert wire.answers()[0][1]["outputs"]["z"] == [[2.0 * number, 0.0, 0.0, 0.0]]
    assert service.responses("ok") == before + MANY


async def test_an_odd_one_among_them_is_refused_alone(service: Service) -> None:
    (odd, refused), (other, wire) = await service.known(), await service.known()
    odd.data_received(predict(1.0, 0.0, 0.0, 0.0).replace(b"[[1.0", b'[["1"'))
    other.data_received(predict(2.0, 0.0, 0.0, 0.0))
    await until(lambda: bool(wire.sent and refused.sent))
    assert refused.sent.startswith(b"HTTP/1.1 400")
    assert wire.answers()[0][1]["outputs"]["z"] == [[4.0, 0.0, 0.0, 0.0]]


async def test_those_that_are_refused_together_are_each_told_so_and_counted(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    connections = [await service.known() for _ in range(MANY)]
    answered = service.state.total_requests
    scheduler = service.app.state.repository.resolve("mlp", None).scheduler
    monkeypatch.setattr(scheduler, "refusal", lambda *_: QueueFull("too many wait", 0.5))
    with caplog.at_level(logging.INFO, "uvicorn.access"):
        for connection, _ in connections:
            connection.access_log = True
            connection.data_received(predict(1.0, 0.0, 0.0, 0.0))
        await until(lambda: all(wire.sent for _, wire in connections))
    ids = set()
    for connection, wire in connections:
        ((head, body),) = wire.answers()
        assert head.startswith(b"HTTP/1.1 429")
        assert b"retry-after: 1\r\n" in head
        assert body["code"] == "queue_full"
        ids.add(head.split(b"x-request-id: ")[1])
        assert not connection._due
        assert not connection._due
    assert len(ids) == MANY
    assert service.responses("queue_full") == MANY
    assert service.state.total_requests == answered + MANY
    assert [record.getMessage().endswith(" 429") for record in caplog.records] == [True] * MANY


class Held:
    """Predictions that wait together behind one that a worker computes until it is let go."""

    def __init__(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        self.service = service
        self.rows: list[int] = []
        self._gate = threading.Event()
        execute = Execution.execute

        def held(batch: Execution, *rest: Any) -> None:
            self.rows.append(batch.rows)
            assert self._gate.wait(20)
            execute(batch, *rest)

        self._monkeypatch, self._held = monkeypatch, held
        self.scheduler = service.app.state.repository.resolve("mlp", None).scheduler

    async def ask(
        self, timeout_ms: float | None = None, each: Sequence[int] = ALIKE
    ) -> list[tuple[Connection, Recorder]]:
        """Connections that wait for twice their number. `each`: rows of each."""
        first, _ = await self.service.known()
        connections = [await self.service.known() for _ in range(MANY)]
        self._ask_all(connections, timeout_ms, each)
        await until(lambda: all(wire.sent for _, wire in connections))  # so their template is known
        self._monkeypatch.setattr(Execution, "execute", self._held)
        first.data_received(predict(9.0, 0.0, 0.0, 0.0))
        await until(lambda: self.rows == [1])
        self._ask_all(connections, timeout_ms, each)
        await until(lambda: self.scheduler.queued == MANY)
        return connections

    def _ask_all(
        self, connections: list[tuple[Connection, Recorder]], timeout_ms: float | None, each: Sequence[int]
    ) -> None:
        for number, (connection, wire) in enumerate(connections):
            wire.sent = b""
            connection.data_received(self.predict(number, timeout_ms, each[number]))

    @staticmethod
    def predict(number: float, timeout_ms: float | None = None, rows: int = 1) -> bytes:
        x = [[number + 10.0 * row, 0.0, 0.0, 0.0] for row in range(rows)]
        fields: dict[str, Any] = {"model": "mlp", "inputs": {"x": x}}
        if timeout_ms is not None:
            fields["timeout_ms"] = timeout_ms
        return request(orjson.dumps(fields))

    @staticmethod
    def answer(number: float, rows: int = 1) -> list[list[float]]:
        return [[2 * (number + 10.0 * row), 0.0, 0.0, 0.0] for row in range(rows)]

    def let_go(self) -> None:
        self._gate.set()


@pytest.fixture
def held(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(service, monkeypatch)
    yield held
    held.let_go()


by_a_worker = pytest.mark.parametrize("service", ["by a worker"], indirect=True)


@by_a_worker
@pytest.mark.parametrize("each", [ALIKE, DIFFERENT])
@pytest.mark.parametrize("timeout_ms", [None, 20_000])
async def test_those_that_wait_together_are_computed_and_answered_together(
    held: Held, timeout_ms: float | None, each: Sequence[int]
) -> None:
    connections = await held.ask(timeout_ms, each)
    (span,) = held.scheduler._queue
    assert len(span) == MANY
    held.let_go()
    await until(lambda: all(wire.sent for _, wire in connections))
    for number, (_, wire) in enumerate(connections):
        ((head, body),) = wire.answers()
        assert body["outputs"]["z"] == held.answer(number, each[number])
        assert body["timing"]["batch_size"] == sum(each)
        assert f"x-request-id: {body['id']}".encode() in head
    assert held.rows == [1, sum(each)]


@by_a_worker
async def test_one_that_goes_away_while_it_waits_is_not_computed(held: Held) -> None:
    connections = await held.ask()
    connections[1][0].connection_lost(None)
    assert held.scheduler.queued == MANY - 1
    held.let_go()
    rest = [connections[at] for at in range(MANY) if at != 1]
    await until(lambda: all(wire.sent for _, wire in rest))
    assert [wire.answers()[0][1]["outputs"]["z"][0][0] for _, wire in rest] == [0.0, 4.0, 6.0, 8.0]
    assert connections[1][1].sent == b""
    assert held.rows == [1, MANY - 1]
    assert held.service.responses("cancelled") == 1


@by_a_worker
@pytest.mark.parametrize("each", [ALIKE, DIFFERENT])
async def test_one_that_goes_away_while_it_is_computed_costs_the_others_nothing(
    held: Held, monkeypatch: pytest.MonkeyPatch, each: Sequence[int]
) -> None:
    connections = await held.ask(each=each)
    execute, gate = Execution.execute, threading.Event()

    def slow(batch: Execution, *rest: Any) -> None:
        execute(batch, *rest)
        assert gate.wait(20)

    monkeypatch.setattr(Execution, "execute", slow)
    held.let_go()
    await until(lambda: held.rows == [1, sum(each)])
    for at in (0, 3):
        connections[at][0].connection_lost(None)
    gate.set()
    rest = {at: connections[at][1] for at in (1, 2, 4)}
    await until(lambda: all(wire.sent for wire in rest.values()))
    for at, wire in rest.items():
        assert wire.answers()[0][1]["outputs"]["z"] == held.answer(at, each[at])
    assert held.service.responses("cancelled") == 2
    await until(lambda: held.scheduler.inflight == 0)


@by_a_worker
async def test_what_comes_behind_one_that_waits_is_answered_after_it(held: Held) -> None:
    connections = await held.ask()
    connection, wire = connections[2]
    connection.data_received(held.predict(7.0))
    held.let_go()
    await until(lambda: len(wire.answers()) == 2)
    assert [body["outputs"]["z"][0][0] for _, body in wire.answers()] == [4.0, 14.0]


@by_a_worker
async def test_a_shutdown_waits_for_those_that_wait(held: Held) -> None:
    connections = await held.ask()
    connection, wire = connections[2]
    connection.shutdown()
    held.let_go()
    await until(lambda: all(wire.sent for _, wire in connections))
    ((head, body),) = wire.answers()
    assert body["outputs"]["z"][0][0] == 4.0
    assert b"connection: close" in head
    await until(lambda: wire.closed)  # a moment later, for what the client may be sending


@by_a_worker
async def test_those_that_wait_longer_than_they_may_are_told_so(held: Held) -> None:
    connections = await held.ask(timeout_ms=50)
    await until(lambda: all(wire.sent for _, wire in connections))
    for _, wire in connections:
        ((head, body),) = wire.answers()
        assert head.startswith(b"HTTP/1.1 504")
        assert body["code"] == "deadline_exceeded"
    held.let_go()
    await until(lambda: held.scheduler.inflight == 0)
    assert held.rows == [1]


@by_a_worker
async def test_nobody_keeps_what_was_asked_together(held: Held) -> None:
    """A group and its requests refer to each other; the memory of their bodies must not wait for the collector."""
    gc.collect()
    gc.disable()
    try:
        connections = await held.ask()
        (span,) = held.scheduler._queue
        numbers = ref(span.batch.inputs["x"])
        del span
        held.let_go()
        await until(lambda: all(wire.sent for _, wire in connections))
        await until(lambda: held.scheduler.inflight == 0)
        await asyncio.sleep(0.05)
        assert numbers() is None
    finally:
        gc.enable()


@by_a_worker
async def test_answers_that_cannot_be_written_cost_nobody_else_theirs(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections = await held.ask()
    answers = held.service._protocol.intake.responses
    write = answers._write

    def fail_of_the_group(group: Any, rows: Any, answer: Any) -> None:
        if len(group) == MANY:
            raise MemoryError("no memory left")
        write(group, rows, answer)

    alone, its_wire = held.service.connect()
    fields = {"model": "mlp", "priority": 3, "inputs": {"x": [[1.0, 0.0, 0.0, 0.0]]}}
    alone.data_received(request(orjson.dumps(fields)))
    monkeypatch.setattr(answers, "_write", fail_of_the_group)
    held.let_go()
    await until(lambda: bool(its_wire.sent) and all(wire.sent for _, wire in connections))
    assert held.rows == [1, MANY + 1]
    assert its_wire.answers()[0][1]["outputs"]["z"][0][0] == 2.0
    assert [wire.answers()[0][1]["code"] for _, wire in connections] == ["internal"] * MANY
    connections[0][0].data_received(held.predict(4.0))
    await until(lambda: len(connections[0][1].answers()) == 2)
    assert connections[0][1].answers()[1][1]["outputs"]["z"][0][0] == 8.0
