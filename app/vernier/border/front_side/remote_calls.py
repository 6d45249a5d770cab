"""Administrative calls that a front makes of the engine process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count
from typing import Any

from vernier.border.records import wire
from vernier.errors import EngineRestarting


class RemoteCalls:
    """Belongs to the event loop's thread.

    Args:
        write: sends a record to the engine process. connected: whether there is one.
    """

    def __init__(self, write: Callable[[bytes], None], connected: Callable[[], bool]) -> None:
        self._write = write
        self._connected = connected
        self._loop = asyncio.get_running_loop()
        self._numbers = count(1)
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def load(self, name: str, version: int | None = None) -> int:
        """Loads a version (the newest if None) and returns it. Raises as `_call` does."""
        result = await self._call({"type": "load", "name": name, "version": version})
        return int(result["version"])

    async def unload(self, name: str, version: int | None = None) -> None:
        """Takes a version, or all, out of service. Raises as `_call` does."""
        await self._call({"type": "unload", "name": name, "version": version})

    async def _call(self, message: dict[str, Any]) -> dict[str, Any]:
        """What the engine process answers. Raises the error that it answers, or EngineRestarting when there is none or
        it ends."""
        if not self._connected():
            raise EngineRestarting("the engine process is being restarted; try again soon")
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._calls[number] = future
        self._write(wire.write_json({**message, "call": number}))
        try:
            result = await future
        finally:
            self._calls.pop(number, None)
        if "error" in result:
            raise wire.error_of(result["error"])
        return result

    def answered(self, message: dict[str, Any]) -> None:
        future = self._calls.get(message.get("call", 0))
        if future is not None and not future.done():
            future.set_result(message)

    def lost(self) -> None:
        """The engine process has died."""
        for future in self._calls.values():
            if not future.done():
                future.set_exception(
                    EngineRestarting("the engine process ended before it had answered; try again")
                )
