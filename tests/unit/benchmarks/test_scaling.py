"""The benchmark on several cores: order, choice of processes, time limit, goals, merging, page and picture."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.load import Call, ClosedLoop, post, wrk
from benchmarks.peers import carry
from benchmarks.peers.environments import InstallError, install, python_of
from benchmarks.peers.peers import PEERS
from benchmarks.processes import StartError
from benchmarks.scaling import command, page, turns
from benchmarks.scaling.cases import CASES, cases_at, sizes_up_to
from benchmarks.scaling.chart import apart, picture
from benchmarks.scaling.contestants import Contestant, contestants, fingerprint
from benchmarks.scaling.goals import GOALS, failures, verdicts
from benchmarks.scaling.results import Spot, comparable, figures, known_choice, merge, ratio
from benchmarks.scaling.sessions import Cores
from benchmarks.scaling.turns import Clock, Session, Turns, steps

SERVERS = ("vernier", "vernier-before", "mosec", "fastapi")


@pytest.fixture(autouse=True)
def before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken out of git."""
    monkeypatch.setenv("PEERS_BEFORE", "/nowhere")


# --- made-up runs ---------------------------------------------------------------------------------
def cell(size: int, case: str, server: str, number: int, rate: float, **more: Any) -> dict[str, Any]:
    return {
        "size": size,
        "case": case,
        "server": server,
        "round": number,
        "processes": 0,
        "rate": rate,
        "p50_ms": 1e4 / rate,
        "p99_ms": 1e5 / rate,
        "requests": int(rate),
        "refused": 0,
        "errors": 0,
        "busy_cores": 0.9 * size,
        "load_busy_cores": 3.0,
        "stolen": 0.01,
        **more,
    }


def run_of(*cells: dict[str, Any], **more: Any) -> dict[str, Any]:
    machine = {
        "cpu": "a processor",
        "cores": 16,
        "threads_per_core": 2,
        "system": "Linux",
        "python": "3.12.1",
    }
    return {
        "id": "2026-01-01T10:00:00",
        "date": "2026-01-01",
        "machine": machine,
        "wrk": "wrk 4",
        "load_cores": 8,
        "seconds": 2,
        "code": "abc",
        "versions": {"mosec": {"mosec": "1.2.3"}},
        "chosen": {},
        "failed": {},
        "cells": list(cells),
        **more,
    }


def everything(rates: dict[str, float], sizes: Sequence[int] = (1, 8)) -> dict[str, Any]:
    """A run of one round in which each server has its rate on one core, and that times the cores on several."""
    cells = [
        cell(size, case.name, server, 1, rate * size)
        for size in sizes
        for case in cases_at(size, max(sizes))
        for server, rate in rates.items()
    ]
    return run_of(*cells)


# --- cases ----------------------------------------------------------------------------------------
def test_cores_double_up_to_the_most() -> None:
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(8) == [1, 2, 4, 8]
    assert sizes_up_to(12) == [1, 2, 4, 8, 12]


def test_every_goal_is_measured() -> None:
    for goal in GOALS:
        for spot in (goal.ours, goal.theirs):
            assert spot.server in SERVERS
            assert CASES[spot.case] in cases_at(spot.size, 8), goal.text


# --- goals ----------------------------------------------------------------------------------------
def test_goals_are_met_and_missed() -> None:
    run = everything({"vernier": 30e3, "vernier-before": 10e3, "mosec": 20e3, "fastapi": 5e3})
    found = {verdict.goal.text: verdict for verdict in verdicts([run])}
    before = found["8 cores, small JSON at 96 connections, requests/s: Vernier ÷ before"]
    assert before.is_met
    assert before.reached is not None
    assert before.reached.median == 3
    assert not found["8 cores, small JSON at 384 connections, requests/s: Vernier ÷ MOSEC at its best"].is_met
    assert found["8 cores, small JSON at 96 connections, requests/s: Vernier ÷ FastAPI with 8 workers"].is_met
    p99 = found["8 cores, small JSON at 96 connections, p99: Vernier ÷ MOSEC at its best"]
    assert p99.goal.sign == "≤"
    assert p99.is_met
    assert not found["8 cores, 96 connections, requests/s: Vernier's small binary ÷ its small JSON"].is_met


def test_a_goal_of_which_a_part_is_missing_is_neither() -> None:
    found = verdicts([everything({"vernier": 1.0})])
    assert [verdict.is_met for verdict in found if verdict.goal.theirs.server != "vernier"] == [None] * 12


