"""Requests that wait at a front for an engine process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vernier.border.front_side.books import outcome_of
from vernier.border.front_side.open_batches import Part
from vernier.errors import DeadlineExceeded


class HeldParts:
    """Belongs to the event loop's thread.

    Attributes:
        rows: of the requests that are held and have not ended.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._parts: dict[int, Part] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, part: Part) -> bool:
        return part.number in self._parts

    def __iter__(self) -> Iterator[Part]:
        return iter(list(self._parts.values()))

    def add(self, part: Part) -> None:
        self._parts[part.number] = part
        self.rows += part.living_rows()

    def ending(self, part: Part, requests: Sequence[int]) -> None:
        """Requests of a part, by their numbers within the batch, that have not ended and are about to."""
        rows = part.whole.batch.rows
        self.rows -= sum([rows[at] for at in requests])

    def remove(self, part: Part) -> None:
        self.rows -= part.living_rows()
        del self._parts[part.number]

    def in_order(self) -> list[Part]:
        """As they should be sent: those that were running when an engine process died go last."""
        return sorted(self._parts.values(), key=lambda part: (part.tries > 0, part.number))

    def withdraw(self, part: Part, request: int) -> None:
        """Ends a request, by its number within the batch, without telling."""
        self.ending(part, (request,))
        part.whole.end((request,))
        self._drop_if_ended(part)

    def expire(self, now: float) -> None:
        """Ends requests whose deadline has come."""
        error = DeadlineExceeded("the deadline passed while the engine process was restarted")
        for part, late in self._late(now):
            requests = [at for at in late if part in self and not part.whole.ended[at]]
            if not requests:
                continue
            self.ending(part, requests)
            outcome = outcome_of(error, part.admitted)
            if outcome is None:
                part.whole.model.refused(error, len(requests))
            part.fail(requests, error, outcome)
            self._drop_if_ended(part)

    def _drop_if_ended(self, part: Part) -> None:
        if part in self and not part.living():
            self.remove(part)
            part.drop()

    def _late(self, now: float) -> list[tuple[Part, list[int]]]:
        """Requests whose deadline has come."""
        found = []
        for part in self._parts.values():
            deadlines = part.whole.batch.deadlines
            if deadlines is not None:
                late = [at for at in part.living() if deadlines[at] <= now]
                if late:
                    found.append((part, late))
        return found
