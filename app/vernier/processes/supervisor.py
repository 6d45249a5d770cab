"""The supervisor: starts front processes and the engine process, watches them, and starts again what dies.

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
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vernier.border import limit_counts
from vernier.border.arena import CHUNK_BYTES, create_memfd
from vernier.border.channel import close_all, socket_pair
from vernier.border.room import BYTES as ROOM_BYTES
from vernier.border.running import BYTES as RUNNING_BYTES
from vernier.exposition_merge import Family, Totals
from vernier.processes import accepting
from vernier.processes.control import FATAL, Control
from vernier.settings import Settings

logger = logging.getLogger("vernier")

#: Of the memory that a front writes, and of that which the engine process writes for it. Pages are taken when used.
ARENA_BYTES = 32 * CHUNK_BYTES
#: A process whose loop has not turned for so long is killed; while it starts, imports and loading may hold it up.
_SILENCE_S, _STARTING_SILENCE_S = 5.0, 60.0
_WATCH_S = 0.25
_ORPHANS_A_TURN = 16
#: Pauses before a process that died soon after its start is started again.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _STABLE_S = 0.1, 10.0, 10.0
#: After one that had served, which is missed more and costs less to try.
_LONGEST_PAUSE_SERVED_S = 1.0
_COLLECT_S = 2.0
#: How often figures are collected, so that those of a process that dies are not lost.
_KEEP_S = 1.0
NOT_STARTED = 3


@dataclass(eq=False)
class Process:
    """A process that the supervisor has started."""

    role: str  # "engine", or "front-0" …
    process: asyncio.subprocess.Process
    control: Control
    started: float
    heard: float
    ready: bool = False
    families: list[Family] = field(default_factory=list)


@dataclass(eq=False)
class Place:
    """Where a process belongs, whichever runs there now.

    memory: that a front writes.
    """

    role: str
    memory: int = -1
    running: Process | None = None
    pause_s: float = _FIRST_PAUSE_S


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
        listeners: Sequence[socket.socket],
        operations: Sequence[socket.socket],
        clients: Sequence[str],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._settings = settings.model_dump(mode="json")
        self._drain_s = settings.drain_delay_s + settings.drain_timeout_s
        self._listeners = listeners
        self._operations = operations
        self._counts = create_memfd("connections", accepting.BYTES)
        self._clients = {name: number for number, name in enumerate(clients)}
        self._room = create_memfd("room", ROOM_BYTES)
        self._limits = create_memfd("limits", limit_counts.bytes_for(len(clients), fronts))
        self._engine = Place("engine")
        self._fronts = [
            Place(f"front-{n}", create_memfd(f"requests-{n}", ARENA_BYTES)) for n in range(fronts)
        ]
        self._ended = Totals()
        for place in self._places:
            self._count_restarts(place, 0)
        self._collecting: dict[int, tuple[set[Process], asyncio.Event]] = {}
        self._number = 0
        self._stopping = False
        self._stop = asyncio.Event()
        self._signals = 0
        self._fatal: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def _places(self) -> list[Place]:
        return [self._engine, *self._fronts]

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
    async def _start(self, place: Place) -> None:
        """Raises OSError when there is no process, descriptor or memory left."""
        hello, fds = self._hello(place)
        ours, theirs = socket_pair()
        try:
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "vernier.processes.child",
                place.role.partition("-")[0],
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
        process = Process(place.role, child, None, now, now)  # type: ignore[arg-type]
        take = partial(self._take, process)
        process.control = Control(ours, take, lambda: None)  # its end is told by the process itself
        place.running = process
        self._spawn(self._await_end(place, process))
        process.control.send(hello, fds)
        for other in self._fronts:
            if place is self._engine or place is other:
                self._introduce(other)

    def _hello(self, place: Place) -> tuple[dict[str, Any], list[int]]:
        """The first message for a process, and the descriptors that go with it."""
        hello: dict[str, Any] = {"type": "hello", "settings": self._settings}
        if place is self._engine:
            return hello, _duplicates(self._room)
        hello |= {
            "index": self._fronts.index(place),
            "fronts": len(self._fronts),
            "listeners": len(self._listeners),
            "clients": self._clients,
        }
        sockets = [s.fileno() for s in (*self._listeners, *self._operations)]
        return hello, _duplicates(self._counts, self._limits, place.memory, *sockets)

    def _introduce(self, place: Place) -> None:
        """A socket and memory between a front and the engine process, if both are there. Where there is no descriptor
        left for them, the front asks again."""
        engine, front = self._engine.running, place.running
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
                to_engine = _duplicates(engine_end.fileno(), place.memory, answers, running)
                to_front = _duplicates(front_end.fileno(), answers, running, self._room)
            except OSError:
                logger.exception(
                    "a front and the engine process cannot be connected", extra={"role": place.role}
                )
                return
            engine.control.send({"type": "front"}, to_engine)
            front.control.send({"type": "engine"}, to_front)

    # --- watching ---------------------------------------------------------------------------------
    async def _await_end(self, place: Place, process: Process) -> None:
        code = await process.process.wait()
        process.control.flush()
        await asyncio.sleep(0)  # what it has sent last is read
        await asyncio.sleep(0.01)
        process.control.close()
        if place.running is process:
            place.running = None
        for waiting, done in self._collecting.values():
            waiting.discard(process)
            if not waiting:
                done.set()
        self._ended.add_ended(process.families)
        if place is not self._engine:
            self._forget_connections(self._fronts.index(place))
        if self._stopping or self._fatal is not None:
            return
        logger.error("a process ended", extra={"role": place.role, "code": code})
        self._count_restarts(place, 1)
        if self._loop.time() - process.started > _STABLE_S:
            place.pause_s = _FIRST_PAUSE_S
            pause_s = 0.0
        else:
            longest_s = _LONGEST_PAUSE_S if not process.ready else _LONGEST_PAUSE_SERVED_S
            pause_s = min(place.pause_s, longest_s)
            place.pause_s = min(2 * pause_s, longest_s)
        await asyncio.sleep(pause_s)
        while not self._stopping and place.running is None:
            try:
                self._renew(place)
                await self._start(place)
            except OSError:  # no process, no memory or no descriptor: there may be one later
                logger.exception("a process cannot be started", extra={"role": place.role})
                await asyncio.sleep(place.pause_s)
                place.pause_s = min(2 * place.pause_s, _LONGEST_PAUSE_S)

    def _renew(self, place: Place) -> None:
        """Memory that nothing of the process before has."""
        if place is self._engine:
            fresh = create_memfd("room", ROOM_BYTES)
            os.close(self._room)
            self._room = fresh
        else:
            fresh = create_memfd(f"requests-{self._fronts.index(place)}", ARENA_BYTES)
            os.close(place.memory)
            place.memory = fresh

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
                    silent = {"role": process.role, "silent_s": round(now - process.heard, 1)}
                    logger.error("a process does not answer and is killed", extra=silent)
                    process.heard = now
                    process.process.kill()
            if os.getpid() == 1 and len(self._running) == len(self._places):  # none is being started
                self._reap_orphans()

    def _count_restarts(self, place: Place, by: int) -> None:
        """A role's counter is there from the start, so that its first restart is an increase."""
        text = "Processes that ended by themselves or were killed, and were started again."
        role = "engine" if place is self._engine else "front"
        self._ended.count("vernier_process_restarts", text, {"role": role}, by)

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
            process.families = message["families"]
            waiting, done = self._collecting.get(message["id"] or 0, (set(), None))
            waiting.discard(process)
            if done is not None and not waiting:
                done.set()
        elif kind == "scrape":
            self._spawn(self._scrape(process, message["id"]))
        elif kind == "unconnected":
            for place in self._fronts:
                if place.running is process:
                    self._introduce(place)
        elif kind == "ready":
            process.ready = True
        elif kind == FATAL:
            self._fatal = message["message"]
            self._stop.set()

    # --- figures ----------------------------------------------------------------------------------
    async def _collect(self) -> Totals:
        self._number += 1
        asked = {process for process in self._running if process.ready or process.role == "engine"}
        done = asyncio.Event()
        number = self._number
        if asked:
            self._collecting[number] = asked, done
            for process in asked:
                process.control.send({"type": "collect", "id": number})
            try:
                async with asyncio.timeout(_COLLECT_S):
                    await done.wait()
            except TimeoutError:
                late = sorted(process.role for process in asked)
                logger.warning("figures are missing", extra={"roles": late})
            finally:
                del self._collecting[number]
        totals = Totals()
        totals.include(self._ended)
        for process in self._running:
            totals.add(process.role, process.families)
        return totals

    async def _scrape(self, process: Process, number: int) -> None:
        totals = await self._collect()
        process.control.send({"type": "scraped", "id": number, "families": totals.families()})

    async def _keep_figures(self) -> None:
        while True:
            await asyncio.sleep(_KEEP_S)
            await self._collect()

    # --- life -------------------------------------------------------------------------------------
    def _signal(self, number: int) -> None:
        self._signals += 1
        if self._signals == 1:
            logger.info("draining", extra={"signal": signal.Signals(number).name})
            self._stop.set()
            return
        for process in self._running:  # a second signal: no more waiting
            if process.role != "engine":
                process.control.send({"type": "drain"})

    async def run(self) -> int:
        """Returns the exit code of the service."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._signal, number)
        for place in self._places:
            await self._start(place)
        for work in (self._watch(), self._keep_figures()):
            self._spawn(work)
        await self._stop.wait()
        self._stopping = True
        if self._fatal is not None:
            for process in self._running:
                process.process.kill()
            await self._ends(self._running, 5.0)
            sys.stderr.write(f"vernier: {self._fatal}\n")
            return 1
        for listener in (*self._listeners, *self._operations):
            listener.close()  # when the last front has closed its own, clients are refused and wait for nobody
        fronts = [place.running for place in self._fronts if place.running is not None]
        for process in fronts:
            process.control.send({"type": "drain"})
        await self._ends(fronts, self._drain_s + 5.0)
        engine = self._engine.running
        if engine is not None:
            engine.control.send({"type": "stop"})
            await self._ends([engine], self._drain_s + 5.0)
        for task in list(self._tasks):
            task.cancel()
        logger.info("stopped", extra={"requests": self._ended.by_model()})
        return 0

    async def _ends(self, processes: Sequence[Process], timeout_s: float) -> None:
        """Returns when they have ended; those that take longer are killed."""
        ends = [asyncio.ensure_future(process.process.wait()) for process in processes]
        if not ends:
            return
        _, late = await asyncio.wait(ends, timeout=timeout_s)
        for process in processes:
            if process.process.returncode is None:
                logger.error("a process did not end in time", extra={"role": process.role})
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


def supervise(settings: Settings, fronts: int, clients: Sequence[str]) -> int:
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
    logger.info(
        "listening", extra={"host": settings.host, "port": port, "fronts": fronts, "pid": os.getpid()}
    )

    async def run() -> int:
        return await Supervisor(settings, fronts, listeners, operations, clients).run()

    return asyncio.run(run())
