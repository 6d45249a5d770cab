"""Counts of requests by how they ended, for each model version, over all engine processes."""

from __future__ import annotations

from collections.abc import Hashable

from vernier.errors import (
    DeadlineExceeded,
    Draining,
    NotReady,
    QueueFull,
    UnsupportedPrecision,
    VernierError,
)
from vernier.exposition import Metrics
from vernier.metrics import ModelMetrics

_REFUSED = (QueueFull, Draining, NotReady, DeadlineExceeded, UnsupportedPrecision)


class Books:
    """Counts the requests to one version of one model, whichever engine process serves it."""

    def __init__(self, metrics: ModelMetrics) -> None:
        self.metrics = metrics
        self.inflight = 0

    def taken(self, requests: int) -> None:
        """Requests have been submitted."""
        self.inflight += requests
        self.metrics.set_inflight(self.inflight)

    def left(self, requests: int, outcome: str | None, admitted: bool) -> None:
        """Requests have ended.

        Args:
            outcome: as they are counted; None when they were refused.
            admitted: whether they have been counted as admitted.
        """
        self.taken(-requests)
        if outcome is None and admitted:
            outcome = "failed"  # by an engine process that took the place of the one that had admitted them
        if outcome is not None:
            if not admitted:
                self.metrics.admitted(requests)
            self.metrics.ended(outcome, requests)


def outcome_of(error: VernierError, admitted: bool) -> str | None:
    """How requests that end with this error are counted; None when they were refused."""
    if admitted and isinstance(error, DeadlineExceeded):
        return "expired"
    return None if isinstance(error, _REFUSED) else "failed"


class Bookkeeper:
    """The books of every model version that an engine process serves."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._books: dict[tuple[str, str], Books] = {}
        self._served: dict[Hashable, set[tuple[str, str]]] = {}

    def of(self, name: str, version: str) -> Books:
        books = self._books.get((name, version))
        if books is None:
            books = self._books[name, version] = Books(self._metrics.model(name, version))
        return books

    def keep(self, engine: Hashable, served: set[tuple[str, str]]) -> None:
        """An engine process serves these names and versions; the books of those that none serves are closed."""
        self._served[engine] = served
        kept = set().union(*self._served.values())
        for key in self._books.keys() - kept:
            del self._books[key]
            self._metrics.forget(*key)
