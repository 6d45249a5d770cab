"""`wrk` as the driver of a closed loop, for servers that are faster than a generator in Python.

The program is `$WRK`, or the `wrk` in the PATH. It does not look at the answers beyond their status, so check them
before and after. Its percentiles are corrected as wrk does it: answers slower than twice the mean interval of a
connection count for the requests that would have been sent meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.load.plans import ClosedLoop
from benchmarks.load.record import Summary
from benchmarks.load.run import pin

_SCRIPT = """
local requests = {}
for _, path in ipairs({%(paths)s}) do
  local file = io.open(path, "rb")
  requests[#requests + 1] = file:read("*a")
  file:close()
end
local turn = 0
request = function()
  turn = turn %% #requests + 1
  return requests[turn]
end
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\nRESULT {"requests": %%d, "us": %%d, "p": [%%d, %%d, %%d, %%d, %%d], ' ..
    '"status": %%d, "connect": %%d, "read": %%d, "write": %%d, "timeout": %%d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(90),
    latency:percentile(99), latency:percentile(99.9), latency.max,
    e.status, e.connect, e.read, e.write, e.timeout))
end
"""


def executable() -> str | None:
    """The program's path; None when there is none."""
    return shutil.which(os.environ.get("WRK") or "wrk")


def is_installed() -> bool:
    return executable() is not None


def version() -> str:
    """As wrk names it; empty when it is not installed."""
    program = executable()
    if program is None:
        return ""
    said = subprocess.run([program, "-v"], capture_output=True, text=True, check=False).stdout
    return said.split("[")[0].strip()


def drive(plan: ClosedLoop, core: int | Collection[int] | None = None) -> Summary:
    """Runs the plan by wrk; whole seconds only, and without its checks.

    It gets a thread for each core in `core`, if there are that many connections; else one.

    Statuses of 400 and above are one number in wrk; they come back as status 400.

    Raises:
        RuntimeError: when wrk is missing or fails, in its words.
    """
    program = executable()
    if program is None:
        raise RuntimeError(
            "wrk is not installed; install it (apt-get install wrk), or use benchmarks.load.measure"
        )
    threads = 1 if core is None or isinstance(core, int) else min(len(core), plan.connections)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, call in enumerate(plan.calls):
            path = Path(folder, f"{number}.http")
            path.write_bytes(call.payload)
            paths.append(json.dumps(str(path)))
        script = Path(folder, "load.lua")
        script.write_text(_SCRIPT % {"paths": ", ".join(paths)})
        ran = subprocess.run(
            [
                *(program, "--threads", str(threads), "--connections", str(plan.connections)),
                *("--timeout", "10s"),
                *("--duration", f"{max(1, round(plan.seconds))}s", "--script", str(script)),
                f"http://{plan.host}:{plan.port}/",
            ],
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: pin(core),
            timeout=plan.seconds + 30,
        )
    line = next((line for line in ran.stdout.splitlines() if line.startswith("RESULT ")), None)
    if ran.returncode != 0 or line is None:
        raise RuntimeError(f"wrk failed: {ran.stderr.strip() or ran.stdout.strip()}")
    return _summary(json.loads(line.removeprefix("RESULT ")))


def _summary(said: dict[str, Any]) -> Summary:
    seconds = said["us"] / 1e6
    refused = said["status"]
    right = said["requests"] - refused
    kinds = ("connect", "read", "write", "timeout")
    p50, p90, p99, p999, longest = (us / 1e3 for us in said["p"])
    return Summary(
        driver="wrk",
        seconds=seconds,
        requests=said["requests"],
        rate=right / seconds,
        goodput=right / seconds,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        p999_ms=p999,
        max_ms=longest,
        statuses={status: count for status, count in ((200, right), (400, refused)) if count},
        errors={kind: said[kind] for kind in kinds if said[kind]},
    )
