from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.executors import Shop, make_packages


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(
    scope="session", params=["onnxruntime", pytest.param("tensorrt", marks=pytest.mark.gpu)], ids=str
)
def shop(request: pytest.FixtureRequest, packages: Path) -> Shop:
    return Shop(packages, request.param)
