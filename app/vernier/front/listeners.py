"""Lets in many clients at once, however busy the loop is.

libuv accepts one connection of a listener in a turn of the loop. Under load a turn takes milliseconds, so hundreds of
clients that connect at once (after a restart, say) would wait for seconds, one after the other. Several listeners on
one socket accept as many in a turn; asyncio's own loop accepts a hundred.
"""

from __future__ import annotations

import asyncio
import os
import socket

import uvicorn

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
