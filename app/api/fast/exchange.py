"""A request of the fast path and its answer, between body and payload. No connection is known here."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar, Protocol

from uvicorn.server import ServerState

from app.api.codecs import (
    Body,
    PredictRequest,
    RawInputs,
    encode_answer,
    encode_answers,
    encode_joined,
    parse_predict,
)
from app.api.errors import ErrorAnswer, answer_error
from app.api.fast.grouping import in_order, side_by_side
from app.api.fast.head import Head
from app.api.fast.memory import Room, neighbours
from app.api.fast.response import LONG_BODY, ResponseHeads
from app.api.forms import Form, json_form, raw_form
from app.api.identity import new_id, new_ids
from app.api.security import Permit
from app.api.service import Predictions, Prepared
from app.errors import Cancelled, EngineError, VernierError
from app.exposition import Metrics
from app.logs import request_id
from app.serving.repository import LoadedModel
from app.serving.request import NEW, Answer, JoinedRequests, PendingRequest

#: Forms that are remembered, so that heads which differ share them.
_MOST_FORMS = 512


class Connection(Protocol):
    """Where answers go."""

    exchanges: ClassVar[Exchanges]
    loop: asyncio.AbstractEventLoop
    server_state: ServerState

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
        payload: the body of the answer; None until there is one.
        message: the answer, head and body, for a connection that stays open; None when that is to be put together.
        refusal: the answer's status and headers when it is an error.
        room: where a large body lies, until it has been read.
    """

    __slots__ = (
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
        self.room = room
        self.head = head
        self.body = body
        self.came = came
        self.permit = permit
        self.identity = ""
        self.model: LoadedModel | None = None
        self.payload: bytes | None = None
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
        if self.payload is None:  # else it was abandoned in the turn of the loop in which it ended
            self.connection.exchanges.ended(self, answer, error)


class Exchanges:
    """Begins and ends exchanges, and counts them. Belongs to the event loop's thread.

    Bodies of one form that come in one turn of the loop are read and submitted together, and the answers of
    one turn are written together: most of what a small request costs is paid once for all of them.
    """

    def __init__(self, predictions: Predictions, metrics: Metrics, responses: ResponseHeads) -> None:
        self._predictions = predictions
        self._repository = predictions.repository
        self.clock = predictions.clock
        self._metrics = metrics
        self._responses = responses
        self._forms: dict[object, Form] = {}
        self._met: dict[Form, list[Exchange]] = {}  # not read yet
        self._answered: list[tuple[Exchange, Answer]] = []  # not written yet

    # --- in ---------------------------------------------------------------------------------------
    def begin(self, exchange: Exchange) -> None:
        """Hands a prediction to its scheduler, soon or at once, or refuses it.

        Its connection is told when the answer is there, except of a refusal, which has its payload already.
        """
        form = exchange.head.form
        if form is None or not (form.small or exchange.room is not None):
            self._ask(exchange)
            return
        met = self._met
        if not met:
            exchange.connection.loop.call_soon(self.ask_met)
        group = met.get(form)
        if group is None:
            met[form] = [exchange]
        else:
            group.append(exchange)

    def ask_met(self) -> None:
        """Reads what was begun in this turn, and hands it to its schedulers."""
        met, self._met = self._met, {}
        for form, exchanges in met.items():
            wanted = [exchange for exchange in exchanges if exchange.payload is None]
            if not wanted:
                continue
            model, its_id = form.model, form.envelope.id
            for exchange, fresh in zip(wanted, new_ids(len(wanted)), strict=True):
                exchange.model = model
                exchange.identity = its_id or exchange.head.request_id or fresh
            for asked in in_order(wanted) if form.small else side_by_side(wanted, form):
                if not self._ask_together(form, asked):
                    for exchange in asked:
                        self._ask(exchange)
                        if exchange.payload is not None:
                            exchange.connection.send_ready()

    def _ask_together(self, form: Form, exchanges: Sequence[Exchange]) -> bool:
        """False, with nothing done, when each must be looked at."""
        try:
            model = self._repository.resolve(form.envelope.model, form.envelope.version)
            self._predictions.require_running()
        except VernierError:
            return False
        if not form.fits(model):
            return False
        count, (rows, outputs, precision, priority, deadline) = len(exchanges), form.rest
        refusal = model.scheduler.refusal(precision, priority, deadline)
        if refusal is not None and all(form.matches(exchange.body) for exchange in exchanges):
            model.scheduler.refused(refusal, count, rows)
            self._refuse(exchanges, refusal)
            return True
        if exchanges[0].room is not None:
            rooms = [exchange.room for exchange in exchanges if exchange.room is not None]
            arrays = form.read_joined(neighbours(rooms), count)
        else:
            arrays = form.read_all([exchange.body for exchange in exchanges])
        if arrays is None:
            return False
        joined = JoinedRequests(form.join(arrays), count * rows, outputs, precision, priority, deadline)
        answer = model.scheduler.run_joined(joined, count)
        if answer is not None:
            self._write_joined(model, exchanges, answer, rows)
            return True
        name = form.name
        for exchange, array in zip(exchanges, arrays, strict=True):
            exchange.prepare(model, ({name: array}, *form.rest))
        admitted, error = model.scheduler.submit_alike(exchanges)
        if error is not None:
            self._refuse(exchanges[admitted:], error)
        return True

    def _refuse(self, exchanges: Sequence[Exchange], error: VernierError) -> None:
        self._answer_errors(exchanges, error)
        self._send(exchanges)

    def _ask(self, exchange: Exchange) -> None:
        """Reads one body and hands it to its scheduler, or refuses it."""
        head, body = exchange.head, exchange.body
        exchange.identity = head.request_id or ""
        try:
            form = head.form
            if form is not None and form.matches(body):
                envelope = form.envelope
                exchange.identity = envelope.id or head.request_id or new_id()
                exchange.model = model = self._repository.resolve(envelope.model, envelope.version)
                if form.fits(model):
                    self._predictions.require_running()
                    self._predictions.require_room(model, *form.rest[2:])
                    arrays = form.read(body)
                    if arrays is not None:
                        exchange.prepare(model, (arrays, *form.rest))
                        model.scheduler.submit(exchange)
                        return
            exchange.model = None
            if head.envelope is None:
                envelope, inputs = parse_predict(body)
            else:
                envelope, inputs = head.envelope, RawInputs(body)
            exchange.identity = envelope.id or head.request_id or new_id()
            exchange.model = model = self._repository.resolve(envelope.model, envelope.version)
            prepared = self._predictions.prepare(envelope, inputs, model, exchange.came)
            if head.patience:
                self._learn(head, body, envelope, model, prepared)
            exchange.prepare(model, prepared)
            model.scheduler.submit(exchange)
        except Exception as error:  # every failure is answered, and its code is counted
            exchange.body = b""
            self._answer_error(exchange, error)

    def _learn(
        self, head: Head, body: Body, envelope: PredictRequest, model: LoadedModel, prepared: Prepared
    ) -> None:
        if head.envelope is None:
            form = json_form(body, envelope, model, prepared)
        else:
            form = raw_form(envelope, model, prepared)
        if form is None or head.form is not None:
            head.patience -= 1
        if form is not None:
            known = self._forms.get(form.key)
            if known is not None and known.fits(model):
                form = known
            else:
                if len(self._forms) >= _MOST_FORMS:
                    self._forms.clear()
                self._forms[form.key] = form
        head.form = form

    def refuse(self, exchange: Exchange, error: Exception) -> None:
        """Answers with an error what was not begun."""
        exchange.identity = exchange.head.request_id or ""
        self._answer_error(exchange, error)

    # --- out --------------------------------------------------------------------------------------
    def ended(self, exchange: Exchange, answer: Answer | None, error: VernierError | None) -> None:
        """The scheduler calls it, through `Exchange.done`."""
        if answer is None:
            self._answer_error(exchange, error or EngineError("a request ended without an answer"))
            exchange.connection.send_ready()
            return
        if not self._answered:
            exchange.connection.loop.call_soon(self._write_answered)
        self._answered.append((exchange, answer))

    def _write_answered(self) -> None:
        """Writes the answers of this turn, those that are alike together, and has them sent."""
        answered, self._answered = self._answered, []
        alike: dict[tuple[int, str, tuple[str, ...]], list[tuple[Exchange, Answer]]] = {}
        for pair in answered:
            exchange, answer = pair
            if exchange.payload is None:
                key = id(exchange.model), answer.precision, tuple(answer.outputs)
                group = alike.get(key)
                if group is None:
                    alike[key] = [pair]
                else:
                    group.append(pair)
        for group in alike.values():
            self._write(group)
        self._send([exchange for exchange, _ in answered])

    def _send(self, exchanges: Sequence[Exchange]) -> None:
        for exchange in exchanges:
            try:
                exchange.connection.send_ready()
            except Exception as fault:  # one connection's fault must not cost the others their answers
                context = {"message": "an answer could not be sent", "exception": fault}
                exchange.connection.loop.call_exception_handler(context)

    def _write_joined(
        self, model: LoadedModel, exchanges: Sequence[Exchange], answer: Answer, rows: int
    ) -> None:
        """Payloads for requests of `rows` rows each that have one answer together; sends them."""
        ids = [exchange.identity for exchange in exchanges]
        try:
            payloads = encode_joined(ids, model.name, model.version, answer, rows)
        except Exception as fault:  # what cannot be written is answered too
            for exchange in exchanges:
                self._answer_error(exchange, fault)
        else:
            self._answer_ok(model, answer.precision, exchanges, payloads)
        self._send(exchanges)

    def _write(self, group: Sequence[tuple[Exchange, Answer]]) -> None:
        """Payloads for answers of one model, one precision and the same outputs."""
        model, precision = group[0][0].model, group[0][1].precision
        assert model is not None
        payloads = None
        if len(group) > 1:
            ids, answers = [e.identity for e, _ in group], [answer for _, answer in group]
            payloads = encode_answers(ids, model.name, model.version, answers)
        written, bodies = [], []
        for at, (exchange, answer) in enumerate(group):
            try:
                payload = (
                    encode_answer(exchange.identity, model.name, model.version, answer)
                    if payloads is None
                    else payloads[at]
                )
            except Exception as fault:  # what cannot be written is answered too
                self._answer_error(exchange, fault)
            else:
                written.append(exchange)
                bodies.append(payload)
        if written:
            self._answer_ok(model, precision, written, bodies)

    def _answer_ok(
        self, model: LoadedModel, precision: str, exchanges: Sequence[Exchange], payloads: Sequence[bytes]
    ) -> None:
        """Gives each its payload, and counts them."""
        messages: Sequence[bytes | None]
        if len(max(payloads, key=len)) < LONG_BODY:
            defaults = exchanges[0].connection.server_state.default_headers
            messages = self._responses.ok_all(defaults, payloads, [e.identity for e in exchanges])
        else:
            messages = [None] * len(payloads)
        now, seconds = self.clock(), []
        for exchange, payload, message in zip(exchanges, payloads, messages, strict=True):
            exchange.payload = payload
            exchange.message = message
            seconds.append(now - exchange.came)
            if exchange.permit is not None:
                exchange.permit.release()
        model.metrics.responded_ok(precision, model.runtime, seconds)

    def abandon(self, exchange: Exchange) -> None:
        """Nobody waits for it any more. Does nothing when it has its answer."""
        if exchange.payload is not None:
            return
        if exchange.model is None and exchange.head.form is not None:  # it was not looked at yet
            exchange.model = exchange.head.form.model
        if exchange.model is not None:
            exchange.model.scheduler.cancel(exchange)
        self._answer_error(exchange, Cancelled("the client disconnected before its answer was ready"))

    def _answer_error(self, exchange: Exchange, error: Exception) -> None:
        self._answer_errors((exchange,), error)

    def _answer_errors(self, exchanges: Sequence[Exchange], error: Exception) -> None:
        """One answer for all, which are of one model; only the id in its head is each one's own."""
        first = exchanges[0]
        first.identity = first.identity or new_id()
        token = request_id.set(first.identity)
        try:
            refusal = answer_error(error)
        finally:
            request_id.reset(token)
        for exchange in exchanges:
            exchange.identity = exchange.identity or new_id()
        defaults, ids = first.connection.server_state.default_headers, [e.identity for e in exchanges]
        messages = self._responses.refused_all(defaults, refusal, ids)
        for exchange, message in zip(exchanges, messages, strict=True):
            exchange.refusal = refusal
            exchange.payload = refusal.body
            exchange.message = message
            if exchange.permit is not None:
                exchange.permit.release()
        if first.model is None:
            self._metrics.responded_without_model(refusal.code, len(exchanges))
        else:
            first.model.metrics.responded_error(refusal.code, len(exchanges))
