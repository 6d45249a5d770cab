"""`python -m benchmarks.peers` without --cores: see the package."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import benchmarks.peers
from benchmarks.load import wrk
from benchmarks.machine import processor
from benchmarks.peers import clients, newcomers, page
from benchmarks.peers.decoding import decoding
from benchmarks.peers.environments import InstallError, install
from benchmarks.peers.goals import GOALS, is_met, ratio
from benchmarks.peers.peers import PEERS
from benchmarks.peers.rounds import measure_part

FOLDER = Path(__file__).resolve().parents[1]
RESULTS, PAGE = FOLDER / "PEERS.json", FOLDER / "PEERS.md"
SERVED = ("json", "binary", "large")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=benchmarks.peers.__doc__)
    parts = ("install", *SERVED, "clients", "newcomers", "decode")
    parser.add_argument("--part", action="append", choices=parts, help="only this; may be given again")
    parser.add_argument("--only", action="append", default=[], help="only this peer; may be given again")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where figures are merged into")
    parser.add_argument("--wheels", type=Path, help="install from this folder; see benchmarks.peers.carry")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed, one for the server and one for the load")
    chosen = options.part or parts
    console = Console()
    results: dict[str, Any] = json.loads(options.results.read_text()) if options.results.is_file() else {}
    peers = [peer for peer in PEERS if not options.only or peer.name in options.only]
    steps = len(peers) * ("install" in chosen) + ("decode" in chosen)
    for part in SERVED:
        served = sum(part in peer.says for peer in peers)
        steps += served * (1 + options.rounds) * (part in chosen)
    steps += clients.steps(options.rounds) * ("clients" in chosen)
    steps += newcomers.steps(options.rounds) * ("newcomers" in chosen)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps)

        def say(text: str) -> None:
            progress.update(task, description=text)
            progress.advance(task)

        for part in chosen:
            if part == "install":
                install_all(say, console)
            else:
                results[part] = {**circumstances(), **measured(part, options, say)}
                options.results.write_text(json.dumps(results, indent=1) + "\n")
    if options.results == RESULTS:
        page.update(PAGE, results)
    for goal in GOALS:
        reached = ratio(results[goal.part], goal.peer, goal.figure) if goal.part in results else None
        if reached is not None:
            verdict = "met" if is_met(goal, reached) else "MISSED"
            console.print(f"{goal.text}: {reached.median:.2f} (goal {goal.limit:g}) {verdict}")


def install_all(say: Callable[[str], None], console: Console) -> None:
    for peer in PEERS:
        say(f"installing {peer.title}")
        try:
            install(peer)
        except InstallError as error:
            console.print(f"{peer.title} cannot be installed: {error}")


def measured(part: str, options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    if part == "decode":
        say("decoding JSON")
        return {"times_ms": decoding()}
    if part == "clients":
        return asdict(clients.measure_clients(options.rounds, options.seconds, say))
    if part == "newcomers":
        return asdict(newcomers.measure_newcomers(options.rounds, say))
    return asdict(measure_part(part, options.rounds, options.seconds, set(options.only), say))


def circumstances() -> dict[str, Any]:
    """Machine and day."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "wrk": wrk.version(),
    }
