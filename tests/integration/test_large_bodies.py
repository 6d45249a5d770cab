"""Large bodies, which are received in their final place: on uvloop, on asyncio's loop; elsewhere with TLS."""

from __future__ import annotations

import itertools
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.test_bad_input import settled
from tests.support.certificates import Authority
from tests.support.packages import ends_model, write_package
from tests.support.server import Server, free_port, serve
from tests.support.wire import Wire, request
from vernier.front.receiver import LARGEST

RAW = "application/octet-stream"
ROWS = 8_000  # 128 KB
LOOPS = ["uvloop", "asyncio", "tls"]


class Service:
    """A server and how to connect to it."""

    def __init__(self, server: Server, context: ssl.SSLContext | None) -> None:
        self.server = server
        self._context = context

    def connect(self) -> Wire:
        wire = Wire(self.server)
        if self._context is not None:
            wire.socket = self._context.wrap_socket(wire.socket, server_hostname="127.0.0.1")
        return wire


@pytest.fixture(scope="module", params=LOOPS)
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """`mlp`, whose output z is twice its input; bodies must come within a second."""
    root = tmp_path_factory.mktemp("large")
    (root / "engines").mkdir()
    write_package(root / "engines", "mlp")
    options = {"body_timeout_s": "1"}
    context, side = None, None
    if request.param == "tls":
        authority = Authority(root, "authority")
        own = authority.issue("server")
        side = free_port()
        options |= {
            "tls_certificate_file": str(own.certificate),
            "tls_key_file": str(own.key),
            "metrics_port": str(side),
        }
        context = ssl.create_default_context(cafile=str(authority.certificate))
    module = "tests.support.without_uvloop" if request.param == "asyncio" else "vernier"
    with serve(
        root / "engines", root / "log", module=module, health_port=side, queue_limit="1000000", **options
    ) as server:
        yield Service(server, context)
        assert "Traceback" not in server.log


def numbers(n: int, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(rows, 4)).astype("<f4")


def raw(x: np.ndarray, **headers: str) -> bytes:
    return request(x.tobytes(), "/v1/predict?model=mlp&outputs=z", content_type=RAW, **headers)


def small(n: int) -> bytes:
    return request(b'{"inputs": {"x": [[%d, 2, 3, 4]]}, "outputs": ["z"]}' % n)


def assert_doubles(wire: Wire, x: np.ndarray) -> None:
    reply = wire.reply()
    assert reply.status == 200, reply.body
    np.testing.assert_array_equal(np.array(orjson.loads(reply.body)["outputs"]["z"], np.float32), 2 * x)


def ask(wire: Wire, x: np.ndarray, **headers: str) -> None:
    wire.send(raw(x, **headers))
    assert_doubles(wire, x)


def assert_small(wire: Wire, n: int) -> None:
    assert wire.reply().json()["outputs"]["z"] == [[2.0 * n, 4.0, 6.0, 8.0]]


