"""One server, started, checked and measured in one case after the other."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

from benchmarks.load import Call, ClosedLoop, Record, wrk
from benchmarks.load.run import pin, run_alone
from benchmarks.machine import core_seconds, cpu_ticks, stolen
from benchmarks.peers.workloads import Workload
from benchmarks.processes import StartError
from benchmarks.scaling.cases import Case
from benchmarks.scaling.contestants import Contestant

READY_S, END_S = 40.0, 2.0
_CHECK_S = 0.5
_ANSWERS_S = 10.0

#: Runs a plan in the process that asks and checks.
Ask = Callable[[ClosedLoop], Record]


@dataclass(frozen=True)
class Cores:
    """Which cores the server may use, and which the load."""

    server: tuple[int, ...]
    load: tuple[int, ...]


@contextmanager
def asking(core: int) -> Iterator[Ask]:
    """A process on `core` that sends requests and checks the answers; started once, since starting takes a second."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=pin, initargs=(core,)) as pool:
        yield lambda plan: pool.submit(run_alone, plan).result(plan.seconds + plan.grace_s + 30)


def measure_session(
    contestant: Contestant,
    load: Workload,
    cases: Sequence[Case],
    cores: Cores,
    processes: int,
    seconds: float,
    ask: Ask,
) -> dict[str, dict[str, Any]]:
    """Figures by case; see `measure_case`. Raises StartError when the server does not come up or answers wrongly."""
    says = contestant.peer.says[load.name]
    calls = [says(x, y) for x, y in zip(load.x, load.y, strict=True)]
    server = contestant.start(load, cores.server, processes)
    try:
        server.wait_ready(calls, READY_S, ask)
        return {case.name: measure_case(server.port, calls, case, cores, seconds, ask) for case in cases}
    except (OSError, RuntimeError, TimeoutError, subprocess.TimeoutExpired) as error:
        raise StartError(f"{error}; {server.last_words()}") from error
    finally:
        server.end(END_S)


def measure_case(
    port: int, calls: list[Call], case: Case, cores: Cores, seconds: float, ask: Ask
) -> dict[str, Any]:
    """Checks a server's answers under this load, then measures.

    Returns:
        rate (right answers per second), p50_ms, p99_ms, requests, refused (answers with 400 and above), errors
        (requests without an answer), busy_cores and load_busy_cores (of those that the server and the load may use),
        and stolen (see `benchmarks.machine`).
    """
    plan = ClosedLoop(
        port=port, calls=calls, connections=case.connections, seconds=seconds, grace_s=_ANSWERS_S
    )
    for check_s in (_CHECK_S, 3 * _CHECK_S, 6 * _CHECK_S):  # a slow server may end nothing in the first
        checked = ask(replace(plan, seconds=check_s)).summary()
        if checked.requests:
            break
    if checked.wrong or not checked.checked or checked.errors or set(checked.statuses) != {200}:
        raise StartError(
            f"{case.name}: {checked.wrong} of {checked.checked} answers wrong, statuses {checked.statuses}, "
            f"{checked.errors}"
        )
    before, server_s, load_s = cpu_ticks(), _worked(cores.server), _worked(cores.load)
    began = time.perf_counter()
    summary = wrk.drive(plan, cores.load)
    took = time.perf_counter() - began
    return {
        "rate": summary.rate,
        "p50_ms": summary.p50_ms,
        "p99_ms": summary.p99_ms,
        "requests": summary.requests,
        "refused": sum(count for status, count in summary.statuses.items() if status >= 400),
        "errors": sum(summary.errors.values()),
        "busy_cores": (_worked(cores.server) - server_s) / took,
        "load_busy_cores": (_worked(cores.load) - load_s) / took,
        "stolen": stolen(before, cpu_ticks()),
    }


def _worked(cores: Sequence[int]) -> float:
    return sum(core_seconds(core) for core in cores)
