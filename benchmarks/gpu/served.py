"""`python -m benchmarks.gpu.served`: how much of a GPU's engine is left when it is served over HTTP.

The service runs in the Python that has TensorRT (`--server`), once for each number of front processes, the load in
wrk, each on cores of its own. Requests of one row, and requests of a whole batch, over kept connections in a closed
loop. wrk looks at no answer: before each measurement a checking client compares every answer with ONNX Runtime's, and
while it is measured one connection of that client goes on doing so. Held against `benchmarks.gpu.bare`: the same
engine, batch and number of slots, nothing around it, measured anew in every round.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.load import Call, ClosedLoop, JsonOutput, Summary, post, wrk
from benchmarks.load.run import pin, run_alone
from benchmarks.machine import core_seconds
from benchmarks.processes import ROOT, ServerProcess, StartError, free_port
from vernier.package.golden import load_golden

_WARM_UP_S, _CHECK_S = 1.0, 0.5
_CHECKING = 8
_READY_S, _BARE_S, _END_S = 120.0, 90.0, 5.0
#: Connections of rows in one request; the queue takes 1024 rows by itself.
_MOST_CONNECTIONS = 960
#: Of the largest values of an output: how far FP16 may stray here.
_TOLERANCE = 3e-2
ROWS, BATCHES = "rows", "batches"


def calls_of(package: Path, precision: str, rows: int) -> list[Call]:
    """Requests of `rows` rows out of the golden vectors, with their answers."""
    name, golden = package.parent.name, load_golden(package / "golden.npz")
    ((of_input, inputs),) = golden.inputs.items()
    ((of_output, outputs),) = golden.outputs.items()
    calls = []
    for start in range(0, len(inputs), min(rows, len(inputs))):
        taken = np.arange(start, start + rows) % len(inputs)
        asked = {"model": name, "precision": precision, "inputs": {of_input: inputs[taken].tolist()}}
        expected = outputs[taken].ravel().tolist()
        tolerance = _TOLERANCE * float(np.abs(outputs).max())
        check = JsonOutput(("outputs", of_output), expected, tolerance)
        calls.append(Call(post("/v1/predict", json.dumps(asked).encode()), check))
    return calls


@dataclass(frozen=True)
class Cores:
    """Which cores the service may use, which wrk, and which one the client that checks."""

    server: tuple[int, ...]
    load: tuple[int, ...]
    check: int

    @classmethod
    def split(cls, load: int, available: Sequence[int]) -> Cores:
        """The last `load` cores are the load's, the very last of them the checking client's; with few they share."""
        if len(available) < 2:
            return cls(tuple(available), tuple(available), available[0])
        load = min(load, len(available) - 1)
        ours = tuple(available[-load:])
        return cls(tuple(available[:-load]), ours[:-1] or ours, ours[-1])


@dataclass
class Clock:
    """Tells what still fits into the time. limit_s: None for no limit."""

    limit_s: float | None
    began: float = field(default_factory=time.monotonic)

    def passed(self) -> float:
        return time.monotonic() - self.began

    def left(self) -> float:
        return float("inf") if self.limit_s is None else self.limit_s - self.passed()

    def tell(self, what: str) -> None:
        print(f"[{self.passed():5.1f} s] {what}", flush=True)


class Load:
    """wrk and the client that checks, on their cores."""

    def __init__(self, cores: Cores) -> None:
        self._cores = cores
        self._client = ProcessPoolExecutor(1, get_context("spawn"), initializer=pin, initargs=(cores.check,))
        self._threads = ThreadPoolExecutor(1)

    def ask(self, plan: ClosedLoop) -> Any:
        """Sends and checks; a Record."""
        return self._client.submit(run_alone, plan).result(plan.seconds + plan.grace_s + 30)

    def warm(self, port: int, calls: list[Call], connections: int) -> None:
        wrk.drive(
            ClosedLoop(port=port, calls=calls, connections=connections, seconds=_WARM_UP_S), self._cores.load
        )

    def measure(self, port: int, calls: list[Call], connections: int, seconds: float) -> dict[str, Any]:
        """What wrk saw, and `checked`, `wrong` and `check_p50_ms` of the client that went on checking meanwhile.

        Its answers are not counted in `goodput`. Also the cores' worth of work of the service and of wrk.
        """
        plan = ClosedLoop(port=port, calls=calls, connections=connections, seconds=seconds)
        beside = self._threads.submit(self.ask, replace(plan, connections=1))
        before, began = self._worked(), time.perf_counter()
        seen = wrk.drive(plan, self._cores.load)
        took, after = time.perf_counter() - began, self._worked()
        checked = beside.result()
        sample: Summary = checked.summary()
        busy = [(b - a) / took for a, b in zip(before, after, strict=True)]
        return {
            **seen.as_dict(),
            "connections": connections,
            "checked": sample.checked,
            "wrong": sample.wrong,
            "check_p50_ms": sample.p50_ms,
            "server_busy_cores": busy[0],
            "load_busy_cores": busy[1],
        }

    def _worked(self) -> tuple[float, float]:
        server, load = (sum(map(core_seconds, cores)) for cores in (self._cores.server, self._cores.load))
        return server, load

    def close(self) -> None:
        self._client.shutdown()
        self._threads.shutdown()


def alone(asked: argparse.Namespace, precision: str, work: Path, cores: Cores) -> dict[str, Any]:
    """What `benchmarks.gpu.bare` found, from plans with the timings that the service's plans were built with."""
    timings = next((work / "cache").rglob("*.timing"), None)
    own = work / f"{asked.package.parent.name}.timing"
    if timings is not None and not own.exists():
        shutil.copyfile(timings, own)
    command = [*shlex.split(asked.bare), str(asked.package.resolve()), "--precision", precision]
    command += ["--batch", str(asked.batch), "--slots", str(asked.slots), "--work", str(work)]
    ran = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=_BARE_S,
        preexec_fn=lambda: pin(cores.server),
    )
    if ran.returncode != 0:
        raise SystemExit(f"the engine alone cannot be measured: {ran.stderr[-2000:]}")
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def serve(asked: argparse.Namespace, fronts: int, work: Path, cores: Cores) -> ServerProcess:
    port = free_port()
    environment = {
        "VERNIER_HOST": "127.0.0.1",
        "VERNIER_PORT": str(port),
        "VERNIER_FRONTS": str(fronts),
        "VERNIER_ENGINES_DIR": str(asked.package.resolve().parents[1]),
        "VERNIER_RUNTIME": asked.runtime,
        "VERNIER_CACHE_DIR": f"{work}/cache",
        "VERNIER_SLOTS": str(asked.slots),
        "VERNIER_DEVICES": asked.devices,
        "VERNIER_REBUILD": "wait",
        "VERNIER_LOG_LEVEL": "error",
    }
    log = work / f"served-{fronts}.log"
    return ServerProcess(shlex.split(asked.server), port, log, core=cores.server, environment=environment)


