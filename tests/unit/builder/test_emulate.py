"""An emulated graph rounds and overflows on a CPU as the narrow graph does on a GPU."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vernier.builder.evaluate import Evaluator, run_model
from vernier.builder.lowering.emulate import emulate
from vernier.builder.samples.data import ArraySamples
from vernier.errors import BuildError

HALF, BRAIN, FLOAT = TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT
X = np.array([[100.0, 1.0, -3.3, 0.125]], np.float32)


def model(
    nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], out: int = FLOAT, taken: int = FLOAT
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", taken, ["batch", 4])],
        [helper.make_tensor_value_info("y", out, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def run(made: onnx.ModelProto, x: np.ndarray = X, as_on_gpu: bool = True) -> np.ndarray:
    return run_model(made, ArraySamples({"x": x}), as_on_gpu=as_on_gpu)["y"]


def in_half(kind: int = HALF) -> onnx.ModelProto:
    """x → half → · 10,000 → · 0.0001 → float: overflows FP16 in the middle for |x| > 6.55."""
    dtype = np.float16 if kind == HALF else ml_dtypes.bfloat16
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=kind),
        helper.make_node("Mul", ["h", "large"], ["big"]),
        helper.make_node("Mul", ["big", "small"], ["small_again"]),
        helper.make_node("Cast", ["small_again"], ["y"], to=FLOAT),
    ]
    return model(nodes, {"large": np.array([1e4], dtype), "small": np.array([1e-4], dtype)})


def test_overflow_between_two_half_nodes_shows_only_when_emulated() -> None:
    assert np.isfinite(run(in_half(), as_on_gpu=False)).all()
    shown = run(in_half())
    assert np.isinf(shown[0, 0])
    assert np.isfinite(shown[0, 1:]).all()


@pytest.mark.parametrize(("kind", "dtype"), [(HALF, np.float16), (BRAIN, ml_dtypes.bfloat16)])
def test_every_node_rounds_to_its_type(kind: int, dtype: type) -> None:
    with np.errstate(over="ignore"):
        big = (X.astype(dtype).astype(np.float32) * dtype(1e4).astype(np.float32)).astype(dtype)
        expected = (big.astype(np.float32) * dtype(1e-4).astype(np.float32)).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(run(in_half(kind)), expected)


def test_inputs_and_outputs_keep_their_types() -> None:
    nodes = [helper.make_node("Mul", ["x", "c"], ["y"]), helper.make_node("Mul", ["y", "c"], ["z"])]
    made = model(nodes, {"c": np.array([3], np.float16)}, HALF, HALF)
    made.graph.output.append(helper.make_tensor_value_info("z", HALF, None))
    x = X.astype(np.float16)
    found = run_model(made, ArraySamples({"x": x}))
    assert found["y"].dtype == found["z"].dtype == np.float16
    np.testing.assert_array_equal(found["y"], x * np.float16(3))
    np.testing.assert_array_equal(found["z"], x * np.float16(3) * np.float16(3))


@pytest.mark.parametrize("scale_type", [np.float32, np.float16])
def test_int8_weights_become_exactly_what_their_dequantization_gives(scale_type: type) -> None:
    kind = FLOAT if scale_type == np.float32 else HALF
    random = np.random.default_rng(0)
    values = random.integers(-127, 128, (4, 3)).astype(np.int8)
    scales = random.uniform(0.001, 0.1, 3).astype(scale_type)
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=kind),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["weight"], axis=1),
        helper.make_node("MatMul", ["h", "weight"], ["m"]),
        helper.make_node("Cast", ["m"], ["y"], to=FLOAT),
    ]
    made = model(nodes, {"w": values, "s": scales, "z": np.zeros(3, np.int8)})
    assert "DequantizeLinear" not in [node.op_type for node in emulate(made).graph.node]
    weight = (values.astype(np.float32) * scales.astype(np.float32)).astype(scale_type).astype(np.float32)
    expected = (X.astype(scale_type).astype(np.float32) @ weight).astype(scale_type).astype(np.float32)
    np.testing.assert_allclose(run(made), expected, rtol=1e-6 if kind == FLOAT else 1e-3)


def test_activation_quantization_stays_in_the_graph() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=HALF),
        helper.make_node("QuantizeLinear", ["h", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Cast", ["d"], ["y"], to=FLOAT),
    ]
    made = model(nodes, {"s": np.array(0.5, np.float16), "z": np.array(0, np.int8)})
    np.testing.assert_array_equal(run(made), [[63.5 if v > 63.5 else np.round(v / 0.5) * 0.5 for v in X[0]]])


def test_branches_inside_a_graph_are_emulated_too() -> None:
    def branch(name: str, factor: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("Mul", ["h", "large"], [f"{name}_b"]),
            helper.make_node("Mul", [f"{name}_b", factor], [f"{name}_o"]),
        ]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}_o", HALF, None)])

    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=HALF),
        helper.make_node(
            "If", ["yes"], ["i"], then_branch=branch("a", "small"), else_branch=branch("b", "large")
        ),
        helper.make_node("Cast", ["i"], ["y"], to=FLOAT),
    ]
    constants = {
        "yes": np.array(True), "large": np.array([1e4], np.float16), "small": np.array([1e-4], np.float16)
    }  # fmt: skip
    assert np.isinf(run(model(nodes, constants))[0, 0])


def test_a_graph_in_fp32_is_left_as_it_is() -> None:
    made = model([helper.make_node("Mul", ["x", "c"], ["y"])], {"c": np.array([3], np.float32)})
    assert emulate(made) == made


def test_samples_run_in_batches_and_come_back_in_order() -> None:
    made = model([helper.make_node("Mul", ["x", "c"], ["y"])], {"c": np.array([3], np.float32)})
    x = np.random.default_rng(0).normal(size=(101, 4)).astype(np.float32)
    for rows in (1, 7, 101, 1000):
        np.testing.assert_array_equal(
            Evaluator(made).run(ArraySamples({"x": x}), rows)["y"], x * np.float32(3)
        )
    done: list[int] = []
    Evaluator(made).run(ArraySamples({"x": x}), 50, done.append)
    assert done == [50, 50, 1]


def test_a_fixed_batch_is_filled_up_and_only_real_samples_are_returned() -> None:
    made = model([helper.make_node("Mul", ["x", "c"], ["y"])], {"c": np.array([3], np.float32)})
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    x = np.random.default_rng(0).normal(size=(19, 4)).astype(np.float32)
    np.testing.assert_array_equal(run(made, x), x * np.float32(3))


def test_what_cannot_be_evaluated_is_refused_with_a_sentence() -> None:
    made = model([helper.make_node("NonZero", ["x"], ["y"])], {}, TensorProto.INT64)
    with pytest.raises(BuildError, match=r"rows for|changes its shape"):
        run(made, np.tri(4, dtype=np.float32))
    with pytest.raises(BuildError, match="no samples"):
        run(made, np.zeros((0, 4), np.float32))
    unknown = model([helper.make_node("Mul", ["x", "x"], ["y"])], {})
    unknown.graph.node[0].op_type = "Frobnicate"
    with pytest.raises(BuildError, match="cannot load the graph"):
        Evaluator(unknown, as_on_gpu=False)
