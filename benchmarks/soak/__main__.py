"""`python -m benchmarks.soak --minutes 20`: the service at 80 % of its capacity, with models reloaded all the while.

First the capacity is measured (see capacity.py), then requests are sent at a steady rate. Memory, descriptors, threads
and latency are judged by the rule in verdict.py. Afterwards the service is killed under load and started again, a few
times. Writes SOAK.md and SOAK.svg; ends with 1 when something was missed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import tempfile
import threading
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from rich.progress import Progress

import vernier
from benchmarks.load import ClosedLoop, OpenLoop, measure
from benchmarks.machine import processor
from benchmarks.processes import ROOT
from benchmarks.serving import call_of, start
from benchmarks.soak.capacity import open_capacity
from benchmarks.soak.page import page, picture
from benchmarks.soak.restart import own_cores, ready_after, restart_seconds
from benchmarks.soak.traffic import Soak
from benchmarks.soak.verdict import judge

TOKEN = "only-for-this-soak"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--engines", type=Path, default=ROOT / "engines")
    parser.add_argument("--share", type=float, default=0.8, help="of the capacity")
    parser.add_argument(
        "--objective-ms", type=float, default=50.0, help="of 99 %% of the answers, at capacity"
    )
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--reload-s", type=float, default=30.0, help="seconds between two reloads")
    parser.add_argument("--restarts", type=int, default=5, help="how often to kill it afterwards")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks", help="folder of SOAK.md and SOAK.svg"
    )
    options = parser.parse_args()
    cores = own_cores()
    seconds = 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        token = Path(folder) / "token"
        token.write_text(TOKEN)
        with start(options.engines, True, cores[0], admin_token_file=str(token)) as server:
            ready_after(server)
            calls = [call_of(server)]
            connections = options.connections
            closed = ClosedLoop(port=server.port, calls=calls, connections=connections, seconds=10.0)
            measure(closed, cores[1])  # warm
            ceiling = measure(closed, cores[1]).summary().rate
            tried = OpenLoop(
                port=server.port,
                calls=calls,
                connections=connections,
                seconds=10.0,
                rate=ceiling,
                check_every=100,
            )
            capacity = open_capacity(tried, options.objective_ms, cores[1])
            rate = options.share * capacity
            soak = Soak(server.process.pid, TOKEN, "ranker", options.reload_s)
            plan = replace(tried, seconds=seconds, rate=rate)
            with Progress() as bars:
                task = bars.add_task(f"{rate:.0f} requests/s", total=seconds)
                done = threading.Event()

                def show() -> None:
                    while not done.wait(1.0):
                        bars.advance(task, 1.0)

                threading.Thread(target=show, daemon=True).start()
                record, rows = soak.run(plan, cores[1])
                done.set()
            server.process.terminate()
            code = server.process.wait(60)
    whole = record.summary()
    refused = sum(count for status, count in whole.statuses.items() if status != 200)
    errors = refused + sum(whole.errors.values()) + whole.wrong + len(soak.failed_reloads)
    verdicts = judge(rows, errors, seconds, code)
    restarts = restart_seconds(options.engines, options.restarts, cores)
    setting = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "versions": f"Vernier {vernier.__version__}, Python {platform.python_version()}, "
        f"ONNX Runtime {version('onnxruntime')}, Linux {platform.release()}",
        "load": f"{rate:.0f} requests a second on {options.connections} connections, {options.share:.0%} of the "
        f"{capacity:.0f} at which arrivals at random were answered within {options.objective_ms:g} ms (99 %); a closed "
        f"loop reached {ceiling:.0f}; {'service and load on a core each' if cores[1] else 'one core for both'}; "
        "the example ranker, one row a request, JSON",
        "generator": f"{whole.waited:,} of {whole.requests:,} requests found every connection busy; the others were "
        f"sent {whole.lag_p99_ms or 0:.1f} ms late or less (99 %)",
        "packages": ", ".join(
            sorted(p.parent.name for p in options.engines.glob("*/*/") if p.name.isdigit())
        ),
        "time": f"{options.minutes:g} minutes, {sum(row['reloads'] for row in rows):.0f} reloads under load",
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "SOAK.md").write_text(page(rows, verdicts, restarts, setting))
    (options.out / "SOAK.svg").write_text(picture(rows, options.minutes))
    for verdict in verdicts:
        print(f"{'ok    ' if verdict.passed else 'MISSED'} {verdict.what}: {verdict.measured}")
    print("ready again after SIGKILL:", ", ".join(f"{s:.2f}" for s in restarts), "s")
    print(whole)
    print(*soak.failed_reloads[:5], sep="\n")
    sys.exit(0 if all(verdict.passed for verdict in verdicts) else 1)


if __name__ == "__main__":
    main()
