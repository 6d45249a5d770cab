"""A real server and real HTTP: answers, batching, models and health."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.packages import mlp_model, run_reference
from tests.support.server import Server


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 3, 16, 17, 100])
def test_answers_equal_onnx_runtime_whatever_the_batch(mlp_server: Server, count: int) -> None:
    x = rows(count)
    answer = mlp_server.predict({"x": x.tolist()}, model="mlp", id="abc").raise_for_status().json()
    expected = run_reference(mlp_model(), {"x": x})
    for name, array in expected.items():
        np.testing.assert_allclose(np.array(answer["outputs"][name], np.float32), array, rtol=0, atol=1e-6)
    assert (answer["id"], answer["model"], answer["version"], answer["precision"]) == (
        "abc",
        "mlp",
        "1",
        "fp32",
    )
    assert answer["timing"].keys() == {"queue_ms", "compute_ms", "batch_size"}


@pytest.mark.parametrize("count", [1, 4, 9])
def test_a_fixed_batch_is_padded_and_split(mlp_server: Server, count: int) -> None:
    x = rows(count)
    answer = mlp_server.predict({"x": x.tolist()}, model="fixed").raise_for_status().json()
    model = mlp_model(seed=1)
    np.testing.assert_allclose(answer["outputs"]["y"], run_reference(model, {"x": x})["y"], atol=1e-6)


def test_versions_and_outputs_are_chosen(mlp_server: Server) -> None:
    x = rows(2)
    newest = mlp_server.predict({"x": x.tolist()}, model="twice", outputs=["y"]).json()
    oldest = mlp_server.predict({"x": x.tolist()}, model="twice", version="1", outputs=["y"]).json()
    assert (newest["version"], oldest["version"]) == ("2", "1")
    assert list(newest["outputs"]) == ["y"]
    np.testing.assert_allclose(
        oldest["outputs"]["y"], run_reference(mlp_model(seed=2), {"x": x})["y"], atol=1e-6
    )


def test_raw_bytes_are_the_single_input(mlp_server: Server) -> None:
    x = rows(5)
    response = httpx.post(
        mlp_server.url + "/v1/predict?model=mlp&outputs=z",
        content=x.tobytes(),
        headers={"content-type": "application/octet-stream"},
    )
    np.testing.assert_allclose(response.json()["outputs"]["z"], 2 * x, atol=1e-6)


async def test_two_hundred_clients_get_each_their_own_answer(mlp_server: Server) -> None:
    model = mlp_model()

    async def one(client: httpx.AsyncClient, seed: int) -> None:
        for step in range(5):
            x = rows(1 + (seed * 7 + step * 3) % 40, seed * 100 + step)
            response = await client.post("/v1/predict", json={"model": "mlp", "inputs": {"x": x.tolist()}})
            z = np.array(response.raise_for_status().json()["outputs"]["z"], np.float32)
            np.testing.assert_allclose(z, 2 * x, atol=1e-6)
            if step == 0:
                y = np.array(response.json()["outputs"]["y"], np.float32)
                np.testing.assert_allclose(y, run_reference(model, {"x": x})["y"], atol=1e-6)

    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=mlp_server.url, limits=limits, timeout=60) as client:
        await asyncio.gather(*(one(client, seed) for seed in range(200)))


def test_models_are_listed_and_described(mlp_server: Server) -> None:
    listed = mlp_server.get("/v1/models").json()["models"]
    assert [(m["name"], m["version"], m["state"]) for m in listed] == [
        ("fixed", "1", "ready"),
        ("mlp", "1", "ready"),
        ("twice", "1", "ready"),
        ("twice", "2", "ready"),
    ]
    described = mlp_server.get("/v1/models/mlp").json()
    assert described["inputs"] == [{"name": "x", "dtype": "float32", "shape": [-1, 4]}]
    assert described["runtime"] == "onnxruntime"
    assert described["warnings"] == [{"code": "few_samples", "message": "give more"}]
    assert mlp_server.get("/v1/models/fixed").json()["warnings"] == []
    assert mlp_server.get("/v1/models/none").json()["code"] == "unknown_model"


def test_health_metrics_and_documentation_answer(mlp_server: Server) -> None:
    mlp_server.predict({"x": rows(1).tolist()}, model="mlp").raise_for_status()
    assert mlp_server.get("/v2/health/live").status_code == 200
    assert mlp_server.get("/v2/health/ready").json() == {"ready": True}
    names = {family.name for family in text_string_to_metric_families(mlp_server.get("/metrics").text)}
    assert {"vernier_request_duration_seconds", "vernier_precision_active", "vernier_engine_bytes"} <= names
    assert {
        "nv_inference_request_success",
        "nv_inference_exec_count",
        "process_resident_memory_bytes",
    } <= names
    schema = mlp_server.get("/openapi.json").json()
    example = schema["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert "inputs" in example
    assert mlp_server.get("/docs").status_code == 200


def test_the_log_is_json_with_the_ids_of_requests(mlp_server: Server, tmp_path: Path) -> None:
    response = mlp_server.predict({"x": rows(1).tolist()}, model="mlp")
    assert re.fullmatch(r"[0-9a-f]{16}", response.headers["x-request-id"])
    assert response.json()["id"] == response.headers["x-request-id"]
    lines = mlp_server.log.splitlines()
    assert all(line.startswith("{") for line in lines), lines
    assert any('"ready"' in line for line in lines)
