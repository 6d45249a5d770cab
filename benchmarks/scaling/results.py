"""Figures of one run and of several: merged, paired by round, condensed.

A results file is `{"runs": [run, …]}`. A run is one invocation on one machine: `id` (when it began), `machine`, `code`
(see `contestants.fingerprint`), `seconds` of a measurement, `versions` and `failed` by server, `chosen` (by server,
number of cores and case, the number of processes that was best), and `cells`, one for each measurement: `size` (cores),
`case`, `server`, `round`, `processes`, and the figures of `sessions.measure_case`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.goals import Ratio

Run = Mapping[str, Any]
Results = Mapping[str, Sequence[Run]]


@dataclass(frozen=True)
class Spot:
    """Where a figure is found."""

    size: int
    case: str
    server: str


def merge(*files: Results) -> dict[str, list[Run]]:
    """All runs in the order of their beginning, each once; of two with one id the later file's counts."""
    runs = {run["id"]: run for file in files for run in file.get("runs", ())}
    return {"runs": [runs[name] for name in sorted(runs)]}


def comparable(results: Results) -> list[list[Run]]:
    """For each machine the runs of the code that it ran last, the machine with the latest run first.

    Figures of different machines, and of different code, are never mixed.
    """
    latest: dict[tuple[str, int], list[Run]] = {}
    for run in reversed(results["runs"]):
        machine = run["machine"]["cpu"], run["machine"]["cores"]
        same = latest.setdefault(machine, [])
        if not same or same[0]["code"] == run["code"]:
            same.append(run)
    return [list(reversed(runs)) for runs in latest.values()]


def cells(runs: Iterable[Run], spot: Spot) -> dict[tuple[str, int], Mapping[str, Any]]:
    """A spot's figures by run and round."""
    return {
        (run["id"], cell["round"]): cell
        for run in runs
        for cell in run["cells"]
        if (cell["size"], cell["case"], cell["server"]) == (spot.size, spot.case, spot.server)
    }


def figures(runs: Iterable[Run], spot: Spot, figure: str) -> list[float]:
    """All of a spot's rounds."""
    return [cell[figure] for cell in cells(runs, spot).values() if cell[figure] is not None]


def median(runs: Iterable[Run], spot: Spot, figure: str) -> float | None:
    found = figures(runs, spot, figure)
    return statistics.median(found) if found else None


def ratio(runs: Sequence[Run], ours: Spot, theirs: Spot, figure: str) -> Ratio | None:
    """Our figure divided by theirs, round by round. None when no round has both."""
    top, bottom = cells(runs, ours), cells(runs, theirs)
    found = [
        top[turn][figure] / bottom[turn][figure]
        for turn in top.keys() & bottom.keys()
        if top[turn][figure] is not None and bottom[turn][figure]
    ]
    return Ratio(statistics.median(found), min(found), max(found)) if found else None


def total(runs: Iterable[Run], server: str, figure: str) -> int:
    """The sum of a figure over everything that was measured of a server."""
    return sum(cell[figure] for run in runs for cell in run["cells"] if cell["server"] == server)


def known_choice(results: Results, is_same: Callable[[Run], bool]) -> dict[str, Any]:
    """What the latest alike run found best, by server, number of cores and case; empty when there is none."""
    found: dict[str, Any] = {}
    for run in results.get("runs", ()):
        if is_same(run):
            for server, by_size in run["chosen"].items():
                for size, by_case in by_size.items():
                    found.setdefault(server, {}).setdefault(size, {}).update(by_case)
    return found
