"""Everything here needs TensorRT and an NVIDIA GPU; without them `make gpu-test` fails instead of skipping."""

from __future__ import annotations

from pathlib import Path
from typing import List

import pytest

from tests.support.executors import Shop, make_packages
from vernier.engine.cuda import Device, open_device

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    for item in items:
        if HERE in Path(str(item.fspath)).parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="session")
def shop(packages: Path) -> Shop:
    return Shop(packages, "tensorrt")


@pytest.fixture(scope="session")
def device() -> Device:
    return open_device()
