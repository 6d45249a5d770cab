"""What only the service's own connections do: their own server, in this process where that shows more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.support.packages import write_package
from tests.support.server import free_port, serve
from tests.support.wire import Wire, request
from vernier.api.auth.security import digest_of
from vernier.front.connection import service_protocol
from vernier.main import create_app
from vernier.settings import Settings

BODY = b'{"model": "mlp", "inputs": {"x": [[1, 2, 3, 4]]}, "outputs": ["z"]}'


class Counting:
    """Notes what reaches the ASGI application."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.paths: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.paths.append(scope["path"])
        await self.app(scope, receive, send)


@asynccontextmanager
async def serving(engines: Path) -> AsyncIterator[tuple[str, Counting]]:
    settings = Settings(engines_dir=engines, monitor_share=0.0)
    app = create_app(settings)
    state = app.state
    counting = Counting(app)
    config = uvicorn.Config(
        counting,
        port=free_port(),
        log_config=None,
        http=service_protocol(state.predictions, state.metrics, state.guard, settings, state.lifecycle),
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    async with asyncio.timeout(30):
        while not server.started or state.repository.not_ready_reason() is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{config.port}", counting
    finally:
        server.should_exit = True
        await running


async def test_predictions_do_not_reach_the_application_and_others_do(engines: Path) -> None:
    write_package(engines)
    async with serving(engines) as (url, counting), httpx.AsyncClient(base_url=url) as client:
        for _ in range(3):
            response = await client.post("/v1/predict", content=BODY)
            assert response.json()["outputs"]["z"] == [[2.0, 4.0, 6.0, 8.0]]
        raw = {"content-type": "application/octet-stream"}
        assert (
            await client.post("/v1/predict?model=mlp", content=b"\0" * 16, headers=raw)
        ).status_code == 200
        assert (await client.post("/v1/predict", content=b"{")).status_code == 400
        assert counting.paths == []

        async def chunks() -> AsyncIterator[bytes]:
            yield BODY

        assert (await client.post("/v1/predict", content=chunks())).status_code == 200
        assert (await client.post("/v1/%70redict", content=BODY)).status_code == 200
        assert (await client.get("/v1/models")).status_code == 200
        assert counting.paths == ["/v1/predict", "/v1/models"]  # the first was written as %70redict


async def test_the_route_stays_in_the_openapi_document(engines: Path) -> None:
    write_package(engines)
    async with serving(engines) as (url, _), httpx.AsyncClient(base_url=url) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert "octet-stream" in str(paths["/v1/predict"]["post"]["requestBody"])


def test_a_head_without_end_is_refused(engines: Path, tmp_path: Path) -> None:
    write_package(engines)
    with serve(engines, tmp_path / "log") as server, Wire(server) as wire:
        wire.send(b"POST /v1/predict HTTP/1.1\r\n")
        with pytest.raises(OSError):
            for n in range(10_000):
                wire.send(b"x-%d: %b\r\n" % (n, b"f" * 1000))
        assert server.predict({"x": [[1, 2, 3, 4]]}).status_code == 200


def test_a_key_keeps_its_limit_of_requests_at_once_however_they_end(engines: Path, tmp_path: Path) -> None:
    write_package(engines)
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[key]]\nname = "front"\nsha256 = "{digest_of("secret")}"\nconcurrent = 1\n')
    with serve(engines, tmp_path / "log", api_keys_file=str(keys)) as server:
        ask = request(BODY, x_api_key="secret")
        with Wire(server) as wire:
            for sent, status in [(ask, 200), (request(b"{", x_api_key="secret"), 400)] * 5:
                wire.send(sent)
                assert wire.reply().status == status
            wire.send(request(BODY))
            assert wire.reply().json()["code"] == "unauthorized"
            with Wire(server) as other:
                other.send(ask[:-5])
                while (
                    True
                ):  # until its head has been read, which must not be while another request is under way
                    time.sleep(0.2)
                    wire.send(ask)
                    reply = wire.reply()
                    if reply.status != 200:
                        break
                assert reply.json()["code"] == "rate_limited"
            while reply.status != 200:  # until the server has noticed that the other one is gone
                wire.send(ask)
                reply = wire.reply()


def test_the_access_log_has_a_line_for_every_request(engines: Path, tmp_path: Path) -> None:
    write_package(engines)
    with serve(engines, tmp_path / "log", access_log="true") as server, Wire(server) as wire:
        wire.send(request(BODY) + request(b"{") + request(target="/v1/models", method="GET"))
        for _ in range(3):
            wire.reply()
        lines = [line for line in server.log.splitlines() if "uvicorn.access" in line and "/v1/" in line]
        assert len(lines) == 3
        assert "POST /v1/predict HTTP/1.1" in lines[0]
        assert "200" in lines[0]
        assert "400" in lines[1]
