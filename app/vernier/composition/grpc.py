"""gRPC beside HTTP, where a port for it is set. Without one nothing of it is imported."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from vernier.composition.tls import tls_options
from vernier.front.limits import Charge
from vernier.settings import Settings, SettingsError


async def start_grpc(app: FastAPI, settings: Settings, *, shared: bool) -> GrpcPort:
    """The port, which takes calls if there is one. Raises SettingsError.

    Args:
        shared: whether the other fronts listen on the port too.
    """
    if settings.grpc_port is None:
        return GrpcPort(None, 0.0)
    tls_options(settings)  # judges the files
    from vernier.api.grpc.server import GrpcFront, GrpcOptions, start_server

    state = app.state
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    options = GrpcOptions(
        f"{host}:{settings.grpc_port}",
        shared,
        settings.max_body_bytes,
        settings.keep_alive_timeout_s,
        settings.tls_certificate_file,
        settings.tls_key_file,
        settings.tls_client_ca_file,
    )
    front = GrpcFront(
        state.repository,
        state.predictions,
        state.metrics,
        state.guard,
        state.readiness,
        state.scrape,
        lambda permit: Charge(state.byte_budget, permit),
    )
    try:
        return GrpcPort(await start_server(front, options), settings.drain_timeout_s)
    except OSError as error:
        raise SettingsError(f"VERNIER_GRPC_PORT: {error}; set another port, or free this one") from error


class GrpcPort:
    """
    Args:
        server: a grpc.aio.Server; None where no port is set.
        drain_s: how long calls may take once no new ones are accepted.
    """

    def __init__(self, server: Any, drain_s: float) -> None:
        self._server = server
        self._drain_s = drain_s

    async def stop(self) -> None:
        """Returns when the calls that were under way have ended."""
        if self._server is not None:
            await self._server.stop(self._drain_s)
