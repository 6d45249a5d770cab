"""The engines folder is watched: packages come, change and go under load, and no request notices."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.support.load import ROW, Load, settled
from tests.support.packages import mlp_model, write_package
from tests.support.server import Server, administrator, serve

#: What the service promises: from the rename to the first answer.
SOON_S = 5.0
#: Long enough for the watch to look twice, and then some.
LOOKS_S = 1.5


def until(condition: Callable[[], bool], timeout_s: float = 20) -> float:
    """Waits for `condition` and returns the seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s
        time.sleep(0.02)
    return time.monotonic() - started


def publish(engines: Path, staging: Path, name: str, version: int, seed: int = 0) -> None:
    """In one rename, as the builder does."""
    shutil.rmtree(staging, ignore_errors=True)
    package = write_package(staging, name, version, mlp_model(seed=seed))
    (engines / name).mkdir(exist_ok=True)
    package.rename(engines / name / str(version))


def served(server: Server) -> set[tuple[str, str]]:
    return {(m["name"], m["version"]) for m in server.get("/v1/models").json()["models"]}


def answers(server: Server, name: str, version: int) -> bool:
    return server.predict(ROW, model=name, version=str(version)).status_code == 200


@pytest.mark.parametrize("fronts", ["1", "0"])
def test_packages_appear_and_vanish_under_load(fronts: str, engines: Path, tmp_path: Path) -> None:
    """With the default interval. Version by version: the newest answers, and its predecessor is removed."""
    publish(engines, tmp_path / "staging", "mlp", 1)
    with serve(engines, tmp_path / "log", watch_s="2", fronts=fronts) as server:
        load = Load(server, "mlp", clients=4)
        for version in (2, 3):
            publish(engines, tmp_path / "staging", "mlp", version, seed=version)
            assert until(lambda: answers(server, "mlp", version)) < SOON_S  # noqa: B023
            shutil.rmtree(engines / "mlp" / str(version - 1))
        until(lambda: served(server) == {("mlp", "3")})
        load.wait_for(50)
        load.stop()
        assert not load.broken
        assert set(load.statuses) == {200}
        settled(server, "mlp")
        assert '"the package is gone"' in server.log


def test_a_service_without_packages_becomes_ready_when_one_appears(engines: Path, tmp_path: Path) -> None:
    with serve(engines, tmp_path / "log", ready=False, watch_s="0.2") as server:
        assert "no engine package" in server.wait_until("/v2/health/ready", 503).json()["error"]
        publish(engines, tmp_path / "staging", "mlp", 1)
        server.wait_until("/v2/health/ready", 200, timeout_s=SOON_S)
        assert answers(server, "mlp", 1)


def test_a_copy_in_the_making_is_not_seen_and_a_damaged_package_is_named_once(
    engines: Path, tmp_path: Path
) -> None:
    write_package(engines, "good")
    source = write_package(tmp_path / "source", "copied")
    with serve(engines, tmp_path / "log", watch_s="0.1") as server:
        target = engines / "copied" / "1"
        target.mkdir(parents=True)
        for path in sorted(source.iterdir(), reverse=True):
            data = path.read_bytes()
            with (target / path.name).open("wb") as stream:
                for start in range(0, len(data), len(data) // 2 + 1):
                    stream.write(data[start : start + len(data) // 2 + 1])
                    stream.flush()
                    time.sleep(0.3)
        until(lambda: answers(server, "copied", 1))
        assert '"package refused"' not in server.log

        publish(engines, tmp_path / "staging", "bad", 1)
        model = engines / "bad" / "1" / "fp32.onnx"
        until(lambda: answers(server, "bad", 1))
        intact = model.read_bytes()
        model.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
        until(lambda: '"package refused"' in server.log)
        time.sleep(LOOKS_S)
        assert server.log.count('"package refused"') == 1
        assert "does not have the sha256" in server.log
        assert server.metric("vernier_package_refused_total", model="bad") == 1
        assert answers(server, "bad", 1)  # what was proven is served on
        model.write_bytes(intact)
        until(lambda: server.log.count('"model loaded"') == 4)
        assert server.log.count('"package refused"') == 1


def test_what_was_unloaded_by_hand_stays_so_until_its_files_change(engines: Path, tmp_path: Path) -> None:
    setting, headers = administrator(tmp_path)
    publish(engines, tmp_path / "staging", "other", 1)
    publish(engines, tmp_path / "staging", "mlp", 1)
    with serve(engines, tmp_path / "log", watch_s="0.1", **setting) as server:
        route = f"{server.url}/v2/repository/models/mlp"
        assert httpx.post(f"{route}/unload", headers=headers).status_code == 200
        time.sleep(LOOKS_S)
        assert served(server) == {("other", "1")}
        assert httpx.post(f"{route}/load", headers=headers).status_code == 200
        assert served(server) == {("other", "1"), ("mlp", "1")}
        assert httpx.post(f"{route}/unload", headers=headers).status_code == 200
        shutil.rmtree(engines / "mlp" / "1")
        publish(engines, tmp_path / "staging", "mlp", 1, seed=1)
        until(lambda: answers(server, "mlp", 1))


def test_a_folder_that_loses_everything_costs_nothing_that_is_served(engines: Path, tmp_path: Path) -> None:
    publish(engines, tmp_path / "staging", "mlp", 1)
    with serve(engines, tmp_path / "log", watch_s="0.1") as server:
        engines.rename(tmp_path / "unmounted")
        until(lambda: "served on" in server.log)
        time.sleep(LOOKS_S)
        assert answers(server, "mlp", 1)
        assert server.log.count("served on") == 1
        (tmp_path / "unmounted").rename(engines)
        time.sleep(LOOKS_S)
        assert server.log.count('"model loaded"') == 1


def test_the_watch_can_be_left_out(engines: Path, tmp_path: Path) -> None:
    publish(engines, tmp_path / "staging", "mlp", 1)
    with serve(engines, tmp_path / "log", watch_s="0") as server:
        publish(engines, tmp_path / "staging", "mlp", 2)
        time.sleep(3)
        assert served(server) == {("mlp", "1")}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_packages_in_a_row_under_load_cost_no_request_and_no_memory(
    engines: Path, tmp_path: Path
) -> None:
    publish(engines, tmp_path / "staging", "mlp", 1)
    memory: list[int] = []
    with serve(engines, tmp_path / "log", watch_s="2") as server:
        load = Load(server, "mlp", clients=4)
        for version in range(2, 102):
            publish(engines, tmp_path / "staging", "mlp", version, seed=version)
            assert until(lambda: answers(server, "mlp", version)) < SOON_S  # noqa: B023
            shutil.rmtree(engines / "mlp" / str(version - 1))
            memory.append(server.memory_bytes)
        load.stop()
        assert not load.broken
        assert set(load.statuses) == {200}
        settled(server, "mlp")
    early, late = sorted(memory[20:40])[10], sorted(memory[80:])[10]
    assert late < 1.05 * early, f"{early / 1e6:.0f} MB grew to {late / 1e6:.0f} MB"
