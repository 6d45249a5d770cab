"""One workload on all its servers: started together, measured in turns, the others held still meanwhile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.load import Call, ClosedLoop, measure, wrk
from benchmarks.machine import core_seconds, cpu_ticks, stolen
from benchmarks.peers.environments import FOLDER, InstallError, install, python_of, versions
from benchmarks.peers.peers import PEERS, Peer, Place
from benchmarks.peers.workloads import Workload, workload
from benchmarks.processes import ROOT, ServerProcess, StartError, free_port

SERVER_CORE, LOAD_CORE = 0, 1
CONNECTIONS = 64
_BUILD_TIMEOUT_S = 300.0
#: Each process keeps one core and one thread for arithmetic, whatever library does it.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Say = Callable[[str], None]


@dataclass
class Part:
    """What became of a workload.

    Attributes:
        rounds: by server, its summaries in the order of the rounds; `stolen` is what `stolen` gives.
        failed: by server, why there are none.
        versions: by server, what is installed.
        formats: by server, how it was spoken to.
    """

    workload: str
    title: str
    driver: str
    connections: int
    seconds: float
    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)


def measure_part(name: str, rounds: int, seconds: float, only: set[str], say: Say) -> Part:
    """Measures a workload.

    Args:
        name: json, binary or large.
        rounds: how often each server is measured.
        seconds: length of one measurement.
        only: names of the peers; empty for all.
        say: gets a word on what goes on, once a server started and once a measurement made.
    """
    load = workload(name, FOLDER / "models")
    driver = "wrk" if wrk.is_installed() else "benchmarks.load"
    part = Part(name, load.title, driver, CONNECTIONS, seconds)
    engines = build_package(load)
    with ExitStack() as stack:
        running: dict[str, tuple[Peer, ServerProcess, list[Call]]] = {}
        for peer in PEERS:
            if name not in peer.says:
                if name in peer.why_not:
                    part.failed[peer.name] = peer.why_not[name]
                continue
            if only and peer.name not in only:
                part.failed[peer.name] = "left out of this run by --only"
                continue
            say(f"{name}: starting {peer.title}")
            calls = [peer.says[name](x, y) for x, y in zip(load.x, load.y, strict=True)]
            try:
                install(peer)
                server = stack.enter_context(start(peer, load, engines))
                server.wait_ready(calls)
            except (InstallError, StartError) as error:
                part.failed[peer.name] = str(error)
                continue
            if peer.survives_pause:
                server.pause()
            else:
                server.end()
            running[peer.name] = peer, server, calls
            part.versions[peer.name] = versions(peer)
            part.formats[peer.name] = peer.formats[name]
            part.rounds[peer.name] = []
        for turn in range(rounds):
            for peer_name, (peer, server, calls) in list(running.items()):
                say(f"{name}: round {turn + 1} of {rounds}, {peer_name}")
                before = cpu_ticks()
                try:
                    if peer.survives_pause:
                        figures = measure_once(server, calls, seconds)
                    else:
                        with start(peer, load, engines) as fresh:
                            fresh.wait_ready(calls)
                            figures = measure_once(fresh, calls, seconds)
                except (StartError, ConnectionError, RuntimeError) as error:
                    part.failed[peer_name] = f"round {turn + 1}: {error}"
                    del running[peer_name]
                    continue
                part.rounds[peer_name].append({**figures, "stolen": stolen(before, cpu_ticks())})
    return part


def start(peer: Peer, load: Workload, engines: Path) -> ServerProcess:
    place = Place(python_of(peer), free_port(), free_port(), load, engines)
    return ServerProcess(
        peer.command(place),
        place.port,
        FOLDER / "logs" / f"{load.name}-{peer.name}.log",
        core=SERVER_CORE,
        environment={**ONE_THREAD, **peer.environment(place)},
    )


def measure_once(server: ServerProcess, calls: list[Call], seconds: float) -> dict[str, Any]:
    """Wakes the server, checks its answers, measures it, and lets it rest.

    Returns the summary's figures, and `core_rate`: requests per second of its core's time, which is the rate
    that the server would reach if the load could keep it busy all the time.

    Raises StartError when an answer is wrong or a connection breaks.
    """
    server.resume()
    try:
        plan = ClosedLoop(port=server.port, calls=calls, connections=CONNECTIONS, seconds=seconds)
        warm_up = ClosedLoop(port=server.port, calls=calls, connections=CONNECTIONS, seconds=1.0)
        for _ in range(3):  # a slow server may end nothing in its first second
            checked = measure(warm_up, LOAD_CORE).summary()
            if checked.requests:
                break
        if checked.wrong or not checked.checked or checked.errors or set(checked.statuses) != {200}:
            raise StartError(
                f"{checked.wrong} of {checked.checked} answers wrong, statuses {checked.statuses}, {checked.errors}"
            )
        before = core_seconds(SERVER_CORE)
        summary = wrk.drive(plan, LOAD_CORE) if wrk.is_installed() else measure(plan, LOAD_CORE).summary()
        busy_s = core_seconds(SERVER_CORE) - before
        if summary.errors:
            raise StartError(f"connections failed under load: {summary.errors}")
        return {**summary.as_dict(), "core_rate": summary.requests / busy_s if busy_s else None}
    finally:
        server.pause()


def build_package(load: Workload, root: Path = ROOT, engines: Path = FOLDER / "engines") -> Path:
    """Vernier's engine package of the workload's model, built once by the code below `root`. Returns `engines`."""
    name = load.model.stem
    if not (engines / name).is_dir():
        command = [sys.executable, "build_engine.py", str(load.model), "--name", name]
        ran = subprocess.run(
            [*command, "--precision", "fp32", "--out", str(engines)],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
            timeout=_BUILD_TIMEOUT_S,
        )
        if ran.returncode != 0:
            raise SystemExit(f"build_engine.py cannot build {load.model}: {ran.stdout}{ran.stderr}")
    return engines
