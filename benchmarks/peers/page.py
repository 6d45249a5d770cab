"""The generated part of benchmarks/PEERS.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.clients import PLAIN
from benchmarks.peers.goals import GOALS, is_met, ratio
from benchmarks.peers.peers import PEERS

BEGIN, END = "<!-- generated: make bench-peers -->", "<!-- end of what is generated -->"
TITLES = {peer.name: peer.title for peer in PEERS}


def update(page: Path, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Replaces what stands between the marks of `page`. Raises ValueError when it has none."""
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} lacks the marks {BEGIN} and {END}; put them where the tables belong")
    page.write_text(f"{head}{BEGIN}\n\n{render(parts)}\n\n{END}{tail}", encoding="utf-8")


def render(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of all parts that were measured."""
    sections = [_goals(parts)]
    sections += [_part(parts[name]) for name in ("json", "binary", "large") if name in parts]
    if "clients" in parts:
        sections.append(_clients(parts["clients"]))
    if "newcomers" in parts:
        sections.append(_newcomers(parts["newcomers"]))
    if "decode" in parts:
        sections.append(_decode(parts["decode"]))
    if parts:
        sections.append(_versions(parts))
    return "\n\n".join(sections)


def _goals(parts: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for goal in GOALS:
        reached = ratio(parts[goal.part], goal.peer, goal.figure) if goal.part in parts else None
        sign = "≤" if goal.figure == "p99_ms" else "≥"
        if reached is None:
            rows.append((goal.text, f"{sign} {goal.limit:g}", "not measured", "", ""))
            continue
        spread = f"{reached.low:.2f} – {reached.high:.2f}"
        met = "met" if is_met(goal, reached) else "**missed**"
        rows.append((goal.text, f"{sign} {goal.limit:g}", f"{reached.median:.2f}", spread, met))
    return "## Goals\n\n" + _table(("ratio", "goal", "median", "of the rounds", ""), rows)


def _part(part: Mapping[str, Any]) -> str:
    rows = []
    measured = (name for name, found in part["rounds"].items() if found)
    names = sorted(measured, key=lambda name: -_median(part, name, "rate"))
    for name in names:
        rates = [summary["rate"] for summary in part["rounds"][name]]
        reached = ratio(part, name, "rate")
        rows.append(
            (
                TITLES.get(name, name),
                part["formats"][name],
                f"{_median(part, name, 'rate'):,.0f}",
                f"{min(rates):,.0f} – {max(rates):,.0f}",
                f"{_median(part, name, 'core_rate'):,.0f}" if _median(part, name, "core_rate") else "",
                f"{_median(part, name, 'p50_ms'):.2f}",
                f"{_median(part, name, 'p99_ms'):.2f}",
                f"{_refused(part, name):.1%}" if _refused(part, name) else "",
                "" if name == "vernier" or reached is None else f"{reached.median:.2f}",
            )
        )
    count = max((len(found) for found in part["rounds"].values()), default=0)
    head = (
        f"## {part['title'][0].upper()}{part['title'][1:]}\n\n"
        f"Closed loop of {part['connections']} connections by `{part['driver']}`; medians of {count} rounds of "
        f"{part['seconds']:g} s, the servers in turns; {_machine(part)}; "
        f"the hypervisor took {_stolen(part):.1%} of the cores' time in the worst round. "
        "`of core time`: requests per second that the server's core worked; more than requests/s where the load could "
        "not keep it busy.\n\n"
    )
    columns = (
        "server",
        "format",
        "requests/s",
        "of the rounds",
        "of core time",
        "p50 ms",
        "p99 ms",
        "refused",
        "Vernier ÷ it",
    )
    return head + _table(columns, rows) + _failed(part)


def _failed(part: Mapping[str, Any]) -> str:
    if not part["failed"]:
        return ""
    lines = [f"- {TITLES.get(name, name)}: {reason}" for name, reason in part["failed"].items()]
    return "\n\nNot measured, or not to the end:\n\n" + "\n".join(lines)


def _clients(part: Mapping[str, Any]) -> str:
    rows = []
    for server, found in part["rounds"].items():
        plain = found[PLAIN]
        for client, summaries in found.items():
            shares = [a["rate"] / b["rate"] for a, b in zip(summaries, plain, strict=True)]
            rows.append(
                (
                    TITLES.get(server, server),
                    client,
                    f"{statistics.median(summary['rate'] for summary in summaries):,.0f}",
                    f"{statistics.median(summary['p99_ms'] for summary in summaries):.2f}",
                    "" if client == PLAIN else f"{statistics.median(shares):.2f}",
                    "" if client == PLAIN else f"{min(shares):.2f} – {max(shares):.2f}",
                )
            )
    every = [
        summary for found in part["rounds"].values() for summaries in found.values() for summary in summaries
    ]
    return (
        "## The same network, and clients that are not a benchmark\n\n"
        f"JSON, {part['requests']} different requests each; closed loop of {part['connections']} connections, "
        f"medians of {len(plain)} rounds of {part['seconds']:g} s, in turns; {_machine(part)}; the hypervisor took "
        f"{max(summary['stolen'] for summary in every):.1%} of the cores' time in the worst measurement.\n\n"
        + _table(("server", "requests", "requests/s", "p99 ms", "÷ as in a benchmark", "of the rounds"), rows)
    )


def _newcomers(part: Mapping[str, Any]) -> str:
    rows = []
    for server, found in part["rounds"].items():
        last = [summary["last_ms"] for summary in found]
        half = statistics.median(summary["median_ms"] for summary in found)
        spread = f"{min(last):,.0f} – {max(last):,.0f}"
        rows.append((TITLES.get(server, server), f"{half:,.0f}", f"{statistics.median(last):,.0f}", spread))
    return (
        "## Clients that connect at once\n\n"
        f"{part['newcomers']} clients connect at once and send the small JSON request, while {part['busy']} "
        "connections keep the server busy with it: milliseconds until half and until the last of them have their "
        f"answer. Medians of {len(found)} rounds; {_machine(part)}; the hypervisor took "
        f"{_stolen(part):.1%} of the cores' time in the worst round.\n\n"
        + _table(("server", "half, ms", "last, ms", "of the rounds"), rows)
    )


def _decode(part: Mapping[str, Any]) -> str:
    times = {name: statistics.median(found) for name, found in part["times_ms"].items()}
    rows = [
        ("Vernier's decoder" if name == "vernier" else name, f"{ms:.2f}", f"{ms / times['vernier']:.2f}")
        for name, ms in times.items()
    ]
    count = len(part["times_ms"]["vernier"])
    return (
        "## JSON decoding of a 3×224×224 array\n\n"
        f"One process, no server; medians of {count} rounds in turns; {_machine(part)}.\n\n"
        + _table(("decoder", "ms", "÷ Vernier"), rows)
    )


def _versions(parts: Mapping[str, Mapping[str, Any]]) -> str:
    found: dict[str, Mapping[str, str]] = {}
    for part in parts.values():
        found |= part.get("versions", {})
    rows = [
        (TITLES.get(name, name), ", ".join(f"{package} {version}" for package, version in packages.items()))
        for name, packages in found.items()
    ]
    drivers = sorted({part["wrk"] for part in parts.values() if part.get("wrk")})
    if drivers:
        rows.append(("load", ", ".join(drivers)))
    return "## Versions\n\n" + _table(("", "installed"), rows)


def _machine(part: Mapping[str, Any]) -> str:
    machine = part["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, {part['date']}"


def _median(part: Mapping[str, Any], name: str, figure: str) -> float:
    return statistics.median(summary.get(figure) or 0.0 for summary in part["rounds"][name])


def _refused(part: Mapping[str, Any], name: str) -> float:
    """Share of answers that are no answers: a status other than 200."""
    counts = [summary["statuses"] for summary in part["rounds"][name]]
    every = sum(sum(count.values()) for count in counts)
    return 1 - sum(count.get("200", 0) for count in counts) / every if every else 0.0


def _stolen(part: Mapping[str, Any]) -> float:
    return max((summary["stolen"] for found in part["rounds"].values() for summary in found), default=0.0)


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
