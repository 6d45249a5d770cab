"""The whole service on a real GPU: a real process, real HTTP, TensorRT engines.

Where TensorRT's Python is older than the service's, `python -m scripts.backport FOLDER` makes a copy of the
service for it; VERNIER_TEST_APP names that folder.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import httpx
import numpy as np
import pytest

from tests.support.executors import Shop, assert_same, random_inputs
from tests.support.server import Server, serve
from vernier.engine.cuda import count_devices

MODELS = ("mlp", "typed")
several = pytest.mark.usefixtures("two_gpus")


@pytest.fixture(scope="module")
def two_gpus() -> None:
    """A fixture, as CUDA may be asked only where the tests run, not where they are collected."""
    if count_devices() < 2:
        pytest.skip("needs two GPUs")


@pytest.fixture(scope="module")
def engines(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    for name in MODELS:
        shutil.copytree(packages / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def settings(cache: Path, **more: str) -> Dict[str, str]:
    return {"runtime": "tensorrt", "cache_dir": str(cache), "rebuild": "background", **more}


@pytest.fixture(scope="module")
def first(engines: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service that starts with no plan at all, waited for until every variant is there."""
    token = tmp_path_factory.mktemp("secrets") / "admin"
    token.write_text("administration-token")
    token.chmod(0o600)
    log = tmp_path_factory.mktemp("log") / "first.log"
    more = settings(cache, admin_token_file=str(token), monitor_share="1")
    with serve(engines, log, ready=False, **more) as server:
        server.wait_until("/v2/health/ready", 200, timeout_s=300)
        wait_for_variants(server, "mlp", 4)
        yield server


def wait_for_variants(server: Server, model: str, count: int, timeout_s: float = 300) -> Dict[str, Any]:
    limit = time.monotonic() + timeout_s
    while True:
        description = server.get("/v1/models/" + model).json()
        if len(description["variants"]) == count:
            return dict(description)
        assert time.monotonic() < limit, server.log[-3000:]
        time.sleep(0.1)


def events(server: Server, message: str) -> List[Dict[str, Any]]:
    entries = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    return [entry for entry in entries if entry["message"] == message]


