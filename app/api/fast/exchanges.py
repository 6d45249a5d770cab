"""Begins predictions of the fast path: those of one form that come in one turn of the loop, together."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence

from app.api.codecs import Body, PredictRequest, RawInputs, parse_predict
from app.api.fast.answers import Answers, exchanges_of
from app.api.fast.exchange import Asked, Connection, Exchange
from app.api.fast.grouping import MOST_TOGETHER, in_order, side_by_side
from app.api.fast.head import Head
from app.api.fast.memory import Room, neighbours
from app.api.fast.response import ResponseHeads
from app.api.forms import Form, json_form, raw_form
from app.api.identity import new_id, new_ids
from app.api.service import Predictions, Prepared
from app.errors import Cancelled, VernierError
from app.exposition import Metrics
from app.serving.repository import LoadedModel
from app.serving.request import JoinedRequests

#: Forms that are remembered, so that heads which differ share them.
_MOST_FORMS = 512


class Exchanges:
    """Belongs to the event loop's thread.

    Bodies of one form that come in one turn of the loop are read and submitted together: most of what a small request
    costs is paid once for all of them.

    Attributes:
        turn: small predictions that came in this turn. Whoever appends the first calls `ask_soon` before.
    """

    def __init__(self, predictions: Predictions, metrics: Metrics, responses: ResponseHeads) -> None:
        self._predictions = predictions
        self._repository = predictions.repository
        self.clock = predictions.clock
        self.answers = Answers(metrics, responses, predictions.clock)
        self._forms: dict[object, Form] = {}
        self.turn: list[Asked] = []
        self._seen = 1  # of the turn's, when they were looked at last
        self._large: defaultdict[Form, list[Exchange]] = defaultdict(list)  # not read yet

    def begin(self, exchange: Exchange) -> None:
        """Hands a prediction to its scheduler, soon or at once, or refuses it.

        Its connection is told when the answer is there, except of a refusal, which is settled already.
        """
        form = exchange.head.form
        if form is not None and exchange.room is not None:
            if not self._large:
                exchange.connection.loop.call_soon(self.ask_large)
            self._large[form].append(exchange)
        elif form is not None and form.small:
            exchange.asked = asked = (exchange, exchange.head, 0, exchange.body, exchange.came)
            if not self.turn:
                self.ask_soon(exchange.connection)
            self.turn.append(asked)
        else:
            self._ask(exchange)

    def ask_soon(self, connection: Connection) -> None:
        """Has the turn's small predictions asked at its end."""
        connection.loop.call_soon(self._ask_turn)

    def _ask_turn(self) -> None:
        count = len(self.turn)
        if self._seen < count < MOST_TOGETHER:  # more has come: reading on makes fewer, fuller batches
            self._seen = count
            asyncio.get_running_loop().call_soon(self._ask_turn)
            return
        turn = self.turn.copy()
        self.turn.clear()
        self._seen = 1  # one alone waits for nobody
        alike: defaultdict[Form | None, list[Asked]] = defaultdict(list)
        for asked in turn:
            if asked[0].asked is asked:  # else it has become an exchange, or nobody waits any more
                alike[asked[1].form].append(asked)
        for form, group in alike.items():
            if form is None or not form.small:
                self._ask_each(group)
                continue
            for part in in_order(group):
                if not self._ask_together(form, part):
                    self._ask_each(part)

    def ask_large(self) -> None:
        """Reads the large bodies of this turn, and hands them to their schedulers."""
        large, self._large = self._large, defaultdict(list)
        for form, exchanges in large.items():
            wanted = [exchange for exchange in exchanges if not exchange.settled]
            if not wanted:
                continue
            for run in side_by_side(wanted, form):
                rooms = [exchange.room for exchange in run if exchange.room is not None]
                group: list[Asked] = [(e, e.head, 0, e.body, e.came) for e in run]
                if not self._ask_together(form, group, rooms):
                    self._ask_each(group)

    def _ask_together(self, form: Form, group: Sequence[Asked], rooms: Sequence[Room] = ()) -> bool:
        """False, with nothing done, when each must be looked at.

        Args:
            rooms: where large bodies lie, one beside the other.
        """
        try:
            model = self._repository.resolve(form.envelope.model, form.envelope.version)
            self._predictions.require_running()
        except VernierError:
            return False
        if not form.fits(model):
            return False
        count, (rows, outputs, precision, priority, deadline) = len(group), form.rest
        _, heads, starts, texts, _ = zip(*group, strict=True)
        ids = _ids(form, heads)
        refusal = model.scheduler.refusal(precision, priority, deadline)
        if refusal is not None and all(map(form.matches, texts, starts)):
            model.scheduler.refused(refusal, count, rows)
            self._refuse(exchanges_of(group, ids, model), refusal)
            return True
        arrays = form.read_joined(neighbours(rooms), count) if rooms else form.read_all(texts, starts)
        if arrays is None:
            return False
        joined = JoinedRequests(form.join(arrays), count * rows, outputs, precision, priority, deadline)
        answer = model.scheduler.run_joined(joined, count)
        if answer is not None:
            self.answers.write_joined(model, group, ids, answer, rows)
            return True
        exchanges, name = exchanges_of(group, ids, model), form.name
        for exchange, array in zip(exchanges, arrays, strict=True):
            exchange.prepare(model, ({name: array}, *form.rest))
        admitted, error = model.scheduler.submit_alike(exchanges)
        if error is not None:
            self._refuse(exchanges[admitted:], error)
        return True

    def _refuse(self, exchanges: Sequence[Exchange], error: VernierError) -> None:
        self.answers.fail(exchanges, error)
        self.answers.send(exchanges)

    def _ask_each(self, group: Iterable[Asked]) -> None:
        for asked in group:
            exchange = asked[0].exchange_of(asked)
            self._ask(exchange)
            if exchange.settled:
                exchange.connection.send_ready()

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
            self.answers.fail((exchange,), error)

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
        self.answers.fail((exchange,), error)

    def abandon(self, exchange: Exchange) -> None:
        """Nobody waits for it any more. Does nothing when it has its answer."""
        if exchange.settled:
            return
        if exchange.model is None and exchange.head.form is not None:  # it was not looked at yet
            exchange.model = exchange.head.form.model
        if exchange.model is not None:
            exchange.model.scheduler.cancel(exchange)
        self.answers.fail((exchange,), Cancelled("the client disconnected before its answer was ready"))


def _ids(form: Form, heads: Sequence[Head]) -> list[str]:
    """An id for each: that of its body, of its head, or a fresh one."""
    its_id, fresh = form.envelope.id, new_ids(len(heads))
    return [its_id or head.request_id or new for head, new in zip(heads, fresh, strict=True)]