def test_what_was_refused_or_lost_is_told() -> None:
    cells = [
        cell(8, "json-96", "vernier", 1, 5.0, refused=3),
        cell(8, "json-96", "vernier", 2, 5.0, errors=2),
    ]
    assert failures([run_of(*cells, cell(8, "json-96", "mosec", 1, 5.0, errors=9))]) == 5


# --- results --------------------------------------------------------------------------------------
def test_runs_are_merged_once_and_the_later_file_counts() -> None:
    first, second = run_of(id="2026-01-02"), run_of(id="2026-01-01")
    again = run_of(id="2026-01-02", code="new")
    assert merge({"runs": [first]}, {"runs": [second, again]}, {}) == {"runs": [second, again]}


def test_ratios_are_of_one_round_of_one_run() -> None:
    here, there = Spot(8, "json-96", "vernier"), Spot(8, "json-96", "mosec")
    first = run_of(
        cell(8, "json-96", "vernier", 1, 40),
        cell(8, "json-96", "mosec", 1, 10),
        cell(8, "json-96", "vernier", 2, 1000),  # its round has no other
        cell(4, "json-96", "mosec", 2, 10),
    )
    second = run_of(cell(8, "json-96", "vernier", 1, 60), cell(8, "json-96", "mosec", 1, 10), id="2026-01-02")
    found = ratio([first, second], here, there, "rate")
    assert found is not None
    assert (found.median, found.low, found.high) == (5, 4, 6)
    assert ratio([first], here, Spot(8, "json-96", "fastapi"), "rate") is None
    assert figures([first], here, "rate") == [40, 1000]


def test_machines_and_code_are_not_mixed() -> None:
    other = {**run_of()["machine"], "cores": 2}
    runs = [
        run_of(id="1", code="old"),
        run_of(id="2", code="new"),
        run_of(id="3", machine=other),
        run_of(id="4", code="new"),
    ]
    assert [[run["id"] for run in group] for group in comparable({"runs": runs})] == [["2", "4"], ["3"]]


def test_what_was_best_before_is_known_on_the_same_machine_only() -> None:
    runs = [
        run_of(chosen={"mosec": {"8": {"json-96": 4, "json-1": 1}}}),
        run_of(chosen={"mosec": {"8": {"json-96": 8}, "4": {"json-96": 2}}}),
        run_of(chosen={"mosec": {"8": {"json-96": 1}}}, load_cores=1),
    ]
    found = known_choice({"runs": runs}, lambda run: bool(run["load_cores"] == 8))
    assert found == {"mosec": {"8": {"json-96": 8, "json-1": 1}, "4": {"json-96": 2}}}
    assert known_choice({"runs": []}, lambda run: True) == {}


# --- page and picture -----------------------------------------------------------------------------
def test_the_page_tells_of_every_case_and_goal() -> None:
    run = everything({"vernier": 30e3, "vernier-before": 10e3, "mosec": 20e3}, sizes=(1, 4, 8))
    run["failed"] = {"FastAPI + ONNX Runtime": "cannot be installed: no wheel"}
    text = page.render({"runs": [run]})
    rows = [line for line in text.splitlines() if line.startswith("|")]
    goal = "8 cores, small JSON at 96 connections, requests/s: Vernier ÷ MOSEC at its best"
    assert f"| {goal} | ≥ 2 | 1.50 | 1.50 – 1.50 | **MISSED** |" in rows
    assert sum("not measured" in row for row in rows) == 2
    assert "| 4 | 120,000 | 40,000 | 3.00 | 80,000 | 1.50 |" in rows
    for case in CASES.values():
        assert f"### {case.title}, 8 cores" in text
    assert "### 600 KB binary, 64 connections, 1 core\n" in text
    assert "### Small JSON, one connection alone, 4 cores" not in text
    assert "- FastAPI + ONNX Runtime: cannot be installed: no wheel" in text
    assert "![requests per second over cores](SCALING.svg)" in text
    assert "took 1.0% of" in text
    assert "a processor, 16 processors" in text


def test_a_page_of_nothing_and_of_one_number_of_cores(tmp_path: Path) -> None:
    assert page.render({"runs": []}).startswith("# Vernier on several cores")
    one = {"runs": [everything({"vernier": 1.0}, sizes=(1,))]}
    page.write(tmp_path / "page.md", tmp_path / "page.svg", one)
    assert "![" not in (tmp_path / "page.md").read_text()
    assert not (tmp_path / "page.svg").exists()
    assert page.render({"runs": [run_of()]})  # it ended before anything was measured


