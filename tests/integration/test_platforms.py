"""What KServe's v1 protocol, Vertex AI and Amazon SageMaker ask of a container, by their documented requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.support.packages import mlp_model, pair_model, run_reference, write_package
from tests.support.server import Server, serve
from vernier.api.invocations import BINARY

BATCH = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
EXPECTED = run_reference(mlp_model(), {"x": BATCH})
ROWS = BATCH.tolist()


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("several")
    write_package(root / "engines", "mlp")
    write_package(root / "engines", "pair", model=pair_model())
    with serve(root / "engines", root / "log") as server:
        yield server


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("single")
    write_package(root / "engines", "mlp")
    with serve(root / "engines", root / "log") as server:
        yield server


# --- KServe v1 and Vertex AI ----------------------------------------------------------------------
@pytest.mark.parametrize("instances", [ROWS, [{"x": row} for row in ROWS]])
def test_instances_are_predicted_row_by_row(several: Server, instances: list[object]) -> None:
    url = several.url + "/v1/models/mlp:predict"
    response = httpx.post(url, json={"instances": instances, "parameters": {"priority": 1, "mine": "x"}})
    predictions = response.json()["predictions"]
    assert list(response.json()) == ["predictions"]
    np.testing.assert_allclose([p["y"] for p in predictions], EXPECTED["y"], atol=1e-6)
    assert np.array_equal(np.array([p["z"] for p in predictions], np.float32), EXPECTED["z"])


def test_a_single_output_is_the_prediction_itself(several: Server) -> None:
    instances = [{"user": 2.0, "item": [1.0, 2.0, 3.0]}, {"user": -1.0, "item": [4.0, 5.0, 6.0]}]
    response = httpx.post(several.url + "/v1/models/pair:predict", json={"instances": instances})
    assert response.json() == {"predictions": [[2.0, 4.0, 6.0], [-4.0, -5.0, -6.0]]}


@pytest.mark.parametrize(
    ("model", "body", "status", "text"),
    [
        ("none", {"instances": ROWS}, 404, "there is no model 'none'"),
        ("mlp", {}, 400, "'instances' is missing"),
        ("mlp", [1], 400, "'instances' is missing"),
        ("mlp", {"instances": []}, 400, "is empty"),
        ("mlp", {"instances": [[1, 2, 3]]}, 400, "it must be 4"),
        ("mlp", {"instances": [{"x": ROWS[0]}, ROWS[1]]}, 400, "instance 1 must be an object with 'x'"),
        ("mlp", {"instances": [{"w": ROWS[0]}]}, 400, "has no input 'w'"),
        ("mlp", {"instances": ["text"]}, 400, "but holds 'text'"),
        ("mlp", {"instances": ROWS, "parameters": 3}, 400, "'parameters' must be an object"),
        ("pair", {"instances": [1.0]}, 400, "each instance must be an object with 'user', 'item'"),
        ("pair", {"instances": [{"user": 1.0}]}, 400, "also needs 'item'"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(
    several: Server, model: str, body: object, status: int, text: str
) -> None:
    response = httpx.post(f"{several.url}/v1/models/{model}:predict", json=body)
    assert (response.status_code, text in response.json()["error"]) == (status, True), response.text


def test_readiness_of_a_model_is_told_as_kserve_asks(several: Server) -> None:
    response = httpx.get(several.url + "/v1/models/mlp")
    assert (response.status_code, response.json()["ready"]) == (200, True)
    assert httpx.get(several.url + "/v1/models/none").status_code == 404


def test_long_instances_are_read_by_a_helper(several: Server) -> None:
    rows = np.random.default_rng(5).normal(size=(4000, 4)).tolist() * 5
    body = json.dumps({"instances": [{"x": row} for row in rows]})
    assert len(body) > 2**20
    response = httpx.post(several.url + "/v1/models/mlp:predict", content=body, timeout=60)
    assert response.status_code == 200, response.text[:200]
    z = np.array([prediction["z"] for prediction in response.json()["predictions"]], np.float32)
    assert np.array_equal(z, 2 * np.array(rows, np.float32))
    wrong = body.replace('{"x"', '{"w"')
    response = httpx.post(several.url + "/v1/models/mlp:predict", content=wrong, timeout=60)
    assert (response.status_code, response.json()["code"]) == (400, "unknown_input")


# --- Amazon SageMaker -----------------------------------------------------------------------------
def test_ping_is_readiness(single: Server) -> None:
    assert httpx.get(single.url + "/ping").status_code == 200


def test_invocations_take_any_of_the_json(single: Server) -> None:
    url = single.url + "/invocations"
    tensor = {"name": "x", "datatype": "FP32", "shape": [3, 4], "data": ROWS}
    predict = httpx.post(url, json={"inputs": {"x": ROWS}}).json()
    infer = httpx.post(url, json={"id": "seven", "inputs": [tensor]}).json()
    instances = httpx.post(url, json={"instances": ROWS}).json()
    assert infer["id"] == "seven"
    found = [
        predict["outputs"]["z"],
        np.reshape(infer["outputs"][1]["data"], (3, 4)),
        [p["z"] for p in instances["predictions"]],
    ]
    for z in found:
        assert np.array_equal(np.array(z, np.float32), EXPECTED["z"])


def test_invocations_take_bytes(single: Server) -> None:
    url = single.url + "/invocations"
    tensor = {"name": "x", "datatype": "FP32", "shape": [3, 4], "parameters": {"binary_data_size": 48}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    content_type = f"{BINARY};json-header-size={len(head)}"
    response = httpx.post(url, content=head + BATCH.tobytes(), headers={"content-type": content_type})
    media_type, _, size = response.headers["content-type"].partition(";json-header-size=")
    assert media_type == BINARY
    sizes = [
        o["parameters"]["binary_data_size"] for o in json.loads(response.content[: int(size)])["outputs"]
    ]
    z = np.frombuffer(response.content[int(size) + sizes[0] :], np.float32).reshape(3, 4)
    assert np.array_equal(z, EXPECTED["z"])
    raw = httpx.post(url, content=BATCH.tobytes(), headers={"content-type": "application/octet-stream"})
    assert raw.json()["model"] == "mlp"


def test_invocations_are_refused_in_words(single: Server, several: Server) -> None:
    url = single.url + "/invocations"
    csv = httpx.post(url, content=b"1,2,3,4", headers={"content-type": "text/csv"})
    assert (csv.status_code, "text/csv" in csv.json()["error"]) == (415, True)
    long = httpx.post(url, content=b"{}", headers={"content-type": f"{BINARY};json-header-size=99"})
    assert long.status_code == 400
    packed = httpx.post(url, content=b"{}", headers={"content-encoding": "gzip"})
    assert packed.status_code == 415
    which = httpx.post(several.url + "/invocations", json={"instances": ROWS})
    assert (which.status_code, which.json()["code"]) == (404, "unknown_model")
    named = httpx.post(several.url + "/invocations", json={"model": "mlp", "inputs": {"x": ROWS}})
    assert named.status_code == 200


def test_the_settings_that_sagemaker_s_documentation_asks_for(engines: Path, tmp_path: Path) -> None:
    """`docker run image serve`: the word behind the command changes nothing."""
    write_package(engines)
    prefix = ("bash", "-c", 'exec "$0" "$@" serve')
    with serve(engines, tmp_path / "log", prefix=prefix) as server:
        assert httpx.get(server.url + "/ping").status_code == 200
