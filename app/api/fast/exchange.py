"""A request of the fast path and its answer, between body and payload. No connection is known here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from app.api.codecs import Body, PredictRequest, RawInputs, encode_answer, parse_predict
from app.api.errors import answer_error
from app.api.fast.head import Head
from app.api.identity import new_id
from app.api.security import Permit
from app.api.service import Predictions, Prepared
from app.errors import Cancelled, EngineError, VernierError
from app.exposition import Metrics
from app.logs import request_id
from app.serving.repository import LoadedModel
from app.serving.request import Answer, PendingRequest

_NO_HEADERS: Mapping[str, str] = {}
_NOTHING = Prepared({}, 0, (), None, 0, None)


class Connection(Protocol):
    """Where answers go."""

    def send_ready(self) -> None:
        """An exchange of this connection has got its answer."""
        ...


class Exchange(PendingRequest):
    """A prediction that the scheduler has, or a refusal.

    Attributes:
        came: when its first byte was seen, on the service's clock.
        identity: the request's id.
        model: None when none was found.
        payload: the body of the answer; None until there is one.
        status, headers: of the answer; the headers are those of an error.
    """

    __slots__ = (
        "came",
        "connection",
        "head",
        "headers",
        "identity",
        "model",
        "owner",
        "payload",
        "permit",
        "status",
    )

    def __init__(
        self,
        owner: Exchanges,
        connection: Connection | None,
        head: Head,
        identity: str,
        came: float,
        permit: Permit | None,
        model: LoadedModel | None,
        prepared: Prepared,
    ) -> None:
        super().__init__(*prepared)
        self.owner = owner
        self.connection = connection
        self.head = head
        self.identity = identity
        self.came = came
        self.permit = permit
        self.model = model
        self.payload: bytes | None = None
        self.status = 200
        self.headers = _NO_HEADERS

    def done(self, answer: Answer | None, error: VernierError | None) -> None:
        self.owner.ended(self, answer, error)
        if self.connection is not None:
            self.connection.send_ready()


class Exchanges:
    """Begins and ends exchanges, and counts them. Belongs to the event loop's thread."""

    def __init__(self, predictions: Predictions, metrics: Metrics) -> None:
        self._predictions = predictions
        self._repository = predictions.repository
        self.clock = predictions.clock
        self._metrics = metrics

    def begin(
        self, connection: Connection, head: Head, body: Body, came: float, permit: Permit | None
    ) -> Exchange:
        """Hands a prediction to its scheduler, or refuses it.

        The connection is told when the answer is there, except of a refusal, which has its payload already.
        """
        identity = head.request_id
        model: LoadedModel | None = None
        try:
            envelope: PredictRequest | None = head.envelope
            if envelope is None:
                envelope, inputs = parse_predict(body)
            else:
                inputs = RawInputs(body)
            identity = envelope.id or identity or new_id()
            model = self._repository.resolve(envelope.model, envelope.version)
            prepared = self._predictions.prepare(envelope, inputs, model, came)
            exchange = Exchange(self, connection, head, identity, came, permit, model, prepared)
            model.scheduler.submit(exchange)
            return exchange
        except Exception as error:  # every failure is answered, and its code is counted
            return self.refuse(head, error, came, permit, identity, model)

    def refuse(
        self,
        head: Head,
        error: Exception,
        came: float,
        permit: Permit | None,
        identity: str | None = None,
        model: LoadedModel | None = None,
    ) -> Exchange:
        """An exchange that is answered with an error."""
        identity = identity or head.request_id or new_id()
        exchange = Exchange(self, None, head, identity, came, permit, model, _NOTHING)
        self._answer_error(exchange, error)
        return exchange

    def ended(self, exchange: Exchange, answer: Answer | None, error: VernierError | None) -> None:
        """Makes the payload. The scheduler calls it, through `Exchange.done`."""
        model = exchange.model
        if answer is None or model is None:
            self._answer_error(exchange, error or EngineError("a request ended without an answer"))
            return
        try:
            exchange.payload = encode_answer(
                request_id=exchange.identity,
                model=model.name,
                version=model.version,
                precision=answer.precision,
                outputs=answer.outputs,
                queue_s=answer.queue_s,
                compute_s=answer.compute_s,
                batch_size=answer.batch_size,
            )
        except Exception as fault:  # what cannot be written is answered too
            self._answer_error(exchange, fault)
            return
        self._close(exchange, "ok", answer.precision)

    def abandon(self, exchange: Exchange) -> None:
        """Nobody waits for it any more. Does nothing when it has its answer."""
        if exchange.payload is not None:
            return
        exchange.connection = None
        if exchange.model is not None:
            exchange.model.scheduler.cancel(exchange)
        self._answer_error(exchange, Cancelled("the client disconnected before its answer was ready"))

    def _answer_error(self, exchange: Exchange, error: Exception) -> None:
        token = request_id.set(exchange.identity)
        try:
            exchange.status, exchange.payload, exchange.headers, code = answer_error(error)
        finally:
            request_id.reset(token)
        self._close(exchange, code, "")

    def _close(self, exchange: Exchange, code: str, precision: str) -> None:
        if exchange.permit is not None:
            exchange.permit.release()
        model = exchange.model
        if model is None:
            self._metrics.responded_without_model(code)
        else:
            model.metrics.responded(code, precision, model.runtime, self.clock() - exchange.came)
