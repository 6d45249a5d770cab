"""Closed-loop clients for tests of what happens to requests while something breaks."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx

from tests.support.server import Server

ROW = {"x": [[0.1, 0.2, 0.3, 0.4]]}


class Load:
    """Threads that each send one request after the other on a kept-alive connection.

    Args:
        stop_at_refusal: a client ends at its first answer other than 200; else it goes on until `stop`.
        fields: of the request's body, beside the inputs.

    Attributes:
        statuses: of every answer, in the order of arrival. bodies: of those that were not 200.
        broken: connections that ended without an answer.
    """

    def __init__(
        self,
        server: Server,
        model: str,
        clients: int,
        *,
        stop_at_refusal: bool = False,
        headers: dict[str, str] | None = None,
        **fields: Any,
    ) -> None:
        self.statuses: list[int] = []
        self.bodies: list[dict[str, Any]] = []
        self.broken: list[str] = []
        self._url = server.url
        self._body = {"model": model, "inputs": ROW, **fields}
        self._headers = headers or {}
        self._stop_at_refusal = stop_at_refusal
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=30, headers=self._headers) as client:
            while not self._stop.is_set():
                try:
                    response = client.post("/v1/predict", json=self._body)
                except httpx.TransportError as error:
                    self.broken.append(repr(error))
                    return
                self.statuses.append(response.status_code)
                if response.status_code != 200:
                    self.bodies.append(response.json())
                    if self._stop_at_refusal:
                        return

    def wait_for(self, answers: int, timeout_s: float = 60) -> None:
        """Until that many more answers have come."""
        wanted = len(self.statuses) + answers
        limit = time.monotonic() + timeout_s
        while len(self.statuses) < wanted:
            assert time.monotonic() < limit, f"{len(self.statuses)} answers, then none: {self.broken}"
            time.sleep(0.01)

    def join(self) -> None:
        """Until every client has ended by itself."""
        for thread in self._threads:
            thread.join(30)

    def stop(self) -> None:
        self._stop.set()
        self.join()


def settled(server: Server, model: str) -> None:
    """Asserts that admitted = answered + failed + expired + cancelled, and that nothing is in flight."""
    limit = time.monotonic() + 10
    while server.metric("vernier_inflight_requests", model=model) and time.monotonic() < limit:
        time.sleep(0.05)
    assert server.metric("vernier_inflight_requests", model=model) == 0
    assert server.metric("vernier_requests_admitted_total", model=model) == server.metric(
        "vernier_requests_ended_total", model=model
    )
