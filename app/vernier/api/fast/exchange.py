"""A prediction of the fast path between its arrival and its answer, and who gets that."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from vernier.api.codecs import Body
from vernier.api.errors import ErrorAnswer
from vernier.api.fast.head import Head
from vernier.api.fast.memory import Room
from vernier.api.fast.response import Headers
from vernier.api.forms import Form
from vernier.api.security import Permit
from vernier.api.service import Prepared
from vernier.errors import VernierError
from vernier.serving.repository import LoadedModel
from vernier.serving.request import NEW, Answer, PendingRequest, RequestGroup
from vernier.tensors import Arrays

if TYPE_CHECKING:
    from vernier.api.fast.answers import Answers
    from vernier.api.fast.exchanges import Exchanges


class Asker(Protocol):
    """Whoever gets the answer to a small prediction: a connection, or an exchange of one.

    Attributes:
        asked: what it waits for since this turn of the loop; None otherwise.
    """

    asked: Asked | None

    @property
    def default_headers(self) -> Headers:
        """uvicorn's own, of which the date is one."""
        ...

    def exchange_of(self, asked: Asked, read: bool = False) -> Exchange:
        """The exchange for it, from now on. `read`: nobody needs the body any more."""
        ...

    def answered(self, message: bytes, refusal: ErrorAnswer | None = None) -> None:
        """Here is its answer.

        Args:
            message: head and body, for a connection that stays open.
            refusal: status and headers when it is an error.
        """
        ...


#: A small prediction: who asked, its head, the bytes that hold its body, where in them that begins, and when its first
#: byte was seen, on the service's clock. A whole request with a known head is nothing more than this until its turn
#: of the loop ends, and mostly has its answer then; only what meets anything out of the ordinary gets an exchange.
Asked = tuple[Asker, Head, int, Body, float]


class Connection(Asker, Protocol):
    """Where answers go."""

    exchanges: ClassVar[Exchanges]
    loop: asyncio.AbstractEventLoop

    def send_ready(self) -> None:
        """An exchange of this connection has got its answer."""
        ...


class Exchange(PendingRequest):
    """A prediction that the scheduler has or will get at the end of the loop's turn, or a refusal.

    Attributes:
        body: until it has been read.
        came: when its first byte was seen, on the service's clock.
        identity: the request's id.
        model: None when none was found.
        settled: whether there is an answer.
        message: it, head and body, for a connection that stays open; None when it is to be put together.
        payload: its body, if there is no message.
        refusal: the answer's status and headers when it is an error.
        room: where a large body lies, until it has been read.
    """

    __slots__ = (
        "asked",
        "body",
        "came",
        "connection",
        "head",
        "identity",
        "message",
        "model",
        "payload",
        "permit",
        "refusal",
        "room",
        "settled",
    )

    def __init__(
        self,
        connection: Connection,
        head: Head,
        body: Body,
        came: float,
        permit: Permit | None,
        room: Room | None = None,
    ) -> None:
        self.connection = connection
        self.asked: Asked | None = None
        self.group: RequestGroup | None = None
        self.room = room
        self.head = head
        self.body = body
        self.came = came
        self.permit = permit
        self.identity = ""
        self.model: LoadedModel | None = None
        self.settled = False
        self.payload = b""
        self.message: bytes | None = None
        self.refusal: ErrorAnswer | None = None
        self.state = NEW  # the scheduler's part follows with `prepare`

    def prepare(self, model: LoadedModel, prepared: Prepared) -> None:
        """Makes it ready for the model's scheduler."""
        self.model = model
        self.body = b""
        self.room = None
        PendingRequest.__init__(self, *prepared)

    def done(self, answer: Answer | None, error: VernierError | None) -> None:
        if not self.settled:  # else it was abandoned in the turn of the loop in which it ended
            self.connection.exchanges.answers.ended(self, answer, error)

    # --- as a prediction that is asked with others ------------------------------------------------
    def ask(self) -> Asked:
        """To be asked with others."""
        self.asked = asked = (self, self.head, 0, self.body, self.came)
        return asked

    @property
    def default_headers(self) -> Headers:
        return self.connection.default_headers

    def exchange_of(self, asked: Asked, read: bool = False) -> Exchange:
        self.asked = None
        if read:
            self.body = b""
            self.room = None
        return self

    def answered(self, message: bytes, refusal: ErrorAnswer | None = None) -> None:
        self.settle(message, refusal=refusal)
        self.connection.send_ready()

    def settle(self, message: bytes | None, payload: bytes = b"", refusal: ErrorAnswer | None = None) -> None:
        """Takes the answer, which is sent in its turn."""
        self.asked = None
        self.settled = True
        self.message = message
        self.payload = payload
        self.refusal = refusal
        if self.permit is not None:
            self.permit.release()


class ExchangeGroup(RequestGroup):
    """Predictions of one form that wait, run and are answered together.

    Args:
        inputs: of all.
        each: rows of each.
        deadlines: of each; None for none.
    """

    __slots__ = ("_answers",)

    def __init__(
        self,
        answers: Answers,
        exchanges: Sequence[Exchange],
        inputs: Arrays,
        each: Sequence[int],
        form: Form,
        deadlines: Sequence[float] | None,
    ) -> None:
        super().__init__(exchanges, inputs, each, *form.rest, deadlines)
        self._answers = answers

    def done(self, answer: Answer | None, error: VernierError | None) -> None:
        exchanges: list[Any] = self.requests
        self.requests = []  # they refer to each other, and to the memory of their bodies
        self._answers.ended_together(exchanges, self.each, answer, error)
