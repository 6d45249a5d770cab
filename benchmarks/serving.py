"""`python -m benchmarks.serving`: requests per second and latency of the service on this machine.

Closed loop: each connection sends its next request when the last one is answered, so the latencies hold
for this many clients and say nothing of a queue that grows. The service's own connections and uvicorn's with the ASGI
route are measured in turns in one run, on the example ranker with one row a request; every answer is compared with the
first. Server and load have a core each where there are two, and the load is made in Python: read the ratios rather
than the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx

from benchmarks.load import Call, ClosedLoop, JsonOutput, Summary, measure, post
from benchmarks.processes import ROOT, ServerProcess, StartError, free_port
from vernier.api.formats.schemas import EXAMPLE

BODY = json.dumps({k: v for k, v in EXAMPLE.items() if k != "timeout_ms"}).encode()


def start(engines: Path, own: bool, core: int | None, **settings: str) -> ServerProcess:
    """The service. `settings`: VERNIER_… without the prefix, in lower case."""
    port = free_port()
    environment = {
        "VERNIER_PORT": str(port),
        "VERNIER_HOST": "127.0.0.1",
        "VERNIER_ENGINES_DIR": str(engines),
        "VERNIER_LOG_LEVEL": "error",
        **{f"VERNIER_{name.upper()}": value for name, value in settings.items()},
    }
    log = ROOT / "build" / "bench" / f"{'own' if own else 'uvicorn'}.log"
    command = (
        ["vernier"] if own else ["uvicorn", "vernier.main:app", "--host", "127.0.0.1", "--port", str(port)]
    )
    return ServerProcess([sys.executable, "-m", *command], port, log, core=core, environment=environment)


def call_of(server: ServerProcess) -> Call:
    """The request with the answer that it gets now."""
    answer = httpx.post(f"http://127.0.0.1:{server.port}/v1/predict", content=BODY).raise_for_status().json()
    path = ("outputs", "score")
    return Call(post("/v1/predict", BODY), JsonOutput(path, answer["outputs"]["score"][0], 1e-5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=Path, default=ROOT / "engines")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    first, second = sorted(os.sched_getaffinity(0))[:2] if len(os.sched_getaffinity(0)) > 1 else (None, None)
    rounds: dict[str, list[Summary]] = {"own connections": [], "uvicorn": []}
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(start(options.engines, name == "own connections", first))
            for name in rounds
        }
        for server in servers.values():
            try:
                server.wait_ready([Call(post("/v1/predict", BODY))])
            except StartError as error:
                raise SystemExit(
                    f"the service did not become ready; is there a package in {options.engines}? (make engines) {error}"
                ) from error
        calls = {name: [call_of(server)] for name, server in servers.items()}
        for _ in range(options.rounds):
            for name, server in servers.items():
                plan = ClosedLoop(
                    port=server.port,
                    calls=calls[name],
                    connections=options.connections,
                    seconds=options.seconds,
                )
                summary = measure(plan, second).summary()
                if summary.wrong or set(summary.statuses) != {200}:
                    raise SystemExit(f"{name}: {summary.wrong} wrong answers, statuses {summary.statuses}")
                rounds[name].append(summary)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    print(f"{options.connections} connections, medians of {options.rounds} rounds of {options.seconds:g} s\n")
    rates = {name: statistics.median(summary.rate for summary in found) for name, found in rounds.items()}
    for name, found in rounds.items():
        p50, p99 = (statistics.median(getattr(s, f) or 0.0 for s in found) for f in ("p50_ms", "p99_ms"))
        print(f"{name:14} {rates[name]:8.0f} requests/s   p50 {p50:6.2f} ms   p99 {p99:6.2f} ms")
    print(f"\nown connections : uvicorn = {rates['own connections'] / rates['uvicorn']:.2f}")


if __name__ == "__main__":
    main()
