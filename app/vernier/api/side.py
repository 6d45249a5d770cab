"""Health and metrics on a port of their own, so that the platform needs no key and no certificate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from fastapi import FastAPI

from vernier.api import health
from vernier.front.timeouts import timeout_protocol


class _SideServer(uvicorn.Server):
    """The main server handles the signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def side_server(main: FastAPI, host: str, port: int | None) -> AsyncIterator[None]:
    """Answers from the main application's state until the block ends. With `port` None, does nothing."""
    if port is None:
        yield
        return
    app = FastAPI(title="Vernier operations", docs_url=None, redoc_url=None, openapi_url=None)
    app.state = main.state
    app.include_router(health.router)
    settings = main.state.settings
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=settings.access_log,  # of all servers in a process, the last one's word counts
        lifespan="off",
        http=timeout_protocol(settings.body_timeout_s),
    )
    server = _SideServer(config)
    serving = asyncio.create_task(server.serve())
    try:
        yield
    finally:
        server.should_exit = True
        await serving
