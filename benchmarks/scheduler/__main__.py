"""`python -m benchmarks.scheduler`: the batching on the real server and in simulation → benchmarks/SCHEDULER.md.

The server, a process of its own, is pinned to one core and the load to another; both policies and the bare session
take turns in every round. --part repeats one part and leaves the other figures as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import onnxruntime

import vernier
from benchmarks.machine import processor
from benchmarks.processes import ROOT
from benchmarks.scheduler import page
from benchmarks.scheduler.bare import BareSession
from benchmarks.scheduler.models import HEAVY, WORKLOADS, Workload, package
from benchmarks.scheduler.rounds import SERVER_CORE, Service, make_calls, serve
from benchmarks.scheduler.virtual import POLICIES, simulate
from vernier.builder.progress import BarProgress

RAW, PAGE = ROOT / "benchmarks/SCHEDULER.json", ROOT / "benchmarks/SCHEDULER.md"
SHARES = (0.5, 0.8, 0.95)
#: The objective, in executions of the largest batch.
OBJECTIVE_RUNS = 4
FIXED_MS = 2.0

Options = argparse.Namespace


def throughput(options: Options, engines: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    """Closed loop against the bare session at the same batch, in turns."""
    found: dict[str, Any] = {}
    for workload in WORKLOADS:
        rows = workload.max_batch
        model = engines / workload.name / "1" / "fp32.onnx"
        bare: list[float] = []
        served: list[float] = []
        whole: list[float] = []
        whole_calls = make_calls(model, workload, rows)
        log = engines / "throughput.log"
        with (
            BareSession(model, SERVER_CORE) as session,
            serve(engines, workload, log) as service,
        ):
            for _ in range(options.rounds):
                service.process.pause()
                bare.append(rows / session.seconds(rows, options.seconds))
                service.process.resume()
                served.append(service.closed(options.seconds, 4 * rows))
                whole.append(rows * service.closed(options.seconds, 4, whole_calls))
                advance(1)
            batch = service.metric("vernier_batch_size_sum"), service.metric("vernier_batch_size_count")
        mine = [k for k in batch[0] if f'model="{workload.name}"' in k]
        found[workload.name] = {
            "batch": rows,
            "batch_ms": 1e3 * rows / median(bare),
            "bare": bare,
            "served": served,
            "whole": whole,
            "mean_batch": sum(batch[0][k] for k in mine) / max(1, sum(batch[1][k] for k in mine)),
            "ratio": _ratio(served, bare),
            "whole_ratio": _ratio(whole, bare),
        }
    return found


def _ratio(rates: Sequence[float], others: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return median(rate / other for rate, other in zip(rates, others, strict=True))


def loads(options: Options, engines: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    """Poisson loads and bursts on both policies in turns, in the same run in simulation; then overload."""
    workload = HEAVY
    curve = _curve(engines, workload, options.seconds)
    objective_ms = round(OBJECTIVE_RUNS * 1e3 * curve[workload.max_batch], 1)
    with ExitStack() as stack:
        services = {
            name: stack.enter_context(
                serve(
                    engines,
                    workload,
                    engines / f"{number}.log",
                    objective_ms=objective_ms,
                    fixed_delay_ms=delay,
                )
            )
            for number, (name, delay) in enumerate(zip(POLICIES, (None, FIXED_MS), strict=True))
        }
        _only(services, "vernier")
        capacity = _capacity(services["vernier"], workload, options.seconds)
        points: list[dict[str, Any]] = []
        for share in SHARES:
            for seed in range(options.rounds):
                for name, service in services.items():
                    _only(services, name)
                    real = service.poisson(share * capacity, options.seconds, seed, objective_ms)
                    points.append({"share": share, "seed": seed, "policy": name, **real})
                    advance(1)
        reasons = {}
        for name, service in services.items():
            _only(services, name)
            reasons[name] = service.dispatched(workload.name)
        bursts = {name: [] for name in services}
        for seed in range(options.rounds):
            for name, service in services.items():
                _only(services, name)
                bursts[name].append(service.burst(0.5 * capacity, seed, objective_ms))
                advance(1)
        _only(services, "vernier")
        overload = _overload(services["vernier"], workload, objective_ms, options, advance)
    virtual = [
        {"share": share, "policy": name, **_virtual(curve, share, objective_ms, workload, name)}
        for share in SHARES
        for name in POLICIES
    ]
    return {
        "model": workload.name,
        "curve_ms": {str(rows): 1e3 * seconds for rows, seconds in curve.items()},
        "objective_ms": objective_ms,
        "capacity": capacity,
        "poisson": points,
        "virtual": virtual,
        "dispatched": reasons,
        "bursts": bursts,
        "overload": overload,
    }


def _only(services: dict[str, Service], name: str) -> None:
    """The others are held still."""
    for other, service in services.items():
        (service.process.resume if other == name else service.process.pause)()


def _curve(engines: Path, workload: Workload, seconds: float) -> dict[int, float]:
    sizes = [2**n for n in range(workload.max_batch.bit_length())]
    with BareSession(engines / workload.name / "1" / "fp32.onnx", SERVER_CORE) as session:
        return {rows: session.seconds(rows, seconds / 4) for rows in sizes}


def _virtual(
    curve: dict[int, float], share: float, objective_ms: float, workload: Workload, policy: str
) -> dict[str, float]:
    rate = share * workload.max_batch / curve[workload.max_batch]
    return simulate(curve, rate, 60.0, 1, objective_ms / 1e3, policy, workload.max_batch)


def _capacity(service: Service, workload: Workload, seconds: float) -> float:
    """Right answers per second in a closed loop: the median of three."""
    # a batch that runs and one that waits: more would be refused for the objective's sake
    return median(service.closed(seconds, 2 * workload.max_batch) for _ in range(3))


def _overload(
    service: Service,
    workload: Workload,
    objective_ms: float,
    options: Options,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Three times what it can do, after a third of the time to get used to it; for each round what came of it.

    What a shared machine can do changes within minutes, so it is measured just before and just after each.
    """
    seconds = options.overload_seconds
    before = _capacity(service, workload, options.seconds)
    service.poisson(3 * before, seconds / 3, 7, objective_ms)
    found = []
    for turn in range(options.rounds):
        memory = service.memory_mib()
        load = service.poisson(3 * before, seconds, 8 + turn, objective_ms)
        memory_after = service.memory_mib()
        after = _capacity(service, workload, options.seconds)
        found.append(
            {
                **load,
                "memory_before_mib": memory,
                "memory_after_mib": memory_after,
                "capacity_before": before,
                "capacity_after": after,
            }
        )
        before = after
        advance(1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scheduler", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--part", choices=("throughput", "loads"), help="only this one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load")
    parser.add_argument("--overload-seconds", type=float, default=30.0)
    parser.add_argument(
        "--engines", type=Path, help="where the models are kept; by default they are built anew"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the tables, write nothing")
    options = parser.parse_args()
    results = json.loads(RAW.read_text()) if RAW.exists() and options.part and not options.dry_run else {}
    parts = {
        "throughput": (throughput, len(WORKLOADS) * options.rounds),
        "loads": (loads, (2 * (len(SHARES) + 1) + 1) * options.rounds),
    }
    chosen = [options.part] if options.part else list(parts)
    with tempfile.TemporaryDirectory() as temporary:
        engines = options.engines or Path(temporary)
        for workload in WORKLOADS:
            package(workload, engines)
        progress = BarProgress()
        for name in chosen:
            run, steps = parts[name]
            with progress.task(name, steps) as advance:
                results[name] = {**run(options, engines, advance), "measured": measured(options)}
    if options.dry_run:
        print(page.render(results))
        return
    RAW.write_text(json.dumps(results, indent=1) + "\n")
    page.update(PAGE, results)


def measured(options: Options) -> dict[str, Any]:
    """When, where and how long."""
    return {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "versions": f"Vernier {vernier.__version__}, Python {platform.python_version()}, ONNX Runtime "
        f"{onnxruntime.__version__}, NumPy {numpy.__version__}",
        "rounds": options.rounds,
        "seconds": options.seconds,
    }


if __name__ == "__main__":
    main()
