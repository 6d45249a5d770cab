"""A batch of one request whose answer a coroutine awaits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from vernier.border.batch import Answer, RequestBatch
from vernier.errors import VernierError


class AwaitedAnswer:
    """A response target; made where an event loop runs.

    Attributes:
        future: the answer, or the error that the request ended with.
    """

    def __init__(self) -> None:
        self.future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
        if not self.future.done():  # else its task was cancelled in the same turn of the loop
            self.future.set_result(answer)

    def failed(self, batch: RequestBatch, requests: Sequence[int], error: VernierError) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def released(self, batch: RequestBatch) -> None:
        """The arrays go when nothing refers to them any more."""
