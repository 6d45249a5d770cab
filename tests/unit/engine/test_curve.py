from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from tests.support.packages import WIDTH, mlp_model
from vernier.engine.curve import measure_curve, repeat_rows
from vernier.engine.ort import OnnxRuntimeExecutor


def test_rows_are_repeated_in_order_and_cut() -> None:
    samples = {"x": np.arange(6).reshape(3, 2), "n": np.array([1, 2, 3])}
    more = repeat_rows(samples, 5)
    assert more["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert more["n"].tolist() == [1, 2, 3, 1, 2]
    assert repeat_rows(samples, 1)["x"].tolist() == [[0, 1]]


def test_a_curve_has_a_time_for_each_bucket_and_is_bounded_by_the_clock(tmp_path: Path) -> None:
    onnx.save(mlp_model(), tmp_path / "m.onnx")
    executor = OnnxRuntimeExecutor(tmp_path / "m.onnx", precision="fp32", intra_op_threads=1)
    slot = executor.open_slot()
    ticks = iter(range(10**9))
    samples = {"x": np.ones((2, WIDTH), np.float32)}
    curve = measure_curve(
        slot, samples, [1, 4, 16], seconds_per_bucket=100.0, least_runs=3, clock=lambda: float(next(ticks))
    )
    # Each tick is a second: a run takes one, measured between two looks at the clock.
    assert curve == {1: 1.0, 4: 1.0, 16: 1.0}
    assert next(ticks) < 400
    slot.close()


def test_a_model_without_a_batch_axis_is_measured_with_the_request_as_it_is(tmp_path: Path) -> None:
    onnx.save(mlp_model(), tmp_path / "m.onnx")
    slot = OnnxRuntimeExecutor(tmp_path / "m.onnx", precision="fp32", intra_op_threads=1).open_slot()
    curve = measure_curve(
        slot, {"x": np.ones((3, WIDTH), np.float32)}, [1], seconds_per_bucket=0.0, least_runs=2, batched=False
    )
    assert list(curve) == [1]
    assert 0 < curve[1] < 1
