"""A thread that dies, and a disk that is full, while requests are served."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.support.disk import on_a_small_disk
from tests.support.load import ROW, Load, settled
from tests.support.packages import mlp_model, slow_model, write_package
from tests.support.server import ROOT, Server, administrator, serve


def kill_and_wait(server: Server, load: Load, deaths: int, message: str) -> None:
    """Kills threads one after the other, each once the one before it has been noticed."""
    for death in range(1, deaths + 1):
        server.process.send_signal(signal.SIGUSR1)
        limit = time.monotonic() + 20
        while server.log.count(message) < death:
            assert time.monotonic() < limit, server.log
            time.sleep(0.02)
        load.wait_for(5)


def test_threads_that_die_are_replaced_and_only_their_batches_fail(engines: Path, tmp_path: Path) -> None:
    write_package(engines, "slow", model=slow_model(layers=10))
    write_package(engines, "watched", variants={"int8": mlp_model()})
    wanted = tmp_path / "wanted"
    settings = {
        "slots": "2",
        "monitor_share": "1",
        "models__watched__precision": "int8",
        "models__slow__max_batch": "4",
    }
    dying = {
        "prefix": ["env", f"DYING_THREAD={wanted}"],
        "module": "tests.support.dying_service",
    }
    with serve(engines, tmp_path / "log", **dying, **settings) as server:  # type: ignore[arg-type]
        load = Load(server, "slow", clients=8)
        wanted.write_text("slow-")
        kill_and_wait(server, load, 4, '"worker died"')
        load.stop()
        failed = [body for body in load.bodies if body["code"] == "internal"]
        assert load.broken == []
        assert len(failed) == len(load.bodies) == load.statuses.count(500) <= 4 * 4
        assert "SystemExit" not in str(failed)
        server.wait_until("/v2/health/ready", 200)
        assert server.metric("vernier_slots", model="slow", state="failed") == 0
        assert server.metric("vernier_requests_ended_total", model="slow", outcome="failed") == len(failed)
        assert server.predict(ROW, model="slow").status_code == 200
        settled(server, "slow")
        # the monitor's thread: answers go on, and that nobody checks them is counted
        load = Load(server, "watched", clients=2)
        wanted.write_text("watched-monitor")
        kill_and_wait(server, load, 1, '"precision monitor died"')
        load.stop()
        assert set(load.statuses) == {200}
        assert server.metric("vernier_precision_samples_total", model="watched", result="dropped") > 0
        server.terminate()
        assert server.wait() == 0


def test_a_full_disk_under_the_log_and_the_cache_stops_no_answer(engines: Path, tmp_path: Path) -> None:
    """Everything that the service writes to goes to one full file system: its log and its cache folder."""
    write_package(engines, "mlp")
    write_package(engines, "late")
    administration, admin = administrator(tmp_path)
    disk = tmp_path / "disk"
    prefix = on_a_small_disk(disk, 64, f"exec \"$@\" >'{disk}/log' 2>&1")
    settings = {
        "access_log": "true",
        "log_level": "debug",
        "cache_dir": str(disk / "cache"),
        **administration,
    }
    with serve(engines, tmp_path / "log", prefix=prefix, **settings) as server:
        inside = Path(f"/proc/{server.process.pid}/root{disk}")
        with (inside / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
            while True:
                filler.write(b"x" * 4096)
        before = (inside / "log").stat().st_size
        load = Load(server, "mlp", clients=4)
        for action, status in (("unload", 200), ("load", 200), ("load", 200)):
            load.wait_for(200)
            url = f"{server.url}/v2/repository/models/late/{action}"
            assert httpx.post(url, headers=admin, timeout=30).status_code == status
        load.stop()
        assert os.statvfs(inside).f_bavail == 0
        assert (inside / "log").stat().st_size < before + 8192
        assert load.broken == []
        assert set(load.statuses) == {200}
        assert server.get("/v2/health/ready").status_code == 200
        settled(server, "mlp")
        (inside / "filler").unlink()  # somebody made room: logging goes on
        limit = time.monotonic() + 10
        while not (inside / "log").read_text().endswith('HTTP/1.1\\" 200"}\n'):
            assert time.monotonic() < limit, (inside / "log").read_text()[-2000:]
            assert server.predict(ROW, model="mlp").status_code == 200
            time.sleep(0.05)
        server.terminate()
        assert server.wait() == 0


FILL = """
import sys
from pathlib import Path
from vernier.package.plan_cache import PlanCache
from vernier.package.plans import Target

target = Target("tensorrt", "11.0", "9.0", "NVIDIA H200")
cache = PlanCache(Path(sys.argv[1]) / "cache")
kept = cache.add(b"k" * 40_000, "fp16", target, "a" * 64)
for precision, size in (("int8", 400_000), ("fp16", 150_000)):
    try:
        cache.add(b"n" * size, precision, target, "b" * 64)
    except OSError as error:
        print(error.strerror)
again = PlanCache(cache.folder)
assert again.plans() == [kept]
assert again.read(kept) == b"k" * 40_000
print(sorted(path.suffix for path in cache.folder.iterdir()))
"""


def test_a_plan_that_finds_no_room_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    prefix = on_a_small_disk(tmp_path / "disk", 128)
    done = subprocess.run(
        [*prefix, sys.executable, "-c", FILL, str(tmp_path / "disk")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    full, again, left = done.stdout.splitlines()
    assert full == again == "No space left on device"
    assert left == str(["", ".json", ".plan"])