@pytest.mark.parametrize("pieces", [1, 2, 3, 40])
def test_one_after_the_other_in_pieces(service: Service, pieces: int) -> None:
    with service.connect() as wire:
        for n in range(4):
            data = raw(numbers(n))
            step = -(-len(data) // pieces)
            for at in range(0, len(data), step):
                wire.send(data[at : at + step])
                time.sleep(0.001 if pieces > 1 else 0)
            assert_doubles(wire, numbers(n))
    settled(service.server)


@pytest.mark.parametrize(
    "cut", [-1, 0, 1, 50], ids=["in the head", "behind it", "a byte later", "a bit later"]
)
def test_head_and_body_apart(service: Service, cut: int) -> None:
    with service.connect() as wire:
        for n in range(3):
            data = raw(numbers(n))
            stop = data.index(b"\r\n\r\n") + 4 + cut
            wire.send(data[:stop])
            time.sleep(0.02)
            wire.send(data[stop:])
            assert_doubles(wire, numbers(n))


def test_what_is_pipelined_behind_large_bodies_is_answered_in_order(service: Service) -> None:
    with service.connect() as wire:
        for _ in range(2):
            large = [raw(numbers(n)) for n in range(3)]
            wire.send(
                b"".join([large[0], small(1), large[1], large[2], request(target="/v1/models", method="GET")])
            )
            assert_doubles(wire, numbers(0))
            assert_small(wire, 1)
            assert_doubles(wire, numbers(1))
            assert_doubles(wire, numbers(2))
            assert "models" in wire.reply().json()


def test_other_lengths_other_heads_and_other_routes_follow(service: Service) -> None:
    with service.connect() as wire:
        for n in range(3):
            ask(wire, numbers(n))
            wire.send(small(n))
            assert_small(wire, n)
            ask(wire, numbers(n))
            ask(wire, numbers(n, 20_000))
            ask(wire, numbers(n, 5_000), x_request_id=f"number-{n}")
            wire.send(request(target="/v1/models", method="GET"))
            assert wire.reply().status == 200


@pytest.mark.parametrize("pause_s", [0, 0.05])
def test_a_body_that_begins_like_a_header_is_a_body(service: Service, pause_s: float) -> None:
    """Behind a longer head that said the same and ended so: the next request must not be read from elsewhere."""
    line = b"x-aa: 123456789\r\n"
    with service.connect() as wire:
        for n in range(3):
            x, tricky = numbers(n), numbers(n + 10)
            tricky.view(np.uint8).ravel()[: len(line)] = np.frombuffer(line, np.uint8)
            traced = raw(x).replace(b"\r\n\r\n", b"\r\n" + line + b"\r\n", 1)
            behind = numbers(n + 20)
            wire.send(traced)
            assert_doubles(wire, x)
            wire.send(raw(tricky))
            time.sleep(pause_s)
            wire.send(raw(behind))
            assert_doubles(wire, tricky)
            assert_doubles(wire, behind)


def test_a_large_body_may_have_a_large_head(service: Service) -> None:
    with service.connect() as wire:
        for n, size in enumerate((0, 4000, 4100, 4200, 6000, 9000, 6000)):
            x = numbers(n)
            wire.send(raw(x, cookie="c" * size))
            assert_doubles(wire, x)


def test_a_body_too_large_to_be_received_in_place_is_answered_too(service: Service) -> None:
    x = numbers(1, 220_000)
    assert x.nbytes > LARGEST
    with service.connect() as wire:
        for n in range(2):
            ask(wire, numbers(n))
            ask(wire, x)


def test_a_large_text_is_read_too(service: Service) -> None:
    x = numbers(3)
    data = request(orjson.dumps({"inputs": {"x": x}, "outputs": ["z"]}, option=orjson.OPT_SERIALIZE_NUMPY))
    with service.connect() as wire:
        for _ in range(3):
            wire.send(data)
            assert_doubles(wire, x)


def test_a_large_body_that_is_refused_does_no_harm(service: Service) -> None:
    odd = numbers(1)
    odd[-1, -1] = np.nan
    with service.connect() as wire:
        for n in range(3):
            wire.send(raw(odd))
            assert wire.reply().json()["code"] == "non_finite_input"
            ask(wire, numbers(n))
            wire.send(request(b"[" * 100_000))
            assert wire.reply().status == 400


def test_connection_close_is_honoured(service: Service) -> None:
    for before in range(2):
        with service.connect() as wire:
            for n in range(before):
                ask(wire, numbers(n))
            wire.send(raw(numbers(7), connection="close"))
            assert_doubles(wire, numbers(7))
            assert wire.ended()


@pytest.mark.parametrize("before", [0, 2])
def test_a_client_that_leaves_within_its_body_is_counted_as_cancelled(service: Service, before: int) -> None:
    def cancelled() -> float:
        return service.server.metric("vernier_requests_total", code="cancelled")

    already = cancelled()
    for cut in (-1, 70_000):
        with service.connect() as wire:
            for n in range(before):
                ask(wire, numbers(n))
            wire.send(raw(numbers(9))[:cut])
            time.sleep(0.05)
            if cut == -1:
                wire.socket.shutdown(socket.SHUT_WR)
                time.sleep(0.05)
    limit = time.monotonic() + 10
    while cancelled() < already + 2:
        assert time.monotonic() < limit
        time.sleep(0.02)
    settled(service.server)


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("more", [False, True], ids=["silent", "still sending"])
def test_a_body_that_takes_too_long_is_given_up(service: Service, before: int, more: bool) -> None:
    with service.connect() as wire:
        for n in range(before):
            ask(wire, numbers(n))
        data = raw(numbers(9))
        wire.send(data[:90_000])
        began = time.monotonic()
        while more and time.monotonic() - began < 0.9:
            wire.send(b"\0")
            time.sleep(0.1)
        reply = wire.reply()
        assert 0.5 < time.monotonic() - began < 5
        assert (reply.status, reply.json()["code"]) == (408, "request_timeout")
        assert reply.headers["connection"] == "close"
        assert wire.ended()
    settled(service.server)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_how_a_stream_is_cut_does_not_matter(service: Service, data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.sampled_from(["large", "larger", "small"]), min_size=1, max_size=6))
    made = {
        "large": lambda n: raw(numbers(n)),
        "larger": lambda n: raw(numbers(n, 9_000)),
        "small": small,
    }
    stream = b"".join(made[kind](n) for n, kind in enumerate(kinds))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=8)))
    with service.connect() as wire:
        for a, b in itertools.pairwise([0, *cuts, len(stream)]):
            wire.send(stream[a:b])
            time.sleep(0.002)
        for n, kind in enumerate(kinds):
            if kind == "small":
                assert_small(wire, n)
            else:
                assert_doubles(wire, numbers(n, 9_000 if kind == "larger" else ROWS))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_bodies_of_many_connections_do_not_touch_each_other(service: Service, data: st.DataObject) -> None:
    """They share memory, and come in whole or in pieces, in any order; some never come to their end."""
    count = data.draw(st.integers(2, 10))
    wires = [service.connect() for _ in range(count)]
    try:
        for turn in range(data.draw(st.integers(1, 3))):
            lost = data.draw(st.sets(st.integers(1, count - 1), max_size=2))
            pieces: list[tuple[int, bytes]] = []
            for n in range(count):
                stream = raw(numbers(100 * turn + n))
                if n in lost:
                    stream = stream[: -data.draw(st.integers(1, len(stream) - 1))]
                cuts = (
                    data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=2)) if len(stream) > 1 else ()
                )
                pieces += [(n, stream[a:b]) for a, b in itertools.pairwise([0, *sorted(cuts), len(stream)])]
            order = data.draw(st.permutations([n for n, _ in pieces]))
            waiting = {n: iter([piece for at, piece in pieces if at == n]) for n in range(count)}
            for n in order:
                wires[n].send(next(waiting[n]))
            for n in range(count):
                if n in lost:
                    wires[n].socket.close()
                    wires[n] = service.connect()
                else:
                    assert_doubles(wires[n], numbers(100 * turn + n))
    finally:
        for wire in wires:
            wire.socket.close()


