"""Messages of the gRPC services, from the descriptors that `scripts.compile_protocols` has made."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from vernier.errors import RequestError

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"


def _pool() -> DescriptorPool:
    pool = DescriptorPool()
    descriptors = FileDescriptorSet.FromString(files(__package__).joinpath("protocols.binpb").read_bytes())
    for file in descriptors.file:
        pool.Add(file)
    return pool


#: Of this service alone: a client in the same process may know the same names.
POOL = _pool()


def message_class(name: str) -> Any:
    """The class of a message by its full name; KeyError when there is none."""
    return GetMessageClass(POOL.FindMessageTypeByName(name))


ModelInferRequest = message_class("inference.ModelInferRequest")
ModelInferResponse = message_class("inference.ModelInferResponse")
ModelStreamInferResponse = message_class("inference.ModelStreamInferResponse")


def parse(kind: Any, data: bytes) -> Any:
    """Raises RequestError."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise RequestError(
            f"the message is no {kind.DESCRIPTOR.full_name}; is the client's .proto right?"
        ) from error
