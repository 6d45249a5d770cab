"""Fair turns among the models that share a device.

Start-time fair queueing: every model has a virtual time, the slot seconds it has used. When the device is
full, the waiting model that has used least goes next. A model that was idle starts at the present virtual
time, so that it cannot save up turns and then shut the others out.
"""

from __future__ import annotations


class Member:
    """A user of a device; `woken` is called when its turn may have come."""

    used_s: float = 0.0
    running: int = 0

    def woken(self) -> None:
        """Asks again with `acquire`, or says `leave`."""


class Device:
    """Belongs to one thread.

    Args:
        capacity: executions that may run at once; more would only slow each other down.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._running = 0
        self._virtual_s = 0.0
        self._waiting: dict[Member, None] = {}

    def acquire(self, member: Member, predicted_s: float) -> bool:
        """Takes a turn of about `predicted_s` seconds; False when others go first, and `woken` follows."""
        if not member.running and member not in self._waiting:
            member.used_s = max(member.used_s, self._virtual_s)
        first = self._first()
        if self._running >= self._capacity or (
            first is not None and first is not member and first.used_s < member.used_s
        ):
            self._waiting[member] = None
            return False
        self._waiting.pop(member, None)
        self._running += 1
        self._virtual_s = max(self._virtual_s, member.used_s)
        member.running += 1
        member.used_s += predicted_s
        return True

    def release(self, member: Member, predicted_s: float, seconds: float) -> None:
        """Ends a turn that took `seconds`."""
        self._running -= 1
        member.running -= 1
        member.used_s += seconds - predicted_s
        self._wake()

    def leave(self, member: Member) -> None:
        """The member has nothing to run after all."""
        if member in self._waiting:
            del self._waiting[member]
            self._wake()

    def _first(self) -> Member | None:
        return min(self._waiting, key=lambda m: m.used_s, default=None)

    def _wake(self) -> None:
        first = self._first()
        if first is not None and self._running < self._capacity:
            first.woken()
