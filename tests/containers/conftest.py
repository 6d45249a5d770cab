from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.containers import clone, run

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.containers)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project without environments, packages and secrets."""
    return clone(tmp_path_factory.mktemp("clone"))


def build_image(checkout: Path, target: str) -> str:
    """Builds an image for CPUs and returns its name, which is the one that compose gives it."""
    tag = "vernier:dev-cpu" if target == "service" else "vernier:dev-builder-cpu"
    run(
        "docker",
        "build",
        "--quiet",
        "--target",
        target,
        "--build-arg",
        "VERSION=dev",
        "--tag",
        tag,
        ".",
        cwd=checkout,
    )
    return tag


@pytest.fixture(scope="session")
def image(checkout: Path) -> str:
    return build_image(checkout, "service")


@pytest.fixture(scope="session")
def builder(checkout: Path) -> str:
    return build_image(checkout, "builder")
