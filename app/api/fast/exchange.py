"""A request of the fast path and its answer, between body and payload. No connection is known here."""

from __future__ import annotations

from typing import ClassVar, Protocol

from app.api.codecs import Body, PredictRequest, RawInputs, encode_answer, parse_predict
from app.api.errors import ErrorAnswer, answer_error
from app.api.fast.head import Head
from app.api.forms import json_form, raw_form
from app.api.identity import new_id
from app.api.security import Permit
from app.api.service import Predictions, Prepared
from app.errors import Cancelled, EngineError, VernierError
from app.exposition import Metrics
from app.logs import request_id
from app.serving.repository import LoadedModel
from app.serving.request import Answer, PendingRequest

_NOTHING: Prepared = ({}, 0, (), None, 0, None)


class Connection(Protocol):
    """Where answers go."""

    exchanges: ClassVar[Exchanges]

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
        refusal: the answer's status and headers when it is an error.
    """

    __slots__ = ("came", "connection", "head", "identity", "model", "payload", "permit", "refusal")

    def __init__(
        self,
        connection: Connection,
        head: Head,
        identity: str,
        came: float,
        permit: Permit | None,
        model: LoadedModel | None,
        prepared: Prepared,
    ) -> None:
        super().__init__(*prepared)
        self.connection = connection
        self.head = head
        self.identity = identity
        self.came = came
        self.permit = permit
        self.model = model
        self.payload: bytes | None = None
        self.refusal: ErrorAnswer | None = None

    def done(self, answer: Answer | None, error: VernierError | None) -> None:
        if self.payload is None:  # else it was abandoned in the turn of the loop in which it ended
            self.connection.exchanges.ended(self, answer, error)
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
            form = head.form
            arrays = None if form is None else form.read(body)
            if form is not None and arrays is not None:
                envelope = form.envelope
                identity = envelope.id or identity or new_id()
                model = self._repository.resolve(envelope.model, envelope.version)
                if form.fits(model):
                    self._predictions.require_running()
                    exchange = Exchange(connection, head, identity, came, permit, model, (arrays, *form.rest))
                    model.scheduler.submit(exchange)
                    return exchange
            if head.envelope is None:
                envelope, inputs = parse_predict(body)
            else:
                envelope, inputs = head.envelope, RawInputs(body)
            identity = envelope.id or identity or new_id()
            model = self._repository.resolve(envelope.model, envelope.version)
            prepared = self._predictions.prepare(envelope, inputs, model, came)
            if head.patience:
                self._learn(head, body, envelope, model, prepared)
            exchange = Exchange(connection, head, identity, came, permit, model, prepared)
            model.scheduler.submit(exchange)
            return exchange
        except Exception as error:  # every failure is answered, and its code is counted
            return self.refuse(connection, head, error, came, permit, identity, model)

    def _learn(
        self, head: Head, body: Body, envelope: PredictRequest, model: LoadedModel, prepared: Prepared
    ) -> None:
        if head.form is not None:
            head.patience -= 1
        if head.envelope is None:
            head.form = json_form(body, envelope, model, prepared)
        else:
            head.form = raw_form(envelope, model, prepared)

    def refuse(
        self,
        connection: Connection,
        head: Head,
        error: Exception,
        came: float,
        permit: Permit | None,
        identity: str | None = None,
        model: LoadedModel | None = None,
    ) -> Exchange:
        """An exchange that is answered with an error."""
        identity = identity or head.request_id or new_id()
        exchange = Exchange(connection, head, identity, came, permit, model, _NOTHING)
        self._answer_error(exchange, error)
        return exchange

    def ended(self, exchange: Exchange, answer: Answer | None, error: VernierError | None) -> None:
        """Makes the payload. The scheduler calls it, through `Exchange.done`."""
        model = exchange.model
        if answer is None or model is None:
            self._answer_error(exchange, error or EngineError("a request ended without an answer"))
            return
        try:
            exchange.payload = encode_answer(exchange.identity, model.name, model.version, answer)
        except Exception as fault:  # what cannot be written is answered too
            self._answer_error(exchange, fault)
            return
        self._close(exchange, "ok", answer.precision)

    def abandon(self, exchange: Exchange) -> None:
        """Nobody waits for it any more. Does nothing when it has its answer."""
        if exchange.payload is not None:
            return
        if exchange.model is not None:
            exchange.model.scheduler.cancel(exchange)
        self._answer_error(exchange, Cancelled("the client disconnected before its answer was ready"))

    def _answer_error(self, exchange: Exchange, error: Exception) -> None:
        token = request_id.set(exchange.identity)
        try:
            exchange.refusal = refusal = answer_error(error)
        finally:
            request_id.reset(token)
        exchange.payload = refusal.body
        self._close(exchange, refusal.code, "")

    def _close(self, exchange: Exchange, code: str, precision: str) -> None:
        if exchange.permit is not None:
            exchange.permit.release()
        model = exchange.model
        if model is None:
            self._metrics.responded_without_model(code)
        else:
            model.metrics.responded(code, precision, model.runtime, self.clock() - exchange.came)
