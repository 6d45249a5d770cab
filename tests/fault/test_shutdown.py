"""SIGTERM under load: readiness turns red first, every admitted request is answered, the process ends in time."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.support.load import ROW, Load
from tests.support.packages import slow_model, write_package
from tests.support.server import Server, serve


def final_totals(server: Server) -> dict[str, int]:
    for line in server.log.splitlines():
        record = json.loads(line)
        if record["message"] == "stopped":
            return dict(record["requests"]["slow/1"])
    raise AssertionError(server.log)


@pytest.mark.parametrize(("uvicorn", "status"), [(False, 0), (True, -signal.SIGTERM)], ids=["own", "uvicorn"])
def test_no_admitted_request_fails_and_the_process_ends_in_time(
    engines: Path, tmp_path: Path, uvicorn: bool, status: int
) -> None:
    """uvicorn's own command raises the signal again when it is done, so it ends with the signal's status."""
    write_package(engines, "slow", model=slow_model())
    with serve(engines, tmp_path / "log", uvicorn=uvicorn, drain_timeout_s="20") as server:
        load = Load(server, "slow", clients=16, stop_at_refusal=True)
        load.wait_for(50)
        began = time.monotonic()
        server.terminate()
        load.join()
        assert server.wait(25) == status
        assert time.monotonic() - began < 20
        totals = final_totals(server)
    assert totals["admitted"] == totals["answered"] >= 50
    assert totals["failed"] == totals["expired"] == totals["cancelled"] == 0
    assert all(status in (200, 503) for status in load.statuses)
    assert all(body["code"] == "draining" for body in load.bodies)


def test_readiness_is_red_while_requests_are_still_taken(engines: Path, tmp_path: Path) -> None:
    write_package(engines, "slow", model=slow_model(layers=2))
    with serve(engines, tmp_path / "log", drain_delay_s="2") as server:
        server.terminate()
        response = server.wait_until("/v2/health/ready", 503, timeout_s=1.5)
        assert response.json()["code"] == "draining"
        assert server.predict(ROW).status_code == 200
        assert server.wait(20) == 0


def test_a_second_signal_does_not_wait(engines: Path, tmp_path: Path) -> None:
    write_package(engines, "slow", model=slow_model(layers=2))
    with serve(engines, tmp_path / "log", drain_delay_s="60") as server:
        server.terminate()
        server.wait_until("/v2/health/ready", 503)
        server.terminate()
        assert server.wait(10) == 0
