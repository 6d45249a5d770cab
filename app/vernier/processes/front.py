"""A front process: sockets, HTTP, TLS, keys and formats; no model, no queue, no device."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

import vernier as package
from vernier.border.front_side.engine_group import EngineGroup
from vernier.border.memory.arena import Arena
from vernier.border.memory.limit_counts import SharedCounts
from vernier.border.records.channel import close_all
from vernier.composition.front import create_front
from vernier.composition.grpc import start_grpc
from vernier.composition.operations import operations_app
from vernier.composition.server import operations_config, server_config
from vernier.exposition import Metrics, register_process
from vernier.exposition_merge import Family
from vernier.logs import configure_logging
from vernier.processes.accepting import Acceptor, ConnectionCounts
from vernier.processes.control import FATAL, Child
from vernier.serving.lifecycle import Lifecycle, Phase
from vernier.settings import Settings, SettingsError

logger = logging.getLogger(__name__)

#: How long the supervisor may take to collect the figures of all processes.
_SCRAPE_S = 5.0
#: How long there may be no engine process before the supervisor is asked for it.
_UNCONNECTED_S = 1.0
#: How often the others are told how many connections this front holds.
_TELL_CONNECTIONS_S = 0.02


class FrontServer(uvicorn.Server):
    """uvicorn's server without listeners and signals of its own: an Acceptor brings the connections."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def connect(self) -> asyncio.Protocol:
        """A protocol for a new connection."""
        make: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol


