"""Requests with parts changed, taken out and doubled, over every protocol's door: refused in words, never a fault."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from tests.property.test_protocols import GOOD, mutated, rest
from tests.property.test_protocols import grpc as grpc_body
from tests.support.load import settled
from tests.support.packages import pair_model, write_package
from tests.support.server import Server, free_port, serve
from vernier.api.invocations import BINARY

COUNT = 400
_FAULTS = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE}


@pytest.fixture(scope="module", params=["0", "2"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, int]]:
    root = tmp_path_factory.mktemp("mutated")
    write_package(root / "engines", "pair", model=pair_model())
    port = free_port()
    with serve(root / "engines", root / "log", fronts=request.param, grpc_port=str(port)) as running:
        yield running, port


Make = Callable[[random.Random], tuple[str, bytes, dict[str, str]]]

INPUTS = {"user": GOOD["x"][:, 0].copy(), "item": GOOD["x"].repeat(2, axis=1)[:, :3].copy()}


def infer(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    body, header_bytes = rest(INPUTS, rng.random() < 0.7, nested=False)
    length = "" if header_bytes is None else str(header_bytes)
    if rng.random() < 0.2:
        length = rng.choice(["0", "-3", "7" * 30, "12, 13", "0x1", str(len(body))])
    return (
        "/v2/models/pair/infer",
        mutated(rng, body),
        {"inference-header-content-length": length} if length else {},
    )


def instances(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    rows = [{"user": 1.5, "item": [1, 2.5, -3]}] * rng.randint(1, 3)
    return "/v1/models/pair:predict", mutated(rng, json.dumps({"instances": rows}).encode()), {}


def invocations(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    body, header_bytes = rest(INPUTS, True, nested=False)
    kind = f"{BINARY};json-header-size={rng.choice([header_bytes, header_bytes, 0, 10**19])}"
    kind = rng.choice([kind, kind, "application/json", "application/octet-stream", BINARY, "x" * 300])
    return "/invocations", mutated(rng, body), {"content-type": kind}


def repository(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    text = b'{"parameters": {"version": "1", "unload_dependents": true}, "ready": true}'
    name = rng.choice(["none", "%2e%2e", "a" * 300, "x%00y"])
    doors = ["index", f"models/{name}/load", f"models/{name}/unload"]
    return f"/v2/repository/{rng.choice(doors)}", mutated(rng, text), {}


@pytest.mark.parametrize("make", [infer, instances, invocations, repository])
def test_rest_has_an_answer_for_each(server: tuple[Server, int], make: Make, tmp_path: Path) -> None:
    running, _ = server
    rng = random.Random(f"{make.__name__} 7")
    statuses: dict[int, int] = {}
    with httpx.Client(base_url=running.url, timeout=30) as client:
        for _ in range(COUNT):
            path, body, headers = make(rng)
            response = client.post(path, content=body, headers=headers)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            assert response.status_code < 500, (response.text, body)
            if response.status_code >= 400:
                assert set(response.json()) == {"error", "code"}, response.text
    assert set(statuses) <= {200, 400, 403, 404, 413, 415}, statuses
    assert running.get("/v2/health/ready").status_code == 200
    settled(running, "pair")


def test_grpc_has_an_answer_for_each(server: tuple[Server, int]) -> None:
    running, port = server
    rng = random.Random("grpc 7")
    statuses: dict[grpc.StatusCode, int] = {}
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for _ in range(COUNT):
            body = mutated(
                rng, grpc_body(INPUTS, typed=rng.random() < 0.5).replace(b"\n\x01m", b"\n\x04pair")
            )
            try:
                call(body, timeout=30)
                code = grpc.StatusCode.OK
            except grpc.RpcError as error:
                code = error.code()
                assert error.details(), body
            statuses[code] = statuses.get(code, 0) + 1
            assert code not in _FAULTS, body
    assert statuses[grpc.StatusCode.INVALID_ARGUMENT] > 50, statuses
    assert statuses[grpc.StatusCode.OK] > 5, statuses
    settled(running, "pair")
