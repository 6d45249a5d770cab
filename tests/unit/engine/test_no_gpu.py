"""On a machine without a GPU every door to it says so in a sentence. (On one with a GPU see tests/gpu.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vernier.engine.cuda import open_device
from vernier.engine.nvml import Nvml, _bus_key
from vernier.errors import EngineError

ROOT = Path(__file__).resolve().parents[3]


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


@pytest.mark.skipif(has_driver(), reason="there is a GPU here")
def test_opening_a_device_without_a_driver_is_an_engine_error() -> None:
    with pytest.raises(EngineError):
        open_device()


@pytest.mark.skipif(has_driver(), reason="there is a GPU here")
def test_gpu_metrics_without_a_driver_are_an_engine_error() -> None:
    with pytest.raises(EngineError, match=r"NVML is not usable here|need the package nvidia-ml-py"):
        Nvml()


def test_bus_addresses_are_compared_by_place_not_by_spelling() -> None:
    assert _bus_key("0000:3B:00.0") == _bus_key("00000000:3b:00.0")
    assert _bus_key("0000:3B:00.0") != _bus_key("0000:3C:00.0")


@pytest.mark.parametrize(
    "module",
    ["cuda", "curve", "layout", "nvml", "plans.plan_manager", "plans.plan_source", "validated", "trt_runtime.trt",
     "trt_runtime.trt_api", "trt_runtime.trt_outputs", "trt_runtime.trt_slot"],
)  # fmt: skip
def test_every_module_imports_without_cuda_or_tensorrt(module: str) -> None:
    """In a fresh process in which importing any of the packages fails."""
    blocked = ("pycuda", "cuda", "tensorrt", "tensorrt_rtx", "tensorrt_lean", "pynvml")
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import vernier.engine.{module}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
