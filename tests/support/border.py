"""A front and an engine process in one event loop, connected as the processes are: sockets, descriptors, memory."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry

from tests.support.scheduling import serving, until
from tests.support.specs import make_manifest
from vernier.border.engine_side.front_session import FrontSession
from vernier.border.engine_side.serving_fronts import Fronts
from vernier.border.front_side.engine_group import EngineGroup
from vernier.border.memory import arena as arenas
from vernier.border.memory.arena import Arena, create_memfd
from vernier.border.memory.room import BYTES as ROOM_BYTES
from vernier.border.memory.room import RoomPage
from vernier.border.memory.running import BYTES as RUNNING_BYTES
from vernier.border.records.channel import socket_pair
from vernier.border.signature import Signature
from vernier.engine.base import Executor
from vernier.exposition import Metrics
from vernier.metrics import ModelMetrics
from vernier.package.manifest import Manifest


def arithmetic_manifest(name: str = "m", version: int = 1, **changes: Any) -> Manifest:
    """Of what ArithmeticExecutor computes."""
    fields = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 2]}],
        "outputs": [{"name": n, "dtype": "float32", "shape": ["batch", 2]} for n in ("y", "z")],
        "dims": {"batch": {"min": 1, "opt": 8, "max": 8}},
        "batching": {"kind": "dynamic", "dim": "batch", "buckets": [1, 8]},
    }
    return make_manifest(name=name, version=version, **{**fields, **changes})


@dataclass(eq=False)
class EngineModel:
    """A ServedModel of the engine side."""

    manifest: Manifest
    scheduler: Any
    precisions: tuple[str, ...] = ("fp32",)
    metrics: ModelMetrics = field(default_factory=lambda: ModelMetrics("m", "1"))
    runtime: str = "onnxruntime"
    state: str = "ready"

    def __post_init__(self) -> None:
        self.name = self.manifest.name
        self.version = str(self.manifest.version)
        self.signature = Signature.of(self.manifest)

    @property
    def precision(self) -> str:
        return self.precisions[0]

    def description(self) -> dict[str, Any]:
        return {"name": self.name}

    def entry(self) -> dict[str, Any]:
        return {
            "manifest": self.manifest.model_dump(mode="json"),
            "precision": self.precision,
            "precisions": list(self.precisions),
            "runtime": self.runtime,
            "state": self.state,
            "description": self.description(),
        }


class EngineSide:
    """What an engine process has for its fronts."""

    def __init__(self, *models: EngineModel) -> None:
        self.models = list(models)
        self.awaited: dict[str, list[int]] = {}
        self.starting = False
        self.reason: str | None = None
        self.room_fd = create_memfd("room", ROOM_BYTES)
        self.calls: list[dict[str, Any]] = []
        self.fronts = Fronts(
            lambda: [(model, model.entry()) for model in self.models],
            lambda: self.reason,
            lambda: self.awaited,
            lambda: self.starting,
            RoomPage(self.room_fd),
            self._call,
        )

    async def _call(self, message: dict[str, Any]) -> dict[str, Any]:
        self.calls.append(message)
        return {"version": 1}

    def close(self) -> None:
        self.fronts.close()
        os.close(self.room_fd)


class FrontSide:
    """What a front process has for its engine processes.

    Attributes:
        engine: the first one.
        session: of the engine process that was met last.
        sessions: of each engine process, the last one.
    """

    def __init__(
        self,
        chunks: int = 4,
        queue_limit: int = 1000,
        clock: Callable[[], float] | None = None,
        engines: int = 1,
    ) -> None:
        self.memory = create_memfd("requests", chunks * arenas.CHUNK_BYTES)
        self.arena = Arena(self.memory, chunks * arenas.CHUNK_BYTES)
        self.metrics = Metrics(CollectorRegistry(), "0")
        options = {} if clock is None else {"clock": clock}
        self.group = EngineGroup(self.arena, self.metrics, queue_limit, engines, **options)
        self.engine = self.group.engines[0]
        self.session: FrontSession | None = None
        self.sessions: dict[int, FrontSession] = {}

    def meet(self, engine: EngineSide, chunks: int = 4, join: bool = True, number: int = 0) -> FrontSession:
        """A new engine process is there."""
        front_end, engine_end = socket_pair()
        answers = create_memfd("answers", chunks * arenas.CHUNK_BYTES)
        running = create_memfd("running", RUNNING_BYTES)
        session = FrontSession(
            engine.fronts, engine_end, os.dup(self.memory), os.dup(answers), os.dup(running)
        )
        self.session = self.sessions[number] = session
        self.group.engines[number].attach(front_end, answers, running, os.dup(engine.room_fd))
        if join:
            engine.fronts.join(session)
        return session

    @property
    def free_chunks(self) -> int:
        return sum(chunk.is_free for chunk in self.arena._chunks)

    def close(self) -> None:
        self.group.close()
        os.close(self.memory)


def kill(session: FrontSession) -> None:
    """The engine process of this session dies: what it has not sent is lost, and it computes no more."""
    channel = session._channel
    channel._ended = True
    channel._shut()


def stall(channel: Any) -> Callable[[], None]:
    """This end reads nothing until what is returned is called."""
    channel._loop.remove_reader(channel._socket.fileno())

    def go_on() -> None:
        if not channel.closed:
            channel._loop.add_reader(channel._socket.fileno(), channel._readable)

    return go_on


class Transport:
    """One model, in this process or behind the border.

    Attributes:
        scheduler: to submit to.
        behind: the one that runs.
        metrics: where the model's requests are counted.
    """

    def __init__(self, scheduler: Any, behind: Any, metrics: ModelMetrics, front: FrontSide | None) -> None:
        self.scheduler = scheduler
        self.behind = behind
        self.metrics = metrics
        self.front = front

    async def settle(self) -> None:
        """Returns when nothing is under way."""

        def quiet() -> bool:
            front = self.front
            return self.behind.inflight == 0 and (
                front is None or not (front.engine.open_requests or front.engine._open)
            )

        await until(quiet)

    def check_books(self) -> dict[str, int]:
        totals = self.metrics.totals()
        admitted = totals["admitted"]
        assert admitted == sum(totals.values()) - admitted, totals
        assert self.metrics._inflight == 0
        return totals


@asynccontextmanager
async def transported(
    form: str,
    *executors: Executor,
    chunks: int = 4,
    answer_chunks: int = 4,
    declared: Sequence[str] | None = None,
    **options: Any,
) -> AsyncIterator[Transport]:
    """`serving`, seen through a transport. form: "process" or "border"."""
    async with serving(*executors, **options) as scheduler:
        if form == "process":
            yield Transport(scheduler, scheduler, scheduler._metrics, None)
            return
        precisions = tuple(declared or [executor.precision for executor in executors])
        manifest = arithmetic_manifest(
            variants={p: {"precision": p, "files": ["fp32.onnx"]} for p in precisions}
        )
        side = EngineSide(EngineModel(manifest, scheduler, precisions))
        front = FrontSide(chunks)
        front.meet(side, answer_chunks)
        await until(lambda: front.group.not_ready_reason() is None)
        model = front.group.resolve("m", None)
        transport = Transport(model.scheduler, scheduler, model.metrics, front)
        try:
            yield transport
        finally:
            for executor in executors:
                for part in executor.parts:
                    part.gate.set()
            await transport.settle()
            assert not front.session._batches
            front.close()
            side.close()
