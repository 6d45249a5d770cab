"""What is quantizable, and what stays in float, by TensorRT's rules."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from tests.unit.builder import architectures
from tests.unit.builder.architectures import node
from tests.unit.builder.models import make_model, weights
from vernier.builder.graphs.graph import GraphView
from vernier.builder.graphs.prepare import clean
from vernier.builder.graphs.simplify import infer_shapes
from vernier.builder.nodes.placement import QuantizableNode, float_notes, quantizable_nodes, weight_axis

F = TensorProto.FLOAT


def found(model: ModelProto) -> dict[str, QuantizableNode]:
    return {n.name: n for n in quantizable_nodes(model)}


def axis_of(model: ModelProto, name: str) -> int | None:
    view = GraphView(model)
    return weight_axis(view, view.by_name[name])


def test_convolutions_and_linear_layers_are_found_in_graph_order() -> None:
    names = [n.name for n in quantizable_nodes(architectures.residual_cnn())]
    assert names == ["Conv c0", "Conv c1", "Conv c2", "Add s1", "Conv p", "Conv c3", "Add s2", "Gemm y"]


def test_a_residual_sum_quantizes_its_shortcut_alone() -> None:
    nodes = found(architectures.residual_cnn())
    assert nodes["Add s1"].activations == ("r0",)
    assert nodes["Add s1"].weight is None
    # Of two convolutions the projection is the shortcut: the block's own runs last and is fused.
    assert nodes["Add s2"].activations == ("p",)


def test_operation_counts_are_per_row() -> None:
    nodes = found(architectures.residual_cnn())
    assert nodes["Conv c0"].macs == 8 * 8 * 8 * 3 * 9
    assert nodes["Conv c0"].weight_bytes == 4 * 8 * 3 * 9
    assert nodes["Gemm y"].macs == 5 * 8
    separable = found(architectures.separable_cnn())
    assert separable["Conv d"].macs == 4 * 8 * 8 * 9
    assert separable["ConvTranspose y"].macs == 6 * 8 * 8 * 3 * 4
    attention = found(architectures.transformer())
    assert attention["MatMul scores"].macs == 6 * 6 * 8


def test_attention_products_quantize_both_operands_and_norms_and_softmax_stay() -> None:
    nodes = found(architectures.transformer())
    assert nodes["MatMul scores"].activations == ("q", "kt")
    assert nodes["MatMul scores"].weight is None
    assert nodes["MatMul f"].weight == "wf"
    assert {n.op_type for n in nodes.values()} == {"MatMul"}


def test_embeddings_and_recurrent_layers_stay_in_float() -> None:
    assert set(found(architectures.recommender())) == {"Gemm d", "Gemm h", "MatMul z"}
    model = architectures.recurrent()
    assert set(found(model)) == {"Gemm y"}
    assert "LSTM hidden" in float_notes(model)[0]
    assert float_notes(architectures.recommender()) == ()


def test_weights_are_scaled_along_their_output_channels() -> None:
    assert axis_of(architectures.residual_cnn(), "Conv c0") == 0
    assert axis_of(architectures.residual_cnn(), "Gemm y") == 0  # transB
    assert axis_of(architectures.recommender(), "Gemm d") == 1
    assert axis_of(architectures.recommender(), "MatMul z") == 1
    assert axis_of(architectures.separable_cnn(), "ConvTranspose y") == 1
    assert axis_of(architectures.transformer(), "MatMul scores") is None


def single(
    op: str, constant: np.ndarray, x: list[int | str], left: bool = False, **attributes: object
) -> ModelProto:
    operands = ["w", "x"] if left else ["x", "w"]
    nodes = [node(op, operands, "y", **attributes)]
    return clean(make_model(nodes, {"x": (F, x)}, {"y": (F, None)}, {"w": constant}), {}, [])


@pytest.mark.parametrize(
    "model",
    [
        single("ConvTranspose", weights(4, 2, 2, 2), ["n", 4, 5, 5], group=2),
        single("MatMul", weights(3, 4), ["n", 4, 5], left=True),
        single("MatMul", weights(2, 4, 5), ["n", 2, 3, 4]),
    ],
)
def test_weights_without_one_channel_axis_get_one_scale(model: ModelProto) -> None:
    (name,) = found(model)
    assert axis_of(model, name) is None


def test_vectors_integers_and_quantized_models_are_left_alone() -> None:
    assert not found(single("MatMul", weights(4), ["n", 4]))
    quantized = make_model(
        [
            node("QuantizeLinear", ["x", "s", "z"], "q"),
            node("DequantizeLinear", ["q", "s", "z"], "d"),
            node("MatMul", ["d", "w"], "y"),
        ],
        {"x": (F, ["n", 4])},
        {"y": (F, ["n", 2])},
        {"s": np.array(0.1, np.float32), "z": np.array(0, np.int8), "w": weights(4, 2)},
    )
    assert not found(clean(quantized, {}, []))


def test_an_add_of_a_bias_or_of_a_value_with_two_readers_is_no_residual_sum() -> None:
    def added(second: str, extra: list[str]) -> ModelProto:
        nodes = [node("Conv", ["x", "w"], "c", pads=[1] * 4), node("Add", ["c", second], "s")]
        nodes += [node("Relu", ["c"], name) for name in extra]
        outputs = {name: (F, ["n", 4, 6, 6]) for name in ["s", *extra]}
        constants = {"w": weights(4, 4, 3, 3), "b": weights(4, 1, 1)}
        return clean(make_model(nodes, {"x": (F, ["n", 4, 6, 6])}, outputs, constants), {}, [])

    assert "Add s" in found(added("x", []))
    assert "Add s" not in found(added("b", []))
    assert "Add s" not in found(added("x", ["r"]))


def test_a_weight_is_found_behind_a_transpose() -> None:
    nodes = [
        node("Transpose", ["w"], "t", perm=[1, 0]),
        node("Identity", ["t"], "i"),
        node("MatMul", ["x", "i"], "y"),
    ]
    model = make_model(nodes, {"x": (F, ["n", 4])}, {"y": (F, ["n", 2])}, {"w": weights(2, 4)})
    infer_shapes(model)
    (described,) = quantizable_nodes(model)
    assert described.weight == "i"
    value = GraphView(model).constant("i")
    assert value is not None
    assert np.array_equal(value, weights(2, 4).T)


def test_a_reshaped_constant_keeps_its_values() -> None:
    steps = [
        helper.make_node("Reshape", ["w", "shape"], ["a"]),
        helper.make_node("Unsqueeze", ["a", "axes"], ["b"]),
        helper.make_node("Squeeze", ["b", "axes"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"], axis=2),
        helper.make_node("Add", ["x", "d"], ["y"]),
    ]
    constants = {"w": weights(4, 6), "shape": np.array([2, 0, -1]), "axes": np.array([1])}
    view = GraphView(make_model(steps, {"x": (F, [12, 2])}, {"y": (F, [12, 2])}, constants))
    value = view.constant("d")
    assert value is not None
    assert np.array_equal(value, weights(4, 6).reshape(12, 2))
    assert view.constant("y") is None
