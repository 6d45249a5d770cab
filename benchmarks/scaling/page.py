"""benchmarks/SCALING.md and its picture, out of the figures alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.goals import Ratio
from benchmarks.scaling.cases import CASES, GROWTH, Case
from benchmarks.scaling.chart import picture
from benchmarks.scaling.goals import OURS, failures, verdicts
from benchmarks.scaling.results import Results, Run, Spot, comparable, figures, median, ratio

TITLES = {
    OURS: "Vernier",
    "vernier-before": "Vernier before",
    "mosec": "MOSEC",
    "fastapi": "FastAPI + ONNX Runtime",
}
_HEAD = """# Vernier on several cores

Written by `make bench-peers CORES=8` (`python -m benchmarks.peers --cores 8`); the raw figures stand in
[SCALING.json](SCALING.json).

A server gets the first cores of the machine, with all its processes; `wrk` gets those that no server uses. Servers are
started anew for each measurement and take turns. Before each one, answers under the same load are compared with ONNX
Runtime's. Figures are medians of the rounds; a ratio is the median of the rounds' ratios. `Vernier before` is the
service as it was with one process. MOSEC runs with the number of workers that was best of 1, 2, 4 and 8 for each
case, FastAPI with one uvicorn worker for each core. All compute with ONNX Runtime on the CPU, an operator on one
thread.
"""


def write(page: Path, svg: Path, results: Results) -> None:
    """Writes both; the picture shows the machine that was measured last."""
    page.write_text(render(results, svg.name), encoding="utf-8")
    for runs in comparable(results)[:1]:
        drawn = chart(runs)
        if drawn is not None:
            svg.write_text(drawn, encoding="utf-8")


def render(results: Results, svg: str = "SCALING.svg") -> str:
    """Markdown; a section for each machine."""
    sections = [_HEAD]
    for number, runs in enumerate(comparable(results)):
        sections += _machine(runs)
        if number == 0 and chart(runs) is not None:
            sections.append(f"![requests per second over cores]({svg})\n")
        sections.append(_growth(runs))
        for size in _sizes(runs):
            sections += [_case(runs, size, case) for case in CASES.values() if _is_shown(runs, size, case)]
        sections += [_failed(runs), _versions(runs)]
    return "\n".join(section for section in sections if section)


def chart(runs: Sequence[Run]) -> str | None:
    """The picture of small JSON; None when it was measured on fewer than two numbers of cores."""
    curves = {}
    for server, title in TITLES.items():
        rates = {size: median(runs, Spot(size, GROWTH, server), "rate") for size in _sizes(runs)}
        if found := {size: rate for size, rate in rates.items() if rate is not None}:
            curves[title] = found
    if len({size for curve in curves.values() for size in curve}) < 2:
        return None
    return picture(f"{CASES[GROWTH].title}: requests/s over the server's cores", curves)


# --- sections -------------------------------------------------------------------------------------
def _machine(runs: Sequence[Run]) -> list[str]:
    last = runs[-1]
    machine = last["machine"]
    dates = sorted({run["date"] for run in runs})
    worst = max((cell["stolen"] for run in runs for cell in run["cells"]), default=0.0)
    rounds = sum(len({cell["round"] for cell in run["cells"]}) for run in runs)
    rows = []
    for verdict in verdicts(runs):
        goal, reached = verdict.goal, verdict.reached
        said = "not measured" if reached is None else f"{reached.median:.2f}"
        met = {None: "", True: "met", False: "**MISSED**"}[verdict.is_met]
        rows.append((goal.text, f"{goal.sign} {goal.limit:g}", said, _spread(reached), met))
    lost = failures(runs)
    return [
        f"## {machine['cpu']}, {machine['cores']} processors\n",
        f"{machine['system']}, Python {machine['python']}, {_count(machine['threads_per_core'], 'processor')} a core; "
        f"{last['wrk']} on {_count(last['load_cores'], 'core')}; {_count(len(runs), 'run')} with "
        f"{_count(rounds, 'round')} in all, measurements of {last['seconds']} s; "
        f"{' to '.join(sorted({dates[0], dates[-1]}))}; serving code {last['code']}. "
        f"The hypervisor took {worst:.1%} of the processors' time in the worst measurement. "
        f"Vernier refused or left unanswered {_count(lost, 'request')} in all.\n",
        "### Goals\n",
        _table(("ratio", "goal", "median", "of the rounds", ""), rows),
    ]


def _growth(runs: Sequence[Run]) -> str:
    servers = _servers(runs)
    rows = []
    for size in _sizes(runs):
        rates = {server: median(runs, Spot(size, GROWTH, server), "rate") for server in servers}
        if not any(rates.values()):
            continue
        row = [str(size)]
        for server in servers:
            rate = rates[server]
            beside = ratio(runs, Spot(size, GROWTH, OURS), Spot(size, GROWTH, server), "rate")
            row.append("" if rate is None else f"{rate:,.0f}")
            if server != OURS:
                row.append("" if beside is None else f"{beside.median:.2f}")
        rows.append(tuple(row))
    if not rows:
        return ""
    columns = ["cores"]
    for server in servers:
        columns += [TITLES[server]] if server == OURS else [TITLES[server], "Vernier ÷ it"]
    return (
        f"### Requests per second by cores: {CASES[GROWTH].title[0].lower()}{CASES[GROWTH].title[1:]}\n\n"
        + _table(tuple(columns), rows)
    )


def _case(runs: Sequence[Run], size: int, case: Case) -> str:
    rows = []
    for server in _servers(runs):
        spot = Spot(size, case.name, server)
        rates = figures(runs, spot, "rate")
        if not rates:
            continue
        p99 = figures(runs, spot, "p99_ms")
        beside = ratio(runs, Spot(size, case.name, OURS), spot, "rate")
        lost = sum(figures(runs, spot, "errors")) + sum(figures(runs, spot, "refused"))
        rows.append(
            (
                TITLES[server],
                _processes(runs, spot),
                f"{statistics.median(rates):,.0f}",
                f"{min(rates):,.0f} – {max(rates):,.0f}",
                f"{_middle(runs, spot, 'p50_ms'):.2f}",
                f"{_middle(runs, spot, 'p99_ms'):.2f}",
                f"{min(p99):.2f} – {max(p99):.2f}" if p99 else "",
                f"{_middle(runs, spot, 'busy_cores'):.1f}",
                f"{_middle(runs, spot, 'load_busy_cores'):.1f}",
                f"{lost:.0f}",
                "" if server == OURS or beside is None else f"{beside.median:.2f}",
            )
        )
    columns = (
        *("server", "processes", "requests/s", "of the rounds", "p50 ms", "p99 ms", "of the rounds"),
        *("cores busy", "load's cores busy", "errors", "Vernier ÷ it"),
    )
    return f"### {case.title}, {_count(size, 'core')}\n\n" + _table(columns, rows)


def _failed(runs: Sequence[Run]) -> str:
    lines = [f"- {name}: {reason}" for run in runs for name, reason in run["failed"].items()]
    return "Not measured, or not to the end:\n\n" + "\n".join(dict.fromkeys(lines)) + "\n" if lines else ""


def _versions(runs: Sequence[Run]) -> str:
    rows = [
        (TITLES.get(name, name), ", ".join(f"{package} {version}" for package, version in packages.items()))
        for name, packages in runs[-1]["versions"].items()
    ]
    return "### Versions\n\n" + _table(("", "installed"), rows)


# --- pieces ---------------------------------------------------------------------------------------
def _sizes(runs: Sequence[Run]) -> list[int]:
    return sorted({cell["size"] for run in runs for cell in run["cells"]})


def _servers(runs: Sequence[Run]) -> list[str]:
    measured = {cell["server"] for run in runs for cell in run["cells"]}
    return [server for server in TITLES if server in measured]


def _is_shown(runs: Sequence[Run], size: int, case: Case) -> bool:
    return any((cell["size"], cell["case"]) == (size, case.name) for run in runs for cell in run["cells"])


def _processes(runs: Sequence[Run], spot: Spot) -> str:
    """How many processes or workers were asked for; empty for who decides alone."""
    counts = sorted({int(count) for count in figures(runs, spot, "processes")} - {0})
    return " or ".join(map(str, counts))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _middle(runs: Sequence[Run], spot: Spot, figure: str) -> float:
    found = median(runs, spot, figure)
    return 0.0 if found is None else found


def _spread(reached: Ratio | None) -> str:
    return "" if reached is None else f"{reached.low:.2f} – {reached.high:.2f}"


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