def ask(
    client: httpx.Client, server: Server, name: str, inputs: Dict[str, np.ndarray], **fields: Any
) -> Tuple[Dict[str, np.ndarray], str]:
    body = {"model": name, "inputs": {k: v.tolist() for k, v in inputs.items()}, **fields}
    response = client.post(server.url + "/v1/predict", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    return {k: np.array(v, np.float32) for k, v in answer["outputs"].items()}, answer["precision"]


def in_threads(count: int, work: Any) -> None:
    failures: List[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def check_answers(server: Server, shop: Shop, clients: int = 8, each: int = 40) -> None:
    """Every client gets its own rows back, as ONNX Runtime computes them."""
    references = {name: shop.reference(name) for name in MODELS}

    def client_of(number: int) -> None:
        rng = np.random.default_rng(number)
        with httpx.Client(timeout=30) as client:
            for step in range(each):
                name = MODELS[int(rng.integers(2))]
                inputs = random_inputs(name, int(rng.integers(1, 80)), 1000 * number + step)
                found, precision = ask(client, server, name, inputs, precision="fp32")
                assert precision == "fp32"
                wanted = {k: v.astype(np.float32) for k, v in references[name](inputs).items()}
                assert_same(found, wanted)

    in_threads(clients, client_of)


def test_answers_are_onnx_runtimes_whoever_shares_the_batch(first: Server, shop: Shop) -> None:
    check_answers(first, shop)
    assert first.metric("vernier_graph_launches_total", model="mlp", kind="graph") > 0
    assert first.metric("vernier_inflight_requests") == 0


def test_it_started_without_plans_served_the_safest_and_took_the_fastest_in(first: Server) -> None:
    rebuilt = [e for e in events(first, "plan rebuilt") if e["model"] == "mlp"]
    assert next(e["precision"] for e in rebuilt) == "fp32"
    assert {e["precision"] for e in rebuilt} == {"fp32", "tf32", "fp16", "int8"}
    installed = {e["precision"] for e in events(first, "engine installed") if e["model"] == "mlp"}
    assert installed == {"tf32", "fp16", "int8"}
    variants = first.get("/v1/models/mlp").json()["variants"]
    curves = {v["precision"]: v["latency_ms"] for v in variants}
    assert all(set(curve) == {"1", "8", "64", "256"} for curve in curves.values()), curves
    active = [v["precision"] for v in variants if v["active"]]
    assert active == [min(curves, key=lambda p: curves[p]["256"])]
    assert first.metric("vernier_precision_active", model="mlp", precision=active[0]) == 1


def test_reduced_variants_answer_within_their_budget(first: Server, shop: Shop) -> None:
    inputs = random_inputs("mlp", 64, 7)
    wanted = shop.reference("mlp")(inputs)
    with httpx.Client(timeout=30) as client:
        for precision, limit in (("tf32", 5e-3), ("fp16", 2e-2), ("int8", 1.5e-1)):
            found, used = ask(client, first, "mlp", inputs, precision=precision)
            assert used == precision
            for name, array in wanted.items():
                assert np.linalg.norm(found[name] - array) <= limit * np.linalg.norm(array)


def test_variants_that_came_while_it_served_are_watched(first: Server) -> None:
    inputs = random_inputs("mlp", 4, 11)
    with httpx.Client(timeout=30) as client:
        for precision in ("tf32", "fp16", "int8"):
            limit = time.monotonic() + 30
            labels = {"model": "mlp", "precision": precision, "metric": "rel_l2"}
            while first.metric("vernier_precision_error_count", **labels) == 0:
                assert ask(client, first, "mlp", inputs, precision=precision)[1] == precision
                assert time.monotonic() < limit, first.log[-3000:]
    assert first.metric("vernier_precision_samples_total", model="mlp", result="failed") == 0


def test_a_variant_that_strays_on_live_traffic_falls_back(
    engines: Path, cache: Path, first: Server, shop: Shop, tmp_path: Path
) -> None:
    """INT8 proved itself on the golden vectors; what comes is far beyond the ranges it was calibrated for."""
    more = settings(cache, rebuild="never", precision="int8", monitor_share="1")
    inputs = {k: 30 * v for k, v in random_inputs("mlp", 8, 5).items()}
    wanted = shop.reference("mlp")(inputs)
    with serve(engines, tmp_path / "log", **more) as server, httpx.Client(timeout=30) as client:
        assert ask(client, server, "mlp", random_inputs("mlp", 8, 5))[1] == "int8"
        limit = time.monotonic() + 30
        while ask(client, server, "mlp", inputs)[1] == "int8":
            assert time.monotonic() < limit, server.log[-3000:]
        found, precision = ask(client, server, "mlp", inputs)
        assert precision == "fp16"
        for name, array in wanted.items():
            assert np.linalg.norm(found[name] - array) <= 2e-2 * np.linalg.norm(array)
        labels = {"model": "mlp", "reason": "budget", "from": "int8", "to": "fp16"}
        assert server.metric("vernier_precision_fallbacks_total", **labels) == 1


def test_raw_bodies_are_answered_too(first: Server, shop: Shop) -> None:
    inputs = random_inputs("mlp", 5, 3)
    response = httpx.post(
        first.url + "/v1/predict?model=mlp&precision=fp32",
        content=inputs["x"].tobytes(),
        headers={"content-type": "application/octet-stream"},
        timeout=30,
    )
    found = {k: np.array(v, np.float32) for k, v in response.json()["outputs"].items()}
    assert_same(found, shop.reference("mlp")(inputs))


def test_the_gpu_is_in_the_metrics(first: Server) -> None:
    names = ("utilization_ratio", "memory_used_bytes", "memory_total_bytes", "power_watts")
    samples = first.metrics()
    for name in names:
        assert len(samples["vernier_gpu_" + name]) == 1, name
    assert first.metric("vernier_gpu_memory_used_bytes") > 100 << 20
    assert first.metric("vernier_gpu_power_watts") > 10
    assert first.metric("vernier_engine_bytes", model="mlp") > 0


def test_the_second_start_builds_nothing(engines: Path, cache: Path, first: Server, tmp_path: Path) -> None:
    with serve(engines, tmp_path / "log", ready=False, **settings(cache, rebuild="never")) as server:
        server.wait_until("/v2/health/ready", 200, timeout_s=60)
        assert len(wait_for_variants(server, "mlp", 4, timeout_s=5)["variants"]) == 4
        assert events(server, "plan rebuilding") == []


def test_a_variant_that_strays_on_this_gpu_is_not_served_and_the_metrics_say_so(
    engines: Path, cache: Path, first: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "engines"
    shutil.copytree(engines / "mlp", folder / "mlp")
    path = folder / "mlp" / "1" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["variants"]["int8"]["budget"] = {"rel_l2": 1e-9}
    path.write_text(json.dumps(manifest))
    with serve(folder, tmp_path / "log", **settings(cache, rebuild="never", precision="int8")) as server:
        description = server.get("/v1/models/mlp").json()
        assert [v["precision"] for v in description["variants"] if v["active"]] == ["fp16"]
        assert server.metric("vernier_package_refused_total", model="mlp", reason="self_test:int8") == 1
        assert any("rel_l2<=1e-09" in e["reason"] for e in events(server, "plan refused"))


def test_sigterm_under_load_loses_nothing(
    engines: Path, cache: Path, first: Server, shop: Shop, tmp_path: Path
) -> None:
    with serve(engines, tmp_path / "log", **settings(cache, rebuild="never", drain_delay_s="0.5")) as server:
        statuses: List[int] = []
        bodies: List[str] = []

        def load(number: int) -> None:
            inputs = {k: v.tolist() for k, v in random_inputs("mlp", 4, number).items()}
            with httpx.Client(timeout=30) as client:
                while True:
                    try:
                        response = client.post(
                            server.url + "/v1/predict", json={"model": "mlp", "inputs": inputs}
                        )
                    except httpx.TransportError:
                        return  # the port is closed: nothing was admitted
                    statuses.append(response.status_code)
                    if response.status_code != 200:
                        bodies.append(response.text)
                        return

        threads = [threading.Thread(target=load, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        server.terminate()
        assert server.wait() == 0
        for thread in threads:
            thread.join()
        assert statuses.count(200) > 100
        assert set(statuses) <= {200, 503}, bodies[:3]
        assert all(json.loads(body)["code"] == "draining" for body in bodies)


def test_unloading_gives_the_memory_back(first: Server) -> None:
    """Last of those that share this service: it takes the models out."""
    headers = {"authorization": "Bearer administration-token"}

    def call(what: str) -> None:
        response = httpx.post(first.url + "/v2/repository/models/mlp/" + what, headers=headers, timeout=120)
        assert response.status_code == 200, response.text

    used: List[float] = []
    for _ in range(4):
        call("unload")
        used.append(first.metric("vernier_gpu_memory_used_bytes"))
        call("load")
        wait_for_variants(first, "mlp", 4)
    loaded = first.metric("vernier_gpu_memory_used_bytes")
    assert used[-1] < loaded
    assert used[-1] <= used[0] + (8 << 20), "memory of unloaded models stays taken"


class Lossy:
    """Load against a service whose GPU is then lost."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.codes: List[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._load, args=(n,)) for n in range(8)]

    def _load(self, number: int) -> None:
        inputs = {k: v.tolist() for k, v in random_inputs("mlp", 8, number).items()}
        with httpx.Client(timeout=30) as client:
            while not self._stop.is_set():
                response = client.post(
                    self._server.url + "/v1/predict", json={"model": "mlp", "inputs": inputs}
                )
                self.codes.append(response.json().get("code", "answered"))
                if response.status_code != 200:
                    time.sleep(0.01)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_a_lost_gpu_fails_what_ran_once_and_turns_readiness_red(
    engines: Path, cache: Path, first: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trigger = tmp_path / "lose"
    monkeypatch.setenv("LOSE_WHEN", str(trigger))
    monkeypatch.setenv("LOSE_GPU", "0")
    with serve(
        engines, tmp_path / "log", module="tests.gpu.losing", **settings(cache, rebuild="never")
    ) as server:
        load = Lossy(server)
        load.start()
        time.sleep(0.5)
        trigger.touch()
        reason = server.wait_until("/v2/health/ready", 503, timeout_s=10).json()
        time.sleep(0.3)
        load.stop()
        assert "until this process restarts" in json.dumps(reason)
        assert load.codes.count("answered") > 20
        assert 1 <= load.codes.count("internal") <= 8  # what ran or waited, each once
        assert load.codes[-1] == "not_ready"
        assert set(load.codes) == {"answered", "internal", "not_ready"}
        assert server.get("/v2/health/live").status_code == 200
        admitted = server.metric("vernier_requests_admitted_total", model="mlp")
        assert admitted == server.metric("vernier_requests_ended_total", model="mlp")
        assert server.metric("vernier_inflight_requests") == 0


@several
def test_two_gpus_share_the_work_and_answer_alike(
    engines: Path, cache: Path, first: Server, shop: Shop, tmp_path: Path
) -> None:
    with serve(
        engines, tmp_path / "log", ready=False, **settings(cache, rebuild="never", devices="0,1")
    ) as server:
        server.wait_until("/v2/health/ready", 200, timeout_s=120)
        check_answers(server, shop)
        used = {labels["gpu"]: v for labels, v in server.metrics()["vernier_gpu_memory_used_bytes"]}
        assert len(used) == 2
        assert min(used.values()) > 100 << 20
        assert server.metric("vernier_slots", model="mlp") == 4


@several
def test_one_of_two_gpus_lost_to_a_bad_kernel_takes_the_process_and_nothing_is_lost_silently(
    engines: Path, cache: Path, first: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA gives every context of the process up after an illegal access in one of them."""
    for index in ("1", "0"):
        trigger = tmp_path / ("lose" + index)
        monkeypatch.setenv("LOSE_WHEN", str(trigger))
        monkeypatch.setenv("LOSE_GPU", index)
        log = tmp_path / ("log" + index)
        more = settings(cache, rebuild="never", devices="0,1")
        with serve(engines, log, module="tests.gpu.losing", **more) as server:
            load = Lossy(server)
            load.start()
            time.sleep(0.5)
            trigger.touch()
            reason = server.wait_until("/v2/health/ready", 503, timeout_s=10).json()
            time.sleep(0.5)
            load.stop()
            assert "until this process restarts" in json.dumps(reason)
            assert load.codes.count("answered") > 20
            # Eight clients, two GPUs: one that failed on the first may reach the other before that is known lost.
            assert 1 <= load.codes.count("internal") <= 16
            assert set(load.codes) == {"answered", "internal", "not_ready"}, server.log[-2000:]
            admitted = server.metric("vernier_requests_admitted_total", model="mlp")
            assert admitted == server.metric("vernier_requests_ended_total", model="mlp")
            assert server.metric("vernier_inflight_requests") == 0


@several
def test_a_gpu_that_is_not_there_stops_the_start_with_a_sentence(
    engines: Path, cache: Path, tmp_path: Path
) -> None:
    with (
        pytest.raises(AssertionError, match="there is no GPU 7 here"),
        serve(engines, tmp_path / "log", **settings(cache, devices="0,7")),
    ):
        pass
    assert os.path.getsize(tmp_path / "log") < 1000
