"""`python -m vernier.processes.child ROLE FD`: what the supervisor starts. FD is the control socket's."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Coroutine
from typing import Any


def _loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


async def _run(role: str, sock: socket.socket) -> None:
    work: Coroutine[Any, Any, None]
    if role == "engine":
        from vernier.processes.engine import Engine, prepare

        prepare()
        work = Engine(sock).run()
    else:
        from vernier.processes.front import Front

        work = Front(sock).run()
    await work


def main() -> None:
    # a terminal sends them to all processes at once; the supervisor alone decides what they mean
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    role, fd = sys.argv[1], int(sys.argv[2])
    loop = _loop()
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(_run(role, socket.socket(fileno=fd)))
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


if __name__ == "__main__":
    main()
