"""From requests of connections to batches: those of one template that come in one turn of the loop are one batch."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from vernier.api.formats.codecs import Body, Inputs, PredictRequest, RawInputs, parse_predict
from vernier.api.formats.long_json import PREDICT, LongFormat
from vernier.api.http.identity import new_id, new_ids
from vernier.api.service import Predictions, Prepared
from vernier.api.v2.requests import InferRequest, json_bytes, parse_infer
from vernier.border.batch import RequestBatch
from vernier.border.catalogue import ServedModel
from vernier.errors import Cancelled, VernierError
from vernier.front.buffers import neighbours
from vernier.front.heads import Head
from vernier.front.json_templates import json_template
from vernier.front.request import InferenceRequest
from vernier.front.responses import ResponseWriter
from vernier.front.templates import Decoded, Extracted, Template, raw_template

#: Requests of small bodies in a batch: more gain nothing, and would share more memory.
MAX_TOGETHER = 64
#: Bytes of bodies that are read at once; one body may be longer than that.
MAX_BYTES_TOGETHER = 2**20
#: Templates that are remembered, so that heads which differ share them.
MAX_TEMPLATES = 512


class RequestIntake:
    """Reads requests and submits them. Belongs to the event loop's thread.

    Most of what a small request costs is paid once for all requests of a batch. A turn ends when reading once more
    brings nothing new, so that batches are full under load and a request alone waits for nobody.
    """

    def __init__(self, predictions: Predictions, responses: ResponseWriter) -> None:
        self._predictions = predictions
        self._repository = predictions.repository
        self.clock = predictions.clock
        self.responses = responses
        self._templates: dict[object, Template] = {}
        self._turn: list[InferenceRequest] = []
        self._seen = 1  # requests of the turn when it was looked at last
        self._large: defaultdict[Template, list[InferenceRequest]] = defaultdict(list)
        self._long: set[asyncio.Task[None]] = set()

    # --- the turn ---------------------------------------------------------------------------------
    def begin(self, request: InferenceRequest) -> None:
        """Submits the request at the end of this turn of the loop. Its connection is told when the answer is there."""
        template = request.head.templates.first
        if template is not None and request.buffer is not None:
            if not self._large:
                request.connection.loop.call_soon(self.submit_large)
            self._large[template].append(request)
            return
        if not self._turn:
            request.connection.loop.call_soon(self._end_turn)
        self._turn.append(request)

    def _end_turn(self) -> None:
        count = len(self._turn)
        if self._seen < count < MAX_TOGETHER:  # more has come: reading on makes fewer, fuller batches
            self._seen = count
            asyncio.get_running_loop().call_soon(self._end_turn)
            return
        turn, self._turn = self._turn, []
        self._seen = 1
        alike: defaultdict[Template | None, list[InferenceRequest]] = defaultdict(list)
        for request in turn:
            if not request.settled:
                templates = request.head.templates
                template = (
                    templates.template_of(request.text, request.start)
                    if templates.others
                    else templates.first
                )
                alike[template].append(request)
        for template, requests in alike.items():
            if template is None or not template.small:
                self._submit_each(requests)
            else:
                for part in _in_parts(requests):
                    self._submit_or_fail(template, part)

    def submit_large(self) -> None:
        """Submits the large bodies of this turn."""
        large, self._large = self._large, defaultdict(list)
        for template, requests in large.items():
            wanted = [request for request in requests if not request.settled]
            if wanted:
                for run in _side_by_side(wanted):
                    self._submit_or_fail(template, run)

    # --- several requests -------------------------------------------------------------------------
    def _submit_or_fail(self, template: Template, requests: Sequence[InferenceRequest]) -> None:
        """Submits requests that may have this template; whatever goes wrong, each of them gets an answer."""
        try:
            if not self._submit_together(template, requests):
                self._submit_each(requests)
        except Exception as fault:
            self.responses.fail([request for request in requests if not request.settled], fault)

    def _submit_together(self, template: Template, requests: Sequence[InferenceRequest]) -> bool:
        """False, with nothing done, when each must be looked at."""
        envelope = template.envelope
        try:
            model = self._repository.resolve(envelope.model, envelope.version)
            self._predictions.require_running()
        except VernierError:
            return False
        count, signature = len(requests), model.signature
        if not template.fits(model) or (count > 1 and not signature.has_batch):
            return False
        extracted = template.extract(
            [request.text for request in requests], [request.start for request in requests]
        )
        if extracted is None:
            return False
        outputs, precision, priority = template.rest
        arrivals = [request.came for request in requests]
        deadlines = template.deadlines(arrivals, extracted)
        ids = _ids(template, [request.head for request in requests], extracted)
        refusal = model.scheduler.refusal(precision, priority, max(deadlines) if deadlines else None)
        if refusal is not None:
            model.scheduler.refused(refusal, count, template.rows)
            for request, identity in zip(requests, ids, strict=True):
                request.identity, request.model = identity, model
            self.responses.fail(requests, refusal)
            return True
        decoded = _decoded(template, requests, extracted)
        if decoded is None:
            return False
        del extracted  # its texts lie in the cache of the processor: the answers can have their place
        requests[0].head.templates.record_hit(count)
        batch = RequestBatch(
            decoded.arrays,
            decoded.rows,
            outputs,
            precision,
            priority,
            arrivals,
            deadlines,
            self.responses,
            requests,
        )
        for index, (request, identity) in enumerate(zip(requests, ids, strict=True)):
            request.identity = identity
            request.model = model
            request.batch = batch
            request.index = index
            request.text = b""
            request.start = 0
            request.buffer = None
        model.scheduler.submit(batch)
        return True

    # --- one request ------------------------------------------------------------------------------
    def _submit_each(self, requests: Iterable[InferenceRequest]) -> None:
        for request in requests:
            try:
                self._submit_alone(request)
            except Exception as error:  # every failure is answered, and its code is counted
                if not request.settled:
                    self.responses.fail((request,), error)

    def _submit_alone(self, request: InferenceRequest) -> None:
        """Reads a body without a template, and learns its template. Raises RequestError."""
        head, body = request.head, request.body
        request.identity = head.request_id or ""
        templates = head.templates
        template = templates.template_of(body)
        if template is not None and (not template.small or request.buffer is None):
            if self._submit_together(template, (request,)):
                return
            request.model = None
        if head.infer is not None:
            target = head.infer
            stop = json_bytes(target.header_length, len(body))
            request.infer, inputs = parse_infer(body, stop, target.model, target.version)
            envelope: PredictRequest = request.infer
        elif head.envelope is None:
            envelope, inputs = parse_predict(body)
        else:
            envelope, inputs = head.envelope, RawInputs(body)
        request.identity = envelope.id or head.request_id or new_id()
        request.model = model = self._repository.resolve(envelope.model, envelope.version)
        prepared = self._predictions.prepare(envelope, inputs, model, request.came)
        if head.infer is None and templates.should_learn():
            self._learn(request, envelope, model, prepared)
        self._submit_prepared(request, model, prepared)

    def _submit_prepared(self, request: InferenceRequest, model: ServedModel, prepared: Prepared) -> None:
        arrays, rows, outputs, precision, priority, deadline = prepared
        request.forget_body()
        request.batch = batch = RequestBatch(
            arrays,
            (rows,),
            outputs,
            precision,
            priority,
            (request.came,),
            None if deadline is None else (deadline,),
            self.responses,
            (request,),
        )
        model.scheduler.submit(batch)

    def begin_long(self, request: InferenceRequest) -> None:
        """As `begin`, for a JSON body that would hold up the loop: a helper reads it."""
        task = request.connection.loop.create_task(self._submit_long(request))
        self._long.add(task)
        task.add_done_callback(self._long.discard)

    async def _submit_long(self, request: InferenceRequest) -> None:
        request.identity = own = request.head.request_id or ""

        def seen(envelope: PredictRequest, model: ServedModel | None) -> None:
            request.identity, request.model = envelope.id or own or new_id(), model

        body: list[Body] = [request.body]
        request.forget_body()
        try:
            envelope, inputs = await self._predictions.read_long(
                body,
                request.came,
                seen,
                lambda: not request.settled,
                _long_format(request.head, len(body[0])),
            )
            if isinstance(envelope, InferRequest):
                request.infer = envelope
            if not request.settled:
                self._submit_read(request, envelope, inputs)
        except Exception as error:  # every failure is answered, and its code is counted
            if not request.settled:
                self.responses.fail((request,), error)

    def _submit_read(self, request: InferenceRequest, envelope: PredictRequest, inputs: Inputs) -> None:
        """Resolves and submits in one turn of the loop, so that the model cannot be replaced in between."""
        request.model = model = self._repository.resolve(envelope.model, envelope.version)
        self._submit_prepared(
            request, model, self._predictions.prepare(envelope, inputs, model, request.came)
        )

    def _learn(
        self, request: InferenceRequest, envelope: PredictRequest, model: ServedModel, prepared: Prepared
    ) -> None:
        head, body = request.head, request.body
        timeout_ms = self._predictions.timeout_ms(envelope)
        template: Template | None
        if head.envelope is None:
            template = json_template(body, envelope, timeout_ms, model, prepared)
        else:
            template = raw_template(envelope, timeout_ms, model, prepared)
        if template is not None:
            known = self._templates.get(template.key)
            if known is not None and known.fits(model):
                template = known
            else:
                if len(self._templates) >= MAX_TEMPLATES:
                    self._templates.clear()
                self._templates[template.key] = template
        head.templates.learn(template)

    # --- requests that end early ------------------------------------------------------------------
    def refuse(self, request: InferenceRequest, error: Exception) -> None:
        """Answers with an error a request that was not begun."""
        request.identity = request.head.request_id or ""
        self.responses.fail((request,), error, send=False)

    def abandon(self, request: InferenceRequest) -> None:
        """The client has gone away. Does nothing when the request has its answer."""
        if request.settled:
            return
        if request.batch is not None and request.model is not None:
            request.model.scheduler.cancel(request.batch, request.index)
        elif request.model is None:  # it was not looked at yet
            template = request.head.templates.template_of(request.text, request.start)
            request.model = None if template is None else template.model
        error = Cancelled("the client disconnected before its answer was ready")
        self.responses.fail((request,), error, send=False)


def _long_format(head: Head, body_bytes: int) -> LongFormat:
    """Raises InvalidJson."""
    target = head.infer
    if target is None:
        return PREDICT
    stop = json_bytes(target.header_length, body_bytes)
    return LongFormat("infer", InferRequest, (stop, target.model, target.version))


def _decoded(
    template: Template, requests: Sequence[InferenceRequest], extracted: Extracted
) -> Decoded | None:
    """The inputs of all; None when one of the bodies is in doubt."""
    slices = [request.buffer for request in requests if request.buffer is not None]
    if slices and len(slices) == len(requests):
        return template.decode_joined(neighbours(slices), len(requests))
    return template.decode(extracted)


def _ids(template: Template, heads: Sequence[Head], extracted: Extracted) -> list[str]:
    """An id for each: that of its body, of its head, or a fresh one."""
    count = len(heads)
    own = [template.envelope.id] * count if extracted.ids is None else extracted.ids
    return [
        its_id or head.request_id or new for its_id, head, new in zip(own, heads, new_ids(count), strict=True)
    ]


def _in_parts(requests: Sequence[InferenceRequest]) -> Iterator[Sequence[InferenceRequest]]:
    """Small requests of one template, by batches that are worth joining."""
    for start in range(0, len(requests), MAX_TOGETHER):
        part = requests[start : start + MAX_TOGETHER]
        if len(part) * max([request.head.length for request in part]) <= MAX_BYTES_TOGETHER:
            yield part
        else:  # some have many rows
            yield from ([request] for request in part)


def _side_by_side(requests: Sequence[InferenceRequest]) -> Iterator[Sequence[InferenceRequest]]:
    """Large bodies of one template that lie one behind the other in one buffer; they came from its end."""
    run: list[InferenceRequest] = []
    for request in reversed(requests):
        above = run and request.buffer is not None and run[-1].buffer is not None
        if run and not (above and request.buffer.is_above(run[-1].buffer)):  # type: ignore[union-attr, arg-type]
            yield run
            run = []
        run.append(request)
    yield run
