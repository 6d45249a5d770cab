"""Which modules a small JSON request passes, in a front and in the engine process: `python -m scripts.request_modules`.

A front's side and an engine process's side run in two threads of this process, over the real border. After the front
has learned the request's template, one more request is sent while every call is seen.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from prometheus_client import CollectorRegistry
from uvicorn.server import ServerState

from tests.support.packages import write_package
from vernier.border.engine_side.serving_fronts import Fronts, FrontSession
from vernier.border.front_side.engine_group import EngineGroup
from vernier.border.memory.arena import CHUNK_BYTES, Arena, create_memfd
from vernier.border.memory.room import BYTES as ROOM_BYTES
from vernier.border.memory.room import RoomPage
from vernier.border.memory.running import BYTES as RUNNING_BYTES
from vernier.border.records.channel import socket_pair
from vernier.composition.engine import create_repository
from vernier.composition.front import create_front
from vernier.composition.server import server_config
from vernier.exposition import Metrics
from vernier.exposition_merge import Family
from vernier.processes.engine import entries
from vernier.serving.lifecycle import Lifecycle
from vernier.settings import Settings

PACKAGE = str(Path(__file__).resolve().parents[1] / "app" / "vernier") + os.sep
ARENA_BYTES = 4 * CHUNK_BYTES
WARM_UPS = 4
BODY = json.dumps({"model": "mlp", "inputs": {"x": [[1.0, 2.0, 3.0, 4.0]]}}).encode()
REQUEST = (
    b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
    % (len(BODY), BODY)
)


class Seen:
    """Modules that a thread entered while it was watched."""

    def __init__(self) -> None:
        self.watching = False
        self.modules: dict[str, set[str]] = {}

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if self.watching and event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            module = frame.f_code.co_filename.removeprefix(PACKAGE)
            self.modules.setdefault(threading.current_thread().name, set()).add(module)


class Side:
    """A thread with a loop of its own."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)


async def start_engine(folder: Path, sock: socket.socket, fds: tuple[int, int, int], room: int) -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, "0", counts_requests=False)
    settings = Settings(engines_dir=folder, monitor_share=0.0, slots=1)
    repository = create_repository(settings, metrics, registry, at_once=False)
    await repository.load_all()

    async def call(message: dict[str, Any]) -> dict[str, Any]:
        return {}

    told = partial(entries, repository)
    fronts = Fronts(told, lambda: None, repository.awaited, lambda: False, RoomPage(room), call)
    fronts.join(FrontSession(fronts, sock, *fds))


class Wire(asyncio.Transport):
    """Where the connection writes."""

    def __init__(self) -> None:
        super().__init__()
        self.written: asyncio.Queue[bytes] = asyncio.Queue()

    def write(self, data: Any) -> None:
        self.written.put_nowait(bytes(data))

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name, default)

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


async def start_front(
    folder: Path, sock: socket.socket, requests_fd: int, answers: int, running: int, room: int
) -> tuple[Any, Wire]:
    registry = CollectorRegistry()
    metrics = Metrics(registry, "0")
    settings = Settings(engines_dir=folder)
    arena = Arena(requests_fd, ARENA_BYTES)
    ready = asyncio.Event()
    engine = EngineGroup(arena, metrics, 1024, 1, lambda number: ready.set() if engine.models() else None)
    engine.engines[0].attach(sock, answers, running, room)
    await ready.wait()
    lifecycle = Lifecycle(0.0)
    lifecycle.started()

    async def scrape() -> Iterable[Family]:
        return ()

    config = server_config(create_front(settings, engine, lifecycle, metrics, scrape), settings, arena)
    config.load()
    make: Callable[..., Any] = config.http_protocol_class  # type: ignore[assignment]
    connection, wire = make(config, ServerState(), {}), Wire()
    connection.connection_made(wire)
    return connection, wire


async def ask(connection: Any, wire: Wire) -> bytes:
    connection.data_received(REQUEST)
    return await wire.written.get()


def main() -> None:
    seen = Seen()
    threading.setprofile(seen)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_package(folder, "mlp")
        ours, theirs = socket_pair()
        requests_fd, answers = create_memfd("requests", ARENA_BYTES), create_memfd("answers", ARENA_BYTES)
        running, room = create_memfd("running", RUNNING_BYTES), create_memfd("room", ROOM_BYTES)
        engine, front = Side("engine process"), Side("front")
        fds = (os.dup(requests_fd), os.dup(answers), os.dup(running))
        engine.run(start_engine(folder, theirs, fds, os.dup(room)))
        connection, wire = front.run(start_front(folder, ours, requests_fd, answers, running, room))
        for _ in range(WARM_UPS):
            front.run(ask(connection, wire))
        seen.watching = True
        answer = front.run(ask(connection, wire))
        seen.watching = False
    if b"200 OK" not in answer:
        sys.exit(f"the request was not answered: {answer!r}")
    for name, modules in sorted(seen.modules.items()):
        print(f"{name}: {len(modules)} modules")
        for module in sorted(modules):
            print(f"  {module}")


if __name__ == "__main__":
    main()
