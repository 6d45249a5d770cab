"""The generated part of benchmarks/SCHEDULER.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

BEGIN, END = "<!-- generated: make bench-scheduler -->", "<!-- end of what is generated -->"


def update(page: Path, results: Mapping[str, Any]) -> None:
    """Replaces what stands between the marks of `page`. Raises ValueError when it has none."""
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} lacks the marks {BEGIN} and {END}; put them where the tables belong")
    page.write_text(f"{head}{BEGIN}\n\n{render(results)}\n\n{END}{tail}", encoding="utf-8")


def render(results: Mapping[str, Any]) -> str:
    """Markdown of the parts that were measured."""
    sections = [_goals(results)]
    if "throughput" in results:
        sections.append(_throughput(results["throughput"]))
    if "loads" in results:
        loads = results["loads"]
        sections += [_loads(loads), _bursts(loads), _overload(loads)]
    return "\n\n".join(sections)


# --- goals --------------------------------------------------------------------------------------------
def _goals(results: Mapping[str, Any]) -> str:
    rows = []
    for name, found in _workloads(results.get("throughput", {})):
        text = f"`{name}`, batches of {found['batch_ms']:.1f} ms: throughput of the bare session, "
        for how, key in (("a row a request", "ratio"), ("a batch a request", "whole_ratio")):
            rows.append(_goal(text + how, "≥ 95 %", found[key] >= 0.95, f"{found[key]:.1%}"))
    if "loads" in results:
        rows += _load_goals(results["loads"])
    return _table(("goal", "asked", "reached", ""), rows)


def _load_goals(loads: Mapping[str, Any]) -> list[tuple[str, ...]]:
    objective = loads["objective_ms"]
    rows = []
    for share in sorted({p["share"] for p in loads["poisson"]}):
        p99 = _median(loads, share, "vernier", "p99_ms")
        rows.append(
            _goal(f"p99 at {share:.0%} of capacity", f"≤ {objective:g} ms", p99 <= objective, f"{p99:.1f} ms")
        )
    spread = _median(loads, 0.5, "vernier", "p99_ms") / _median(loads, 0.5, "vernier", "p50_ms")
    rows.append(_goal("p99 / p50 at 50 % of capacity", "≤ 3", spread <= 3, f"{spread:.2f}"))
    recovery = median(b["recovery_ms"] for b in loads["bursts"]["vernier"])
    rows.append(
        _goal(
            "back within the objective after 200 ms of 4 × the load",
            "≤ 1 s",
            recovery <= 1000,
            f"{recovery:.0f} ms",
        )
    )
    overloads = loads["overload"]
    goodput = median(_goodput(over) for over in overloads)
    rows.append(_goal("goodput at 3 × capacity", "≥ 90 %", goodput >= 0.9, f"{goodput:.1%}"))
    p99 = median(over["p99_ms"] for over in overloads)
    rows.append(
        _goal("p99 of what is accepted then", f"≤ {objective:g} ms", p99 <= objective, f"{p99:.1f} ms")
    )
    grown = overloads[-1]["memory_after_mib"] - overloads[0]["memory_before_mib"]
    reached = f"{grown:.1f} MiB of {overloads[-1]['memory_after_mib']:.0f}"
    rows.append(_goal("memory grown meanwhile", "≤ 2 MiB", grown <= 2, reached))
    return rows


def _goal(text: str, asked: str, is_met: bool, reached: str) -> tuple[str, ...]:
    return text, asked, reached, "met" if is_met else "**missed**"


# --- tables -------------------------------------------------------------------------------------------
def _throughput(part: Mapping[str, Any]) -> str:
    rows = [
        (
            f"`{name}`",
            str(found["batch"]),
            f"{found['batch_ms']:.1f}",
            f"{median(found['bare']):.0f}",
            f"{median(found['served']):.0f}",
            f"{median(found['whole']):.0f}",
            *(f"{found[key]:.1%}" for key in ("ratio", "whole_ratio")),
        )
        for name, found in _workloads(part)
    ]
    head = (
        "model",
        "batch",
        "ms a batch",
        "bare, rows/s",
        "a row a request",
        "a batch a request",
        "a row ÷ bare",
        "a batch ÷ bare",
    )
    text = (
        "Closed loop, rows per second: requests of one row on four times as many connections as a batch has rows, and "
        "requests of a whole batch on four connections. What is missing beside the bare session is what HTTP costs on "
        "the same core."
    )
    return f"## Throughput\n\n{text} {_measured(part)}\n\n{_table(head, rows)}"


def _loads(loads: Mapping[str, Any]) -> str:
    rows = []
    virtual = {(v["share"], v["policy"]): v for v in loads["virtual"]}
    for share in sorted({p["share"] for p in loads["poisson"]}):
        for policy in ("vernier", "fixed 2 ms"):
            simulated = virtual[share, policy]
            refused = [
                sum(n for status, n in p["statuses"].items() if str(status) == "429") / max(1, p["requests"])
                for p in _points(loads, share, policy)
            ]
            rows.append(
                (
                    f"{share:.0%}",
                    policy,
                    *(f"{_median(loads, share, policy, key):.1f}" for key in ("p50_ms", "p99_ms")),
                    f"{median(refused):.2%}",
                    *(f"{simulated[key]:.1f}" for key in ("p50_ms", "p99_ms")),
                    f"{simulated['refused']:.2%}",
                )
            )
    head = ("load", "policy", "p50, ms", "p99, ms", "refused", "simulated p50", "simulated p99", "refused")
    curve = ", ".join(f"{rows}: {ms:.1f}" for rows, ms in loads["curve_ms"].items())
    text = (
        f"`{loads['model']}`, capacity {loads['capacity']:.0f} requests/s (closed loop), objective "
        f"{loads['objective_ms']:g} ms (four batches). Milliseconds a batch of the bare session: {curve}."
    )
    return f"## Poisson loads\n\n{text} {_measured(loads)}\n\n{_table(head, rows)}\n\n{_reasons(loads)}"


def _reasons(loads: Mapping[str, Any]) -> str:
    """Why batches left, by policy."""
    texts = []
    for policy, counts in loads["dispatched"].items():
        total = max(1, sum(counts.values()))
        texts.append(f"{policy}: " + ", ".join(f"{name} {n / total:.0%}" for name, n in counts.items() if n))
    return f"Why batches left. {'; '.join(texts)}."


def _bursts(loads: Mapping[str, Any]) -> str:
    keys = ("recovery_ms", "missed_in_burst", "p99_before_ms", "p99_later_ms")
    rows = []
    for policy, found in loads["bursts"].items():
        recovery, missed, before, later = (median(b[key] for b in found) for key in keys)
        rows.append((policy, f"{recovery:.0f}", f"{missed:.1%}", f"{before:.1f}", f"{later:.1f}"))
    head = ("policy", "recovery, ms", "missed in the burst", "p99 before, ms", "p99 from 1 s after, ms")
    text = (
        "Half of capacity, four times that for 200 ms. Recovery: from the end of the burst until the last request that "
        "was refused or late."
    )
    return f"## Bursts\n\n{text}\n\n{_table(head, rows)}"


def _overload(loads: Mapping[str, Any]) -> str:
    rows = [
        (
            f"{over['seconds']:.0f}",
            f"{over['requests'] / over['seconds']:.0f}",
            f"{over['goodput']:.0f}",
            f"{over['capacity_before']:.0f} → {over['capacity_after']:.0f}",
            f"{_goodput(over):.1%}",
            f"{over['p50_ms']:.1f}",
            f"{over['p99_ms']:.1f}",
            ", ".join(f"{status}: {count}" for status, count in sorted(over["statuses"].items())),
            f"{over['memory_before_mib']:.1f} → {over['memory_after_mib']:.1f}",
        )
        for over in loads["overload"]
    ]
    head = (
        "seconds",
        "offered/s",
        "in time/s",
        "capacity, before → after",
        "goodput",
        "p50 accepted, ms",
        "p99 accepted, ms",
        "answers",
        "memory, MiB",
    )
    text = (
        "Three times capacity, which is measured anew just before and just after: what a shared machine can do changes "
        "within minutes. Goodput is held against the mean of both. A line for each round; the goals are held against "
        "the medians."
    )
    return f"## Overload\n\n{text}\n\n{_table(head, rows)}"


# --- helpers ------------------------------------------------------------------------------------------
def _workloads(part: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, found) for name, found in part.items() if name != "measured"]


def _points(loads: Mapping[str, Any], share: float, policy: str) -> list[Mapping[str, Any]]:
    return [p for p in loads["poisson"] if p["share"] == share and p["policy"] == policy]


def _goodput(over: Mapping[str, Any]) -> float:
    """Answers in time, as a share of what was the capacity around them."""
    return float(over["goodput"] / mean((over["capacity_before"], over["capacity_after"])))


def _median(loads: Mapping[str, Any], share: float, policy: str, key: str) -> float:
    return median(p[key] for p in _points(loads, share, policy))


def _measured(part: Mapping[str, Any]) -> str:
    m = part["measured"]
    return f"Medians of {m['rounds']} rounds of {m['seconds']:g} s. {m['date']}, {m['machine']}; {m['versions']}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
