"""`python -m benchmarks.soak.restart`: from SIGKILL under load to readiness, with every package in the folder."""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import httpx

from benchmarks.load import ClosedLoop, measure
from benchmarks.processes import ROOT, ServerProcess
from benchmarks.serving import call_of, start

Cores = tuple[int | None, int | None]


def own_cores() -> Cores:
    """One for the service and one for the load; None for both where there is only one."""
    have = sorted(os.sched_getaffinity(0))
    return (have[0], have[1]) if len(have) > 1 else (None, None)


def ready_after(server: ServerProcess) -> float:
    """Waits until readiness is green; seconds since the call. SystemExit when that takes minutes."""
    began = time.perf_counter()
    while time.perf_counter() < began + 180:
        try:
            if httpx.get(f"http://127.0.0.1:{server.port}/v2/health/ready").status_code == 200:
                return time.perf_counter() - began
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise SystemExit(
        f"the service did not become ready; is there a package? (make engines) {server.last_words()}"
    )


def restart_seconds(engines: Path, times: int, cores: Cores) -> list[float]:
    """Kills the service under load and starts it again; seconds until it is ready each time."""
    taken = []
    server = start(engines, True, cores[0])
    try:
        ready_after(server)
        for _ in range(times):
            plan = ClosedLoop(port=server.port, calls=[call_of(server)], connections=8, seconds=3.0)
            load = threading.Thread(target=measure, args=(plan, cores[1]))
            load.start()
            time.sleep(2.0)
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
            load.join()
            server = start(engines, True, cores[0])
            taken.append(ready_after(server))
    finally:
        server.end()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("--engines", type=Path, default=ROOT / "engines")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--goal-s", type=float, default=5.0, help="ends with 1 when a start takes longer")
    options = parser.parse_args()
    taken = restart_seconds(options.engines, options.times, own_cores())
    tries = ", ".join(f"{seconds:.2f}" for seconds in taken)
    print(f"ready again after SIGKILL: {tries} s; median {statistics.median(taken):.2f} s")
    print(f"load of the machine: {os.getloadavg()[0]:.1f}")
    sys.exit(0 if max(taken) < options.goal_s else 1)


if __name__ == "__main__":
    main()
