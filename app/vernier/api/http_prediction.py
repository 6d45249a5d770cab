"""A prediction that one HTTP request of the application asks for: what every protocol's route has in common."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Request, Response

from vernier.api.http.body import read_body, wait_for_disconnect
from vernier.api.http.errors import error_response
from vernier.api.http.identity import header_value
from vernier.api.prediction import Prediction
from vernier.settings import Settings


class HttpPrediction(Prediction):
    """Given up when the request's client disconnects."""

    def __init__(self, request: Request) -> None:
        state = request.app.state
        super().__init__(
            state.predictions,
            state.metrics,
            request.headers.get("x-request-id"),
            lambda: wait_for_disconnect(request),
        )
        self._request = request

    async def body(self) -> bytes:
        """The request's body, within the service's limits. Raises what `read_body` raises."""
        settings: Settings = self._request.app.state.settings
        return await read_body(self._request, settings.max_body_bytes, settings.body_timeout_s)

    async def respond(self, work: Callable[[], Awaitable[Response]]) -> Response:
        """The response that `work` makes, or that of its error, with the request's id in its head."""
        response = await self.run(work, error_response)
        response.headers["x-request-id"] = header_value(self.identity)
        return response
