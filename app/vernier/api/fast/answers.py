"""What predictions are answered: payloads, heads and counts of many at once."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from vernier.api.codecs import encode_answer
from vernier.api.errors import ErrorAnswer, answer_error
from vernier.api.fast.bodies import Bodies, alike_bodies, joined_bodies
from vernier.api.fast.exchange import Asked, Exchange
from vernier.api.fast.response import Headers, ResponseHeads
from vernier.api.identity import Identities, new_id
from vernier.errors import EngineError, VernierError
from vernier.exposition import Metrics
from vernier.logs import request_id
from vernier.serving.repository import LoadedModel
from vernier.serving.request import Answer, chosen


class Answers:
    """Writes answers and counts them. Belongs to the event loop's thread.

    Those of one turn of the loop are written together: most of what a small answer costs is paid once for all.
    """

    def __init__(self, metrics: Metrics, responses: ResponseHeads, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._responses = responses
        self._clock = clock
        self._ended: list[tuple[Exchange, Answer]] = []  # not written yet
        self._together: list[tuple[Sequence[Exchange | None], Sequence[int], Answer]] = []  # nor these

    def ended(self, exchange: Exchange, answer: Answer | None, error: VernierError | None) -> None:
        """The scheduler is done with an exchange."""
        if answer is None:
            self.fail((exchange,), error or EngineError("a request ended without an answer"))
            exchange.connection.send_ready()
            return
        self._write_soon(exchange)
        self._ended.append((exchange, answer))

    def ended_together(
        self,
        exchanges: Sequence[Exchange | None],
        rows: Sequence[int],
        answer: Answer | None,
        error: VernierError | None,
    ) -> None:
        """The scheduler is done with a group. None in it stands for one that has left.

        Args:
            rows: of each.
        """
        wanted = [exchange for exchange in exchanges if exchange is not None and not exchange.settled]
        if not wanted:
            return
        if answer is None:
            self.fail(wanted, error or EngineError("a request ended without an answer"))
            self.send(wanted)
            return
        self._write_soon(wanted[0])
        self._together.append((exchanges, rows, answer))

    def _write_soon(self, exchange: Exchange) -> None:
        if not self._ended and not self._together:
            exchange.connection.loop.call_soon(self._write_ended)

    def _write_ended(self) -> None:
        """Writes the answers of this turn, those that are alike together, and has them sent."""
        together, self._together = self._together, []
        ended, self._ended = self._ended, []
        for exchanges, rows, all_rows in together:
            with self._answering([exchange for exchange in exchanges if exchange is not None]):
                self._write_together(exchanges, rows, all_rows)
        alike: defaultdict[tuple[int, str, tuple[str, ...]], list[tuple[Exchange, Answer]]] = defaultdict(
            list
        )
        for exchange, answer in ended:
            if not exchange.settled:
                key = id(exchange.model), answer.precision, tuple(answer.outputs)
                alike[key].append((exchange, answer))
        for group in alike.values():
            with self._answering([exchange for exchange, _ in group]):
                self._write(group)
        self.send([exchange for exchange, _ in ended])

    @contextmanager
    def _answering(self, exchanges: Sequence[Exchange]) -> Iterator[None]:
        """Whatever goes wrong in the block, all get an answer."""
        try:
            yield
        except Exception as fault:
            left = [exchange for exchange in exchanges if not exchange.settled]
            if not left:
                report(fault)
                return
            self.fail(left, fault)
            self.send(left)

    def _write_together(
        self, exchanges: Sequence[Exchange | None], rows: Sequence[int], answer: Answer
    ) -> None:
        """What is left of a group gets its rows of the answer."""
        places, wanted = [], []
        for place, exchange in enumerate(exchanges):
            if exchange is not None and not exchange.settled:
                places.append(place)
                wanted.append(exchange)
        if not wanted:
            return
        if len(wanted) < len(exchanges):
            answer = replace(answer, outputs=chosen(answer.outputs, rows, places))
            rows = [rows[place] for place in places]
        model = wanted[0].model
        assert model is not None
        ids = [exchange.identity for exchange in wanted]
        self.write_joined(model, [exchange.ask() for exchange in wanted], ids, answer, rows)

    def _write(self, group: Sequence[tuple[Exchange, Answer]]) -> None:
        """Payloads for answers of one model, one precision and the same outputs."""
        model, precision = group[0][0].model, group[0][1].precision
        assert model is not None
        bodies = None
        if len(group) > 1:
            written, ids = [exchange for exchange, _ in group], Identities([e.identity for e, _ in group])
            bodies = alike_bodies(ids, model.name, model.version, [answer for _, answer in group])
        if bodies is None:
            written, whole = [], []
            for exchange, answer in group:
                try:
                    whole.append(encode_answer(exchange.identity, model.name, model.version, answer))
                    written.append(exchange)
                except Exception as fault:  # what cannot be written is answered too
                    self.fail((exchange,), fault)
            if not written:
                return
            bodies, ids = Bodies(len(whole), [whole]), Identities([e.identity for e in written])
        messages = self._responses.ok_all(written[0].default_headers, bodies, ids)
        self._settle(written, bodies, messages)
        self._count(model, precision, [exchange.came for exchange in written])

    def write_joined(
        self,
        model: LoadedModel,
        group: Sequence[Asked],
        ids: Sequence[str],
        answer: Answer,
        rows: Sequence[int],
    ) -> None:
        """Answers predictions that have one answer together, and sends them.

        Args:
            ids, rows: of each.
        """
        written = Identities(ids)
        try:
            bodies = joined_bodies(written, model.name, model.version, answer, rows)
        except Exception as fault:  # what cannot be written is answered too
            exchanges = exchanges_of(group, ids, model)
            self.fail(exchanges, fault)
            self.send(exchanges)
            return
        messages = self._responses.ok_all(group[0][0].default_headers, bodies, written)
        self._count(model, answer.precision, [came for _, _, _, _, came in group])
        if messages is None:
            exchanges = exchanges_of(group, ids, model)
            self._settle(exchanges, bodies, None)
            self.send(exchanges)
            return
        self._tell(group, messages)

    def send(self, exchanges: Iterable[Exchange]) -> None:
        """Lets connections send the answers that these have got."""
        for exchange in exchanges:
            try:
                exchange.connection.send_ready()
            except Exception as fault:
                report(fault)

    def refuse_joined(
        self, model: LoadedModel, group: Sequence[Asked], ids: Sequence[str], error: Exception
    ) -> None:
        """`fail` for predictions of which each has an id and nothing waits for; sends the answer, too."""
        refusal, messages = self._refusal(error, group[0][0].default_headers, ids)
        model.metrics.responded_error(refusal.code, len(group))
        self._tell(group, messages, refusal)

    def fail(self, exchanges: Sequence[Exchange], error: Exception) -> None:
        """One answer for all, which are of one model; only the id in its head is each one's own. Sends nothing."""
        first = exchanges[0]
        for exchange in exchanges:
            exchange.identity = exchange.identity or new_id()
        ids = [exchange.identity for exchange in exchanges]
        refusal, messages = self._refusal(error, first.default_headers, ids)
        for exchange, message in zip(exchanges, messages, strict=True):
            exchange.settle(message, refusal=refusal)
        if first.model is None:
            self._metrics.responded_without_model(refusal.code, len(exchanges))
        else:
            first.model.metrics.responded_error(refusal.code, len(exchanges))

    def _refusal(
        self, error: Exception, defaults: Headers, ids: Sequence[str]
    ) -> tuple[ErrorAnswer, list[bytes]]:
        """What all are answered, and the message for each. The log tells the first one's id."""
        token = request_id.set(ids[0])
        try:
            refusal = answer_error(error)
        finally:
            request_id.reset(token)
        return refusal, self._responses.refused_all(defaults, refusal, Identities(ids))

    @staticmethod
    def _tell(group: Sequence[Asked], messages: Sequence[bytes], refusal: ErrorAnswer | None = None) -> None:
        for (asker, *_), message in zip(group, messages, strict=True):
            try:
                asker.answered(message, refusal)
            except Exception as fault:  # one connection's fault must not cost the others their answers
                report(fault)

    def _settle(
        self, exchanges: Sequence[Exchange], bodies: Bodies, messages: Sequence[bytes] | None
    ) -> None:
        """messages: None when each is to be put together by its connection."""
        if messages is None:
            for exchange, payload in zip(exchanges, bodies.whole(), strict=True):
                exchange.settle(None, payload)
        else:
            for exchange, message in zip(exchanges, messages, strict=True):
                exchange.settle(message)

    def _count(self, model: LoadedModel, precision: str, came: Sequence[float]) -> None:
        now = self._clock()
        model.metrics.responded_ok(precision, model.runtime, [now - at for at in came])


def exchanges_of(group: Sequence[Asked], ids: Sequence[str], model: LoadedModel | None) -> list[Exchange]:
    """Exchanges for predictions of one model that have been read."""
    exchanges = [asked[0].exchange_of(asked, read=True) for asked in group]
    for exchange, identity in zip(exchanges, ids, strict=True):
        exchange.identity = identity
        exchange.model = model
    return exchanges


def report(fault: Exception) -> None:
    """What nobody can be told."""
    context = {"message": "a prediction could not be asked or answered as it should", "exception": fault}
    asyncio.get_running_loop().call_exception_handler(context)
