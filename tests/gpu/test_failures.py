"""What goes wrong on a GPU: damaged plans, and a CUDA error after which the device is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.executors import Shop, assert_same, random_inputs
from vernier.engine.base import run_once
from vernier.errors import EngineError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "other model"])
def test_a_damaged_plan_is_an_engine_error_and_the_next_one_loads(shop: Shop, damage: str) -> None:
    good = shop.plan("mlp", "fp32")
    plan = {
        "empty": b"",
        "garbage": b"garbage" * 1000,
        "truncated": good[: len(good) // 2],
        "other model": shop.plan("typed", "fp32"),
    }[damage]
    with pytest.raises(EngineError):
        shop.open("mlp", plan=plan)
    executor = shop.open("mlp")
    slot = executor.open_slot()
    inputs = random_inputs("mlp", 3, 0)
    assert_same(run_once(slot, inputs), shop.reference("mlp")(inputs))
    slot.close()
    executor.close()


LOST_DEVICE = """
import sys, threading
import numpy as np
from pathlib import Path
from vernier.engine.base import run_once
from vernier.engine.cuda import open_device
from vernier.errors import DeviceFailed
from tests.support.executors import Shop, random_inputs

shop = Shop(Path(sys.argv[1]), "tensorrt")
executor = shop.open("mlp", plan=Path(sys.argv[2]).read_bytes())
slots = [executor.open_slot() for _ in range(3)]
for slot in slots:
    for step in range(4):
        run_once(slot, random_inputs("mlp", 8, step))
device = open_device()
assert device.failed is None

from tests.gpu.losing import lose
lose(device)

outcomes = []
def use(slot):
    for _ in range(2):
        try:
            run_once(slot, random_inputs("mlp", 8, 0))
            outcomes.append("answered")
        except DeviceFailed as error:
            outcomes.append(error.message)
threads = [threading.Thread(target=use, args=(slot,)) for slot in slots]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(outcomes) == 6 and "answered" not in outcomes, outcomes
assert len(set(outcomes)) == 1, outcomes
assert "illegal memory access" in outcomes[0] and "until this process restarts" in outcomes[0], outcomes
assert device.failed == outcomes[0]
try:
    shop.open("mlp", plan=Path(sys.argv[2]).read_bytes())
    raise SystemExit("a lost device took a new engine")
except DeviceFailed:
    pass
for slot in slots:
    slot.close()
executor.close()
sys.stdout.write("lost once, told every time\\n")
sys.stdout.flush()
"""


def test_a_lost_device_fails_every_request_once_with_the_same_clear_sentence(
    shop: Shop, packages: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "mlp.plan"
    plan.write_bytes(shop.plan("mlp", "fp32"))
    done = subprocess.run(
        [sys.executable, "-c", LOST_DEVICE, str(packages), str(plan)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "app"), os.environ.get("PYTHONPATH", "")]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=300,
    )
    assert done.stdout.decode().endswith("lost once, told every time\n"), done.stderr.decode()[-3000:]
    assert done.returncode == 0, done.stderr.decode()[-3000:]
