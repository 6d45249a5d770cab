"""The supervisor: starts front and engine processes, watches them, and starts again what dies.

It holds the listening sockets and the shared memory, so that a process that dies takes neither with it. A new engine
process gets the memory of the fronts that live; a new front meets the engine process that runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from vernier.border.memory import limit_counts
from vernier.border.memory.arena import create_memfd
from vernier.border.memory.running import BYTES as RUNNING_BYTES
from vernier.border.records.channel import close_all, socket_pair
from vernier.processes import accepting
from vernier.processes.control import FATAL, Control
from vernier.processes.figures import Figures
from vernier.processes.places import ARENA_BYTES, Process, ProcessPlace
from vernier.settings import Settings

logger = logging.getLogger("vernier")

#: A process whose loop has not turned for so long is killed; while it starts, imports and loading may hold it up.
_SILENCE_S, _STARTING_SILENCE_S = 5.0, 60.0
_WATCH_S = 0.25
_ORPHANS_A_TURN = 16
#: How long fronts that are ready wait for those that are not before they accept connections, at the service's start.
_OPENING_S = 5.0
NOT_STARTED = 3


class Supervisor:
    """Belongs to the event loop's thread.

    Args:
        listeners: of the service's port. operations: of the port for health and metrics, if there is one.
        clients: names of those that have limits.
    """

    def __init__(
        self,
        settings: Settings,
        fronts: int,
        engines: int,
        listeners: Sequence[socket.socket],
        operations: Sequence[socket.socket],
        clients: Sequence[str],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._drain_s = settings.drain_delay_s + settings.drain_timeout_s
        self._listeners = listeners
        self._operations = operations
        self._counts = create_memfd("connections", accepting.BYTES)
        self._clients = {name: number for number, name in enumerate(clients)}
        self._limits = create_memfd("limits", limit_counts.bytes_for(len(clients), fronts))
        self._fronts = [ProcessPlace("front", n, settings.model_dump(mode="json")) for n in range(fronts)]
        self._engines = [
            ProcessPlace("engine", n, settings.for_engine(n, engines).model_dump(mode="json"))
            for n in range(engines)
        ]
        self._places = [*self._engines, *self._fronts]
        self._figures = Figures(self._places, lambda: self._running)
        self._accepting = False
        self._stopping = False
        self._stop = asyncio.Event()
        self._signals = 0
        self._fatal: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def _running(self) -> list[Process]:
        return [place.running for place in self._places if place.running is not None]

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.critical("the supervisor made a mistake", exc_info=task.exception())

    # --- starting ---------------------------------------------------------------------------------
    async def _start(self, place: ProcessPlace) -> None:
        """Raises OSError when there is no process, descriptor or memory left."""
        hello, fds = self._hello(place)
        ours, theirs = socket_pair()
        try:
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "vernier.processes.child",
                place.kind,
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
            )
        except BaseException:
            close_all(fds)
            ours.close()
            raise
        finally:
            theirs.close()
        now = self._loop.time()
        process = Process(place, child, None, now, now)  # type: ignore[arg-type]
        take = partial(self._take, process)
        process.control = Control(ours, take, lambda: None)  # its end is told by the process itself
        place.running = process
        self._spawn(self._await_end(place, process))
        process.control.send(hello, fds)
        if place.kind == "front":
            if self._accepting:
                process.control.send({"type": "accept"})
            for engine in self._engines:
                self._introduce(place, engine)
        else:
            for front in self._fronts:
                self._introduce(front, place)

    def _hello(self, place: ProcessPlace) -> tuple[dict[str, Any], list[int]]:
        """The first message for a process, and the descriptors that go with it."""
        hello: dict[str, Any] = {"type": "hello", "settings": place.settings}
        if place.kind == "engine":
            hello["unloaded"] = place.unloaded
            return hello, _duplicates(place.memory)
        hello |= {
            "index": place.number,
            "fronts": len(self._fronts),
            "engines": len(self._engines),
            "listeners": len(self._listeners),
            "clients": self._clients,
        }
        sockets = [s.fileno() for s in (*self._listeners, *self._operations)]
        return hello, _duplicates(self._counts, self._limits, place.memory, *sockets)

    def _introduce(self, front_place: ProcessPlace, engine_place: ProcessPlace) -> None:
        """A socket and memory between a front and an engine process, if both are there. Where there is no descriptor
        left for them, the front asks again."""
        engine, front = engine_place.running, front_place.running
        if engine is None or front is None:
            return
        with ExitStack() as stack:
            try:
                front_end, engine_end = socket_pair()
                stack.callback(front_end.close)
                stack.callback(engine_end.close)
                answers = create_memfd("answers", ARENA_BYTES)
                stack.callback(os.close, answers)
                running = create_memfd("running", RUNNING_BYTES)
                stack.callback(os.close, running)
                to_engine = _duplicates(engine_end.fileno(), front_place.memory, answers, running)
                to_front = _duplicates(front_end.fileno(), answers, running, engine_place.memory)
            except OSError:
                roles = {"front": front_place.role, "engine": engine_place.role}
                logger.exception("a front and an engine process cannot be connected", extra=roles)
                return
            engine.control.send({"type": "front"}, to_engine)
            front.control.send({"type": "engine", "engine": engine_place.number}, to_front)

    def _accept(self) -> None:
        """Lets fronts accept connections: at the service's start together, since one alone would take all that wait."""
        self._accepting = True
        for place in self._fronts:
            if place.running is not None:
                place.running.control.send({"type": "accept"})

    # --- watching ---------------------------------------------------------------------------------
    async def _await_end(self, place: ProcessPlace, process: Process) -> None:
        code = await process.process.wait()
        process.control.flush()
        await asyncio.sleep(0)  # what it has sent last is read
        await asyncio.sleep(0.01)
        process.control.close()
        if place.running is process:
            place.running = None
        self._figures.ended(process)
        if place.kind == "front":
            self._forget_connections(place.number)
            self._accept()  # the others wait for it no longer
        if self._stopping or self._fatal is not None:
            return
        logger.error("a process ended", extra={"role": place.role, "code": code})
        self._figures.count_restarts(place, 1)
        await asyncio.sleep(place.pause_s(process, self._loop.time() - process.started))
        while not self._stopping and place.running is None:
            try:
                place.renew()
                await self._start(place)
            except OSError:  # no process, no memory or no descriptor: there may be one later
                logger.exception("a process cannot be started", extra={"role": place.role})
                await asyncio.sleep(place.next_pause_s())

    def _forget_connections(self, index: int) -> None:
        os.pwrite(self._counts, bytes(8), 8 * index)
        limit_counts.forget_front(self._limits, len(self._clients), len(self._fronts), index)

    async def _watch(self) -> None:
        """Kills processes whose loop does not turn any more."""
        while True:
            await asyncio.sleep(_WATCH_S)
            now = self._loop.time()
            for process in self._running:
                limit_s = _SILENCE_S if process.ready else _STARTING_SILENCE_S
                if now - process.heard > limit_s and process.process.returncode is None:
                    silent = {"role": process.place.role, "silent_s": round(now - process.heard, 1)}
                    logger.error("a process does not answer and is killed", extra=silent)
                    process.heard = now
                    process.process.kill()
            if os.getpid() == 1 and len(self._running) == len(self._places):  # none is being started
                self._reap_orphans()

    def _reap_orphans(self) -> None:
        """As the first process of a container, which inherits the helpers of fronts and engine processes that died."""
        own = {process.process.pid for process in self._running}
        for _ in range(_ORPHANS_A_TURN):
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None or ended.si_pid in own:  # its own are waited for elsewhere
                return
            os.waitpid(ended.si_pid, os.WNOHANG)

    def _take(self, process: Process, message: dict[str, Any], fds: list[int]) -> None:
        close_all(fds)
        process.heard = self._loop.time()
        kind = message["type"]
        if kind == "collected":
            self._figures.take(process, message)
        elif kind == "scrape":
            self._spawn(self._scrape(process, message["id"]))
        elif kind == "unconnected":
            self._introduce(process.place, self._engines[message["engine"]])
        elif kind == "unloaded":
            process.place.unloaded = message["packages"]
        elif kind == "ready":
            process.ready = True
            if all(place.running is not None and place.running.ready for place in self._fronts):
                self._accept()
        elif kind == FATAL:
            self._fatal = message["message"]
            self._stop.set()

    # --- life -------------------------------------------------------------------------------------
    async def _scrape(self, process: Process, number: int) -> None:
        totals = await self._figures.collect()
        process.control.send({"type": "scraped", "id": number, "families": totals.families()})

    def _signal(self, number: int) -> None:
        self._signals += 1
        if self._signals == 1:
            logger.info("draining", extra={"signal": signal.Signals(number).name})
            self._stop.set()
            return
        for process in self._running:  # a second signal: no more waiting
            process.control.send({"type": "drain"})  # means nothing to an engine process

    async def run(self) -> int:
        """Returns the exit code of the service."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._signal, number)
        for place in self._places:
            await self._start(place)
        for work in (self._watch(), self._figures.keep()):
            self._spawn(work)
        opening = self._loop.call_later(_OPENING_S, self._accept)
        await self._stop.wait()
        opening.cancel()
        self._stopping = True
        if self._fatal is not None:
            for process in self._running:
                process.process.kill()
            await self._ends(self._running, 5.0)
            sys.stderr.write(f"vernier: {self._fatal}\n")
            return 1
        for listener in (*self._listeners, *self._operations):
            listener.close()  # when the last front has closed its own, clients are refused and wait for nobody
        for places, order in ((self._fronts, "drain"), (self._engines, "stop")):
            processes = [place.running for place in places if place.running is not None]
            for process in processes:
                process.control.send({"type": order})
            await self._ends(processes, self._drain_s + 5.0)
        for task in list(self._tasks):
            task.cancel()
        logger.info("stopped", extra={"requests": self._figures.by_model()})
        return 0

    async def _ends(self, processes: Sequence[Process], timeout_s: float) -> None:
        """Returns when they have ended; those that take longer are killed."""
        ends = [asyncio.ensure_future(process.process.wait()) for process in processes]
        if not ends:
            return
        _, late = await asyncio.wait(ends, timeout=timeout_s)
        for process in processes:
            if process.process.returncode is None:
                logger.error("a process did not end in time", extra={"role": process.place.role})
                process.process.kill()
        if late:
            await asyncio.wait(late, timeout=5.0)
        await asyncio.sleep(0.05)  # what they have sent last is read


def _duplicates(*fds: int) -> list[int]:
    """Of all, or an OSError."""
    made: list[int] = []
    try:
        made += (os.dup(fd) for fd in fds)
    except OSError:
        close_all(made)
        raise
    return made


def supervise(settings: Settings, fronts: int, engines: int, clients: Sequence[str]) -> int:
    """Runs the service until it is told to stop; returns its exit code.

    Args:
        clients: names of those that have limits.
    """
    try:
        listeners = accepting.listen(settings.host, settings.port)
        operations = (
            [] if settings.metrics_port is None else accepting.listen(settings.host, settings.metrics_port)
        )
        if (
            settings.grpc_port is not None
        ):  # each front binds it for itself; here it is seen whether it is free
            for probe in accepting.listen(settings.host, settings.grpc_port):
                probe.close()
    except OSError as error:
        logger.error("the service cannot listen", extra={"host": settings.host, "error": str(error)})
        return NOT_STARTED
    port = listeners[0].getsockname()[1]
    count = {"fronts": fronts, "engines": engines}
    logger.info("listening", extra={"host": settings.host, "port": port, **count, "pid": os.getpid()})

    async def run() -> int:
        return await Supervisor(settings, fronts, engines, listeners, operations, clients).run()

    return asyncio.run(run())
