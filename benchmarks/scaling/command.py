"""`python -m benchmarks.peers --cores N`: see the package."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import benchmarks.scaling
from benchmarks.load import wrk
from benchmarks.machine import processor, threads_per_core
from benchmarks.peers.environments import InstallError
from benchmarks.peers.workloads import Workload, workload
from benchmarks.scaling import page
from benchmarks.scaling.cases import CASES, Case, cases_at, sizes_up_to
from benchmarks.scaling.contestants import FOLDER, Contestant, contestants, fingerprint
from benchmarks.scaling.goals import verdicts
from benchmarks.scaling.results import Results, comparable, known_choice, merge
from benchmarks.scaling.sessions import Cores, asking
from benchmarks.scaling.turns import Clock, Turns, steps

RESULTS = Path(__file__).resolve().parents[1] / "SCALING.json"


def main() -> None:
    options = _options()
    if options.merge:
        found = merge(*(_read(path) for path in (options.results, *options.merge)))
        _write(options.results, found)
        _print_goals(found, Console())
        return
    cores = _cores(options.cores)
    if not wrk.is_installed():
        raise SystemExit("wrk is needed: install Debian's package, or name the program in $WRK")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the servers, too
    run = _measured(options, cores)
    found = merge(_read(options.results), {"runs": [run]})
    _write(options.results, found)
    _print_goals({"runs": [run]}, Console())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=benchmarks.scaling.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cores", type=int, help="the most that a server gets")
    parser.add_argument(
        "--sizes", type=_numbers, help="numbers of cores, such as 1,8; default: 1, 2, 4 … --cores"
    )
    parser.add_argument("--case", action="append", choices=CASES, help="only this, on every number of cores")
    parser.add_argument("--only", action="append", default=[], help="only this server; may be given again")
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--seconds", type=int, default=2, help="of one measurement")
    parser.add_argument("--minutes", type=float, help="end before then, with the rounds that fitted")
    parser.add_argument(
        "--fronts", type=_numbers, default=[], help="try Vernier with so many front processes: 4,6"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the run is merged into")
    parser.add_argument(
        "--merge", type=Path, nargs="+", help="measure nothing; merge these files into --results"
    )
    parser.add_argument(
        "--wheels", type=Path, help="install what is needed from this folder; see benchmarks.peers.carry"
    )
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def _cores(most: int) -> Cores:
    """The first `most` cores of the machine for servers, the others for the load."""
    usable = sorted(os.sched_getaffinity(0))
    if not 1 <= most < len(usable):
        raise SystemExit(
            f"{most} cores for servers and one or more for the load are needed; {len(usable)} are here"
        )
    return Cores(tuple(usable[:most]), tuple(usable[most:]))


def _measured(options: argparse.Namespace, cores: Cores) -> dict[str, Any]:
    """One run, as benchmarks.scaling.results describes it. What was measured is written as it comes."""
    console = Console()
    clock = Clock(60 * options.minutes if options.minutes else None)
    chosen_sizes = options.sizes or sizes_up_to(options.cores)
    if chosen_sizes[0] < 1 or chosen_sizes[-1] > options.cores:
        raise SystemExit(f"--sizes must lie between 1 and --cores, which is {options.cores}")
    cases = {size: _cases(options, size) for size in chosen_sizes}
    names = {case.workload for size in cases for case in cases[size]}
    loads = {name: workload(name, FOLDER / "models") for name in sorted(names)}
    every = [one for one in contestants(options.fronts) if not options.only or one.name in options.only]
    began = datetime.now(UTC)
    run: dict[str, Any] = {
        "id": began.isoformat(timespec="seconds"),
        "date": began.date().isoformat(),
        "machine": machine(),
        "wrk": wrk.version(),
        "load_cores": len(cores.load),
        "seconds": options.seconds,
        "code": fingerprint(),
        "versions": {},
        "chosen": {},
        "failed": {},
        "cells": [],
    }
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress, asking(cores.load[0]) as ask:
        task = progress.add_task("preparing", total=steps(every, cases, options.rounds))

        def say(text: str) -> None:
            progress.update(task, description=text)
            progress.advance(task)
            _write_run(options.results, run)  # whatever ends this, what was measured stays

        ready = _prepared(every, list(loads.values()), run["failed"])
        run["versions"] = {one.name: one.versions() for one in ready}
        turns = Turns(ready, loads, cases, cores, options.seconds, ask, clock, say)
        turns.chosen = _known(options, run)
        turns.failed, turns.cells = run["failed"], run["cells"]
        run["chosen"] = turns.chosen
        in_time = turns.choose()
        for number in range(1, options.rounds + 1):
            in_time = in_time and turns.round(number)
            if not in_time:
                break
        progress.update(
            task, total=progress.tasks[0].completed, description="done" if in_time else "no time for more"
        )
    for name, reason in run["failed"].items():
        console.print(f"{name}: {reason}")
    return run


def _cases(options: argparse.Namespace, size: int) -> Sequence[Case]:
    if options.case:
        return [CASES[name] for name in options.case]
    return cases_at(size, options.cores)


def _prepared(
    every: Sequence[Contestant], loads: Sequence[Workload], failed: dict[str, str]
) -> list[Contestant]:
    """Those that could be installed; why the others could not is put into `failed`.

    One after the other: a package holds latencies that its build measures.
    """
    ready = []
    for one in every:
        try:
            one.prepare(loads)
            ready.append(one)
        except InstallError as error:
            failed[one.peer.title] = f"cannot be installed: {error}"
    return ready


def _known(options: argparse.Namespace, run: Mapping[str, Any]) -> dict[str, Any]:
    """What earlier runs on this machine found best, so that a short run need not try again."""

    def is_same(other: Mapping[str, Any]) -> bool:
        alike = all(other["machine"][what] == run["machine"][what] for what in ("cpu", "cores"))
        return alike and bool(other["load_cores"] == run["load_cores"])

    known = known_choice(merge(_read(RESULTS), _read(options.results)), is_same)
    return {name: sizes for name, sizes in known.items() if name == "mosec"}


def machine() -> dict[str, Any]:
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads_per_core": threads_per_core(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _read(path: Path) -> Results:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": []}


def _write_run(path: Path, run: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(merge(_read(path), {"runs": [run]}), indent=1) + "\n", encoding="utf-8")


def _write(path: Path, found: Results) -> None:
    """The figures, and with them the page and the picture beside where they are the repository's own."""
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if path.resolve() == RESULTS:
        page.write(path.with_suffix(".md"), path.with_suffix(".svg"), found)


def _print_goals(found: Results, console: Console) -> None:
    for runs in comparable(found):
        for verdict in verdicts(runs):
            if verdict.reached is not None:
                goal, said = verdict.goal, "met" if verdict.is_met else "MISSED"
                console.print(
                    f"{goal.text}: {verdict.reached.median:.2f} (goal {goal.sign} {goal.limit:g}) {said}"
                )
