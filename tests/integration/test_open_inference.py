"""Triton's own clients over REST: what they send and what they make of the answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator

import httpx
import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as client
import tritonclient.http.aio as client_aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.support.packages import echo_model, mlp_model, pair_model, run_reference, write_package
from tests.support.server import Server, administrator, serve
from vernier.tensors import DTYPES, numpy_dtype

BATCH = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
EXPECTED = run_reference(mlp_model(), {"x": BATCH})
ADMIN = {"authorization": "Bearer administrators-token"}


@pytest.fixture(scope="module", params=["own", "uvicorn"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("oip")
    engines = root / "engines"
    write_package(engines, "mlp")
    write_package(engines, "mlp", 2, mlp_model(seed=5))
    write_package(engines, "pair", model=pair_model())
    write_package(engines, "fixed", model=mlp_model(seed=1, batch=4))
    write_package(engines, "echo", model=echo_model(DTYPES))
    settings, _ = administrator(root)
    with serve(engines, root / "log", uvicorn=request.param == "uvicorn", **settings) as running:
        yield running


@pytest.fixture
def triton(server: Server) -> Iterator[client.InferenceServerClient]:
    with client.InferenceServerClient(f"127.0.0.1:{server.port}") as found:
        yield found


def sent(name: str, array: np.ndarray, binary: bool = True) -> client.InferInput:
    tensor = client.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    return tensor.set_data_from_numpy(array, binary_data=binary)


def predicted(triton: client.InferenceServerClient) -> dict[str, int]:
    return triton.get_inference_statistics("mlp", "1")["model_stats"][0]


# --- what the server tells ------------------------------------------------------------------------
def test_the_server_and_its_models_are_live_and_ready(triton: client.InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("mlp")
    assert triton.is_model_ready("mlp", "1")
    assert not triton.is_model_ready("mlp", "3")
    assert not triton.is_model_ready("none")


def test_metadata_names_tensors_versions_and_extensions(triton: client.InferenceServerClient) -> None:
    server = triton.get_server_metadata()
    assert server["name"] == "vernier"
    assert {"binary_tensor_data", "model_repository", "statistics"} <= set(server["extensions"])
    assert triton.get_model_metadata("mlp") == {
        "name": "mlp",
        "versions": ["1", "2"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "z", "datatype": "FP32", "shape": [-1, 4]},
        ],
    }
    assert triton.get_model_metadata("fixed")["inputs"][0]["shape"] == [-1, 4]


def test_the_configuration_has_what_load_generators_read(triton: client.InferenceServerClient) -> None:
    config = triton.get_model_config("mlp", "1")
    assert config["max_batch_size"] == 16
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [4], "optional": False}]
    assert [output["dims"] for output in config["output"]] == [[3], [4]]
    assert config["model_transaction_policy"] == {"decoupled": False}
    assert config["dynamic_batching"]["default_priority_level"] == 10
    assert "sequence_batching" not in config
    assert "ensemble_scheduling" not in config
    assert triton.get_model_config("pair")["input"][0]["dims"] == []
    assert triton.get_model_config("fixed")["max_batch_size"] == 4


def test_statistics_count_requests_rows_and_executions(triton: client.InferenceServerClient) -> None:
    before = predicted(triton)
    for _ in range(3):
        triton.infer("mlp", [sent("x", BATCH)], model_version="1")
    with pytest.raises(InferenceServerException):
        triton.infer("mlp", [sent("x", BATCH[:, :3])], model_version="1")
    after = predicted(triton)
    assert after["inference_count"] - before["inference_count"] == 9
    assert 1 <= after["execution_count"] - before["execution_count"] <= 3
    assert after["last_inference"] >= before["last_inference"]
    assert abs(after["last_inference"] / 1e3 - time.time()) < 60
    stats = after["inference_stats"]
    assert set(stats) == {
        "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss"
    }  # fmt: skip
    for name in ("success", "compute_infer"):
        assert stats[name]["count"] - before["inference_stats"][name]["count"] == 3, name
        assert stats[name]["ns"] > before["inference_stats"][name]["ns"], name
    assert stats["queue"]["count"] - before["inference_stats"]["queue"]["count"] == 3
    batches = after["batch_stats"]
    assert sum(batch["compute_infer"]["count"] for batch in batches) == after["execution_count"]
    assert all(batch["compute_infer"]["ns"] > 0 for batch in batches)
    everything = triton.get_inference_statistics()["model_stats"]
    named = [(entry["name"], entry["version"]) for entry in everything]
    assert named == [("echo", "1"), ("fixed", "1"), ("mlp", "1"), ("mlp", "2"), ("pair", "1")]
    assert len(triton.get_inference_statistics("mlp")["model_stats"]) == 2


# --- inference ------------------------------------------------------------------------------------
@pytest.mark.parametrize("binary_in", [False, True])
@pytest.mark.parametrize("binary_out", [False, True, None])
def test_inference_in_json_and_binary(
    triton: client.InferenceServerClient, binary_in: bool, binary_out: bool | None
) -> None:
    outputs = (
        None
        if binary_out is None
        else [client.InferRequestedOutput(name, binary_data=binary_out) for name in ("z", "y")]
    )
    result = triton.infer(
        "mlp", [sent("x", BATCH, binary_in)], model_version="1", outputs=outputs, request_id="seven"
    )
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("seven", "mlp", "1")
    assert [output["name"] for output in response["outputs"]] == (
        ["y", "z"] if outputs is None else ["z", "y"]
    )
    assert all(("data" in output) == (binary_out is False) for output in response["outputs"])
    np.testing.assert_allclose(result.as_numpy("y"), EXPECTED["y"], atol=1e-6)
    np.testing.assert_array_equal(result.as_numpy("z"), EXPECTED["z"])


def test_without_a_version_the_newest_answers(triton: client.InferenceServerClient) -> None:
    assert triton.infer("mlp", [sent("x", BATCH)]).get_response()["model_version"] == "2"


def test_several_inputs_in_json_and_binary_together(triton: client.InferenceServerClient) -> None:
    user, item = np.array([1.0, 2.0], np.float32), BATCH[:2, :3].copy()
    result = triton.infer("pair", [sent("item", item, binary=False), sent("user", user)])
    np.testing.assert_array_equal(result.as_numpy("z"), item * user[:, None])


@pytest.mark.parametrize("binary", [True, False])
def test_every_dtype_comes_back_bit_by_bit(triton: client.InferenceServerClient, binary: bool) -> None:
    rng = np.random.default_rng(3)
    arrays = {}
    for name in DTYPES:
        dtype = numpy_dtype(name)
        if dtype.kind == "f":
            array = (rng.normal(size=(2, 3)) * 100).astype(dtype)
            array[0, 0] = -0.0
        elif dtype.kind == "b":
            array = rng.integers(0, 2, (2, 3)).astype(dtype)
        else:
            bounds = np.iinfo(dtype)
            array = rng.integers(bounds.min, bounds.max, (2, 3), dtype, endpoint=True)
            array[1] = (bounds.min, 0, bounds.max)
        arrays[name] = array
    # the client has no JSON for FP16
    inputs = [sent(f"in_{d}", array, binary or d == "float16") for d, array in arrays.items()]
    outputs = [client.InferRequestedOutput(f"out_{d}", binary_data=binary or d == "float16") for d in DTYPES]
    result = triton.infer("echo", inputs, outputs=outputs)
    for name, array in arrays.items():
        back = result.as_numpy(f"out_{name}")
        assert (back.dtype, back.tobytes()) == (array.dtype, array.tobytes()), name


def test_texts_and_bf16_are_refused_in_words(triton: client.InferenceServerClient) -> None:
    texts = client.InferInput("x", [1, 4], "BYTES")
    texts.set_data_from_numpy(np.array([["a", "b", "c", "d"]], dtype=np.object_))
    with pytest.raises(InferenceServerException, match="sent as BYTES, but the model takes FP32: convert"):
        triton.infer("mlp", [texts])
    brain = client.InferInput("x", [1, 4], "BF16")
    brain.set_data_from_numpy(BATCH[:1].astype(ml_dtypes.bfloat16))
    with pytest.raises(InferenceServerException, match="sent as BF16, but the model takes FP32: convert"):
        triton.infer("mlp", [brain])


def test_errors_have_triton_s_and_our_fields(triton: client.InferenceServerClient, server: Server) -> None:
    with pytest.raises(InferenceServerException, match="there is no model 'none' here") as caught:
        triton.infer("none", [sent("x", BATCH)])
    assert caught.value.status() == "404"
    with pytest.raises(InferenceServerException, match="has no version '9'"):
        triton.infer("mlp", [sent("x", BATCH)], model_version="9")
    with pytest.raises(InferenceServerException, match="has no input 'w'"):
        triton.infer("mlp", [sent("w", BATCH)])
    with pytest.raises(InferenceServerException, match="Content-Encoding"):
        triton.infer("mlp", [sent("x", BATCH)], request_compression_algorithm="gzip")
    with pytest.raises(InferenceServerException, match="keep no state"):
        triton.infer("mlp", [sent("x", BATCH)], sequence_id=5)
    response = httpx.post(server.url + "/v2/models/mlp/infer", content=b"{}")
    assert response.status_code == 400
    assert response.json() == {
        "error": response.json()["error"],
        "code": "missing_input",
    }


def test_priority_timeout_and_precision_are_followed(triton: client.InferenceServerClient) -> None:
    result = triton.infer(
        "mlp", [sent("x", BATCH)], priority=1, timeout=5_000_000, parameters={"precision": "fp32"}
    )
    assert result.get_response()["parameters"] == {"precision": "fp32"}
    with pytest.raises(InferenceServerException, match="no 'int8' variant"):
        triton.infer("mlp", [sent("x", BATCH)], parameters={"precision": "int8"})
    with pytest.raises(InferenceServerException, match="deadline") as caught:
        triton.infer("mlp", [sent("x", BATCH)], timeout=1)
    assert caught.value.status() == "504"


def test_a_raw_body_is_the_only_input(server: Server) -> None:
    head = {"inference-header-content-length": "0", "content-type": "application/octet-stream"}
    response = httpx.post(server.url + "/v2/models/mlp/infer", content=BATCH.tobytes(), headers=head)
    result = client.InferResult.from_response_body(
        response.content, header_length=int(response.headers["inference-header-content-length"])
    )
    np.testing.assert_array_equal(result.as_numpy("z"), EXPECTED["z"])
    refused = httpx.post(server.url + "/v2/models/pair/infer", content=BATCH.tobytes(), headers=head)
    assert (refused.status_code, refused.json()["code"]) == (415, "unsupported_media_type")


def test_long_json_is_read_like_short(server: Server) -> None:
    rows = np.random.default_rng(5).normal(size=(30_000, 4)).astype(np.float32)
    tensor = {"name": "x", "shape": [30_000, 4], "datatype": "FP32", "data": rows.reshape(-1).tolist()}
    body = json.dumps({"id": "long", "inputs": [tensor], "outputs": [{"name": "z"}]})
    assert len(body) > 2**20
    response = httpx.post(server.url + "/v2/models/mlp/versions/1/infer", content=body, timeout=60)
    assert response.status_code == 200, response.text[:300]
    answer = response.json()
    assert (answer["id"], answer["model_version"]) == ("long", "1")
    assert np.array_equal(np.array(answer["outputs"][0]["data"], np.float32).reshape(-1, 4), 2 * rows)
    wrong = httpx.post(
        server.url + "/v2/models/mlp/infer", content=body.replace('"FP32"', '"FP64"'), timeout=60
    )
    assert (wrong.status_code, wrong.json()["code"]) == (400, "wrong_dtype")


async def test_many_at_once_by_the_asynchronous_client(server: Server) -> None:
    async with client_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as triton:
        assert await triton.is_server_ready()

        async def one(seed: int) -> None:
            x = np.random.default_rng(seed).normal(size=(2, 4)).astype(np.float32)
            result = await triton.infer("mlp", [sent("x", x, binary=bool(seed % 2))], model_version="1")
            np.testing.assert_array_equal(result.as_numpy("z"), 2 * x)

        await asyncio.gather(*map(one, range(40)))


# --- the repository -------------------------------------------------------------------------------
def test_models_are_loaded_and_unloaded(triton: client.InferenceServerClient, server: Server) -> None:
    for call in (triton.get_model_repository_index, lambda: triton.load_model("pair")):
        with pytest.raises(InferenceServerException, match="administration token"):
            call()
    index = triton.get_model_repository_index(headers=ADMIN)
    assert {"name": "pair", "version": "1", "state": "READY", "reason": ""} in index
    triton.unload_model("pair", headers=ADMIN, unload_dependents=True)
    assert not triton.is_model_ready("pair")
    assert "pair" not in [entry["name"] for entry in triton.get_model_repository_index(headers=ADMIN)]
    triton.load_model("pair", headers=ADMIN)
    assert triton.is_model_ready("pair")
    with pytest.raises(InferenceServerException, match="cannot be set here"):
        triton.load_model("pair", headers=ADMIN, config="{}")
    with pytest.raises(InferenceServerException, match="there is no"):
        triton.load_model("none", headers=ADMIN)
    refused = httpx.post(
        server.url + "/v2/repository/models/pair/unload",
        headers=ADMIN,
        json={"parameters": {"version": "7"}},
    )
    assert refused.status_code == 404
