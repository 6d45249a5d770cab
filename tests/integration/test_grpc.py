"""Triton's clients, gRPC's own health and reflection, and raw stubs against the gRPC port."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as client
import tritonclient.grpc.aio as client_aio
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.support.certificates import Authority
from tests.support.load import settled
from tests.support.packages import echo_model, mlp_model, pair_model, run_reference, slow_model, write_package
from tests.support.server import Server, administrator, free_port, serve
from vernier.api.auth.security import digest_of
from vernier.api.grpc.schema import SERVICE, message_class
from vernier.tensors import DTYPES, numpy_dtype

BATCH = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
EXPECTED = run_reference(mlp_model(), {"x": BATCH})
ADMIN = {"authorization": "Bearer administrators-token"}


class GrpcServer:
    def __init__(self, server: Server, port: int) -> None:
        self.server = server
        self.target = f"127.0.0.1:{port}"


@pytest.fixture(scope="module", params=["fronts", "uvicorn"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcServer]:
    root = tmp_path_factory.mktemp("grpc")
    engines = root / "engines"
    write_package(engines, "mlp")
    write_package(engines, "mlp", 2, mlp_model(seed=5))
    write_package(engines, "pair", model=pair_model())
    write_package(engines, "slow", model=slow_model())
    write_package(engines, "echo", model=echo_model(DTYPES))
    settings, _ = administrator(root)
    port = free_port()
    settings |= {"grpc_port": str(port), "fronts": "2", "max_body_bytes": "3000000"}
    with serve(engines, root / "log", uvicorn=request.param == "uvicorn", **settings) as running:
        yield GrpcServer(running, port)


@pytest.fixture
def triton(server: GrpcServer) -> Iterator[client.InferenceServerClient]:
    with client.InferenceServerClient(server.target) as found:
        yield found


@pytest.fixture
def channel(server: GrpcServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as found:
        yield found


def sent(name: str, array: np.ndarray) -> client.InferInput:
    tensor = client.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    return tensor.set_data_from_numpy(array)


def call(channel: grpc.Channel, name: str, request: Any, **options: Any) -> Any:
    """One unary call by the service's own messages."""
    method = channel.unary_unary(
        f"/{SERVICE}/{name}",
        lambda message: message.SerializeToString(),
        message_class(f"inference.{name}Response").FromString,
    )
    return method(request, timeout=options.pop("timeout", 30), **options)


# --- what the server tells ------------------------------------------------------------------------
def test_the_server_and_its_models_are_live_and_ready(triton: client.InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("mlp")
    assert triton.is_model_ready("mlp", "2")
    with pytest.raises(InferenceServerException, match="there is no model 'none'"):
        triton.is_model_ready("none")


def test_metadata_configuration_and_statistics(triton: client.InferenceServerClient) -> None:
    metadata = triton.get_server_metadata(as_json=True)
    assert metadata["name"] == "vernier"
    model = triton.get_model_metadata("mlp", as_json=True)
    assert model["versions"] == ["1", "2"]
    assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "4"]}]
    config = triton.get_model_config("mlp").config
    assert config.max_batch_size == 16
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("x", 11, [4])]
    assert config.dynamic_batching.default_priority_level == 10

    def counted() -> Any:
        return triton.get_inference_statistics("mlp", "1").model_stats[0]

    before = counted()
    triton.infer("mlp", [sent("x", BATCH)], model_version="1")
    after = counted()
    assert after.inference_count - before.inference_count == 3
    assert after.inference_stats.success.count - before.inference_stats.success.count == 1
    assert sum(batch.compute_infer.count for batch in after.batch_stats) == after.execution_count
    assert len(triton.get_inference_statistics().model_stats) == 5