def start_all(
    asked: argparse.Namespace, work: Path, cores: Cores, load: Load, ending: ExitStack, clock: Clock
) -> dict[int, ServerProcess]:
    """The services by their number of fronts; the first one builds the plans, those after it start together.

    One that does not start is told of and left out. Raises SystemExit when none does.
    """
    first = [calls_of(asked.package, p, 1)[0] for p in asked.precision]
    servers: dict[int, ServerProcess] = {}

    def wait_for(fronts: int, server: ServerProcess) -> None:
        try:
            server.wait_ready(first, max(1.0, min(_READY_S, clock.left())), load.ask)
            servers[fronts] = server
        except StartError as error:
            server.end(_END_S)
            print(f"{fronts} fronts do not serve: {error}", flush=True)

    def begin(fronts: int) -> ServerProcess:
        server = serve(asked, fronts, work, cores)
        ending.callback(server.end, _END_S)
        return server

    clock.tell("waiting for the first service and its plans")
    wait_for(asked.fronts[0], begin(asked.fronts[0]))
    clock.tell("waiting for the others")
    for fronts, server in [(fronts, begin(fronts)) for fronts in asked.fronts[1:]]:
        wait_for(fronts, server)
    if not servers:
        raise SystemExit("no service started")
    return servers


def check(load: Load, server: ServerProcess, calls: list[Call]) -> None:
    """Raises StartError when an answer is not ONNX Runtime's."""
    plan = ClosedLoop(port=server.port, calls=calls, connections=_CHECKING, seconds=_CHECK_S)
    seen = load.ask(plan).summary()
    if seen.wrong or seen.errors or not seen.checked or set(seen.statuses) != {200}:
        raise StartError(f"{seen.wrong} of {seen.checked} answers were wrong, {seen.statuses}, {seen.errors}")


