"""Begins predictions of the fast path: those of one form that come in one turn of the loop, together."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate

from vernier.api.codecs import Body, PredictRequest, RawInputs, parse_predict
from vernier.api.fast.answers import Answers, exchanges_of, report
from vernier.api.fast.exchange import Asked, Connection, Exchange, ExchangeGroup
from vernier.api.fast.grouping import MOST_TOGETHER, in_order, side_by_side
from vernier.api.fast.head import Head
from vernier.api.fast.memory import Room, neighbours
from vernier.api.fast.response import ResponseHeads
from vernier.api.forms import Apart, Decoded, Form, raw_form
from vernier.api.identity import new_id, new_ids
from vernier.api.json_forms import json_form
from vernier.api.service import Predictions, Prepared
from vernier.errors import Cancelled, VernierError
from vernier.exposition import Metrics
from vernier.serving.repository import LoadedModel
from vernier.serving.request import NEW, JoinedRequests

#: Forms that are remembered, so that heads which differ share them.
_MOST_FORMS = 512
#: Deadlines that differ by so little of the time that is left count as one where requests wait.
_NEARLY = 0.05


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
        form = exchange.head.forms.first
        if form is not None and exchange.room is not None:
            if not self._large:
                exchange.connection.loop.call_soon(self.ask_large)
            self._large[form].append(exchange)
        elif form is not None and form.small:
            if not self.turn:
                self.ask_soon(exchange.connection)
            self.turn.append(exchange.ask())
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
                forms = asked[1].forms
                alike[forms.form_of(asked[3], asked[2]) if forms.others else forms.first].append(asked)
        for form, group in alike.items():
            for part in in_order(group):
                self._ask_group(form if form is not None and form.small else None, part)

    def ask_large(self) -> None:
        """Reads the large bodies of this turn, and hands them to their schedulers."""
        large, self._large = self._large, defaultdict(list)
        for form, exchanges in large.items():
            wanted = [exchange for exchange in exchanges if not exchange.settled]
            if not wanted:
                continue
            for run in side_by_side(wanted, form):
                rooms = [exchange.room for exchange in run if exchange.room is not None]
                self._ask_group(form, [exchange.ask() for exchange in run], rooms)

    def _ask_group(self, form: Form | None, group: Sequence[Asked], rooms: Sequence[Room] = ()) -> None:
        """Asks what has come in one turn, together if it has a form.

        Args:
            rooms: where large bodies lie, one beside the other.
        """
        try:
            if form is None or not self._ask_together(form, group, rooms):
                self._ask_each(group)
        except Exception as fault:  # nobody may wait for ever, whatever went wrong
            left = [asked for asked in group if asked[0].asked is asked]
            ids = [asked[1].request_id or "" for asked in left]
            self._refuse(exchanges_of(left, ids, None if form is None else form.model), fault)

    def _ask_together(self, form: Form, group: Sequence[Asked], rooms: Sequence[Room]) -> bool:
        """False, with nothing done, when each must be looked at."""
        try:
            model = self._repository.resolve(form.envelope.model, form.envelope.version)
            self._predictions.require_running()
        except VernierError:
            return False
        if not form.fits(model):
            return False
        _, heads, starts, texts, came = zip(*group, strict=True)
        apart = form.take_apart(texts, starts)
        if apart is None:
            return False
        count, (_, precision, priority) = len(group), form.rest
        ids, deadlines = _ids(form, heads, apart), form.deadlines(came, apart)
        refusal = model.scheduler.refusal(precision, priority, max(deadlines) if deadlines else None)
        if refusal is not None:
            model.scheduler.refused(refusal, count, form.rows)
            self.answers.refuse_joined(model, group, ids, refusal)
            return True
        decoded = form.decode_joined(neighbours(rooms), count) if rooms else form.decode(apart)
        if decoded is None:
            return False
        del apart  # its texts lie in the cache of the processor: the answers can have their place
        heads[0].forms.was_of_use(count)
        done = self._run_joined(form, model, group, ids, decoded, deadlines)
        if done == count:
            return True
        exchanges = exchanges_of(group[done:], ids[done:], model)
        try:
            left, own = decoded.part(done, count), deadlines and deadlines[done:]
            self._submit_all(form, model, exchanges, left, own)
        except Exception as fault:  # those that the scheduler has not taken would wait for ever
            self._refuse([exchange for exchange in exchanges if not _is_taken(exchange)], fault)
        return True

    def _run_joined(
        self,
        form: Form,
        model: LoadedModel,
        group: Sequence[Asked],
        ids: Sequence[str],
        decoded: Decoded,
        deadlines: Sequence[float] | None,
    ) -> int:
        """Runs at once and answers what can be, by as many rows as fit. Returns how many requests, from the front."""
        outputs, precision, priority = form.rest
        first = min(deadlines) if deadlines else None
        scheduler = model.scheduler
        if first is not None and (
            first <= self.clock() or scheduler.refusal(precision, priority, first) is not None
        ):
            return 0
        ends = list(accumulate(decoded.rows))
        start, before, stop = 0, 0, len(group)
        while start < len(group):
            part = decoded.part(start, stop)
            joined = JoinedRequests(part.arrays, part.rows, outputs, precision, priority, first)
            answer = scheduler.run_joined(joined)
            if answer is not None:
                self.answers.write_joined(model, group[start:stop], ids[start:stop], answer, part.rows)
                start, before, stop = stop, ends[stop - 1], len(group)
                continue
            fit = bisect_right(ends, before + scheduler.room_for_joined(precision), start, stop)
            if fit in (start, stop):
                break
            stop = fit
        return start

    def _submit_all(
        self,
        form: Form,
        model: LoadedModel,
        exchanges: Sequence[Exchange],
        decoded: Decoded,
        deadlines: Sequence[float] | None,
    ) -> None:
        rows, scheduler = decoded.rows, model.scheduler
        if (
            len(rows) > 1
            and max(rows) <= scheduler.largest_grouped
            and (deadlines is None or _nearly_one(deadlines, self.clock()))
        ):
            group = ExchangeGroup(self.answers, exchanges, decoded.arrays, rows, form, deadlines)
            refusal = scheduler.admit(group)
            if refusal is not None:
                self._refuse([exchange for exchange in exchanges if exchange.group is not group], refusal)
            return
        own: Sequence[float | None] = deadlines or [None] * len(rows)
        for exchange, arrays, count, deadline in zip(exchanges, decoded.each(), rows, own, strict=True):
            exchange.prepare(model, (arrays, count, *form.rest, deadline))
        for exchange in exchanges:
            try:
                self._submit(model, exchange)
            except VernierError as error:
                self._refuse((exchange,), error)

    def _submit(self, model: LoadedModel, exchange: Exchange) -> None:
        self._predictions.require_time(exchange.deadline)
        model.scheduler.submit(exchange)

    def _refuse(self, exchanges: Sequence[Exchange], error: Exception) -> None:
        if not exchanges:
            report(error)
            return
        self.answers.fail(exchanges, error)
        self.answers.send(exchanges)

    def _ask_each(self, group: Iterable[Asked]) -> None:
        for asked in group:
            exchange = asked[0].exchange_of(asked)
            self._ask(exchange)
            if exchange.settled:
                self.answers.send((exchange,))

    def _ask(self, exchange: Exchange) -> None:
        """Reads one body and hands it to its scheduler, or refuses it."""
        head, body = exchange.head, exchange.body
        exchange.identity = head.request_id or ""
        try:
            form = head.forms.form_of(body)
            apart = None if form is None else form.take_apart((body,), (0,))
            if form is not None and apart is not None:
                envelope = form.envelope
                (exchange.identity,) = _ids(form, (head,), apart)
                exchange.model = model = self._repository.resolve(envelope.model, envelope.version)
                if form.fits(model):
                    self._predictions.require_running()
                    _, precision, priority = form.rest
                    deadlines = form.deadlines((exchange.came,), apart)
                    deadline = deadlines[0] if deadlines else None
                    self._predictions.require_room(model, precision, priority, deadline)
                    decoded = form.decode(apart)
                    if decoded is not None:
                        head.forms.was_of_use()
                        exchange.prepare(model, (decoded.arrays, decoded.rows[0], *form.rest, deadline))
                        self._submit(model, exchange)
                        return
            exchange.model = None
            if head.envelope is None:
                envelope, inputs = parse_predict(body)
            else:
                envelope, inputs = head.envelope, RawInputs(body)
            exchange.identity = envelope.id or head.request_id or new_id()
            exchange.model = model = self._repository.resolve(envelope.model, envelope.version)
            prepared = self._predictions.prepare(envelope, inputs, model, exchange.came)
            if head.forms.wants():
                self._learn(head, body, envelope, model, prepared)
            exchange.prepare(model, prepared)
            model.scheduler.submit(exchange)
        except Exception as error:  # every failure is answered, and its code is counted
            exchange.body = b""
            self.answers.fail((exchange,), error)

    def _learn(
        self, head: Head, body: Body, envelope: PredictRequest, model: LoadedModel, prepared: Prepared
    ) -> None:
        timeout_ms = self._predictions.timeout_ms(envelope)
        form: Form | None
        if head.envelope is None:
            form = json_form(body, envelope, timeout_ms, model, prepared)
        else:
            form = raw_form(envelope, timeout_ms, model, prepared)
        if form is not None:
            known = self._forms.get(form.key)
            if known is not None and known.fits(model):
                form = known
            else:
                if len(self._forms) >= _MOST_FORMS:
                    self._forms.clear()
                self._forms[form.key] = form
        head.forms.learn(form)

    def refuse(self, exchange: Exchange, error: Exception) -> None:
        """Answers with an error what was not begun."""
        exchange.identity = exchange.head.request_id or ""
        self.answers.fail((exchange,), error)

    def abandon(self, exchange: Exchange) -> None:
        """Nobody waits for it any more. Does nothing when it has its answer."""
        if exchange.settled:
            return
        if exchange.model is None:  # it was not looked at yet
            form = exchange.head.forms.form_of(exchange.body)
            exchange.model = None if form is None else form.model
        if exchange.model is not None:
            exchange.model.scheduler.cancel(exchange)
        self.answers.fail((exchange,), Cancelled("the client disconnected before its answer was ready"))


def _nearly_one(deadlines: Sequence[float], now: float) -> bool:
    first = min(deadlines)
    return first > now and max(deadlines) - first <= _NEARLY * (first - now)


def _is_taken(exchange: Exchange) -> bool:
    """Whether the scheduler has it, or it has its answer."""
    asked = exchange.group or exchange
    return exchange.settled or asked.state != NEW


def _ids(form: Form, heads: Sequence[Head], apart: Apart) -> list[str]:
    """An id for each: that of its body, of its head, or a fresh one."""
    count = len(heads)
    its_ids = [form.envelope.id] * count if apart.ids is None else apart.ids
    return [
        its_id or head.request_id or new
        for its_id, head, new in zip(its_ids, heads, new_ids(count), strict=True)
    ]
