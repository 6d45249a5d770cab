"""Servers in one process, on uvicorn: for predictions, and for health and metrics on a port of their own.

libuv accepts one connection of a listener in a turn of the loop. Under load a turn takes milliseconds, so hundreds of
clients that connect at once (after a restart, say) would wait for seconds, one after the other. Several listeners on
one socket accept as many in a turn; asyncio's own loop accepts a hundred.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from fastapi import FastAPI

from vernier.api import health
from vernier.composition.server import operations_config

#: Listeners on each socket. One that finds nothing costs about a microsecond of each new connection.
_LISTENERS = 16


class AcceptingServer(uvicorn.Server):
    """uvicorn's server with several listeners on its sockets."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        if not type(loop).__module__.startswith("uvloop"):
            return
        config = self.config
        for server in tuple(self.servers):
            for listener in server.sockets:
                for _ in range(_LISTENERS - 1):
                    same = socket.socket(fileno=os.dup(listener.fileno()))
                    more = await loop.create_server(
                        self._connect, sock=same, ssl=config.ssl, backlog=config.backlog
                    )
                    self.servers.append(more)

    def _connect(self) -> asyncio.Protocol:
        """As uvicorn's own `create_protocol`, which it does not show."""
        make = self.config.http_protocol_class
        return make(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


class _OperationsServer(uvicorn.Server):
    """The main server handles the signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def operations_app(main: FastAPI) -> FastAPI:
    """Health and metrics alone, from the main application's state, without key and certificate."""
    app = FastAPI(title="Vernier operations", docs_url=None, redoc_url=None, openapi_url=None)
    app.state = main.state
    app.include_router(health.router)
    return app


@asynccontextmanager
async def operations_server(main: FastAPI, port: int | None) -> AsyncIterator[None]:
    """Serves `operations_app` until the block ends. With `port` None, does nothing."""
    if port is None:
        yield
        return
    server = _OperationsServer(operations_config(operations_app(main)))
    serving = asyncio.create_task(server.serve())
    try:
        yield
    finally:
        server.should_exit = True
        await serving
