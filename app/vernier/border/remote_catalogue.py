"""What the engine process has told of its models.

While an engine process is being restarted the models of the one before are still known, so that requests for them are
read and held; what the new one has not loaded in the end is gone.
"""

from __future__ import annotations

from typing import Any

from vernier.border.remote_model import Books, RemoteModel, Submitter
from vernier.border.resolution import find_model
from vernier.exposition import Metrics

_STARTING = "the engine process is starting"
_RESTARTING = "the engine process is being restarted"


class RemoteCatalogue:
    """Belongs to the event loop's thread.

    Attributes:
        starting: whether models may still come that nobody has asked for.
    """

    def __init__(self, engine: Submitter, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._models: dict[int, RemoteModel] = {}  # of the engine process that is there, by its numbers
        self._served: dict[str, dict[int, RemoteModel]] = {}
        self._awaited: dict[str, list[int]] = {}
        self._books: dict[tuple[str, str], Books] = {}
        self._reason: str | None = _STARTING
        self._ready_once = False
        self.starting = True

    def lost(self) -> None:
        """The engine process has died: the next one counts anew."""
        self._models = {}
        self.starting = True
        self._reason = _RESTARTING if self._ready_once else _STARTING

    def current(self, model: RemoteModel) -> RemoteModel | None:
        """The model that takes requests which this one was to answer: itself, or the same served anew."""
        if self._models.get(model.number) is model:
            return model
        found = self._served.get(model.name, {}).get(int(model.version))
        if found is None or self._models.get(found.number) is not found:
            return None
        return found if found.signature == model.signature else None

    def take(self, message: dict[str, Any]) -> None:
        """Takes a catalogue, all of it or, when it raises, nothing."""
        models: dict[int, RemoteModel] = {}
        served: dict[str, dict[int, RemoteModel]] = {}
        awaited, reason, starting = message["awaited"], message["reason"], message["starting"]
        for entry in message["models"]:
            model = self._models.get(entry["number"])
            if model is None:
                name, version = entry["manifest"]["name"], str(entry["manifest"]["version"])
                model = RemoteModel(self._engine, entry, self._books_of(name, version))
            else:
                model.update(entry)
            models[model.number] = model
            served.setdefault(model.name, {})[int(model.version)] = model
        if starting:
            for name, versions in self._served.items():
                for number, stale in versions.items():
                    served.setdefault(name, {}).setdefault(number, stale)
        self._models, self._served = models, served
        self._awaited, self._reason, self.starting = awaited, reason, starting
        self._ready_once = self._ready_once or reason is None
        for name, version in list(self._books):
            if int(version) not in served.get(name, {}):
                del self._books[name, version]
                self._metrics.forget(name, version)

    def _books_of(self, name: str, version: str) -> Books:
        books = self._books.get((name, version))
        if books is None:
            books = self._books[name, version] = Books(self._metrics.model(name, version))
        return books

    def models(self) -> list[RemoteModel]:
        """Every served version, by name and version."""
        return [self._served[name][v] for name in sorted(self._served) for v in sorted(self._served[name])]

    def resolve(self, name: str | None, version: str | None) -> RemoteModel:
        """The version asked for, or the newest. Raises UnknownModel, UnknownVersion, NotReady."""
        return find_model(self._served, self._awaited, name, version, self.not_ready_reason)

    def not_ready_reason(self) -> str | None:
        """None when every model can execute; else a sentence."""
        return self._reason
