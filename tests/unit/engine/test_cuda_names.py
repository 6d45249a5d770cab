"""The names that the code takes of cuda-bindings exist in the installed version; PyCUDA's are run by tests/gpu."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vernier.engine.cuda import STICKY

driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")

SOURCE = (Path(__file__).resolve().parents[3] / "app" / "vernier" / "engine" / "cuda.py").read_text("utf-8")


def test_every_driver_call_exists() -> None:
    names = set(re.findall(r"driver\.(cu[A-Z]\w+|CU\w+)", SOURCE))
    assert {"cuGraphLaunch", "cuStreamBeginCapture", "CUstreamCaptureMode"} <= names
    assert [name for name in names if not hasattr(driver, name)] == []


def test_the_codes_after_which_a_context_is_lost_are_errors_that_the_driver_knows() -> None:
    known = {int(code): code.name for code in driver.CUresult}
    assert set(known) >= STICKY
    assert known[700] == "CUDA_ERROR_ILLEGAL_ADDRESS"
    assert known[719] == "CUDA_ERROR_LAUNCH_FAILED"
    assert 2 not in STICKY, "out of memory can be survived"


def test_capture_is_confined_to_its_thread() -> None:
    assert driver.CUstreamCaptureMode(1).name == "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"
    assert int(driver.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL) == 1
