"""The gRPC server of one process: its methods, its limits, its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection

from vernier.api.auth.security import Guard, Permit
from vernier.api.grpc.calls import CallAdmission, CallCharge, Context
from vernier.api.grpc.infer import Inference
from vernier.api.grpc.schema import HEALTH, POOL, SERVICE, message_class, parse
from vernier.api.grpc.service import Descriptions, unary
from vernier.api.service import Predictions
from vernier.border.catalogue import Catalogue
from vernier.exposition import Metrics

#: Calls of one connection at once, and of all connections of the process.
_MAX_STREAMS = 256
_MAX_CALLS = 4096
#: What stands around the tensors of a message.
_ENVELOPE_BYTES = 64 * 1024
_MAX_METADATA_BYTES = 64 * 1024
_WATCH_S = 1.0
_HealthRequest = message_class("grpc.health.v1.HealthCheckRequest")
_HealthResponse = message_class("grpc.health.v1.HealthCheckResponse")


@dataclass(frozen=True)
class GrpcOptions:
    """
    Attributes:
        address: host and port.
        shared: whether other processes listen on the port too, and the kernel spreads connections over them.
        certificate, key, client_ca: PEM files, as for HTTPS; without them the port is plain.
        idle_s: after which a connection without a call is closed.
    """

    address: str
    shared: bool
    max_body_bytes: int
    idle_s: float
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None


@dataclass(frozen=True)
class GrpcFront:
    """What the methods need of the process that they are in."""

    catalogue: Catalogue
    predictions: Predictions
    metrics: Metrics
    guard: Guard
    readiness: Callable[[], str | None]
    scrape: Callable[[], Awaitable[Any]]
    charge: Callable[[Permit], CallCharge]


def _credentials(options: GrpcOptions) -> grpc.ServerCredentials | None:
    if options.certificate is None or options.key is None:
        return None
    authority = options.client_ca.read_bytes() if options.client_ca else None
    pair = (options.key.read_bytes(), options.certificate.read_bytes())
    return grpc.ssl_server_credentials([pair], authority, authority is not None)


class GrpcServer:
    """A port that takes calls."""

    def __init__(self, server: Any, stopping: asyncio.Event) -> None:
        self._server = server
        self._stopping = stopping

    async def stop(self, grace_s: float) -> None:
        """Returns when the calls that were under way have ended, or `grace_s` have passed. Streams read no more."""
        self._stopping.set()
        await self._server.stop(grace_s)


async def start_server(front: GrpcFront, options: GrpcOptions) -> GrpcServer:
    """Raises OSError when the port cannot be had."""
    stopping = asyncio.Event()
    server = grpc.aio.server(
        options=(
            ("grpc.so_reuseport", int(options.shared)),
            ("grpc.max_receive_message_length", options.max_body_bytes + _ENVELOPE_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", _MAX_STREAMS),
            ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
            ("grpc.max_connection_idle_ms", int(options.idle_s * 1e3)),
        ),
        maximum_concurrent_rpcs=_MAX_CALLS,
    )
    server.add_generic_rpc_handlers((_inference(front, stopping), _health(front.readiness, stopping)))
    reflection.enable_server_reflection((SERVICE, HEALTH, reflection.SERVICE_NAME), server, POOL)
    credentials = _credentials(options)
    try:
        if credentials is None:
            server.add_insecure_port(options.address)
        else:
            server.add_secure_port(options.address, credentials)
    except RuntimeError as error:
        raise OSError(f"{options.address} cannot be listened on") from error
    await server.start()
    return GrpcServer(server, stopping)


def _inference(front: GrpcFront, stopping: asyncio.Event) -> grpc.GenericRpcHandler:
    admission = CallAdmission(front.guard, front.charge)
    inference = Inference(front.predictions, front.metrics, admission, stopping)
    descriptions = Descriptions(front.catalogue, front.readiness, front.scrape)
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(unary(name, method, admission))
        for name, method in descriptions.methods().items()
    }
    handlers["ModelInfer"] = grpc.unary_unary_rpc_method_handler(inference.unary)
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(inference.stream)
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _health(readiness: Callable[[], str | None], stopping: asyncio.Event) -> grpc.GenericRpcHandler:
    def status(data: bytes) -> int:
        if parse(_HealthRequest, data).service not in ("", SERVICE):
            return int(_HealthResponse.SERVICE_UNKNOWN)
        return int(_HealthResponse.SERVING if readiness() is None else _HealthResponse.NOT_SERVING)

    async def check(data: bytes, context: Context) -> bytes:
        found = status(data)
        if found == _HealthResponse.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"ask for '{SERVICE}', or for no service by name")
        answer: bytes = _HealthResponse(status=found).SerializeToString()
        return answer

    async def watch(data: bytes, context: Context) -> AsyncIterator[bytes]:
        told = -1
        while True:
            if (found := status(data)) != told:
                told = found
                yield _HealthResponse(status=found).SerializeToString()
            if stopping.is_set():
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), _WATCH_S)

    handlers = {
        "Check": grpc.unary_unary_rpc_method_handler(check),
        "Watch": grpc.unary_stream_rpc_method_handler(watch),
    }
    return grpc.method_handlers_generic_handler(HEALTH, handlers)