def test_health_by_the_standard_protocol(channel: grpc.Channel) -> None:
    kind = message_class("grpc.health.v1.HealthCheckRequest")
    answer = message_class("grpc.health.v1.HealthCheckResponse").FromString
    check = channel.unary_unary("/grpc.health.v1.Health/Check", kind.SerializeToString, answer)
    assert check(kind(), timeout=10).status == 1
    assert check(kind(service=SERVICE), timeout=10).status == 1
    with pytest.raises(grpc.RpcError) as caught:
        check(kind(service="other"), timeout=10)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    watch = channel.unary_stream("/grpc.health.v1.Health/Watch", kind.SerializeToString, answer)
    states = watch(kind(), timeout=10)
    assert next(states).status == 1
    states.cancel()


def test_reflection_tells_the_services_and_their_messages(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert set(database.get_services()) >= {SERVICE, "grpc.health.v1.Health"}
    pool = DescriptorPool(database)
    assert (
        pool.FindServiceByName(SERVICE).methods_by_name["ModelInfer"].input_type.name == "ModelInferRequest"
    )


# --- inference ------------------------------------------------------------------------------------
def test_inference_with_ids_outputs_and_versions(triton: client.InferenceServerClient) -> None:
    wanted = [client.InferRequestedOutput("z"), client.InferRequestedOutput("y")]
    result = triton.infer("mlp", [sent("x", BATCH)], model_version="1", outputs=wanted, request_id="seven")
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("seven", "mlp", "1")
    assert [output.name for output in response.outputs] == ["z", "y"]
    assert response.parameters["precision"].string_param == "fp32"
    np.testing.assert_array_equal(result.as_numpy("z"), EXPECTED["z"])
    np.testing.assert_allclose(result.as_numpy("y"), EXPECTED["y"], atol=1e-6)
    assert triton.infer("mlp", [sent("x", BATCH)]).get_response().model_version == "2"


def test_every_dtype_comes_back_bit_by_bit_raw_and_typed(
    triton: client.InferenceServerClient, channel: grpc.Channel
) -> None:
    rng = np.random.default_rng(3)
    arrays = {
        name: np.frombuffer(rng.bytes(6 * numpy_dtype(name).itemsize), numpy_dtype(name)).reshape(2, 3)
        for name in DTYPES
        if numpy_dtype(name).kind in "iu"
    }
    arrays |= {n: (rng.normal(size=(2, 3)) * 99).astype(n) for n in ("float16", "float32", "float64")}
    arrays["bool"] = np.array([[True, False, True], [False, False, True]])
    result = triton.infer("echo", [sent(f"in_{name}", array) for name, array in arrays.items()])
    for name, array in arrays.items():
        back = result.as_numpy(f"out_{name}")
        assert (back.dtype, back.tobytes()) == (array.dtype, array.tobytes()), name


def test_typed_contents_are_answered_typed(channel: grpc.Channel) -> None:
    request = message_class("inference.ModelInferRequest")(model_name="pair")
    for name, shape, numbers in (("user", (2,), [1.5, -2.0]), ("item", (2, 3), [1, 2, 3, 4, 5, 6])):
        tensor = request.inputs.add(name=name, datatype="FP32", shape=shape)
        tensor.contents.fp32_contents.extend(numbers)
    answer = call(channel, "ModelInfer", request)
    assert list(answer.outputs[0].contents.fp32_contents) == [1.5, 3.0, 4.5, -8.0, -10.0, -12.0]
    assert not answer.raw_output_contents


def test_errors_have_a_status_a_sentence_and_a_code(
    triton: client.InferenceServerClient, channel: grpc.Channel
) -> None:
    for arguments, status, text in (
        ({"model_name": "none"}, "NOT_FOUND", "there is no model 'none'"),
        ({"model_name": "mlp", "model_version": "9"}, "NOT_FOUND", "no version '9'"),
        ({"model_name": "mlp", "timeout": 1}, "DEADLINE_EXCEEDED", "deadline"),
        ({"model_name": "mlp", "sequence_id": 3}, "INVALID_ARGUMENT", "keep no state"),
        ({"model_name": "mlp", "parameters": {"precision": "int8"}}, "INVALID_ARGUMENT", "no 'int8' variant"),
    ):
        with pytest.raises(InferenceServerException, match=text) as caught:
            triton.infer(inputs=[sent("x", BATCH)], **arguments)
        assert caught.value.status() == f"StatusCode.{status}"
    kind = message_class("inference.ModelInferRequest")
    with pytest.raises(grpc.RpcError) as failed:
        call(channel, "ModelInfer", kind(model_name="mlp", raw_input_contents=[b"x"]))
    assert dict(failed.value.trailing_metadata())["code"] == "wrong_shape"
    garbage = channel.unary_unary(f"/{SERVICE}/ModelInfer", None, None)
    with pytest.raises(grpc.RpcError) as failed:
        garbage(b"\xff\xff\xff", timeout=10)
    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as failed:
        garbage(b"x" * 4_000_000, timeout=10)
    assert failed.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_deadline_and_a_cancelled_call_end_the_request(server: GrpcServer, channel: grpc.Channel) -> None:
    kind = message_class("inference.ModelInferRequest")
    x = np.ones((64, 4), np.float32)
    request = kind(model_name="slow", raw_input_contents=[x.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    with pytest.raises(grpc.RpcError) as failed:
        call(channel, "ModelInfer", request, timeout=0.005)
    assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    method = channel.unary_unary(f"/{SERVICE}/ModelInfer", kind.SerializeToString, None)
    calls = [method.future(request, timeout=30) for _ in range(20)]
    for one in calls:
        one.cancel()
    settled(server.server, "slow")


def test_a_stream_answers_in_order_and_tells_errors_apart(triton: client.InferenceServerClient) -> None:
    results: queue.Queue[tuple[Any, Any]] = queue.Queue()
    triton.start_stream(lambda result, error: results.put((result, error)))
    for number in range(150):
        x = BATCH[:, :3] if number == 70 else BATCH * number
        triton.async_stream_infer(
            "mlp",
            [sent("x", np.ascontiguousarray(x))],
            model_version="1",
            request_id=str(number),
            enable_empty_final_response=number == 3,
        )
    for number in range(150):
        result, error = results.get(timeout=30)
        if number == 70:
            assert "must be 4" in str(error)
            continue
        assert error is None
        response = result.get_response()
        assert response.id == str(number)
        assert ("triton_final_response" in response.parameters) == (number == 3)
        np.testing.assert_array_equal(result.as_numpy("z"), 2 * BATCH * np.float32(number))
    triton.stop_stream()


async def test_many_at_once_by_the_asynchronous_client(server: GrpcServer) -> None:
    async with client_aio.InferenceServerClient(server.target) as triton:
        assert await triton.is_server_ready()

        async def one(seed: int) -> None:
            x = np.random.default_rng(seed).normal(size=(2, 4)).astype(np.float32)
            result = await triton.infer("mlp", [sent("x", x)], model_version="1")
            np.testing.assert_array_equal(result.as_numpy("z"), 2 * x)

        await asyncio.gather(*map(one, range(200)))


# --- the repository -------------------------------------------------------------------------------
def test_models_are_loaded_and_unloaded(triton: client.InferenceServerClient) -> None:
    for refused in (triton.get_model_repository_index, lambda: triton.load_model("pair")):
        with pytest.raises(InferenceServerException, match="administration token") as caught:
            refused()
        assert caught.value.status() == "StatusCode.UNAUTHENTICATED"
    index = triton.get_model_repository_index(headers=ADMIN)
    assert ("pair", "1", "READY") in [(entry.name, entry.version, entry.state) for entry in index.models]
    triton.unload_model("pair", headers=ADMIN, unload_dependents=True)
    with pytest.raises(InferenceServerException, match="there is no model 'pair'"):
        triton.is_model_ready("pair")
    triton.load_model("pair", headers=ADMIN)
    assert triton.is_model_ready("pair")
    with pytest.raises(InferenceServerException, match="cannot be set here"):
        triton.load_model("pair", headers=ADMIN, config="{}")


# --- the port -------------------------------------------------------------------------------------
def test_a_port_in_use_stops_the_start_with_a_sentence(engines: Path, tmp_path: Path) -> None:
    write_package(engines)
    port = str(free_port())
    for fronts in ("0", "1"):
        with serve(engines, tmp_path / "first", fronts=fronts, grpc_port=port):
            for others in ("0", "1"):
                with (
                    pytest.raises(AssertionError),
                    serve(engines, tmp_path / "second", fronts=others, grpc_port=port),
                ):
                    pass
                log = (tmp_path / "second").read_text()
                assert "VERNIER_GRPC_PORT" in log or "cannot listen" in log, log


def test_calls_under_way_are_answered_while_the_service_stops(engines: Path, tmp_path: Path) -> None:
    write_package(engines, "slow", model=slow_model())
    port = free_port()
    with serve(engines, tmp_path / "log", fronts="2", grpc_port=str(port)) as server:
        x = np.ones((256, 4), np.float32)
        with client.InferenceServerClient(f"127.0.0.1:{port}") as triton:
            answers: queue.Queue[Any] = queue.Queue()
            triton.async_infer("slow", [sent("x", x)], lambda result, error: answers.put((result, error)))
            while not server.metric("vernier_inflight_requests"):
                pass
            open_stream: queue.Queue[Any] = queue.Queue()
            triton.start_stream(lambda result, error: open_stream.put((result, error)))
            triton.async_stream_infer("slow", [sent("x", x[:1])])
            assert open_stream.get(timeout=30)[1] is None
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                states = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=60)
                assert next(states) == b"\x08\x01"
                began = time.monotonic()
                server.terminate()
                assert list(states) in ([], [b"\x08\x02"])
            result, error = answers.get(timeout=30)
        assert error is None
        assert result.as_numpy("z").shape == (256, 4)
        assert server.wait() == 0
        assert time.monotonic() - began < 15  # idle streams hold up nothing


def test_tls_certificates_and_limits_hold_here_too(engines: Path, tmp_path: Path) -> None:
    write_package(engines)
    authority = Authority(tmp_path, "authority")
    own, known = authority.issue("service"), authority.issue("client")
    stranger = Authority(tmp_path, "stranger").issue("other")
    (tmp_path / "keys").write_text(
        f'[[key]]\nname = "front"\nsha256 = "{digest_of("a-front-ends-key")}"\nrequests_per_s = 3\n'
    )
    port = free_port()
    settings = {
        "tls_certificate_file": str(own.certificate),
        "tls_key_file": str(own.key),
        "tls_client_ca_file": str(authority.certificate),
        "api_keys_file": str(tmp_path / "keys"),
        "metrics_port": str(health := free_port()),
        "grpc_port": str(port),
    }
    request = message_class("inference.ModelInferRequest")(model_name="mlp", raw_input_contents=[bytes(16)])
    request.inputs.add(name="x", datatype="FP32", shape=(1, 4))
    key = (("x-api-key", "a-front-ends-key"),)
    with serve(engines, tmp_path / "log", health_port=health, **settings):
        roots = authority.certificate.read_bytes()
        for pair, admitted in ((known, True), (stranger, False), (None, False)):
            shown = (None, None) if pair is None else (pair.key.read_bytes(), pair.certificate.read_bytes())
            credentials = grpc.ssl_channel_credentials(roots, *shown)
            with grpc.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
                if not admitted:
                    with pytest.raises(grpc.RpcError) as failed:
                        call(channel, "ModelInfer", request, timeout=5, metadata=key)
                    assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
                    continue
                codes = []
                for _ in range(5):
                    try:
                        call(channel, "ModelInfer", request, metadata=key)
                        codes.append(grpc.StatusCode.OK)
                    except grpc.RpcError as error:
                        trailer = dict(error.trailing_metadata())
                        assert (trailer["code"], trailer["retry-after"]) == ("rate_limited", "1")
                        codes.append(error.code())
                assert codes == [grpc.StatusCode.OK] * 3 + [grpc.StatusCode.RESOURCE_EXHAUSTED] * 2
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError):
            call(channel, "ModelInfer", request, timeout=5, metadata=key)
