"""A front whose first messages come all at once."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from vernier.border.memory.arena import CHUNK_BYTES, create_memfd
from vernier.border.memory.limit_counts import bytes_for
from vernier.border.records.channel import socket_pair
from vernier.processes import accepting, front
from vernier.processes.control import Control
from vernier.processes.front import Front
from vernier.settings import Settings


@pytest.mark.parametrize("engines", [0, 2])
async def test_a_front_that_is_to_end_before_it_has_started_ends(
    tmp_path: Path, engines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The messages lie in its socket while it imports what it needs."""
    monkeypatch.setattr(front, "configure_logging", lambda *settings: None)
    ours, theirs = socket_pair()
    listener = socket.create_server(("127.0.0.1", 0))
    settings = Settings(engines_dir=tmp_path, drain_delay_s=0.01, drain_timeout_s=1)
    heard: list[str] = []
    control = Control(ours, lambda message, fds: heard.append(message["type"]), lambda: None)
    hello = {
        "type": "hello",
        "settings": settings.model_dump(mode="json"),
        "index": 0,
        "fronts": 1,
        "engines": 1,
        "listeners": 1,
        "clients": {},
    }
    memory = [
        create_memfd("counts", accepting.BYTES),
        create_memfd("limits", bytes_for(0, 1)),
        create_memfd("requests", CHUNK_BYTES),
    ]
    control.send(hello, (*memory, os.dup(listener.fileno())))
    for _ in range(engines):
        front_end, engine_end = socket_pair()
        engine_end.close()
        fds = [create_memfd("shared", 4 * CHUNK_BYTES) for _ in range(3)]
        control.send({"type": "engine", "engine": 0}, (front_end.detach(), *fds))
    control.send({"type": "drain"})
    listener.close()
    await asyncio.wait_for(Front(theirs).run(), 20)
    await asyncio.sleep(0.01)
    assert "ready" in heard
    control.close()
