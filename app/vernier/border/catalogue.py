"""What a front knows of the models that are served, in whichever process they are."""

from __future__ import annotations

from typing import Any, Protocol

from vernier.border.batch import RequestBatch
from vernier.border.signature import Signature
from vernier.errors import VernierError
from vernier.metrics import ModelMetrics


class SchedulerObserver(Protocol):
    """Watches a scheduler, on its loop's thread."""

    def room(self, rows: int, retry_after_s: float) -> None:
        """
        Args:
            rows: that may still be queued.
            retry_after_s: after which the request that was refused last should come back.
        """

    def started(self, batch: RequestBatch) -> None:
        """An execution of some of the batch's requests is about to begin."""


class BatchScheduler(Protocol):
    """The entrance to one model version."""

    def submit(self, batch: RequestBatch) -> None:
        """Every request of the batch ends exactly once; its target is told, perhaps before this returns."""

    def cancel(self, batch: RequestBatch, index: int) -> None:
        """Ends one request without telling; nothing happens when it has ended."""

    def refusal(
        self, precision: str | None = None, priority: int = 0, deadline: float | None = None
    ) -> VernierError | None:
        """Why a request of one row that has not been read yet would be refused; None when it would be admitted."""

    def watch(self, observer: SchedulerObserver) -> None:
        """Tells the observer of the queue's room, now and whenever it changes, and of executions that begin."""

    def refused(self, error: VernierError, count: int = 1, rows: int = 1) -> None:
        """Counts requests of `rows` rows each that were refused for what `refusal` said."""


class ServedModel(Protocol):
    """One served version of one model."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def signature(self) -> Signature: ...

    @property
    def precision(self) -> str:
        """The variant that new batches take."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """The variants that are loaded."""

    @property
    def runtime(self) -> str: ...

    @property
    def state(self) -> str: ...

    @property
    def metrics(self) -> ModelMetrics: ...

    @property
    def scheduler(self) -> BatchScheduler: ...

    def description(self) -> dict[str, Any]:
        """What `GET /v1/models/{name}` answers."""


class Catalogue(Protocol):
    """The served models. Belongs to the event loop's thread."""

    def models(self) -> list[Any]:
        """Every served version, by name and version."""

    def resolve(self, name: str | None, version: str | None) -> Any:
        """The version asked for, or the newest. Raises UnknownModel, UnknownVersion, NotReady."""

    def not_ready_reason(self) -> str | None:
        """None when every model can execute; else a sentence."""

    async def load(self, name: str, version: int | None = None) -> Any:
        """Loads one version, the newest by default. Raises PackageError, EngineError, UnknownModel."""

    async def unload(self, name: str, version: int | None = None) -> None:
        """Takes a version, or all, out of service. Raises UnknownModel."""