def connections_of(asked: argparse.Namespace) -> dict[str, list[int]]:
    """By kind of request: enough that every slot has its next batch, and as much again waits or is on its way."""
    many = 2 * (asked.slots * len(asked.devices.split(",")) + 1)
    rows = asked.connections or [min(many * asked.batch, _MOST_CONNECTIONS)]
    return {ROWS: rows, BATCHES: [many]}


class Rounds:
    """Measures round after round, as far as the time reaches; `found` is what there is so far.

    A round holds `bare` in rows per second, `ms` of an execution while all slots are busy, and under `served` one
    measurement for each number of fronts, kind of request and number of connections.
    """

    def __init__(self, asked: argparse.Namespace, work: Path) -> None:
        self._asked = asked
        self._work = work
        self._clock = Clock(asked.limit_s)
        self._cores = cores = Cores.split(asked.load_cores, sorted(os.sched_getaffinity(0)))
        self._load = Load(cores)
        self._servers: dict[int, ServerProcess] = {}
        self._rounds: list[dict[str, Any]] = []
        self._took_s: dict[str, float] = {}
        self.found = {
            "batch": asked.batch,
            "slots": asked.slots,
            "gpus": len(asked.devices.split(",")),
            "cores": {"server": len(cores.server), "load": len(cores.load)},
            "driver": wrk.version(),
            "rounds": self._rounds,
        }

    def run(self) -> None:
        """Raises SystemExit when nothing can be measured."""
        asked = self._asked
        with ExitStack() as ending:
            ending.callback(self._load.close)
            self._servers = start_all(asked, self._work, self._cores, self._load, ending, self._clock)
            for precision in asked.precision:
                for turn in range(asked.rounds):
                    if self._rounds and self._clock.left() < self._guess_s(precision):
                        self._clock.tell(f"no time for more of {precision}")
                        break
                    self._round(precision, turn)

    def _guess_s(self, precision: str) -> float:
        """How long a round will take; the first one, with plans and warming up, says nothing of it."""
        kinds = connections_of(self._asked)
        count = len(self._servers) * sum(len(kinds[kind]) for kind in self._asked.requests)
        seen = [turn["precision"] for turn in self._rounds].count(precision)
        each = self._asked.seconds + (1.0 if seen else _WARM_UP_S + _CHECK_S + 1.0)
        guess: float = 8.0 + count * each + (0.0 if seen else 20.0)
        return self._took_s.get(precision, guess)

    def _round(self, precision: str, turn: int) -> None:
        asked, started = self._asked, time.monotonic()
        self._clock.tell(f"{precision}, round {turn + 1} of {asked.rounds}: the engine alone")
        bare = alone(asked, precision, self._work, self._cores)
        self.found.update(device=bare["device"], tensorrt=bare["tensorrt"])
        pool = bare["pool"][precision]
        round_ = {"precision": precision, "bare": pool["per_s"] * asked.batch, "ms": 1e3 * pool["p50"]}
        self._rounds.append({**round_, "served": []})
        for fronts, server in list(self._servers.items()):
            try:
                for kind in asked.requests:
                    self._serve(precision, turn, fronts, server.port, kind)
            except (OSError, RuntimeError, TimeoutError, subprocess.TimeoutExpired) as error:
                self._clock.tell(f"{fronts} fronts are left out: {error}; {server.last_words()}")
                del self._servers[fronts]
        if turn:
            self._took_s[precision] = time.monotonic() - started

    def _serve(self, precision: str, turn: int, fronts: int, port: int, kind: str) -> None:
        """One kind of request to one service, by every number of connections."""
        asked, round_ = self._asked, self._rounds[-1]
        rows = 1 if kind == ROWS else asked.batch
        calls = calls_of(asked.package, precision, rows)
        if turn == 0:
            check(self._load, self._servers[fronts], calls)
        for connections in connections_of(asked)[kind]:
            if turn == 0:
                self._load.warm(port, calls, connections)
            seen = self._load.measure(port, calls, connections, asked.seconds)
            round_["served"].append({"fronts": fronts, "kind": kind, **seen})
            if asked.out is not None:
                asked.out.write_text(json.dumps(self.found, indent=1))
            rate = seen["goodput"] * rows
            self._clock.tell(
                f"{precision}, {fronts} fronts, {connections} connections with {kind}: {rate:,.0f} rows/s, "
                f"{rate / round_['bare']:.0%} of alone"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="engines/NAME/VERSION")
    parser.add_argument("--server", required=True, help="starts the service, such as 'python -m vernier'")
    parser.add_argument("--bare", required=True, help="the engine alone: 'python -m benchmarks.gpu.bare'")
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--fronts", nargs="+", type=int, default=[0], help="0: everything in one process")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument(
        "--devices", default="0", help="GPUs that serve, such as 0,1; the engine alone has one"
    )
    parser.add_argument("--runtime", default="tensorrt")
    parser.add_argument("--requests", nargs="+", choices=[ROWS, BATCHES], default=[ROWS, BATCHES])
    parser.add_argument(
        "--connections", nargs="+", type=int, help="with a row a request; by default by itself"
    )
    parser.add_argument("--load-cores", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a measurement; wrk takes whole ones")
    parser.add_argument("--limit-s", type=float, help="begins nothing that would probably end later")
    parser.add_argument("--work", type=Path, help="keeps plans and logs from one call to the next")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if not wrk.is_installed():
        parser.error("wrk makes the load: install it (apt-get install wrk), or name it in WRK")
    with tempfile.TemporaryDirectory() as own:
        work = asked.work or Path(own)
        work.mkdir(parents=True, exist_ok=True)
        rounds = Rounds(asked, work)
        try:
            rounds.run()
        finally:
            print(table(rounds.found))
    if wrong := faults(rounds.found):
        raise SystemExit("\n".join(wrong))


def faults(found: dict[str, Any]) -> list[str]:
    """What must not happen while it is measured: wrong answers, refused ones, none at all."""
    return [
        f"{turn['precision']}, {seen['fronts']} fronts, {seen['kind']}: {seen['wrong']} of {seen['checked']} "
        f"answers wrong, statuses {seen['statuses']}, {seen['errors']}"
        for turn in found["rounds"]
        for seen in turn["served"]
        if seen["wrong"] or seen["errors"] or set(seen["statuses"]) != {"200"} or not seen["checked"]
    ]


def table(found: dict[str, Any]) -> str:
    """Medians of the rounds, and of the ratios of each round, in Markdown."""
    batch, cores = found["batch"], found["cores"]
    lines = [
        f"{found.get('device')}, {found['gpus']} serving, TensorRT {found.get('tensorrt')}; {cores['server']} cores "
        f"for the service, {cores['load']} for {found['driver']}; batches of {batch}, {found['slots']} slots on each "
        "GPU",
        "",
        "|  | fronts | in a request | connections | rounds | engine alone, rows/s | ms of one | served, rows/s "
        "| of alone | p50 / p99, ms | busy cores of service and load |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, int, str, int], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for turn in found["rounds"]:
        for seen in turn["served"]:
            key = turn["precision"], seen["fronts"], seen["kind"], seen["connections"]
            groups.setdefault(key, []).append((turn, seen))
    for (precision, fronts, kind, connections), ours in groups.items():
        each = 1 if kind == ROWS else batch
        cells = [
            precision.upper(),
            str(fronts),
            "a row" if kind == ROWS else "a batch",
            str(connections),
            str(len(ours)),
            f"{median(turn['bare'] for turn, _ in ours):,.0f}",
            f"{median(turn['ms'] for turn, _ in ours):.2f}",
            f"{median(seen['goodput'] * each for _, seen in ours):,.0f}",
            f"{median(seen['goodput'] * each / turn['bare'] for turn, seen in ours):.0%}",
            " / ".join(f"{median(seen[p] for _, seen in ours):.1f}" for p in ("p50_ms", "p99_ms")),
            " + ".join(
                f"{median(seen[b] for _, seen in ours):.1f}" for b in ("server_busy_cores", "load_busy_cores")
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
