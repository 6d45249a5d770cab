"""Load on a server over HTTP/1.1, open loop and closed loop, without coordinated omission.

    plan = OpenLoop("127.0.0.1", 8000, calls, seconds=10, rate=500)
    record = measure(plan, core=1)         # in a process of its own, pinned to core 1
    print(record.after(1).summary(objective_ms=20))

An open loop sends when its schedule says so, however slow the answers are, and every latency counts from the
moment that the schedule names: a request that waits for a free connection, or behind a generator that is late,
carries that wait. A closed loop keeps a fixed number of connections busy; it shows what a server can do, and
its latencies say nothing of a queue that grows.

One process drives some tens of thousands of small requests per second. Where a server is faster, `wrk` is the driver
(`benchmarks.load.wrk`): a closed loop too, in C, that does not look at the answers.
"""

from benchmarks.load.calls import Call, FloatOutput, JsonOutput, post
from benchmarks.load.plans import ClosedLoop, OpenLoop, Plan
from benchmarks.load.record import Record, Summary
from benchmarks.load.run import measure, run
from benchmarks.load.schedule import Burst, poisson

__all__ = [
    "Burst",
    "Call",
    "ClosedLoop",
    "FloatOutput",
    "JsonOutput",
    "OpenLoop",
    "Plan",
    "Record",
    "Summary",
    "measure",
    "poisson",
    "post",
    "run",
]
