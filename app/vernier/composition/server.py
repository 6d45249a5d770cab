"""uvicorn's options for the service's ports."""

from __future__ import annotations

from typing import Any

import uvicorn
from fastapi import FastAPI

from vernier.border.memory.arena import Arena
from vernier.composition.tls import tls_options
from vernier.front.connection import plain_protocol, service_protocol
from vernier.settings import Settings


def server_config(app: FastAPI, settings: Settings, arena: Arena | None = None) -> uvicorn.Config:
    """For predictions. Raises SettingsError.

    Args:
        arena: where large bodies are received; None for memory of this process alone.
    """
    state = app.state
    http: Any = service_protocol(
        state.predictions, state.metrics, state.guard, settings, state.lifecycle, state.byte_budget, arena
    )
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=settings.access_log,
        timeout_keep_alive=int(settings.keep_alive_timeout_s),
        timeout_graceful_shutdown=int(settings.drain_timeout_s),
        server_header=False,
        lifespan="auto" if arena is None else "off",
        http=http,
        **tls_options(settings),
    )


def operations_config(app: FastAPI) -> uvicorn.Config:
    """For health and metrics on a port of their own."""
    state = app.state
    settings: Settings = state.settings
    http: Any = plain_protocol(settings, state.lifecycle, state.byte_budget)
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.metrics_port or 0,
        log_config=None,
        access_log=settings.access_log,  # of all servers in a process, the last one's word counts
        lifespan="off",
        http=http,
    )
