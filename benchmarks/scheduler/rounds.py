"""The loads on the real server: what is sent, and what is written down of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime

from benchmarks.load import Burst, Call, ClosedLoop, JsonOutput, OpenLoop, Record, measure, post
from benchmarks.processes import ServerProcess, free_port
from benchmarks.scheduler.models import FEATURES, Workload
from vernier.metrics import DISPATCH_REASONS

SERVER_CORE, LOAD_CORE = 0, 1
#: Enough that an open loop never waits for a free one below capacity.
_CONNECTIONS = 256
_WARM_UP_S = 0.5
#: Every so manyth answer is compared with ONNX Runtime's.
_CHECK_EVERY = 16
BURST_AT_S, BURST_S, BURST_FACTOR, BURST_RUN_S = 2.0, 0.2, 4.0, 5.0


@dataclass(frozen=True)
class Service:
    """A running server of one workload."""

    process: ServerProcess
    calls: list[Call]

    def plan(self, rate: float, seconds: float, seed: int, bursts: tuple[Burst, ...] = ()) -> OpenLoop:
        return OpenLoop(
            port=self.process.port,
            calls=self.calls,
            seconds=seconds,
            rate=rate,
            seed=seed,
            bursts=bursts,
            connections=_CONNECTIONS,
            check_every=_CHECK_EVERY,
        )

    def closed(self, seconds: float, connections: int, calls: list[Call] | None = None) -> float:
        """Right answers per second while so many connections are kept busy, by other `calls` if given."""
        plan = ClosedLoop(
            port=self.process.port,
            calls=calls or self.calls,
            seconds=_WARM_UP_S + seconds,
            connections=connections,
            check_every=_CHECK_EVERY,
        )
        summary = measure(plan, LOAD_CORE).after(_WARM_UP_S).summary()
        if summary.wrong or summary.errors:
            raise RuntimeError(f"{summary.wrong} answers were wrong, {summary.errors}")
        return summary.goodput

    def poisson(self, rate: float, seconds: float, seed: int, objective_ms: float) -> dict[str, Any]:
        record = measure(self.plan(rate, _WARM_UP_S + seconds, seed), LOAD_CORE).after(_WARM_UP_S)
        return record.summary(objective_ms).as_dict()

    def burst(self, rate: float, seed: int, objective_ms: float) -> dict[str, float]:
        """Milliseconds after a burst until no request misses the objective any more, and p99 before and later."""
        bursts = (Burst(BURST_AT_S, BURST_S, BURST_FACTOR),)
        record = measure(self.plan(rate, BURST_RUN_S, seed, bursts), LOAD_CORE)
        return recovery(record, objective_ms)

    def memory_mib(self) -> float:
        """Resident memory of the server's process."""
        status = Path(f"/proc/{self.process.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) / 1024

    def metric(self, name: str) -> dict[str, float]:
        """Samples of /metrics by their labels."""
        text = httpx.get(f"http://127.0.0.1:{self.process.port}/metrics").text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(name)]
        return {labels[len(name) :]: float(value) for labels, value in lines}

    def dispatched(self, model: str) -> dict[str, float]:
        """Batches so far by why they left."""
        samples = self.metric("vernier_dispatch_total")
        return {
            reason: sum(
                n for labels, n in samples.items() if f'"{model}"' in labels and f'"{reason}"' in labels
            )
            for reason in DISPATCH_REASONS
        }


def recovery(record: Record, objective_ms: float) -> dict[str, float]:
    """See `Service.burst`. Requests that were refused or not answered miss the objective."""
    end = BURST_AT_S + BURST_S
    missed = (record.status != 200) | (record.latency_s * 1e3 > objective_ms)
    late = record.due_s[missed & (record.due_s >= end)]
    during = (record.due_s >= BURST_AT_S) & (record.due_s < end)
    before = record.between(_WARM_UP_S, BURST_AT_S).summary()
    later = record.between(end + 1.0, BURST_RUN_S).summary()
    return {
        "recovery_ms": float(late.max() - end) * 1e3 if late.size else 0.0,
        "missed_in_burst": float(missed[during].mean()),
        "p99_before_ms": before.p99_ms or 0.0,
        "p99_later_ms": later.p99_ms or 0.0,
    }


@contextmanager
def serve(
    engines: Path,
    workload: Workload,
    log: Path,
    *,
    objective_ms: float | None = None,
    fixed_delay_ms: float | None = None,
) -> Iterator[Service]:
    """The workload's server on its core. It is paused whenever another one is measured."""
    port = free_port()
    own = ["-m", "vernier"]
    usual = ["-m", "benchmarks.scheduler.fixed_delay", f"{fixed_delay_ms}"]
    environment = {
        "VERNIER_HOST": "127.0.0.1",
        "VERNIER_PORT": str(port),
        "VERNIER_ENGINES_DIR": str(engines),
        "VERNIER_LOG_LEVEL": "error",
    }
    if objective_ms is not None:
        environment["VERNIER_LATENCY_OBJECTIVE_MS"] = f"{objective_ms}"
    command = [sys.executable, *(own if fixed_delay_ms is None else usual)]
    with ServerProcess(command, port, log, core=SERVER_CORE, environment=environment) as process:
        calls = make_calls(engines / workload.name / "1" / "fp32.onnx", workload)
        process.wait_ready(calls[:1])
        yield Service(process, calls)


def make_calls(model: Path, workload: Workload, rows: int = 1, count: int = 32) -> list[Call]:
    """Requests of `rows` rows each, with the answers that ONNX Runtime gives."""
    inputs = np.random.default_rng(2).standard_normal((count, rows, FEATURES)).astype(np.float32)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    answers = [session.run(None, {"x": x})[0] for x in inputs]
    return [
        Call(
            post(
                "/v1/predict",
                json.dumps({"model": workload.name, "inputs": {"x": x.round(4).tolist()}}).encode(),
            ),
            JsonOutput(("outputs", "y"), answer.ravel().tolist(), 1e-2),
        )
        for x, answer in zip(inputs, answers, strict=True)
    ]
