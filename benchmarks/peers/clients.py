"""What it costs that clients differ: the small JSON request as a benchmark sends it, and as services do.

One server answers all of them, in turns; MOSEC answers those that it can be sent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import orjson

from benchmarks.load import Call, JsonOutput, post
from benchmarks.machine import cpu_ticks, stolen
from benchmarks.peers.environments import FOLDER, install
from benchmarks.peers.peers import PEERS, VERNIER, Peer
from benchmarks.peers.rounds import CONNECTIONS, Say, build_package, measure_once, start
from benchmarks.peers.workloads import USER, Workload, two_inputs, workload

PLAIN = "as in a benchmark"
#: Requests that differ: more than a server may remember of any client.
_DIFFERENT = 2000

#: From the fields of Vernier's body to the path, the body, and where in the answer the numbers are.
Wrap = Callable[[dict[str, Any]], tuple[str, object, tuple[str, ...]]]


@dataclass(frozen=True)
class Client:
    """
    Attributes:
        headers: of a request.
        fields: of a request's body beside the model and the inputs.
        rows: of a request.
        two_inputs: whether its model has them.
    """

    headers: Callable[[random.Random], Mapping[str, str]] = lambda rng: {}
    fields: Callable[[random.Random], Mapping[str, Any]] | None = None
    rows: int = 1
    two_inputs: bool = False

    @property
    def is_common(self) -> bool:
        """Whether it can ask every server."""
        return self.fields is None and self.rows == 1 and not self.two_inputs


def _hexadecimal(rng: random.Random, size: int) -> str:
    return f"{rng.getrandbits(8 * size):0{2 * size}x}"


def _traced(rng: random.Random) -> dict[str, str]:
    """What an instrumented client behind a proxy sends."""
    return {
        "user-agent": "python-httpx/0.28.1",
        "accept": "*/*",
        "accept-encoding": "gzip, deflate",
        "x-forwarded-for": f"10.0.{rng.randrange(256)}.{rng.randrange(256)}",
        "x-forwarded-proto": "http",
        "traceparent": f"00-{_hexadecimal(rng, 16)}-{_hexadecimal(rng, 8)}-01",
    }


def _named(rng: random.Random) -> dict[str, str]:
    return {"x-request-id": _hexadecimal(rng, 16)}


def _id(rng: random.Random) -> Mapping[str, Any]:
    return {"id": _hexadecimal(rng, 16)}


def _deadline(rng: random.Random) -> Mapping[str, Any]:
    return {"timeout_ms": round(1000 + 1000 * rng.random(), 3)}


CLIENTS = {
    PLAIN: Client(),
    "a trace and an address in the head": Client(headers=_traced),
    "an id of its own in the head": Client(headers=_named),
    "an id of its own in the body": Client(fields=_id),
    "a deadline of its own": Client(fields=_deadline),
    "two inputs": Client(two_inputs=True),
    "all of these": Client(
        headers=lambda rng: {**_traced(rng), **_named(rng)},
        fields=lambda rng: {**_id(rng), **_deadline(rng)},
        two_inputs=True,
    ),
    "ten rows": Client(rows=10),
    "ten rows of two inputs": Client(rows=10, two_inputs=True),
}


def calls_of(client: Client, load: Workload, wrap: Wrap) -> list[Call]:
    """Requests that differ in everything in which the client's do."""
    rng = random.Random(3)
    picks = np.random.default_rng(3).integers(0, len(load.x), (_DIFFERENT, client.rows))
    calls = []
    for rows in picks:
        x, y = load.x[rows], load.y[rows]
        inputs = {"user": x[:, :USER].copy(), "item": x[:, USER:].copy()} if client.two_inputs else {"x": x}
        more = client.fields(rng) if client.fields is not None else {}
        model = "two_inputs" if client.two_inputs else load.model.stem
        path, body, answer = wrap({"model": model, **more, "inputs": inputs})
        text = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        payload = post(path, text, headers=client.headers(rng))
        calls.append(Call(payload, JsonOutput(answer, y.ravel().tolist())))
    return calls


def _to_vernier(fields: dict[str, Any]) -> tuple[str, object, tuple[str, ...]]:
    return "/v1/predict", fields, ("outputs", "y")


def _to_mosec(fields: dict[str, Any]) -> tuple[str, object, tuple[str, ...]]:
    return "/inference", {"x": fields["inputs"]["x"][0]}, ("y",)


@dataclass
class Measured:
    """What became of it.

    Attributes:
        rounds: by server and client, its summaries in the order of the rounds.
    """

    connections: int
    seconds: float
    rounds: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    requests: int = _DIFFERENT


def measure_clients(rounds: int, seconds: float, say: Say) -> Measured:
    """See the module. `say` gets a word on what goes on, `steps(rounds)` times."""
    load = workload("json", FOLDER / "models")
    engines = build_package(load)
    pair = FOLDER / "models" / "two_inputs.onnx"
    onnx.save(two_inputs(), pair)
    build_package(replace(load, model=pair))
    measured = Measured(CONNECTIONS, seconds)
    mosec = next(peer for peer in PEERS if peer.name == "mosec")
    servers: list[tuple[Peer, dict[str, list[Call]]]] = [
        (VERNIER, {name: calls_of(client, load, _to_vernier) for name, client in CLIENTS.items()}),
        (
            mosec,
            {name: calls_of(client, load, _to_mosec) for name, client in CLIENTS.items() if client.is_common},
        ),
    ]
    install(mosec)
    for turn in range(rounds):
        for peer, asked in servers:
            with start(peer, load, engines) as server:
                server.wait_ready(asked[PLAIN])
                for name, calls in asked.items():
                    say(f"clients: round {turn + 1} of {rounds}, {peer.title}, {name}")
                    before = cpu_ticks()
                    figures = measure_once(server, calls, seconds)
                    figures["stolen"] = stolen(before, cpu_ticks())
                    measured.rounds.setdefault(peer.name, {}).setdefault(name, []).append(figures)
    return measured


def steps(rounds: int) -> int:
    """How often `say` is called."""
    return rounds * (len(CLIENTS) + sum(client.is_common for client in CLIENTS.values()))
