"""JSON between processes; what is too long for a record travels in memory of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vernier.border.memory.arena import filled_memfd
from vernier.border.records import wire
from vernier.border.records.channel import MAX_RECORD_BYTES, Channel


def write_message(channel: Channel, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Sends a message.

    Args:
        fds: sent along, and closed here; such messages are short.
    """
    record = wire.write_json(message)
    if fds or len(record) <= MAX_RECORD_BYTES:
        channel.write(record, fds)
        return
    channel.write(record[:1], (filled_memfd("message", record),))


def read_message(record: memoryview, fds: Sequence[int]) -> dict[str, Any]:
    """Raises WireError. The descriptors stay the caller's."""
    if len(record) > 1 or not fds:
        return wire.read_json(record)
    try:
        text = os.pread(fds[0], os.fstat(fds[0]).st_size, 0)
    except (OSError, MemoryError) as error:
        raise wire.WireError(f"a message cannot be read: {error}") from error
    return wire.read_json(memoryview(text))
