"""INT8 products are exact on every CPU: no sum of two products saturates on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from vernier.builder.evaluate import Evaluator
from vernier.builder.samples.data import ArraySamples
from vernier.engine.base import run_once
from vernier.engine.ort import OnnxRuntimeExecutor, exact_int8

WIDTH, ROWS = 64, 8


def loud_product(path: Path) -> Path:
    """y = x · w with the largest integers that INT8 has on both sides."""
    weight = np.full((WIDTH, 16), 127, np.int8)
    weight[:, ::2] = -127
    one, zero = np.array(1 / 128, np.float32), np.array(0, np.int8)
    constants = {"w": weight, "one": one, "zero": zero}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "one", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "one", "zero"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "loud",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 16])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    return path


def test_the_largest_numbers_come_out_as_they_should(tmp_path: Path) -> None:
    path = loud_product(tmp_path / "loud.onnx")
    x = np.full((ROWS, WIDTH), 127 / 128, np.float32)
    expected = np.full((ROWS, 16), WIDTH * (127 / 128) ** 2, np.float32)
    expected[:, ::2] *= -1
    samples = ArraySamples({"x": x})
    judged = Evaluator(path, as_on_gpu=False, optimize=True).run(samples)["y"]
    np.testing.assert_allclose(judged, expected, rtol=1e-5)
    executor = OnnxRuntimeExecutor(path, precision="int8", intra_op_threads=1)
    slot = executor.open_slot()
    np.testing.assert_allclose(run_once(slot, {"x": x})["y"], expected, rtol=1e-5)
    slot.close()
    executor.close()


def test_only_a_cpu_that_saturates_pays_for_it() -> None:
    key = "session.qdqisint8allowed"
    for flags, kept in ((frozenset({"avx2"}), True), (frozenset({"avx2", "avx512_vnni"}), False)):
        options = onnxruntime.SessionOptions()
        exact_int8(options, flags)
        try:
            assert (options.get_session_config_entry(key) == "1") is kept
        except RuntimeError:  # what was never set cannot be read
            assert not kept
