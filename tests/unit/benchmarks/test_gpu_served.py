"""The benchmark of the service on a GPU: cores, connections, the table, and what makes it fail."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from benchmarks.gpu.served import BATCHES, ROWS, Clock, Cores, connections_of, faults, table


def seen(fronts: int, goodput: float, kind: str = ROWS, **more: Any) -> dict[str, Any]:
    return {
        "fronts": fronts,
        "kind": kind,
        "connections": 384 if kind == ROWS else 6,
        "goodput": goodput,
        "requests": int(goodput),
        "p50_ms": 6.0,
        "p99_ms": 9.0,
        "server_busy_cores": 5.5,
        "load_busy_cores": 2.0,
        "checked": 100,
        "wrong": 0,
        "statuses": {"200": int(goodput)},
        "errors": {},
        **more,
    }


def found(*rounds: tuple[float, list[dict[str, Any]]]) -> dict[str, Any]:
    return {
        "batch": 64,
        "slots": 2,
        "gpus": 1,
        "cores": {"server": 12, "load": 3},
        "driver": "wrk",
        "device": "GPU",
        "tensorrt": "8.6.0",
        "rounds": [
            {"precision": "fp16", "bare": bare, "ms": 1.9, "served": served} for bare, served in rounds
        ],
    }


@pytest.mark.parametrize(
    ("load", "count", "server", "driver", "check"),
    [
        (4, 16, range(12), range(12, 15), 15),
        (1, 2, range(1), range(1, 2), 1),
        (4, 2, range(1), range(1, 2), 1),
        (4, 1, range(1), range(1), 0),
    ],
)
def test_the_load_gets_the_last_cores_and_the_checking_client_the_very_last(
    load: int, count: int, server: range, driver: range, check: int
) -> None:
    assert Cores.split(load, range(count)) == Cores(tuple(server), tuple(driver), check)


@pytest.mark.parametrize(
    ("devices", "given", "rows"), [("0", None, [384]), ("0,1", None, [640]), ("0", [96, 512], [96, 512])]
)
def test_connections_fill_every_slot_twice(devices: str, given: list[int] | None, rows: list[int]) -> None:
    asked = argparse.Namespace(slots=2, batch=64, devices=devices, connections=given)
    assert connections_of(asked)[ROWS] == rows
    assert connections_of(asked)[BATCHES] == [6 if devices == "0" else 10]


def test_ratios_are_of_each_round_and_the_table_has_their_median() -> None:
    rounds = (
        (10_000.0, [seen(0, 5_000), seen(4, 9_900), seen(4, 150, BATCHES)]),
        (5_000.0, [seen(0, 3_000), seen(4, 4_900)]),
        (8_000.0, [seen(0, 4_000), seen(4, 8_000)]),
    )
    head, rows = found(*rounds), table(found(*rounds)).splitlines()[4:]
    assert "12 cores for the service, 3 for wrk" in table(head)
    assert [row.split("|")[2:6] + row.split("|")[8:10] for row in rows] == [
        [" 0 ", " a row ", " 384 ", " 3 ", " 4,000 ", " 50% "],
        [" 4 ", " a row ", " 384 ", " 3 ", " 8,000 ", " 99% "],
        [" 4 ", " a batch ", " 6 ", " 1 ", " 9,600 ", " 96% "],
    ]


def test_a_run_that_was_ended_before_anything_was_measured_still_has_a_table() -> None:
    nothing = found()
    del nothing["device"], nothing["tensorrt"]
    assert table(nothing).count("\n") == 3


@pytest.mark.parametrize(
    "more",
    [{"wrong": 1}, {"statuses": {"200": 9, "400": 1}}, {"errors": {"timeout": 1}}, {"checked": 0}],
)
def test_wrong_refused_and_missing_answers_are_faults(more: dict[str, Any]) -> None:
    assert not faults(found((1.0, [seen(0, 10)])))
    assert len(faults(found((1.0, [seen(0, 10), seen(4, 10, **more)])))) == 1


def test_without_a_limit_everything_fits() -> None:
    assert Clock(None).left() == float("inf")
    assert 9 < Clock(10).left() <= 10
