"""The two loops on the wire: what they send when, and what they write down."""

from __future__ import annotations

import asyncio
from array import array
from collections import deque
from time import perf_counter

import numpy as np

from benchmarks.load.calls import Check
from benchmarks.load.client import Client
from benchmarks.load.plans import ClosedLoop, OpenLoop, Plan
from benchmarks.load.record import UNANSWERED, Record
from benchmarks.load.schedule import poisson

_RECONNECT_S = 0.05
_CONNECT_TIMEOUT_S = 10.0
#: The loop's timers are good to a millisecond; nearer to a send than this, it spins.
_SPIN_S = 0.002


class Loop:
    """What both loops share: connections, calls in turns, rows.

    Args:
        plan: what to do.
    """

    #: Whether a row belongs to the window in which it was due; else to that in which it ended.
    counts_by_due: bool

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.loop = asyncio.get_running_loop()
        self.began = 0.0
        self.clients: set[Client] = set()
        self.finished = self.loop.create_future()
        self._closing = False
        self._calls = list(plan.calls)
        self._next_call = 0
        self._since_check = 0
        self._due, self._latency, self._lag = array("d"), array("d"), array("d")
        self._status, self._waited = array("h"), array("b")
        self._to_check: list[tuple[int, Check, bytes]] = []

    async def run(self) -> Record:
        """Raises ConnectionError when the server does not take the connections."""
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await asyncio.gather(*(self._open() for _ in range(self.plan.connections)))
        except (OSError, TimeoutError) as error:
            self._close()
            raise ConnectionError(
                f"{self.plan.host}:{self.plan.port} does not take {self.plan.connections} connections: {error}"
            ) from error
        self.began = perf_counter()
        give_up = self.loop.call_later(self.plan.seconds + self.plan.grace_s, self.finish)
        try:
            self.start()
            await self.finished
        finally:
            give_up.cancel()
            self._close()
        return self._record()

    def start(self) -> None:
        raise NotImplementedError

    def free(self, client: Client) -> None:
        """The client can take a request."""
        raise NotImplementedError

    def finish(self) -> None:
        if not self.finished.done():
            self.finished.set_result(None)

    def send(self, client: Client, due: float, waited: bool) -> None:
        """Sends the next call. `due` is in seconds since the loop began."""
        index = self._next_call
        self._next_call = index + 1 if index + 1 < len(self._calls) else 0
        client.due = due
        client.waited = waited
        client.sent = perf_counter() - self.began
        client.send(self._calls[index])

    # --- clients ----------------------------------------------------------------------------------
    async def _open(self) -> None:
        _, client = await self.loop.create_connection(
            lambda: Client(self._ended, self._lost), self.plan.host, self.plan.port
        )
        self.clients.add(client)

    def _lost(self, client: Client) -> None:
        self.clients.discard(client)
        if not self._closing:
            self.loop.call_later(_RECONNECT_S, lambda: self.loop.create_task(self._reopen()))

    async def _reopen(self) -> None:
        if self._closing:
            return
        try:
            _, client = await self.loop.create_connection(
                lambda: Client(self._ended, self._lost), self.plan.host, self.plan.port
            )
        except OSError:
            if not self._closing:
                self.loop.call_later(_RECONNECT_S, lambda: self.loop.create_task(self._reopen()))
            return
        if self._closing:
            client.close()
            return
        self.clients.add(client)
        self.free(client)

    def _close(self) -> None:
        """Writes down who never got an answer, and closes every connection."""
        self._closing = True
        for client in list(self.clients):
            if client.is_busy:
                client.is_busy = False
                self._write(client, UNANSWERED)
            client.close()

    # --- rows -------------------------------------------------------------------------------------
    def _ended(self, client: Client, status: int, body: bytes) -> None:
        self._write(client, status)
        check = client.call.check
        if check is not None and 200 <= status < 300:
            self._since_check += 1
            if self._since_check >= self.plan.check_every:
                self._since_check = 0
                self._to_check.append((len(self._due) - 1, check, body))  # later: it takes time from the load
        if client.is_open:
            self.free(client)

    def _write(self, client: Client, status: int) -> None:
        due = client.due
        self._row(due, status, 0.0 if client.waited else client.sent - due, client.waited)

    def _row(self, due: float, status: int, lag: float, waited: bool) -> None:
        self._due.append(due)
        self._latency.append(perf_counter() - self.began - due)
        self._status.append(status)
        self._lag.append(lag)
        self._waited.append(waited)

    def _record(self) -> Record:
        right = np.full(len(self._due), -1, np.int8)
        for row, check, body in self._to_check:
            right[row] = check(body)
        record = Record(
            due_s=np.array(self._due),
            latency_s=np.array(self._latency),
            status=np.array(self._status),
            right=right,
            lag_s=np.array(self._lag),
            waited=np.array(self._waited, np.bool_),
            window_s=(0.0, self.plan.seconds),
            is_open=self.counts_by_due,
        )
        return record.between(0.0, self.plan.seconds)


