"""From answers to bytes: heads, bodies and counts of the requests of a batch, in one step for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from vernier.api.http.errors import ErrorResponse, answer_error
from vernier.api.http.identity import Identities, new_id
from vernier.api.v2.answers import encode_infer
from vernier.api.v2.requests import InferRequest
from vernier.border.batch import Answer, RequestBatch, chosen
from vernier.border.catalogue import ServedModel
from vernier.errors import VernierError
from vernier.exposition import Metrics
from vernier.front.answer_bodies import joined_bodies
from vernier.front.request import InferenceRequest
from vernier.front.response_heads import Headers, ResponseHeads
from vernier.logs import request_id


class ResponseWriter:
    """The target of batches that a front submits. Belongs to the event loop's thread.

    Args:
        clock: the one that the requests' arrivals are on, in seconds.
    """

    def __init__(self, metrics: Metrics, heads: ResponseHeads, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._heads = heads
        self._clock = clock

    # --- what the engine side tells ---------------------------------------------------------------
    def answered(self, batch: RequestBatch, requests: range, answer: Answer) -> None:
        group: Sequence[InferenceRequest] = batch.tokens[requests.start : requests.stop]
        rows = batch.rows[requests.start : requests.stop]
        if any(request.settled for request in group):
            places = [at for at, request in enumerate(group) if not request.settled]
            if not places:
                return
            outputs = chosen(answer.outputs, rows, places)
            answer = Answer(outputs, answer.precision, answer.queue_s, answer.compute_s, answer.batch_size)
            group, rows = [group[at] for at in places], [rows[at] for at in places]
        try:
            self._write(group, rows, answer)
        except Exception as fault:  # what cannot be written is answered too
            self.fail([request for request in group if not request.settled], fault)
            return
        self.send(group)

    def failed(self, batch: RequestBatch, requests: Sequence[int], error: VernierError) -> None:
        tokens = batch.tokens
        self.fail([tokens[at] for at in requests if not tokens[at].settled], error)

    def released(self, batch: RequestBatch) -> None:
        """The arrays go when nothing refers to them any more."""

    # --- writing ----------------------------------------------------------------------------------
    def _write(self, group: Sequence[InferenceRequest], rows: Sequence[int], answer: Answer) -> None:
        first, model = group[0], group[0].model
        assert model is not None
        if first.infer is not None:  # alone in its batch
            self._write_infer(first, first.infer, model, answer)
            return
        ids = Identities([request.identity for request in group])
        bodies = joined_bodies(ids, model.name, model.version, answer, rows)
        messages = self._heads.ok_all(first.connection.default_headers, bodies, ids)
        now = self._clock()
        model.metrics.responded_ok(answer.precision, model.runtime, [now - request.came for request in group])
        if messages is None:
            for request, payload in zip(group, bodies.whole(), strict=True):
                request.settle(None, payload)
        else:
            for request, message in zip(group, messages, strict=True):
                request.settle(message)

    def _write_infer(
        self, request: InferenceRequest, envelope: InferRequest, model: ServedModel, answer: Answer
    ) -> None:
        body, headers = encode_infer(envelope, request.identity, model.name, model.version, answer)
        defaults = request.connection.default_headers
        head = self._heads.make(defaults, 200, len(body), request.identity, headers)
        model.metrics.responded_ok(answer.precision, model.runtime, [self._clock() - request.came])
        request.settle(head + body)

    def fail(self, requests: Sequence[InferenceRequest], error: Exception, *, send: bool = True) -> None:
        """One error for requests of one model; only the id in the head of the answer is each one's own.

        Args:
            send: have the connections send the answers; else their owner does.
        """
        if not requests:
            return
        first = requests[0]
        for request in requests:
            request.identity = request.identity or new_id()
        ids = [request.identity for request in requests]
        refusal, messages = self._refusal(error, first.connection.default_headers, ids)
        for request, message in zip(requests, messages, strict=True):
            request.settle(message, refusal=refusal)
        if first.model is None:
            self._metrics.responded_without_model(refusal.code, len(requests))
        else:
            first.model.metrics.responded_error(refusal.code, len(requests))
        if send:
            self.send(requests)

    def _refusal(
        self, error: Exception, defaults: Headers, ids: Sequence[str]
    ) -> tuple[ErrorResponse, list[bytes]]:
        """The error's answer, and a message for each id. The log tells the first id."""
        token = request_id.set(ids[0])
        try:
            refusal = answer_error(error)
        finally:
            request_id.reset(token)
        return refusal, self._heads.refused_all(defaults, refusal, Identities(ids))

    @staticmethod
    def send(requests: Iterable[InferenceRequest]) -> None:
        """Lets connections send the answers that these have got."""
        for request in requests:
            try:
                request.connection.send_ready()
            except Exception as fault:  # one connection's fault must not cost the others their answers
                report(fault)


def report(fault: Exception) -> None:
    """Tells the loop's exception handler of a fault that no client can be told of."""
    context = {"message": "a prediction could not be answered as it should", "exception": fault}
    asyncio.get_running_loop().call_exception_handler(context)
