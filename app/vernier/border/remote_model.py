"""A model version that the engine process serves, as a front sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from vernier.border.batch import RequestBatch
from vernier.border.catalogue import SchedulerObserver
from vernier.border.signature import Signature
from vernier.errors import (
    DeadlineExceeded,
    Draining,
    NotReady,
    QueueFull,
    UnsupportedPrecision,
    VernierError,
)
from vernier.metrics import ModelMetrics
from vernier.package.manifest import Manifest

_REFUSED = (QueueFull, Draining, NotReady, DeadlineExceeded, UnsupportedPrecision)


class Submitter(Protocol):
    """What carries batches to the engine process."""

    def submit(self, model: RemoteModel, batch: RequestBatch) -> None: ...

    def cancel(self, batch: RequestBatch, index: int) -> None: ...

    def refusal(self, model: RemoteModel) -> VernierError | None: ...


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


class RemoteModel:
    """Satisfies ServedModel, and is its own scheduler.

    Args:
        entry: of the catalogue.

    Attributes:
        number: by which the engine process knows it; another one knows it by another number.
    """

    def __init__(self, engine: Submitter, entry: dict[str, Any], books: Books) -> None:
        manifest = Manifest.model_validate(entry["manifest"])
        self.number: int = entry["number"]
        self.name = manifest.name
        self.version = str(manifest.version)
        self.signature = Signature.of(manifest)
        self.books = books
        self.metrics = books.metrics
        self._engine = engine
        self._all_outputs = tuple(self.signature.outputs)
        self.update(entry)

    def update(self, entry: dict[str, Any]) -> None:
        """Takes what changes while a version is served."""
        self.precision: str = entry["precision"]
        self.precisions: tuple[str, ...] = tuple(entry["precisions"])
        self.runtime: str = entry["runtime"]
        self.state: str = entry["state"]
        self._description: dict[str, Any] = entry["description"]

    @property
    def scheduler(self) -> RemoteModel:
        return self

    def description(self) -> dict[str, Any]:
        return self._description

    def submit(self, batch: RequestBatch) -> None:
        self._engine.submit(self, batch)

    def cancel(self, batch: RequestBatch, index: int) -> None:
        self._engine.cancel(batch, index)

    def refusal(
        self, precision: str | None = None, priority: int = 0, deadline: float | None = None
    ) -> VernierError | None:
        """What the engine process has published; it decides when it gets the batch."""
        return self._engine.refusal(self)

    def refused(self, error: VernierError, count: int = 1, rows: int = 1) -> None:
        self.metrics.rejected(error.reason if isinstance(error, QueueFull) else error.code, count)

    def watch(self, observer: SchedulerObserver) -> None:
        raise TypeError("a scheduler is watched where it runs")

    def output_numbers(self, names: Sequence[str]) -> list[int] | None:
        """As a submission tells them; None for all, in their order."""
        return None if tuple(names) == self._all_outputs else [self._all_outputs.index(n) for n in names]
