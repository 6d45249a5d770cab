"""What the engine process has told of its models.

While an engine process is being restarted the models of the one before are still known, so that requests for them are
read and held; what the new one has not loaded in the end is gone.
"""

from __future__ import annotations

from typing import Any

from vernier.border.front_side.books import Bookkeeper
from vernier.border.front_side.remote_model import RemoteModel, Submitter

_STARTING = "the engine process is starting"
_RESTARTING = "the engine process is being restarted"


class RemoteCatalogue:
    """Belongs to the event loop's thread.

    Attributes:
        starting: whether models may still come that nobody has asked for.
        awaited: name → versions that will be served once they are loaded.
        reason: why not every model can execute; None when each can.
        ready_once: whether an engine process here has been ready.
        lost_once: whether one has died.
    """

    def __init__(self, engine: Submitter, books: Bookkeeper) -> None:
        self._engine = engine
        self._books = books
        self._models: dict[int, RemoteModel] = {}  # of the engine process that is there, by its numbers
        self._served: dict[str, dict[int, RemoteModel]] = {}
        self.awaited: dict[str, list[int]] = {}
        self.reason: str | None = _STARTING
        self.ready_once = self.lost_once = False
        self.starting = True

    def lost(self) -> None:
        """The engine process has died: the next one counts anew."""
        self._models = {}
        self.starting = self.lost_once = True
        self.reason = _RESTARTING if self.ready_once else _STARTING

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
                model = RemoteModel(self._engine, entry, self._books.of(name, version))
            else:
                model.update(entry)
            models[model.number] = model
            served.setdefault(model.name, {})[int(model.version)] = model
        if starting:
            for name, versions in self._served.items():
                for number, stale in versions.items():
                    served.setdefault(name, {}).setdefault(number, stale)
        self._models, self._served = models, served
        self.awaited, self.reason, self.starting = awaited, reason, starting
        self.ready_once = self.ready_once or reason is None
        self._books.keep(self, {(name, str(version)) for name in served for version in served[name]})

    def models(self) -> list[RemoteModel]:
        """Every served version, by name and version."""
        return [self._served[name][v] for name in sorted(self._served) for v in sorted(self._served[name])]

    def serves(self, name: str, version: int) -> bool:
        """Whether the engine process that is there serves it."""
        model = self._served.get(name, {}).get(version)
        return model is not None and self._models.get(model.number) is model
