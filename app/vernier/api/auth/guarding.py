"""The guard in front of the ordinary path, and headers that every answer carries."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vernier.api.auth.doors import admit, permission_of
from vernier.api.auth.security import Guard, Permit, token_of
from vernier.api.http.errors import error_response
from vernier.errors import VernierError

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
)


def route_path(scope: Scope) -> str:
    """The path by which the router chooses a route: percent-decoded, without the prefix that a proxy has put before it.

    Not `Request.url.path`: many versions of Starlette parse that from a URL that begins with the client's Host
    header, and `Host: x/ping?` then makes every path look like a probe's.
    """
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    if prefix and path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in ("", "/"):
        return path[len(prefix) :]
    return path


class GuardMiddleware:
    """Asks the guard before a route is chosen, and releases its permit when the answer has been sent."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *SECURITY_HEADERS]
            await send(message)

        try:
            permit = self._permit(scope)
        except VernierError as error:
            await error_response(error)(scope, receive, send_with_headers)
            return
        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            permit.release()

    def _permit(self, scope: Scope) -> Permit:
        headers = Headers(scope=scope)
        token = token_of(headers.get("authorization"), headers.get("x-api-key"))
        return admit(self._guard, permission_of(route_path(scope)), token)
