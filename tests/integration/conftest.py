from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.packages import mlp_model, write_package
from tests.support.server import Server, serve

#: Large bodies hold thousands of rows each, and many come at once.
MANY_ROWS = "1000000"


@pytest.fixture(scope="module", params=["own", "uvicorn"])
def mlp_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with `mlp` (dynamic batch, at most 16 rows), `fixed` (batch of 4) and versions 1 and 2 of `twice`.

    Every test that takes it runs against `python -m vernier`, whose connections are the service's own, and against
    `uvicorn vernier.main:app`, where all requests go to the ASGI application.
    """
    root = tmp_path_factory.mktemp("mlp")
    engines = root / "engines"
    doubt = {"code": "few_samples", "message": "give more"}
    write_package(engines, "mlp", warnings=[doubt])
    write_package(engines, "fixed", model=mlp_model(seed=1, batch=4))
    write_package(engines, "twice", 1, mlp_model(seed=2))
    write_package(engines, "twice", 2, mlp_model(seed=3))
    limits = {"max_body_bytes": "200000", "queue_limit": MANY_ROWS}
    with serve(engines, root / "log", uvicorn=request.param == "uvicorn", **limits) as server:
        yield server
