"""`python -m benchmarks.processes_ready ENGINES`: how soon the service is ready, and again after a kill."""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from benchmarks.processes import ROOT, free_port

PAUSE_S = 0.005


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def seconds_until(port: int, ready: bool, limit_s: float = 60.0) -> float:
    began = time.monotonic()
    while is_ready(port) is not ready:
        if time.monotonic() - began > limit_s:
            raise SystemExit(f"readiness did not become {ready} within {limit_s:g} s")
        time.sleep(PAUSE_S)
    return time.monotonic() - began


def engine_process(pid: int) -> int:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"vernier.processes.child\0engine" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise SystemExit("there is no engine process")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", type=Path)
    parser.add_argument("--fronts", type=int, default=8)
    parser.add_argument("--times", type=int, default=5)
    asked = parser.parse_args()
    port = free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "app"), os.environ.get("PYTHONPATH")])),
        "VERNIER_FRONTS": str(asked.fronts),
        "VERNIER_HOST": "127.0.0.1",
        "VERNIER_PORT": str(port),
        "VERNIER_ENGINES_DIR": str(asked.engines),
        "VERNIER_LOG_LEVEL": "warning",
    }
    starts, restarts = [], []
    for _ in range(asked.times):
        service = subprocess.Popen([sys.executable, "-m", "vernier"], env=environment)
        try:
            starts.append(seconds_until(port, True))
            time.sleep(1)
            os.kill(engine_process(service.pid), signal.SIGKILL)
            killed = time.monotonic()
            seconds_until(port, False)
            seconds_until(port, True)
            restarts.append(time.monotonic() - killed)
        finally:
            service.terminate()
            service.wait(60)
    for name, seconds in (("ready", starts), ("ready again", restarts)):
        print(
            f"{asked.fronts} fronts, {name} after {statistics.median(seconds):.2f} s (at most {max(seconds):.2f})"
        )


if __name__ == "__main__":
    main()
