"""The wall clock jumps by months, forward and back, while requests are served: only the dates in the log change."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.support.load import ROW, Load, settled
from tests.support.packages import slow_model, write_package
from tests.support.server import serve
from vernier.api.auth.security import digest_of

FRONT, LIMITED = "front-ends-key", "limited-key"
DAY_S = 86400


def faked_clock(offsets: Path) -> list[str]:
    """A command prefix under which the wall clock is off by what the file says; the monotonic clock is left alone."""
    faketime = shutil.which("faketime")
    if faketime is None:
        pytest.fail("faketime is missing: install Debian's package `faketime`")
    # the tool's own environment names its library, wherever the distribution put it
    told = subprocess.run([faketime, "-f", "+0", "env"], capture_output=True, text=True, check=True).stdout
    (library,) = [line for line in told.splitlines() if line.startswith("LD_PRELOAD=")]
    return [
        "env",
        library,
        "FAKETIME_DONT_FAKE_MONOTONIC=1",
        "FAKETIME_CACHE_DURATION=1",  # seconds after which the file is read again
        f"FAKETIME_TIMESTAMP_FILE={offsets}",
    ]


def dates(log: str) -> set[str]:
    return {json.loads(line)["time"][:7] for line in log.splitlines() if line.startswith("{")}


def test_a_wall_clock_that_jumps_changes_nothing(engines: Path, tmp_path: Path) -> None:
    write_package(engines, "slow", model=slow_model(layers=10))
    keys = tmp_path / "keys.toml"
    keys.write_text(
        f'[[key]]\nname = "front"\nsha256 = "{digest_of(FRONT)}"\n'
        f'[[key]]\nname = "limited"\nsha256 = "{digest_of(LIMITED)}"\nrequests_per_s = 1\n'
    )
    offsets = tmp_path / "offsets"
    offsets.write_text("+0\n")
    settings = {"api_keys_file": str(keys), "access_log": "true"}
    with (
        serve(engines, tmp_path / "log", prefix=faked_clock(offsets), **settings) as server,
        httpx.Client(base_url=server.url, headers={"x-api-key": LIMITED}, timeout=30) as limited,
    ):
        began = time.monotonic()
        load = Load(server, "slow", clients=4, headers={"x-api-key": FRONT}, timeout_ms=10_000)
        seen = dates(server.log)
        for days in (60, -365):
            load.wait_for(20)
            while limited.post("/v1/predict", json={"inputs": ROW}).status_code == 200:
                pass
            offsets.write_text(f"{days * DAY_S:+d}\n")
            limit = time.monotonic() + 20
            while len(dates(server.log)) == len(seen):
                assert time.monotonic() < limit, "the clock that the service sees does not jump"
                time.sleep(0.1)
            seen = dates(server.log)
            load.wait_for(20)
            time.sleep(1.0)  # the window of the limited key; by the wall clock it is months, or has not begun
            answer = limited.post("/v1/predict", json={"inputs": ROW, "timeout_ms": 10_000})
            assert answer.status_code == 200, answer.text
            timing = answer.json()["timing"]
            assert 0 <= timing["queue_ms"] <= 10_000
            assert 0 <= timing["compute_ms"] <= 10_000
        load.stop()
        took = time.monotonic() - began
        assert load.broken == load.bodies == []
        assert set(load.statuses) == {200}
        settled(server, "slow")
        assert server.get("/v2/health/ready").status_code == 200
        assert 0 < server.metric("vernier_request_duration_seconds_sum", model="slow") < 5 * took
        server.terminate()
        assert server.wait() == 0
