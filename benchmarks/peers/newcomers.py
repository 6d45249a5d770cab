"""How long clients that connect at once wait for their first answer while others keep the server busy.

As after a restart, or when a balancer moves clients: the kernel takes the connections in, and the server accepts them
when it comes to it.
"""

from __future__ import annotations

import os
import selectors
import socket
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from benchmarks.load import Call, ClosedLoop, wrk
from benchmarks.load.run import pin
from benchmarks.machine import cpu_ticks, stolen
from benchmarks.peers.environments import FOLDER, install
from benchmarks.peers.peers import PEERS
from benchmarks.peers.rounds import LOAD_CORE, Say, build_package, start
from benchmarks.peers.workloads import workload

SERVERS = ("vernier", "mosec", "fastapi")
NEWCOMERS, BUSY = 500, 256
_SETTLE_S, _LOAD_S, _PATIENCE_S = 2.0, 4.0, 120.0
_CHUNK = 65536


@dataclass
class Measured:
    """What became of it.

    Attributes:
        rounds: by server, milliseconds until half and until all of the newcomers had their answers.
    """

    newcomers: int = NEWCOMERS
    busy: int = BUSY
    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def measure_newcomers(rounds: int, say: Say) -> Measured:
    """See the module; needs wrk. `say` gets a word on what goes on, `steps(rounds)` times."""
    load = workload("json", FOLDER / "models")
    engines = build_package(load)
    measured = Measured()
    peers = [peer for peer in PEERS if peer.name in SERVERS]
    for turn in range(rounds):
        for peer in peers:
            say(f"newcomers: round {turn + 1} of {rounds}, {peer.title}")
            install(peer)
            calls = [peer.says["json"](x, y) for x, y in zip(load.x, load.y, strict=True)]
            with start(peer, load, engines) as server, ThreadPoolExecutor(1) as others:
                server.wait_ready(calls)
                before = cpu_ticks()
                plan = ClosedLoop(
                    port=server.port, calls=calls, connections=BUSY, seconds=_LOAD_S + _SETTLE_S
                )
                loading = others.submit(wrk.drive, plan, LOAD_CORE)
                time.sleep(_SETTLE_S)
                waited = first_answers(server.port, calls[0])
                loading.result()
                found = {"median_ms": 1e3 * statistics.median(waited), "last_ms": 1e3 * max(waited)}
                found["stolen"] = stolen(before, cpu_ticks())
                measured.rounds.setdefault(peer.name, []).append(found)
    return measured


def first_answers(port: int, call: Call, count: int = NEWCOMERS) -> list[float]:
    """Seconds from the first connection until each of `count` had an answer. Raises TimeoutError."""
    cores = os.sched_getaffinity(0)
    pin(LOAD_CORE)
    try:
        with selectors.DefaultSelector() as selector:
            began = time.perf_counter()
            for _ in range(count):
                client = socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_S)
                client.sendall(call.payload)
                client.setblocking(False)
                selector.register(client, selectors.EVENT_READ)
            waited: list[float] = []
            while len(waited) < count:
                ready = selector.select(_PATIENCE_S)
                if not ready:
                    raise TimeoutError(f"{count - len(waited)} of {count} newcomers had no answer")
                for key, _ in ready:
                    client = key.fileobj  # type: ignore[assignment]
                    answer = client.recv(_CHUNK)
                    if not answer.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200")):
                        raise RuntimeError(f"a newcomer was answered {answer[:100]!r}")
                    selector.unregister(client)
                    client.close()
                    waited.append(time.perf_counter() - began)
            return waited
    finally:
        os.sched_setaffinity(0, cores)


def steps(rounds: int) -> int:
    """How often `say` is called."""
    return rounds * len(SERVERS)
