from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.packages import mlp_model, write_package
from tests.support.server import Server, serve

#: Large bodies hold thousands of rows each, and many come at once.
MANY_ROWS = "1000000"


@pytest.fixture(scope="module", params=["fast", "ordinary"])
def mlp_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with `mlp` (dynamic batch, at most 16 rows), `fixed` (batch of 4) and versions 1 and 2 of `twice`.

    Every test that takes it runs against the fast path and against the ordinary one.
    """
    root = tmp_path_factory.mktemp("mlp")
    engines = root / "engines"
    write_package(engines, "mlp")
    write_package(engines, "fixed", model=mlp_model(seed=1, batch=4))
    write_package(engines, "twice", 1, mlp_model(seed=2))
    write_package(engines, "twice", 2, mlp_model(seed=3))
    fast = "true" if request.param == "fast" else "false"
    with serve(
        engines, root / "log", max_body_bytes="200000", fast_path=fast, queue_limit=MANY_ROWS
    ) as server:
        yield server
