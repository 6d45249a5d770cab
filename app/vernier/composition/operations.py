"""Health and metrics on a port of their own, so that the platform needs no key and no certificate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from fastapi import FastAPI

from vernier.api import health
from vernier.composition.server import operations_config


class _SideServer(uvicorn.Server):
    """The main server handles the signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def operations_app(main: FastAPI) -> FastAPI:
    """Health and metrics alone, from the main application's state."""
    app = FastAPI(title="Vernier operations", docs_url=None, redoc_url=None, openapi_url=None)
    app.state = main.state
    app.include_router(health.router)
    return app


@asynccontextmanager
async def side_server(main: FastAPI, host: str, port: int | None) -> AsyncIterator[None]:
    """Answers from the main application's state until the block ends. With `port` None, does nothing."""
    if port is None:
        yield
        return
    config = operations_config(operations_app(main), main.state.settings)
    config.host, config.port = host, port
    server = _SideServer(config)
    serving = asyncio.create_task(server.serve())
    try:
        yield
    finally:
        server.should_exit = True
        await serving
