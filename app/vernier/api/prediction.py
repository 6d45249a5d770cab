"""One prediction outside of a connection's intake, whichever protocol it came by: from its first byte to its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from vernier.api.formats.codecs import LONG_BYTES, Body, Inputs, PredictRequest
from vernier.api.formats.long_json import PREDICT, LongFormat
from vernier.api.http.errors import describe_error
from vernier.api.http.identity import new_id
from vernier.api.service import Predictions, Prepared
from vernier.border.awaited import AwaitedAnswer
from vernier.border.batch import Answer, RequestBatch
from vernier.border.catalogue import ServedModel
from vernier.errors import Cancelled
from vernier.exposition import Metrics
from vernier.logs import request_id

T = TypeVar("T")

#: From a body, and the arguments of the protocol's LongFormat, to a request. Raises RequestError.
Parser = Callable[..., tuple[PredictRequest, Inputs]]


async def _never() -> None:
    await asyncio.get_running_loop().create_future()


class Prediction:
    """Runs one prediction, gives it up when the client goes away, and counts how it ended.

    Args:
        identity: the client's id of the request, if there is one yet.
        gone: returns when the client has gone away; called once the request has been submitted.

    Attributes:
        identity: the request's id, in its answer and in the log.
        model: that it is for; None until it is known.
        arrived: when it was first seen, on the service's clock.
    """

    def __init__(
        self,
        predictions: Predictions,
        metrics: Metrics,
        identity: str | None,
        gone: Callable[[], Awaitable[None]] = _never,
    ) -> None:
        self.predictions = predictions
        self.arrived = predictions.clock()
        self.identity = identity or new_id()
        self.model: ServedModel | None = None
        self._metrics = metrics
        self._gone = gone
        self._precision = ""

    @property
    def served(self) -> ServedModel:
        """The model that has answered."""
        assert self.model is not None
        return self.model

    async def run(self, work: Callable[[], Awaitable[T]], failed: Callable[[Exception], T]) -> T:
        """What `work` makes of the request, or `failed` of the error; either is counted, and the log tells the id."""
        token = request_id.set(self.identity)
        code = "cancelled"  # unless the task is cancelled, another takes its place
        try:
            result = await work()
            code = "ok"
        except Exception as error:  # every failure is answered here, so that its code is counted
            result = failed(error)
            code = describe_error(error)[2]
        finally:
            request_id.reset(token)
            self._count(code)
        return result

    def _count(self, code: str) -> None:
        model = self.model
        if model is None:
            self._metrics.responded_without_model(code)
        else:
            seconds = self.predictions.clock() - self.arrived
            model.metrics.responded(code, self._precision, model.runtime, seconds)

    def _take(self, envelope: PredictRequest) -> None:
        self.identity = envelope.id or self.identity
        request_id.set(self.identity)

    async def read_long(
        self, body: list[Body], long_format: LongFormat = PREDICT
    ) -> tuple[PredictRequest, Inputs]:
        """A long JSON body, read by a helper; see `Predictions.read_long`."""

        def seen(envelope: PredictRequest, found: ServedModel | None) -> None:
            self._take(envelope)
            self.model = found

        return await self.predictions.read_long(body, self.arrived, seen, long_format=long_format)

    async def parse(
        self, parser: Parser, body: list[Body], form: LongFormat, json_bytes: int | None = None
    ) -> tuple[PredictRequest, Inputs]:
        """What the protocol's parser makes of a body, in a helper when its JSON is long.

        Args:
            parser: the one that helpers know by the name of `form`.
            body: a list with it, which is emptied.
            json_bytes: how much of it is JSON; None when all is.
        """
        if (len(body[0]) if json_bytes is None else json_bytes) > LONG_BYTES:
            return await self.read_long(body, form)
        return parser(body.pop(), *form.arguments)

    async def answer(self, envelope: PredictRequest, inputs: Inputs) -> Answer:
        """Validates the request, has it computed, and gives the answer. Raises VernierError.

        The request is submitted in the same turn of the loop in which its model was resolved, so that a model
        that is replaced meanwhile has either admitted it or was not the one resolved.
        """
        self._take(envelope)
        self.model = model = self.predictions.repository.resolve(envelope.model, envelope.version)
        answer = await self._compute(model, self.predictions.prepare(envelope, inputs, model, self.arrived))
        self._precision = answer.precision
        return answer

    async def _compute(self, model: ServedModel, prepared: Prepared) -> Answer:
        arrays, rows, outputs, precision, priority, deadline = prepared
        awaited = AwaitedAnswer()
        deadlines = None if deadline is None else (deadline,)
        batch = RequestBatch(
            arrays, (rows,), outputs, precision, priority, (self.arrived,), deadlines, awaited
        )
        model.scheduler.submit(batch)
        future = awaited.future
        gone = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait((future, gone), return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                return future.result()
            raise Cancelled("the client disconnected before its answer was ready")
        finally:
            gone.cancel()
            if not future.done():
                model.scheduler.cancel(batch, 0)
