"""The table of doors: every route and every method is in it, and each asks for what it says, over real ports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from prometheus_client import CollectorRegistry

from tests.support.packages import write_package
from tests.support.server import Server, free_port, serve
from vernier.api import docs_page
from vernier.api.auth.doors import Permission, permission_of
from vernier.api.auth.security import digest_of
from vernier.api.grpc.schema import HEALTH, POOL, SERVICE
from vernier.composition.front import create_front
from vernier.exposition import Metrics
from vernier.serving.lifecycle import Lifecycle
from vernier.settings import Settings

KEY, ADMIN = "a-front-ends-key", "an-administrators-token"
OPEN, PREDICT, ADMINISTRATE = Permission.OPEN, Permission.PREDICT, Permission.ADMIN
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

PATHS = {
    "GET /v2/health/live": OPEN,
    "GET /v2/health/ready": OPEN,
    "GET /metrics": OPEN,
    "GET /openapi.json": OPEN,
    "GET /docs": OPEN,
    "GET /ping": OPEN,
    "POST /v1/predict": PREDICT,
    "POST /v1/models/{name}:predict": PREDICT,
    "POST /invocations": PREDICT,
    "GET /v1/models": PREDICT,
    "GET /v1/models/{name}": PREDICT,
    "GET /v2": PREDICT,
    "GET /v2/models/stats": PREDICT,
    "GET /v2/models/{name}": PREDICT,
    "GET /v2/models/{name}/versions/{version}": PREDICT,
    "GET /v2/models/{name}/ready": PREDICT,
    "GET /v2/models/{name}/versions/{version}/ready": PREDICT,
    "GET /v2/models/{name}/config": PREDICT,
    "GET /v2/models/{name}/versions/{version}/config": PREDICT,
    "GET /v2/models/{name}/stats": PREDICT,
    "GET /v2/models/{name}/versions/{version}/stats": PREDICT,
    "POST /v2/models/{name}/infer": PREDICT,
    "POST /v2/models/{name}/versions/{version}/infer": PREDICT,
    "POST /v2/repository/index": ADMINISTRATE,
    "POST /v2/repository/models/{name}/load": ADMINISTRATE,
    "POST /v2/repository/models/{name}/unload": ADMINISTRATE,
}
METHODS = {
    "ServerLive": OPEN,
    "ServerReady": OPEN,
    "ModelReady": PREDICT,
    "ServerMetadata": PREDICT,
    "ModelMetadata": PREDICT,
    "ModelInfer": PREDICT,
    "ModelStreamInfer": PREDICT,
    "ModelConfig": PREDICT,
    "ModelStatistics": PREDICT,
    "RepositoryIndex": ADMINISTRATE,
    "RepositoryModelLoad": ADMINISTRATE,
    "RepositoryModelUnload": ADMINISTRATE,
}
#: How the service is set up → permission → what is sent → whether the door opens.
TOKENS = {"none": None, "wrong": "no-key-of-this-service", "key": KEY, "admin": ADMIN}
ALLOWED = {
    "guarded": {OPEN: set(TOKENS), PREDICT: {"key"}, ADMINISTRATE: {"admin"}},
    "without keys": {OPEN: set(TOKENS), PREDICT: set(TOKENS), ADMINISTRATE: {"admin"}},
    "without a token": {OPEN: set(TOKENS), PREDICT: {"key"}, ADMINISTRATE: set()},
}


class _Nothing:
    def models(self) -> list[object]:
        return []


def test_every_route_is_in_the_table(tmp_path: Path) -> None:
    async def scrape() -> tuple[()]:
        return ()

    metrics = Metrics(CollectorRegistry(), "0")
    app = create_front(Settings(engines_dir=tmp_path), _Nothing(), Lifecycle(0.0), metrics, scrape)  # type: ignore[arg-type]
    own = [route for route in app.routes if hasattr(route, "methods")]
    found = {f"{method} {route.path}" for route in own for method in route.methods - {"HEAD"}}
    found |= {
        f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods
    }
    found |= {f"GET {route.path}" for route in docs_page.router.routes}  # not in the schema
    assert found == set(PATHS)
    app.state.predictions.close()
    for door, permission in PATHS.items():
        assert permission_of(door.partition(" ")[2]) is permission, door


def test_every_method_is_in_the_table() -> None:
    assert set(POOL.FindServiceByName(SERVICE).methods_by_name) == set(METHODS)
    for name, permission in METHODS.items():
        assert permission_of(f"/{SERVICE}/{name}") is permission, name
    for name in POOL.FindServiceByName(HEALTH).methods_by_name:
        assert permission_of(f"/{HEALTH}/{name}") is OPEN
    assert permission_of(REFLECTION) is OPEN


def test_what_nobody_has_thought_of_needs_a_key() -> None:
    for door in ("/", "/v3/anything", "/v2/models/x/new", f"/{SERVICE}/New", "/v2/", "", "/ui"):
        assert permission_of(door) is PREDICT, door


@pytest.fixture(scope="module", params=ALLOWED)
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, int, str]]:
    root = tmp_path_factory.mktemp("doors")
    (root / "keys").write_text(f'[[key]]\nname = "front"\nsha256 = "{digest_of(KEY)}"\n')
    (root / "token").write_text(ADMIN)
    settings = {"api_keys_file": str(root / "keys"), "admin_token_file": str(root / "token")}
    if request.param == "without keys":
        del settings["api_keys_file"]
    elif request.param == "without a token":
        del settings["admin_token_file"]
    write_package(root / "engines")
    port = free_port()
    with serve(root / "engines", root / "log", grpc_port=str(port), **settings) as server:
        yield server, port, request.param


def test_each_path_opens_for_whom_the_table_says(service: tuple[Server, int, str]) -> None:
    server, _, setup = service
    for door, permission in PATHS.items():
        method, _, path = door.partition(" ")
        for name, token in TOKENS.items():
            for headers in ({"authorization": f"Bearer {token}"}, {"x-api-key": token}):
                sent = {} if token is None else headers
                url = server.url + path.format(name="none", version="1")
                status = httpx.request(method, url, headers=sent, timeout=10).status_code
                assert (status not in (401, 403)) == (name in ALLOWED[setup][permission]), (door, name)


def test_each_method_opens_for_whom_the_table_says(service: tuple[Server, int, str]) -> None:
    _, port, setup = service
    refusals = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
    doors = {f"/{SERVICE}/{name}": permission for name, permission in METHODS.items()}
    doors[f"/{HEALTH}/Check"] = OPEN
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for door, permission in doors.items():
            for name, token in TOKENS.items():
                for metadata in ((("authorization", f"Bearer {token}"),), (("x-api-key", token),)):
                    sent = () if token is None else metadata
                    try:
                        if door.endswith("ModelStreamInfer"):
                            list(channel.stream_stream(door)(iter([b""]), metadata=sent, timeout=10))
                        else:
                            channel.unary_unary(door)(b"", metadata=sent, timeout=10)
                        code = None
                    except grpc.RpcError as error:
                        code = error.code()
                    assert (code not in refusals) == (name in ALLOWED[setup][permission]), (door, name, code)
                    assert code is not grpc.StatusCode.UNIMPLEMENTED, door
