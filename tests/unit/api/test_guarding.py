"""The guard decides by the path that the router takes, whatever else the request says of itself."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.datastructures import URL
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from vernier.api.auth.guarding import GuardMiddleware
from vernier.api.auth.security import Guard, Key, digest_of
from vernier.api.http.errors import install_error_handlers

KEY, ADMIN = "front-ends-key", "administrators-token"
GUARDS = {
    "keys": Guard(keys=[Key("front", digest_of(KEY))], admin_digest=digest_of(ADMIN)),
    "no keys": Guard(admin_digest=digest_of(ADMIN)),
}
LIES = ["x/ping?", "x/docs#", "x/metrics?y=", "x/v2/health/live?", "/ping?", "x/ping\\"]


@pytest.fixture(autouse=True)
def _url_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Request.url` as older versions of Starlette build it, whichever version is installed."""

    def url(request: Request) -> URL:
        return URL(f"http://{request.headers.get('host')}{request.scope['path']}")

    monkeypatch.setattr(Request, "url", property(url))


async def status(guard: Guard, path: str, host: str = "x", root_path: str = "") -> int:
    """What the guard alone answers; 200 stands for a request that it lets through."""
    statuses: list[int] = []

    async def let_through(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": root_path + path,
        "raw_path": (root_path + path).encode(),
        "root_path": root_path,
        "query_string": b"",
        "headers": [(b"host", host.encode())],
        "scheme": "http",
        "server": ("127.0.0.1", 80),
    }
    await GuardMiddleware(let_through, guard)(scope, receive, send)
    return statuses[0]


@pytest.mark.parametrize("host", ["x", *LIES])
async def test_the_host_header_opens_nothing(host: str) -> None:
    for path in ("/v1/predict", "/v1/models", "/v2/repository/models/mlp/unload"):
        assert await status(GUARDS["keys"], path, host) == 401, path
    assert await status(GUARDS["no keys"], "/v2/repository/models/mlp/unload", host) == 401
    assert await status(GUARDS["keys"], "/metrics", host) == 200


@pytest.mark.parametrize("host", ["x/v2/repository?", "x/v1/predict?"])
async def test_the_host_header_closes_nothing(host: str) -> None:
    for path in ("/v2/health/live", "/metrics", "/docs"):
        assert await status(GUARDS["keys"], path, host) == 200, path


@pytest.mark.parametrize("root_path", ["/api", "/ping", "/metrics", "/v2/repository", "/v1/predict", "/"])
async def test_the_prefix_of_a_proxy_is_no_part_of_the_decision(root_path: str) -> None:
    assert await status(GUARDS["keys"], "/v1/predict", root_path=root_path) == 401
    assert await status(GUARDS["no keys"], "/v1/predict", root_path=root_path) == 200
    for guard in GUARDS.values():
        assert await status(guard, "/v2/repository/models/mlp/unload", root_path=root_path) == 401
        assert await status(guard, "/v2/health/live", root_path=root_path) == 200


@pytest.mark.parametrize("root_path", ["", "/api", "/ping", "/v1"])
@pytest.mark.parametrize(
    ("target", "answered"),
    [
        ("/ping", 200),
        ("/%70ing", 200),
        ("/v1/predict", 401),
        ("/v1/%70redict", 401),
        ("/v1%2Fpredict", 401),
        ("/v1/predict?/ping", 401),
        ("/v1/%2570redict", 401),  # decoded once only: no route
        ("/v1/ping", 401),
    ],
)
async def test_the_guard_and_the_router_read_a_target_alike(
    target: str, answered: int, root_path: str
) -> None:
    """Without its guard the application says which route a target reaches; with it, who may reach that."""

    def application(guard: Guard) -> FastAPI:
        app = FastAPI()
        app.add_api_route("/ping", lambda: "ping", methods=["POST"])
        app.add_api_route("/v1/predict", lambda: "predict", methods=["POST"])
        app.add_middleware(GuardMiddleware, guard=guard)
        return app

    async def post(guard: Guard) -> httpx.Response:
        transport = httpx.ASGITransport(app=application(guard), root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post(root_path + target)

    reached = await post(GUARDS["no keys"])
    if reached.status_code == 200:
        assert reached.json() == ("ping" if answered == 200 else "predict")
    assert (await post(GUARDS["keys"])).status_code == answered


async def test_messages_name_the_path_that_was_asked_for() -> None:
    app = FastAPI()
    install_error_handlers(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://x") as client:
        response = await client.get("/nothing", headers={"host": "x/ping?"})
    assert response.status_code == 404
    assert json.loads(response.content)["error"].startswith("there is nothing at /nothing;")
