"""Imports go downwards, and the engine side stays free of web packages; the contracts stand in pyproject.toml."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
APP = ROOT / "app" / "vernier"
ENGINE_SIDE = [
    *sorted((APP / "engine").rglob("*.py")),
    *sorted((APP / "package").rglob("*.py")),
    *sorted((APP / "accuracy").rglob("*.py")),
    *(APP / name for name in ("errors.py", "tensors.py", "budget.py", "metrics.py", "heap.py")),
    APP / "builder" / "plans" / "plan.py",
]
CUDA = {"tensorrt", "tensorrt_rtx", "tensorrt_lean", "pycuda", "cuda"}
MAY_NAME_CUDA = {
    "app/vernier/engine/trt_runtime/trt.py",
    "app/vernier/engine/cuda.py",
    "app/vernier/builder/plans/plan.py",
}


def test_the_contracts_of_the_layers_are_kept() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT / "app"), "PATH": ""}
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", ENGINE_SIDE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_engine_side_keeps_to_python_3_9(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 9))


def imported(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            roots.add(node.module.partition(".")[0])
    return roots


def test_cuda_libraries_are_named_at_their_boundary_alone() -> None:
    offenders = {
        str(path.relative_to(ROOT))
        for path in (APP).rglob("*.py")
        if imported(path) & CUDA and str(path.relative_to(ROOT)) not in MAY_NAME_CUDA
    }
    assert offenders == set()


def test_nothing_that_serves_reads_the_wall_clock() -> None:
    """Deadlines, windows and timeouts must survive a clock that jumps; tokens end by it, builds are dated, and a figure
    tells when the last execution was."""
    wall = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow")}
    offenders = {
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (APP).rglob("*.py")
        if "builder" not in path.relative_to(APP).parts
        and path not in (APP / "api/auth/security.py", APP / "exposition.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in wall
    }
    assert offenders == set()


def test_nothing_is_decided_or_said_by_the_url_of_a_request() -> None:
    """Starlette puts it together with the Host header, which the client is free to choose."""
    offenders = {
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "app").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in {"url", "base_url"}
        and "request" in ast.unparse(node.value).lower()
    }
    assert offenders == set()