class Front:
    """What a front process is made of. Belongs to the event loop's thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._child = Child(sock, self._take)
        self._scrapes: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = count(1)
        self._engines: EngineGroup | None = None
        self._lifecycle: Lifecycle | None = None
        self._servers: list[FrontServer] = []
        self._accept = asyncio.Event()
        self._draining = asyncio.Event()
        self._drain_asked = False
        self._asking: dict[int, asyncio.TimerHandle] = {}
        self._waiting: dict[int, list[int]] = {}  # engine processes that came before this was ready for them

    # --- the supervisor ---------------------------------------------------------------------------
    def _take(self, message: dict[str, Any], fds: list[int]) -> None:
        kind = message["type"]
        if kind == "engine":
            number = message["engine"]
            if self._engines is None:
                close_all(self._waiting.pop(number, ()))  # of one that has died since
                self._waiting[number] = fds
            else:
                self._attach(self._engines, number, fds)
            return
        close_all(fds)
        if kind == "scraped":
            future = self._scrapes.pop(message["id"], None)
            if future is not None and not future.done():
                future.set_result(message)
        elif kind == "accept":
            self._accept.set()
        elif kind == "drain":
            self._drain()

    def _attach(self, engines: EngineGroup, number: int, fds: list[int]) -> None:
        sock_fd, answers_fd, running_fd, room_fd = fds
        try:
            engines.engines[number].attach(socket.socket(fileno=sock_fd), answers_fd, running_fd, room_fd)
        except OSError:
            logger.exception("the engine process cannot be reached", extra={"engine": number})
            self._engine_changed(number)

    def _is_missed(self, number: int) -> bool:
        return self._engines is not None and not self._engines.engines[number].connected

    def _engine_changed(self, number: int) -> None:
        """Asks for the engine process anew when a while has passed without one: the socket to it may have broken though
        it lives."""
        if number not in self._asking and self._is_missed(number):
            self._asking[number] = self._loop.call_later(_UNCONNECTED_S, self._ask_again, number)

    def _ask_again(self, number: int) -> None:
        del self._asking[number]
        if self._is_missed(number):
            self._child.send({"type": "unconnected", "engine": number})
            self._engine_changed(number)

    def _drain(self) -> None:
        if self._lifecycle is None or self._lifecycle.phase is Phase.STARTING:
            self._drain_asked = True  # the service ends while this front is only starting
        else:
            self._lifecycle.drain(self._loop, self._draining.set)

    async def _scrape(self) -> Iterable[Family]:
        """The figures of all processes, by way of the supervisor."""
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._scrapes[number] = future
        self._child.send({"type": "scrape", "id": number})
        try:
            async with asyncio.timeout(_SCRAPE_S):
                message = await future
        finally:
            self._scrapes.pop(number, None)
        families: Iterable[Family] = message["families"]
        return families

    # --- life -------------------------------------------------------------------------------------
    async def run(self) -> None:
        hello, fds = await self._child.hello
        settings = Settings.model_validate(hello["settings"])
        index: int = hello["index"]
        configure_logging(settings.log_format, settings.log_level, settings.access_log)
        counts_fd, limits_fd, requests_fd = fds[:3]
        sockets = [socket.socket(fileno=fd) for fd in fds[3:]]
        listeners, operations = sockets[: hello["listeners"]], sockets[hello["listeners"] :]
        limits = SharedCounts(limits_fd, hello["clients"], hello["fronts"], index)
        counts = ConnectionCounts(counts_fd, hello["fronts"])
        registry = CollectorRegistry()
        register_process(registry)
        metrics = Metrics(registry, package.__version__)
        self._lifecycle = lifecycle = Lifecycle(settings.drain_delay_s)
        arena = Arena(requests_fd, os.fstat(requests_fd).st_size)
        self._engines = engines = EngineGroup(
            arena, metrics, settings.queue_limit, hello["engines"], self._engine_changed, first=index
        )
        for number, engine_fds in self._waiting.items():
            self._attach(engines, number, engine_fds)
        try:
            app = create_front(
                settings, engines, lifecycle, metrics, self._scrape, counts=limits, fronts=hello["fronts"]
            )
            config = server_config(app, settings, arena)
            config.load()
            grpc = await start_grpc(app, settings, shared=True)
        except SettingsError as error:
            self._child.send({"type": FATAL, "message": error.message})
            self._child.close()
            return
        beating = asyncio.create_task(self._child.beat(registry))
        lifecycle.started()
        if self._drain_asked:
            self._drain()
        self._child.send({"type": "ready"})
        ends = [asyncio.create_task(self._draining.wait()), asyncio.create_task(self._child.ended.wait())]
        accept = asyncio.create_task(self._accept.wait())
        await asyncio.wait([accept, *ends], return_when=asyncio.FIRST_COMPLETED)
        main = FrontServer(config)
        acceptors = [await self._serve(main, listeners, counts, index)]
        if operations:
            acceptors.append(await self._serve_operations(app, operations, index))
        telling = asyncio.create_task(self._tell_connections(acceptors[0]))
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        telling.cancel()
        for acceptor in acceptors[:1]:
            await acceptor.close()
        await asyncio.gather(grpc.stop(), self._end(main))
        lifecycle.stopped()
        app.state.predictions.close()
        for timer in self._asking.values():
            timer.cancel()
        self._engines = None
        engines.close()
        for acceptor in acceptors[1:]:
            await acceptor.close()
        for server in self._servers[1:]:
            await self._end(server)
        for task in (*ends, accept, beating):
            task.cancel()
        self._child.close()

    async def _serve(
        self, server: FrontServer, listeners: list[socket.socket], counts: ConnectionCounts | None, index: int
    ) -> Acceptor:
        config = server.config
        if not config.loaded:
            config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup(sockets=[])
        self._servers.append(server)
        ticking = asyncio.create_task(server.main_loop())
        server.server_state.tasks.add(ticking)
        ticking.add_done_callback(server.server_state.tasks.discard)
        held = server.server_state.connections
        return Acceptor(listeners, server.connect, config.ssl, counts, index, lambda: len(held))

    async def _serve_operations(
        self,
        app: FastAPI,
        listeners: list[socket.socket],
        index: int,
    ) -> Acceptor:
        """Health and metrics on a port of their own; few connections, which need not be spread."""
        server = FrontServer(operations_config(operations_app(app)))
        return await self._serve(server, listeners, None, index)

    async def _tell_connections(self, acceptor: Acceptor) -> None:
        while True:
            acceptor.count()
            await asyncio.sleep(_TELL_CONNECTIONS_S)

    @staticmethod
    async def _end(server: FrontServer) -> None:
        server.should_exit = True
        with suppress(asyncio.CancelledError):
            await server.shutdown(sockets=[])
