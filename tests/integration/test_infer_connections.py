"""Inference requests of the Open Inference Protocol as they come over connections: in pieces, together, at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.support.packages import ends_model, write_package
from tests.support.server import Server, serve
from tests.support.wire import Reply, Wire, chunked, request

WIDTH = 60_000
INFER = "/v2/models/ends/infer"


@pytest.fixture(scope="module", params=["0", "2"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("infer")
    write_package(root / "engines", "ends", model=ends_model(WIDTH))
    write_package(root / "engines", "mlp")
    settings = {"max_body_bytes": "4000000"}
    with serve(root / "engines", root / "log", fronts=request.param, **settings) as running:
        yield running


def body_of(rows: np.ndarray, binary: bool, **parameters: Any) -> tuple[bytes, dict[str, str]]:
    """A body, and the header that belongs to it."""
    entry: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": list(rows.shape)}
    if not binary:
        entry["data"] = rows.reshape(-1).tolist()
        return json.dumps({"inputs": [entry], "parameters": parameters}).encode(), {}
    entry["parameters"] = {"binary_data_size": rows.nbytes}
    head = json.dumps({"inputs": [entry], "parameters": parameters}).encode()
    return head + rows.tobytes(), {"inference_header_content_length": str(len(head))}


def sent(rows: np.ndarray, binary: bool = True, target: str = INFER, **headers: str) -> bytes:
    body, header = body_of(rows, binary)
    return request(body, target, **header, **headers)


def numbers(reply: Reply, output: str = "z") -> np.ndarray:
    assert reply.status == 200, reply.body[:300]
    (found,) = [entry for entry in reply.json()["outputs"] if entry["name"] == output]
    return np.array(found["data"], np.float32).reshape(found["shape"])


def small(seed: int, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32)


def test_both_protocols_pipelined_are_answered_in_order(server: Server) -> None:
    own = json.dumps({"model": "mlp", "inputs": {"x": small(0).tolist()}}).encode()
    path = "/v2/models/mlp/infer"
    with Wire(server) as wire:
        for _ in range(3):  # the third time the heads are known by their bytes
            parts = [sent(small(n, 1 + n % 3), n % 2 == 0, path, x_request_id=f"r{n}") for n in range(12)]
            parts.insert(5, request(own))
            parts.insert(9, request(b"{", path))
            parts.insert(9, request(target="/v2/health/live", method="GET"))
            wire.send(b"".join(parts))
            replies = [wire.reply() for _ in parts]
            assert [reply.status for reply in replies] == [200] * 10 + [400] + [200] * 4
            assert replies[9].json() == {"live": True}
            assert "precision" in replies.pop(5).json()
            del replies[8:10]
            for n, reply in enumerate(replies):
                assert reply.headers["x-request-id"] == reply.json()["id"] == f"r{n}"
                assert np.array_equal(numbers(reply), 2 * small(n, 1 + n % 3))


def test_the_length_of_the_json_is_read_anew_from_each_head(server: Server) -> None:
    body, header = body_of(small(1), binary=True)
    good = int(header["inference_header_content_length"])
    with Wire(server) as wire:
        for length, status in [(good, 200)] * 3 + [(good - 1, 400), (good + 1, 400), (good, 200)]:
            head = {"inference_header_content_length": str(length)}
            wire.send(request(body, "/v2/models/mlp/infer", **head))
            assert wire.reply().status == status, length


@pytest.mark.parametrize("binary", [False, True])
def test_large_bodies_come_whole_and_in_pieces(server: Server, binary: bool) -> None:
    rows = np.random.default_rng(7).normal(size=(2, WIDTH)).astype(np.float32)
    expected = 2 * rows[:, [0, WIDTH // 2, WIDTH - 1]]
    body, header = body_of(rows, binary)
    assert len(body) > (2**20 if not binary else 2**18)
    data = request(body, INFER, **header)
    with Wire(server) as wire:
        for _ in range(4):
            wire.send(data)
            assert np.array_equal(numbers(wire.reply()), expected)
        wire.send(*[data[start : start + 50_000] for start in range(0, len(data), 50_000)])
        assert np.array_equal(numbers(wire.reply()), expected)
        if not binary:
            wire.send(chunked(body, 40_000, INFER))
            assert np.array_equal(numbers(wire.reply()), expected)


def test_a_large_answer_in_bytes(server: Server) -> None:
    rows = small(3, 9000)
    body, header = body_of(rows, True, binary_data_output=True)
    with Wire(server) as wire:
        for closing in (False, True):
            headers = {**header, **({"connection": "close"} if closing else {})}
            wire.send(request(body, "/v2/models/mlp/infer", **headers))
            reply = wire.reply()
            assert reply.headers["content-type"] == "application/octet-stream"
            stop = int(reply.headers["inference-header-content-length"])
            sizes = [e["parameters"]["binary_data_size"] for e in json.loads(reply.body[:stop])["outputs"]]
            assert len(reply.body) == stop + sum(sizes)
            assert reply.body[stop + sizes[0] :] == (2 * rows).tobytes()
        assert reply.headers["connection"] == "close"
        assert wire.ended()


def test_old_clients_and_odd_heads_get_the_same_answer(server: Server) -> None:
    rows = small(4)
    for data in (
        sent(rows, True, "/v2/models/mlp/infer", version="1.0"),
        sent(rows, True, "/v2/models/mlp/versions/1/infer?x=y"),
        sent(rows, True, "/v2/models/m%6Cp/infer"),
        sent(rows, True, "/v2/models/mlp/infer", content_encoding="identity"),
        sent(rows, True, "/v2/models/mlp/infer", expect="100-continue"),
    ):
        with Wire(server) as wire:
            wire.send(data)
            assert np.array_equal(numbers(wire.reply()), 2 * rows), data[:100]
    # refused by its head: the connection may end before all of the body could be sent
    too_long = request(b"x" * 4_000_001, "/v2/models/mlp/infer").partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    for data, status in (
        (sent(rows, True, "/v2/models/mlp/versions/9/infer"), 404),
        (sent(rows, True, "/v2/models/mlp/versions/x/infer"), 404),
        (sent(rows, True, "/v2/models/mlp/infer", content_encoding="gzip"), 415),
        (too_long, 413),
        (request(b"", "/v2/models/mlp/infer"), 400),
        (
            request(b"", "/v2/models/mlp/infer", inference_header_content_length="99999999999999999999999"),
            400,
        ),
    ):
        with Wire(server) as wire:
            wire.send(data)
            reply = wire.reply()
            assert reply.status == status, data[:200]
            assert set(reply.json()) == {"error", "code"}