def test_large_rows_of_many_connections_run_together_where_they_lie(tmp_path: Path) -> None:
    """Each gets the answer to its own row, and they are batches; a row that is not finite is refused alone."""
    width, connections = 100_000, 12
    (tmp_path / "engines").mkdir()
    write_package(tmp_path / "engines", "ends", model=ends_model(width))
    with serve(tmp_path / "engines", tmp_path / "log", queue_limit="1000000") as server:
        wires = [Wire(server) for _ in range(connections)]
        largest = 0
        for n in range(40):
            sent = [
                np.random.default_rng(connections * n + i).normal(size=width).astype("<f4")
                for i in range(connections)
            ]
            bad = n % connections if n > 20 else -1
            if n > 20:
                sent[bad][n] = np.nan
            for wire, x in zip(wires, sent, strict=True):
                wire.send(request(x.tobytes(), "/v1/predict?model=ends", content_type=RAW))
            for i, (wire, x) in enumerate(zip(wires, sent, strict=True)):
                reply = wire.reply()
                if i == bad:
                    assert (reply.status, reply.json()["code"]) == (400, "non_finite_input")
                    continue
                answer = reply.json()
                largest = max(largest, answer["timing"]["batch_size"])
                ends = x[[0, width // 2, width - 1]]
                np.testing.assert_array_equal(np.array(answer["outputs"]["z"], np.float32), [2 * ends])
        assert largest > 1
        for wire in wires:
            wire.socket.close()
        settled(server)


def test_what_the_monitor_keeps_of_large_rows_is_not_received_over(tmp_path: Path) -> None:
    """Rows of 400 KB run where they were received; the monitor repeats some of them later."""
    width, connections = 100_000, 4
    (tmp_path / "engines").mkdir()
    model = ends_model(width)
    write_package(tmp_path / "engines", "ends", model=model, variants={"int8": model})
    with serve(
        tmp_path / "engines", tmp_path / "log", precision="int8", monitor_share="0.5", queue_limit="1000000"
    ) as server:
        wires = [Wire(server) for _ in range(connections)]
        for n in range(60):
            sent = [np.random.default_rng(connections * n + i).normal(size=width) for i in range(connections)]
            for wire, x in zip(wires, sent, strict=True):
                target = "/v1/predict?model=ends"
                wire.send(request(x.astype("<f4").tobytes(), target, content_type=RAW))
            for wire, x in zip(wires, sent, strict=True):
                reply = wire.reply().json()
                assert reply["precision"] == "int8"
                ends = x.astype("<f4")[[0, width // 2, width - 1]]
                np.testing.assert_array_equal(np.array(reply["outputs"]["z"], np.float32), [2 * ends])
        for wire in wires:
            wire.socket.close()
        settled(server)
        assert server.metric("vernier_precision_samples_total", result="within") > 10
        assert server.metric("vernier_precision_samples_total", result="over") == 0
        assert server.metric("vernier_precision_samples_total", result="failed") == 0


def test_a_body_that_is_arriving_at_the_end_is_answered(tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    write_package(tmp_path / "engines", "mlp")
    with serve(tmp_path / "engines", tmp_path / "log", queue_limit="1000000") as server:
        with Wire(server) as first, Wire(server) as later:
            later.send(raw(numbers(0)))
            assert_doubles(later, numbers(0))
            data = raw(numbers(1))
            for wire in (first, later):
                wire.send(data[:100_000])
            time.sleep(0.2)
            server.terminate()
            time.sleep(0.2)
            for wire in (first, later):
                wire.send(data[100_000:])
                reply = wire.reply()
                assert (reply.status, reply.headers["connection"]) in ((200, "close"), (503, "close"))
                assert wire.ended()
        assert server.wait(20) == 0
