"""The comparison with other servers: its models, requests, ratios and page, and the processes that it starts."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.load import Call, ClosedLoop, measure
from benchmarks.peers import page
from benchmarks.peers.decoding import decoding
from benchmarks.peers.environments import InstallError, install
from benchmarks.peers.goals import GOALS, Goal, is_met, ratio
from benchmarks.peers.peers import PEERS, Peer
from benchmarks.peers.rounds import measure_once, stolen
from benchmarks.peers.workloads import IMAGE, workload
from benchmarks.processes import ServerProcess, StartError, free_port

PAGE = Path(page.__file__).parents[1] / "PEERS.md"


# --- models and requests --------------------------------------------------------------------------
def test_the_image_model_shows_that_all_of_the_image_came(tmp_path: Path) -> None:
    load = workload("large", tmp_path)
    assert load.x.shape == (4, *IMAGE)
    assert np.array_equal(load.y, load.x.reshape(4, -1)[:, -2:])


@pytest.mark.parametrize("name", ["json", "binary"])
def test_every_peer_is_asked_for_the_same_rows(tmp_path: Path, name: str) -> None:
    load = workload(name, tmp_path)
    assert len(np.unique(load.y)) == len(load.x)  # a mixed-up row would be noticed
    x, y = load.x[0], load.y[0]
    asked = {peer.name: peer.says[name](x, y) for peer in PEERS if name in peer.says}
    assert {"vernier", "mosec", "fastapi", "pytriton", "uvicorn"} <= asked.keys()
    for peer, call in asked.items():
        head, _, body = call.payload.partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}".encode() in head
        if name == "binary":
            assert body.endswith(x.tobytes())
        else:
            assert json.dumps(round(float(x[0]), 6)).encode() in body
        answer = load.y[1].tobytes() if name == "binary" else json.dumps([7.0] * 64).encode()
        assert call.check is not None
        assert not call.check(answer), peer


def test_who_is_missing_from_a_workload_says_why() -> None:
    for peer in PEERS:
        for name in ("json", "binary", "large"):
            if peer.package != "uvicorn":
                assert (name in peer.says) != (name in peer.why_not), (peer.name, name)
        assert peer.says.keys() == peer.formats.keys()
        assert all("==" in requirement for requirement in peer.requirements)


def test_both_decoders_are_timed() -> None:
    took = decoding(rounds=2)
    assert [len(times) for times in took.values()] == [2, 2]


# --- ratios and page ------------------------------------------------------------------------------
def part_of(rates: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    same = {"p50_ms": 1.0, "statuses": {"200": 3, "400": 1}, "stolen": 0.02}
    rounds = {
        name: [{"rate": rate, "core_rate": rate + 5e3, "p99_ms": 1e5 / rate, **same} for rate in found]
        for name, found in rates.items()
    }
    return {
        "workload": "json",
        "title": "some network",
        "driver": "wrk",
        "connections": 64,
        "seconds": 3.0,
        "rounds": rounds,
        "failed": {},
        "versions": {name: {name: "1.2.3"} for name in rates},
        "formats": dict.fromkeys(rates, "JSON"),
        "date": "2026-01-01",
        "machine": {"cpu": "a processor", "cores": 2},
        "wrk": "wrk 4",
        **more,
    }


def test_ratios_are_medians_of_each_rounds_ratio() -> None:
    part = part_of({"vernier": [100, 400, 900], "mosec": [50, 100, 150]})
    found = ratio(part, "mosec", "rate")
    assert found is not None
    assert (found.median, found.low, found.high) == (4, 2, 6)
    assert ratio(part, "pytriton", "rate") is None
    least, most = Goal("json", "mosec", "rate", 5, ""), Goal("json", "mosec", "p99_ms", 5, "")
    assert not is_met(least, found)
    assert is_met(most, found)


def test_times_are_ratios_the_other_way_round() -> None:
    found = ratio({"times_ms": {"vernier": [2.0], "orjson and NumPy": [8.0]}}, "orjson and NumPy", "rate")
    assert found is not None
    assert found.median == 4


def test_the_page_tells_what_was_met_and_missed_and_not_measured(tmp_path: Path) -> None:
    rates = {"vernier": [80e3, 100e3, 90e3], "mosec": [20e3] * 3, "fastapi": [15e3] * 3}
    text = page.render({"json": part_of(rates, failed={"ray": "it does not fit"})})
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "| small JSON, requests/s: Vernier ÷ MOSEC | ≥ 2.5 | 4.50 | 4.00 – 5.00 | met |" in rows
    assert (
        "| small JSON, requests/s: Vernier ÷ FastAPI + ONNX Runtime | ≥ 10 | 6.00 | 5.33 – 6.67 | **missed** |"
        in rows
    )
    assert sum("not measured" in row for row in rows) == len(GOALS) - 3
    assert "| Vernier | JSON | 90,000 | 80,000 – 100,000 | 95,000 | 1.00 | 1.11 | 25.0% |  |" in rows
    assert "took 2.0% of the cores' time" in text
    assert "- Ray Serve: it does not fit" in text


def test_only_what_stands_between_the_marks_is_generated(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    for _ in range(2):
        page.update(file, {"json": part_of({"vernier": [1.0]})})
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("## Goals") == 1
    file.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the marks"):
        page.update(file, {})


def test_the_committed_page_follows_from_the_committed_figures() -> None:
    results = PAGE.with_suffix(".json")
    text = PAGE.read_text(encoding="utf-8")
    assert results.is_file()
    assert page.render(json.loads(results.read_text())) in text


def test_time_that_a_hypervisor_took() -> None:
    assert stolen([0] * 8, [5, 0, 2, 1, 0, 0, 0, 2]) == 0.2
    assert stolen([1] * 8, [1] * 8) == 0


# --- processes ------------------------------------------------------------------------------------
def peer(name: str) -> Peer:
    return next(peer for peer in PEERS if peer.name == name)


def calls_of(name: str, tmp_path: Path) -> list[Call]:
    load = workload("json", tmp_path)
    return [peer(name).says["json"](x, y) for x, y in zip(load.x, load.y, strict=True)]


def test_a_server_is_held_still_measured_and_ended(tmp_path: Path) -> None:
    calls = calls_of("uvicorn", tmp_path)
    port = free_port()
    command = [sys.executable, "benchmarks/peers/servers/bare.py", str(port), "echo"]
    with ServerProcess(command, port, tmp_path / "log", core=0) as server:
        server.wait_ready(calls)
        server.pause()
        silent = measure(
            ClosedLoop(port=port, calls=calls, connections=2, seconds=0.2, grace_s=0.2)
        ).summary()
        assert silent.errors == {"unanswered": 2} or silent.requests == 0
        assert not silent.statuses
        figures = measure_once(server, calls, 1.0)
        assert figures["statuses"].keys() == {"200"}
        assert figures["core_rate"] > 0
        wrong = [Call(call.payload, calls[0].check) for call in calls]
        with pytest.raises(StartError, match="answers wrong"):
            measure_once(server, wrong, 1.0)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such port today')"]
    with (
        ServerProcess(command, free_port(), tmp_path / "log") as server,
        pytest.raises(StartError, match="ended with 1: no such port today"),
    ):
        server.wait_ready([Call(b"")])


def test_what_cannot_be_installed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.environments.FOLDER", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    mosec = peer("mosec")
    with pytest.raises(InstallError, match="No matching distribution"):
        install(mosec)
