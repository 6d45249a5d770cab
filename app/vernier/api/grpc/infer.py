"""ModelInfer and ModelStreamInfer: predictions over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from vernier.api.grpc.calls import CallAdmission, Context, abort, metadata_of, sentence_of
from vernier.api.grpc.codec import encode_model_infer, parameters_of, read_model_infer
from vernier.api.grpc.schema import (
    SERVICE,
    ModelInferRequest,
    ModelInferResponse,
    ModelStreamInferResponse,
    parse,
)
from vernier.api.prediction import Prediction
from vernier.api.service import Predictions
from vernier.api.v2.requests import InferRequest
from vernier.errors import Unauthorized
from vernier.exposition import Metrics

#: Predictions of one stream that may be under way at once.
MAX_STREAMED = 64


class Inference:
    """Belongs to the event loop's thread.

    Args:
        stopping: set when streams shall end with the requests that they have read.
    """

    def __init__(
        self, predictions: Predictions, metrics: Metrics, admission: CallAdmission, stopping: asyncio.Event
    ) -> None:
        self._predictions = predictions
        self._metrics = metrics
        self._admission = admission
        self._stopping = stopping

    async def unary(self, data: bytes, context: Context) -> bytes | None:
        """ModelInfer."""
        _, result = await self._run("ModelInfer", data, context)
        if isinstance(result, Exception):
            await abort(context, result)
            return None
        answer: bytes = result.SerializeToString()
        return answer

    async def _run(self, method: str, data: bytes, context: Context) -> tuple[Any, Any]:
        """The request's message, as far as there is one, and the answer's or the error; cancelled with the call."""
        prediction = Prediction(self._predictions, self._metrics, metadata_of(context).get("x-request-id"))
        message: Any = ModelInferRequest()

        async def work() -> Any:
            nonlocal message
            with self._admission.request(f"/{SERVICE}/{method}", context, len(data)):
                message = parse(ModelInferRequest, data)
                request, inputs = read_model_infer(message)
                request.timeout_ms = self._timeout_ms(request, context)
                answer = await prediction.answer(request, inputs)
                model = prediction.served
                return encode_model_infer(request, prediction.identity, model.name, model.version, answer)

        result = await prediction.run(work, lambda error: error)
        return message, result

    def _timeout_ms(self, request: InferRequest, context: Context) -> float | None:
        """The sooner of the request's and the call's deadline."""
        allowed_ms = self._predictions.timeout_ms(request)
        remaining_s: float | None = context.time_remaining()
        if remaining_s is None:
            return allowed_ms
        left_ms = max(0.0, remaining_s * 1e3)
        return left_ms if allowed_ms is None else min(allowed_ms, left_ms)

    async def stream(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        """ModelStreamInfer: answers in the order of their requests, of which several are under way at once."""
        due: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(MAX_STREAMED)
        running: set[asyncio.Task[bytes]] = set()

        async def read() -> None:
            try:
                async for data in requests:
                    task = asyncio.ensure_future(self._streamed(data, context))
                    running.add(task)
                    task.add_done_callback(running.discard)
                    await due.put(task)
            finally:
                await due.put(None)

        async def end_with_the_service() -> None:
            await self._stopping.wait()
            reading.cancel()

        reading = asyncio.ensure_future(read())
        ending = asyncio.ensure_future(end_with_the_service())
        try:
            while (task := await due.get()) is not None:
                yield await task
        except Unauthorized as error:
            await abort(context, error)
        finally:
            left = [ending, reading, *running]
            for other in left:
                other.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _streamed(self, data: bytes, context: Context) -> bytes:
        """The answer, or an error of this request alone. Raises Unauthorized, which ends the stream."""
        request, result = await self._run("ModelStreamInfer", data, context)
        if isinstance(result, Unauthorized):
            raise result
        if isinstance(result, Exception):
            answer = ModelStreamInferResponse(
                error_message=sentence_of(result), infer_response=ModelInferResponse(id=request.id)
            )
        else:
            answer = ModelStreamInferResponse(infer_response=result)
        if parameters_of(request.parameters).get("triton_enable_empty_final_response") is True:
            answer.infer_response.parameters["triton_final_response"].bool_param = True
        encoded: bytes = answer.SerializeToString()
        return encoded