def test_the_picture_is_an_image_with_a_line_for_each_server(tmp_path: Path) -> None:
    both = {"runs": [everything({"vernier": 9e4, "mosec": 2e4}, sizes=(1, 2, 4, 8))]}
    page.write(tmp_path / "page.md", tmp_path / "page.svg", both)
    root = ElementTree.fromstring((tmp_path / "page.svg").read_text())
    assert len(root.findall("{*}polyline")) == 2
    assert len(root.findall("{*}circle")) == 8
    drawn = picture("of one", {"one": {1: 3.0}})
    assert ">one<" in drawn


def test_labels_keep_their_distance() -> None:
    found = apart({"a": 100.0, "b": 98.0, "c": 50.0, "d": 97.0}, 10)
    assert found == {"a": 100.0, "b": 90.0, "d": 80.0, "c": 50.0}


def test_the_committed_page_follows_from_the_committed_figures() -> None:
    if command.RESULTS.is_file():
        text = command.RESULTS.with_suffix(".md").read_text(encoding="utf-8")
        assert page.render(json.loads(command.RESULTS.read_text(encoding="utf-8"))) == text


# --- the order of a run ---------------------------------------------------------------------------
class FakeTime:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


@contextmanager
def measuring(
    monkeypatch: pytest.MonkeyPatch, measure: Callable[..., dict[str, Any]]
) -> Iterator[list[Session]]:
    """Sessions as they are measured, by `measure` instead of by servers."""
    seen: list[Session] = []

    def session_of(
        contestant: Contestant, load: Any, cases: Any, cores: Cores, processes: int, *rest: Any
    ) -> Any:
        seen.append(Session(contestant, len(cores.server), processes, tuple(cases)))
        return measure(seen[-1])

    monkeypatch.setattr(turns, "measure_session", session_of)
    yield seen


def turns_of(now: FakeTime, limit_s: float | None = None, most: int = 4) -> Turns:
    one = contestants()[0]
    several = replace(
        one, peer=replace(one.peer, name="mosec", title="MOSEC"), processes=lambda cores: (1, 2, 4)
    )
    sizes = {size: cases_at(size, most) for size in (1, most)}
    cores = Cores(tuple(range(most)), (most,))
    loads = dict.fromkeys(("json", "binary", "large"), cast(Any, None))
    return Turns(
        [one, several], loads, sizes, cores, 2, cast(Any, None), Clock(limit_s, now), lambda text: None
    )


def test_the_best_number_of_processes_is_chosen_for_each_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def rates(session: Session) -> dict[str, Any]:
        if session.processes == 4 and session.workload == "large":
            raise StartError("too many")
        best = {"json-96": 2, "json-1": 1}
        return {
            case.name: {"rate": 9.0 if session.processes == best.get(case.name) else session.processes}
            for case in session.cases
        }

    a_run = turns_of(FakeTime())
    with measuring(monkeypatch, rates) as seen:
        assert a_run.choose()
        assert a_run.chosen["mosec"]["4"] == {
            "json-96": 2,
            "json-384": 4,
            "json-1": 1,
            "binary-96": 4,
            "large-64": 2,
        }
        assert a_run.chosen["vernier"]["1"] == {"json-96": 0, "large-64": 0}
        assert {session.contestant.name for session in seen} == {"mosec"}  # no choice, no trial
        tried = len(seen)
        assert a_run.choose()
        assert len(seen) == tried  # what is known is not tried again
        assert a_run.round(1)
    large = [session for session in seen[tried:] if session.workload == "large"]
    assert [session.processes for session in large if session.contestant.name == "mosec"] == [2, 2]
    groups = [s for s in seen[tried:] if (s.contestant.name, s.size, s.workload) == ("mosec", 4, "json")]
    assert [[case.name for case in session.cases] for session in groups] == [
        ["json-96"],
        ["json-384"],
        ["json-1"],
    ]


def test_servers_take_turns_and_who_failed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def rates(session: Session) -> dict[str, Any]:
        if session.contestant.name == "mosec" and session.size == 4 and session.workload == "binary":
            raise StartError("a wrong answer")
        return {case.name: {"rate": 1.0} for case in session.cases}

    a_run = turns_of(FakeTime())
    a_run.chosen = {"mosec": {str(n): dict.fromkeys(CASES, 1) for n in (1, 4)}}
    with measuring(monkeypatch, rates) as seen:
        a_run.choose()
        assert a_run.round(1)
        first = list(seen)
        assert a_run.round(2)
    second = seen[len(first) :]
    assert [session.contestant.name for session in first[:2]] == ["vernier", "mosec"]
    assert [session.contestant.name for session in second[:2]] == ["mosec", "vernier"]
    assert [session.size for session in first] == sorted((session.size for session in first), reverse=True)
    assert len(second) == len(first) - 1
    assert a_run.failed == {"MOSEC, 4 cores, binary": "round 1: a wrong answer"}
    assert {cell["round"] for cell in a_run.cells} == {1, 2}
    assert all(cell["server"] in SERVERS and cell["rate"] == 1.0 for cell in a_run.cells)


