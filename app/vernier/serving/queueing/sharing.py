"""Fair turns among the models that share a device.

Start-time fair queueing: every model has a virtual time, the slot seconds it has used. When the device is
full, the waiting model that has used least goes next. A model that was idle starts at the present virtual
time, so that it cannot save up turns and then shut the others out.
"""

from __future__ import annotations

from typing import Protocol


class Member(Protocol):
    """A user of a device."""

    def woken(self) -> None:
        """The member's turn may have come: it asks again, or says that it has nothing to run."""


class _Account:
    __slots__ = ("running", "used_s")

    def __init__(self) -> None:
        self.used_s = 0.0
        self.running = 0


class DeviceScheduler:
    """Belongs to one thread.

    Args:
        capacity: executions that may run at once; more would only slow each other down.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._running = 0
        self._virtual_s = 0.0
        self._accounts: dict[Member, _Account] = {}
        self._waiting: dict[Member, _Account] = {}

    def may_run(self, member: Member) -> bool:
        """Whether the member may start an execution now; if not, it waits, and `woken` will be called."""
        account = self._accounts.get(member)
        if account is None:
            account = self._accounts[member] = _Account()
        if not account.running and member not in self._waiting:
            account.used_s = max(account.used_s, self._virtual_s)
        others = [a.used_s for m, a in self._waiting.items() if m is not member]
        if self._running >= self._capacity or (others and min(others) < account.used_s):
            self._waiting[member] = account
            return False
        self._waiting.pop(member, None)
        return True

    def started(self, member: Member, predicted_s: float) -> None:
        """An execution that should take `predicted_s`; charged at once, so that many starts count."""
        account = self._accounts[member]
        self._virtual_s = max(self._virtual_s, account.used_s)
        self._running += 1
        account.running += 1
        account.used_s += predicted_s
        # Several executions may have ended before another one was started: there may be room for more.
        self._wake()

    def ended(self, member: Member, predicted_s: float, seconds: float) -> None:
        """The same execution took `seconds`."""
        account = self._accounts[member]
        self._running -= 1
        account.running -= 1
        account.used_s += seconds - predicted_s
        self._wake()

    def nothing_to_run(self, member: Member) -> None:
        """The member waits for no turn."""
        if self._waiting.pop(member, None) is not None:
            self._wake()

    def leave(self, member: Member) -> None:
        """The member is gone for good."""
        self.nothing_to_run(member)
        self._accounts.pop(member, None)

    def _wake(self) -> None:
        if self._waiting and self._running < self._capacity:
            min(self._waiting, key=lambda m: self._waiting[m].used_s).woken()