class Closed(Loop):
    """Drives a `ClosedLoop`."""

    counts_by_due = False

    def start(self) -> None:
        for client in list(self.clients):
            self.free(client)
        self.loop.call_later(self.plan.seconds, self._settle)

    def free(self, client: Client) -> None:
        now = perf_counter() - self.began
        if now < self.plan.seconds:
            self.send(client, now, False)

    def _settle(self) -> None:
        """Ends the run when the last answer is there."""
        if any(client.is_busy for client in self.clients):
            self.loop.call_later(0.01, self._settle)
        else:
            self.finish()


class Open(Loop):
    """Drives an `OpenLoop`."""

    counts_by_due = True

    def __init__(self, plan: OpenLoop) -> None:
        super().__init__(plan)
        self._schedule = poisson(plan.rate, plan.seconds, seed=plan.seed, bursts=plan.bursts).tolist()
        self._position = 0
        self._free: deque[Client] = deque()
        self._backlog: deque[float] = deque()

    def start(self) -> None:
        self._free.extend(self.clients)
        self._tick()

    def free(self, client: Client) -> None:
        if self._backlog:
            self.send(client, self._backlog.popleft(), True)
        else:
            self._free.append(client)

    def _tick(self) -> None:
        """Sends what is due, and comes again when the next one is."""
        schedule, position = self._schedule, self._position
        now = perf_counter() - self.began
        while position < len(schedule) and schedule[position] <= now:
            self._dispatch(schedule[position])
            position += 1
        self._position = position
        if self.finished.done():
            return
        if position == len(schedule):
            self._settle()
            return
        gap = schedule[position] - now
        if gap > _SPIN_S:
            self.loop.call_later(gap - _SPIN_S, self._tick)
        else:
            self.loop.call_soon(self._tick)

    def _dispatch(self, due: float) -> None:
        while self._free:
            client = self._free.popleft()  # in turns: every connection is a client of its own
            if client.is_open:
                self.send(client, due, False)
                return
        self._backlog.append(due)

    def _settle(self) -> None:
        if len(self._due) < len(self._schedule):
            self.loop.call_later(0.005, self._settle)
        elif self.plan.seconds > (left := perf_counter() - self.began):
            self.loop.call_later(self.plan.seconds - left, self.finish)
        else:
            self.finish()

    def _close(self) -> None:
        for due in self._backlog:
            self._row(due, UNANSWERED, 0.0, True)
        self._backlog.clear()
        super()._close()


def loop_of(plan: Plan) -> Loop:
    """The loop that drives `plan`; call it where an event loop runs."""
    if isinstance(plan, OpenLoop):
        return Open(plan)
    if isinstance(plan, ClosedLoop):
        return Closed(plan)
    raise TypeError(f"{type(plan).__name__} is neither an OpenLoop nor a ClosedLoop")