def test_a_run_ends_before_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = FakeTime()

    def rates(session: Session) -> dict[str, Any]:
        now.s += 20.0
        return {case.name: {"rate": 1.0} for case in session.cases}

    a_run = turns_of(now, limit_s=215.0)
    a_run.chosen = {"mosec": {str(n): dict.fromkeys(CASES, 1) for n in (1, 4)}}
    with measuring(monkeypatch, rates) as seen:
        a_run.choose()
        assert a_run.round(1)
        assert len(seen) == 10
        assert not a_run.round(2)
    assert len(seen) == 10  # the eleventh would have ended at 220
    assert turns_of(now, limit_s=None).clock.fits(seen[0], 1e9)


def test_the_progress_bar_counts_trials_too() -> None:
    a_run = turns_of(FakeTime())
    assert steps(a_run.contestants, a_run.sizes, 3) == 5 * 3 + 5 * (3 + 3)


# --- who is measured ------------------------------------------------------------------------------
def test_processes_by_cores() -> None:
    by_name = {one.name: one for one in contestants()}
    assert tuple(by_name) == SERVERS == tuple(page.TITLES)
    assert list(by_name["mosec"].processes(4)) == [1, 2, 4]
    assert list(by_name["fastapi"].processes(8)) == [8]
    assert by_name["vernier-before"].root == Path("/nowhere")
    assert by_name["vernier-before"].peer.command(cast(Any, None))[1:] == ["-m", "app"]
    assert fingerprint() == fingerprint()


def test_the_number_of_fronts_needs_a_service_that_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.scaling.contestants.has_fronts", lambda: True)
    assert list(contestants([2, 6])[0].processes(4)) == [2]
    assert list(contestants([2, 6])[0].processes(1)) == [0]
    monkeypatch.setattr("benchmarks.scaling.contestants.has_fronts", lambda: False)
    with pytest.raises(ValueError, match="no setting"):
        contestants([2])


def test_carried_wheels_serve_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = {peer.name: peer for peer in PEERS}
    monkeypatch.setenv(carry.CARRIED, "/site")
    assert python_of(by_name["fastapi"]) == python_of(by_name["vernier"])
    install(by_name["fastapi"])  # it is here, as it is in what Vernier needs
    with pytest.raises(InstallError, match="not among the wheels"):
        install(replace(by_name["mosec"], package="no-such-package"))


# --- what travels ---------------------------------------------------------------------------------
def test_what_the_other_machine_has_does_not_travel() -> None:
    needs = ["numpy>=2", "onnx>=1.17,<2", "uvloop>=0.21; platform_system != 'Windows'", "pyjwt[crypto]>=2.9"]
    assert carry.wanted([*needs, "onnxruntime==1.32.0", "pyjwt[crypto]>=2.9"]) == [
        "pyjwt[crypto]>=2.9",
        "uvloop>=0.21",
    ]
    lock = 'a-b==1.0 \\\n    --hash=sha256:00\nuvloop==0.23.0 ; platform_system != "Windows" \\\n    # via x==3\n'
    assert carry.pins(lock) == ["a-b==1.0", "uvloop==0.23.0"]


def test_a_folder_without_wheels_says_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"benchmarks\.peers\.carry"):
        carry.install(tmp_path)


# --- wrk ------------------------------------------------------------------------------------------
def test_wrk_gets_a_thread_for_each_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "another-wrk"
    said = '{"requests": 4, "us": 2000000, "p": [1, 2, 3, 4, 5], "status": 1, '
    said += '"connect": 0, "read": 2, "write": 0, "timeout": 0}'
    program.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\necho 'RESULT {said}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("WRK", str(program))
    assert wrk.executable() == str(program)
    calls = [Call(post("/", b"{}"))]
    usable = sorted(os.sched_getaffinity(0))
    summary = wrk.drive(ClosedLoop(port=1, calls=calls, seconds=1, connections=1), usable)
    assert (summary.statuses, summary.errors, summary.rate) == ({200: 3, 400: 1}, {"read": 2}, 1.5)
    assert (tmp_path / "asked").read_text().startswith("--threads 1 --connections 1 ")
    wrk.drive(ClosedLoop(port=1, calls=calls, seconds=1, connections=64), usable)
    assert (tmp_path / "asked").read_text().startswith(f"--threads {len(usable)} --connections 64 ")
