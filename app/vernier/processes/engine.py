"""The engine process: models, admission, queue, batching, workers, monitor and devices; no sockets of clients."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import Any

from prometheus_client import CollectorRegistry

import vernier as package
from vernier.border.catalogue import ServedModel
from vernier.border.engine_side.front_session import FrontSession
from vernier.border.engine_side.serving_fronts import Fronts
from vernier.border.memory.room import RoomPage
from vernier.border.records.channel import close_all
from vernier.composition.engine import create_repository
from vernier.errors import EngineError, LoadRefused, PackageError
from vernier.exposition import Metrics, register_process
from vernier.heap import limit_arenas
from vernier.logs import configure_logging
from vernier.processes.control import FATAL, Child
from vernier.serving.models.repository import Repository
from vernier.serving.models.watch import watch
from vernier.settings import Settings, SettingsError

logger = logging.getLogger(__name__)

#: How often fronts hear of what changed by itself: a precision, a fault.
_PUBLISH_S = 0.1


def entries(repository: Repository) -> list[tuple[ServedModel, dict[str, Any]]]:
    """What fronts are told of every served version; see RemoteModel."""
    return [
        (
            model,
            {
                "manifest": model.manifest.model_dump(mode="json"),
                "precision": model.precision,
                "precisions": list(model.precisions),
                "runtime": model.runtime,
                "state": model.state,
                "description": model.description(),
            },
        )
        for model in repository.models()
    ]


class Engine:
    """What the engine process is made of. Belongs to the event loop's thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._child = Child(sock, self._take)
        self._stopping = asyncio.Event()
        self._repository: Repository | None = None
        self._fronts: Fronts | None = None
        self._starting = True
        self._published: object = None
        self._unloaded: list[tuple[str, int]] = []  # as the supervisor was told
        self._waiting: list[list[int]] = []  # fronts that came before there was a repository

    def _take(self, message: dict[str, Any], fds: list[int]) -> None:
        kind = message["type"]
        if kind == "front":
            if self._fronts is None:
                self._waiting.append(fds)
            else:
                self._join(self._fronts, fds)
            return
        close_all(fds)
        if kind == "stop":
            self._stopping.set()

    @staticmethod
    def _join(fronts: Fronts, fds: list[int]) -> None:
        sock_fd, requests_fd, answers_fd, running_fd = fds
        sock = socket.socket(fileno=sock_fd)
        try:
            session = FrontSession(fronts, sock, requests_fd, answers_fd, running_fd)
        except OSError:
            logger.exception("a front cannot be served")  # it asks again
            return
        fronts.join(session)

    # --- what fronts are told ---------------------------------------------------------------------
    def _entries(self) -> list[tuple[ServedModel, dict[str, Any]]]:
        assert self._repository is not None
        return entries(self._repository)

    def _reason(self) -> str | None:
        assert self._repository is not None
        return self._repository.not_ready_reason()

    def _awaited(self) -> dict[str, list[int]]:
        assert self._repository is not None
        return self._repository.awaited()

    async def _call(self, message: dict[str, Any]) -> dict[str, Any]:
        """Loads or unloads for a front."""
        repository = self._repository
        assert repository is not None
        if message["type"] == "load":
            try:
                model = await repository.load(message["name"], message["version"])
            except (PackageError, EngineError) as error:
                raise LoadRefused(error.message) from error
            self._publish()
            return {"version": model.version}
        await repository.unload(message["name"], message["version"])
        self._publish()
        return {}

    def _publish(self) -> None:
        """Tells the fronts what has changed, if anything has; to find that out is cheap, since it is asked often."""
        repository, fronts = self._repository, self._fronts
        if repository is None or fronts is None:
            return
        unloaded = sorted(repository.unloaded)
        if unloaded != self._unloaded and not self._starting:
            self._unloaded = unloaded
            self._child.send({"type": "unloaded", "packages": unloaded})
        models = [(id(m), m.precision, m.precisions, m.state) for m in repository.models()]
        state = models, repository.not_ready_reason(), repository.awaited(), self._starting
        if state != self._published:
            self._published = state
            fronts.publish()

    async def _publish_for_ever(self) -> None:
        while True:
            try:
                self._publish()
            except Exception:  # the next time may succeed: there may be no memory for a moment
                logger.exception("fronts could not be told of the models")
            await asyncio.sleep(_PUBLISH_S)

    # --- life -------------------------------------------------------------------------------------
    async def run(self) -> None:
        hello, (room_fd,) = await self._child.hello
        room = RoomPage(room_fd)
        os.close(room_fd)
        settings = Settings.model_validate(hello["settings"])
        configure_logging(settings.log_format, settings.log_level, settings.access_log)
        registry = CollectorRegistry()
        register_process(registry)
        metrics = Metrics(registry, package.__version__, counts_requests=False)
        try:
            self._repository = repository = create_repository(settings, metrics, registry, at_once=False)
        except SettingsError as error:
            self._child.send({"type": FATAL, "message": error.message})
            self._child.close()
            return
        self._fronts = fronts = Fronts(
            self._entries, self._reason, self._awaited, lambda: self._starting, room, self._call
        )
        repository.before_retiring(fronts.retire)
        for fds in self._waiting:
            self._join(fronts, fds)
        tasks = [
            asyncio.create_task(self._child.beat(registry)),
            asyncio.create_task(self._publish_for_ever()),
            asyncio.create_task(self._load_and_watch(repository, settings.watch_s, hello["unloaded"])),
        ]
        ends = [asyncio.create_task(self._stopping.wait()), asyncio.create_task(self._child.ended.wait())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in (*tasks, *ends):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        fronts.close()
        await repository.close()
        self._child.close()

    async def _load_and_watch(
        self, repository: Repository, watch_s: float, unloaded: list[list[Any]]
    ) -> None:
        self._unloaded = [(name, version) for name, version in unloaded]
        try:
            await repository.load_all(self._unloaded)
        except Exception:  # what is loaded is served
            logger.exception("not all models could be loaded")
        self._starting = False
        self._publish()
        self._child.send({"type": "ready"})
        reason = repository.not_ready_reason()
        if reason is None:
            logger.info("ready", extra={"models": len(repository.models())})
        else:
            logger.error("not ready", extra={"reason": reason})
        await watch(repository, watch_s)


def prepare() -> None:
    """Before the loop runs."""
    limit_arenas()
