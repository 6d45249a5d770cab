"""Memory that moves into huge pages, on the system at hand; one that has none skips."""

from __future__ import annotations

import mmap
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vernier.engine import huge_pages
from vernier.engine.base import run_once
from vernier.engine.huge_pages import use_huge_pages
from vernier.engine.ort import OnnxRuntimeExecutor

MIB = 2**20
SIZE = 16 * MIB
MAP_NORESERVE = 0x4000  # mmap(2); mmap does not name it
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
RELEASE = (
    tuple(int(part) for part in platform.release().split(".")[:2]) if sys.platform == "linux" else (0, 0)
)

pytestmark = pytest.mark.skipif(
    RELEASE < (6, 1) or not ENABLED.exists() or "[madvise]" not in ENABLED.read_text(),
    reason="this system does not give huge pages to those alone who ask",
)


@pytest.fixture
def memory() -> np.ndarray:
    """Private memory that no library has asked huge pages for, in a mapping that the system joins with no other."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, SIZE, flags=flags), np.uint8)


def at(array: np.ndarray, name: str) -> int:
    """KiB of what /proc/self/smaps tells about the mapping that holds the array."""
    address = array.__array_interface__["data"][0]
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(mapping[1], 16) <= address < int(mapping[2], 16)
        elif inside and line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise AssertionError("the array lies in no mapping")


def test_memory_in_use_lies_in_huge_pages_afterwards_and_is_what_it_was(memory: np.ndarray) -> None:
    memory[:] = np.arange(SIZE, dtype=np.uint32).view(np.uint8)[:SIZE]
    expected = memory.copy()
    assert use_huge_pages() > 0
    assert at(memory, "AnonHugePages") >= (SIZE - 4 * MIB) / 1024  # its ends need not fill one
    np.testing.assert_array_equal(memory, expected)


def test_memory_with_holes_is_left_alone(memory: np.ndarray) -> None:
    memory[:: MIB // 8] = 1
    before = at(memory, "Rss")
    use_huge_pages()
    assert at(memory, "AnonHugePages") == 0
    assert at(memory, "Rss") == before


def test_nothing_happens_where_the_administrator_turned_them_off(
    memory: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    monkeypatch.setattr(huge_pages, "_SYSTEM", tmp_path)
    memory[:] = 1
    assert use_huge_pages() == 0
    assert at(memory, "AnonHugePages") == 0


@pytest.mark.parametrize("missing", ["_SYSTEM", "_MAPS", "_PAGEMAP"])
def test_nothing_happens_where_the_system_does_not_tell(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, missing, tmp_path / "nowhere")
    assert use_huge_pages() == 0


LOAD = """
import sys
from pathlib import Path
from vernier.engine.ort import OnnxRuntimeExecutor
def huge():
    text = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("AnonHugePages"))
before = huge()
executor = OnnxRuntimeExecutor(Path(sys.argv[1]), precision="fp32", intra_op_threads=1)
print(huge() - before)
"""


def one_layer(path: Path, width: int) -> np.ndarray:
    weights = np.random.default_rng(1).standard_normal((width, width)).astype(np.float32)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name in "xy"]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", value[:1], value[1:], [numpy_helper.from_array(weights, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return weights


def test_the_weights_of_a_large_model_lie_in_huge_pages_and_those_of_a_small_one_do_not(
    tmp_path: Path,
) -> None:
    gained = {}
    for width in (256, 2048):
        path = tmp_path / f"{width}.onnx"
        one_layer(path, width)
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(path)],
            capture_output=True,
            text=True,
            check=True,
            cwd=os.getcwd(),
        )
        gained[width] = int(done.stdout)
    assert gained[256] == 0
    assert gained[2048] >= 0.8 * 2048 * 2048 * 4 / 1024


def test_answers_do_not_change(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    weights = one_layer(path, 2048)
    x = np.random.default_rng(2).standard_normal((3, 2048)).astype(np.float32)
    slot = OnnxRuntimeExecutor(path, precision="fp32", intra_op_threads=1).open_slot()
    np.testing.assert_allclose(run_once(slot, {"x": x})["y"], x @ weights, rtol=1e-3, atol=1e-3)
