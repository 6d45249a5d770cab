"""`python -m benchmarks.serving`: requests per second and latency of the service on this machine.

Closed loop: each connection sends its next request when the last one is answered, so the latencies hold
for this many clients and say nothing of a queue that grows. Both doors of the service are measured in turns
in one run, on the example ranker with one row a request; every answer is compared with the first. Server and
load share the machine's cores, so read the ratios rather than the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

from app.api.schemas import EXAMPLE

ROOT = Path(__file__).resolve().parents[1]
BODY = json.dumps({k: v for k, v in EXAMPLE.items() if k != "timeout_ms"}).encode()
REQUEST = (
    b"POST /v1/predict HTTP/1.1\r\nhost: vernier\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n" % len(BODY)
) + BODY


async def client(port: int, until: float, latencies: list[float], score: float) -> None:
    """One connection, one request at a time. Raises AssertionError when an answer is another one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while time.perf_counter() < until:
            began = time.perf_counter()
            writer.write(REQUEST)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = next(
                int(line.split(b":")[1])
                for line in head.lower().split(b"\r\n")
                if line.startswith(b"content-length:")
            )
            body = await reader.readexactly(length)
            latencies.append(time.perf_counter() - began)
            assert abs(json.loads(body)["outputs"]["score"][0][0] - score) < 1e-5, body
    finally:
        writer.close()


def first_score(port: int) -> float:
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/predict", content=BODY).raise_for_status().json()
    return float(answer["outputs"]["score"][0][0])


async def load(port: int, connections: int, seconds: float, score: float) -> tuple[float, float, float]:
    """Requests per second, and the median and 99th percentile of the latency in milliseconds."""
    latencies: list[float] = []
    until = time.perf_counter() + seconds
    await asyncio.gather(*(client(port, until, latencies, score) for _ in range(connections)))
    cut = statistics.quantiles(latencies, n=100)
    return len(latencies) / seconds, cut[49] * 1e3, cut[98] * 1e3


def start(engines: Path, fast: bool) -> tuple[subprocess.Popen[bytes], int]:
    """A service that is ready, and its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = {
        **os.environ,
        "VERNIER_PORT": str(port),
        "VERNIER_HOST": "127.0.0.1",
        "VERNIER_ENGINES_DIR": str(engines),
        "VERNIER_FAST_PATH": str(fast).lower(),
        "VERNIER_LOG_LEVEL": "error",
    }
    process = subprocess.Popen([sys.executable, "-m", "app"], cwd=ROOT, env=environment)
    for _ in range(600):
        try:
            if httpx.get(f"http://127.0.0.1:{port}/v2/health/ready").status_code == 200:
                return process, port
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    process.kill()
    raise SystemExit(f"the service did not become ready; is there a package in {engines}? (make engines)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=Path, default=ROOT / "engines")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    services = {name: start(options.engines, name == "fast path") for name in ("fast path", "ordinary path")}
    rounds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in services}
    try:
        for _ in range(options.rounds):
            for name, (_, port) in services.items():
                rounds[name].append(
                    asyncio.run(load(port, options.connections, options.seconds, first_score(port)))
                )
    finally:
        for process, _ in services.values():
            process.terminate()
            process.wait(30)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    print(f"{options.connections} connections, medians of {options.rounds} rounds of {options.seconds:g} s\n")
    medians = {
        name: [statistics.median(column) for column in zip(*found, strict=True)]
        for name, found in rounds.items()
    }
    for name, (rate, p50, p99) in medians.items():
        print(f"{name:14} {rate:8.0f} requests/s   p50 {p50:6.2f} ms   p99 {p99:6.2f} ms")
    print(f"\nfast path : ordinary path = {medians['fast path'][0] / medians['ordinary path'][0]:.2f}")


if __name__ == "__main__":
    main()
