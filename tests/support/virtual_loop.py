"""An event loop whose time passes only when nothing is left to do."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any


class _Selector(selectors.DefaultSelector):
    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events and timeout is None:
            raise RuntimeError("everything waits for something that never comes")
        if not events and timeout:
            self.loop.now += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """No threads may call it."""

    def __init__(self) -> None:
        selector = _Selector()
        super().__init__(selector)
        self.now = 1000.0
        selector.loop = self

    def time(self) -> float:
        return self.now if hasattr(self, "now") else 0.0
