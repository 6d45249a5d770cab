"""A model version that one engine process serves, as a front sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from vernier.border.batch import RequestBatch
from vernier.border.front_side.books import Books
from vernier.border.signature import Signature
from vernier.errors import QueueFull, VernierError
from vernier.package.manifest import Manifest


class Submitter(Protocol):
    """What carries batches to the engine process."""

    def submit(self, model: RemoteModel, batch: RequestBatch) -> None: ...

    def refusal(self, model: RemoteModel) -> VernierError | None: ...

    def has(self, model: RemoteModel) -> bool: ...

    @property
    def open_rows(self) -> int: ...


class RemoteModel:
    """
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

    def description(self) -> dict[str, Any]:
        return self._description

    def submit(self, batch: RequestBatch) -> None:
        self._engine.submit(self, batch)

    def refusal(self) -> VernierError | None:
        """What the engine process has published; it decides when it gets the batch."""
        return self._engine.refusal(self)

    @property
    def reachable(self) -> bool:
        """Whether the engine process is there and has it; else requests are held until it is."""
        return self._engine.has(self)

    @property
    def open_rows(self) -> int:
        """Rows that this front has sent to the engine process, of all its models, and that it may still read."""
        return self._engine.open_rows

    def refused(self, error: VernierError, count: int) -> None:
        self.metrics.rejected(error.reason if isinstance(error, QueueFull) else error.code, count)

    def output_numbers(self, names: Sequence[str]) -> list[int] | None:
        """As a submission tells them; None for all, in their order."""
        return None if tuple(names) == self._all_outputs else [self._all_outputs.index(n) for n in names]
