"""The descriptors of the gRPC services: what the .proto files say, and on the wire what Triton's clients say."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from tritonclient.grpc import model_config_pb2, service_pb2

from scripts.compile_protocols import PROTOCOLS, compile_protocols
from vernier.api.grpc.schema import POOL, SERVICE

OURS = POOL.FindFileByName("open_inference.proto")
THEIRS: dict[str, Any] = {
    **model_config_pb2.DESCRIPTOR.message_types_by_name,
    **service_pb2.DESCRIPTOR.message_types_by_name,
}


def test_the_descriptors_are_those_of_the_proto_files() -> None:
    assert PROTOCOLS.read_bytes() == compile_protocols(), "run python -m scripts.compile_protocols"


def assert_compatible(ours: Any, theirs: Any) -> None:
    for field in ours.fields:
        other = theirs.fields_by_name[field.name]
        assert (field.number, field.type, field.is_repeated) == (
            other.number,
            other.type,
            other.is_repeated,
        ), field.full_name
        if field.message_type is not None:
            assert field.message_type.full_name == other.message_type.full_name
    for nested in ours.nested_types:
        assert_compatible(nested, theirs.nested_types_by_name[nested.name])


@pytest.mark.parametrize("name", OURS.message_types_by_name)
def test_messages_have_triton_s_fields(name: str) -> None:
    assert_compatible(OURS.message_types_by_name[name], THEIRS[name])


def test_methods_and_datatypes_are_triton_s() -> None:
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    for method in POOL.FindServiceByName(SERVICE).methods:
        other = theirs.methods_by_name[method.name]
        assert method.input_type.full_name == other.input_type.full_name
        assert method.output_type.full_name == other.output_type.full_name
        assert (method.client_streaming, method.server_streaming) == (
            other.client_streaming,
            other.server_streaming,
        )
    numbers = {value.name: value.number for value in OURS.enum_types_by_name["DataType"].values}
    assert numbers == dict(model_config_pb2.DataType.items())


def test_without_a_port_nothing_of_grpc_is_imported() -> None:
    """It would take 20 MB of each front's memory, and threads."""
    code = "import sys, vernier.main, vernier.processes.front; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
