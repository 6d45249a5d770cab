"""A lowered graph says in types and Q/DQ pairs exactly what the precision assignment said."""

from __future__ import annotations

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tests.support.quantized_graphs import full_recipe
from tests.unit.builder import architectures
from tests.unit.builder.architectures import ALL, data, kinds, node
from tests.unit.builder.models import check, make_model, weights
from vernier.builder.evaluate import run_model
from vernier.builder.graphs.graph import GraphView
from vernier.builder.graphs.opset import opset_of
from vernier.builder.graphs.prepare import clean
from vernier.builder.lowering.lower import Recipe, lower
from vernier.builder.lowering.quantized import fp16_scale, round_scale
from vernier.builder.nodes.placement import quantizable_nodes
from vernier.errors import BuildError

F, F16 = TensorProto.FLOAT, TensorProto.FLOAT16


def recipe_for(model: ModelProto, base: str = "fp32", count: int = 64) -> Recipe:
    return full_recipe(model, data(model, count).take(range(count)), base)


def constant(model: ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)


def named(model: ModelProto, name: str) -> NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def type_of(model: ModelProto, name: str) -> int:
    from vernier.builder.graphs.simplify import infer_shapes

    copy = ModelProto()
    copy.CopyFrom(model)
    infer_shapes(copy)
    return GraphView(copy).types[name]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("base", ["fp32", "fp16", "bf16"])
def test_every_architecture_lowers_to_a_valid_graph_with_its_own_interface(kind: str, base: str) -> None:
    model = ALL[kind]()
    lowered = lower(model, recipe_for(model, base))
    check(lowered)
    assert [(v.name, v.type) for v in lowered.graph.input] == [(v.name, v.type) for v in model.graph.input]
    assert [v.name for v in lowered.graph.output] == [v.name for v in model.graph.output]
    samples = data(model, 32, seed=5)
    exact, got = run_model(model, samples), run_model(lowered, samples)
    for name in exact:
        assert np.abs(got[name] - exact[name]).max() < 0.1 * np.abs(exact[name]).max()


@pytest.mark.parametrize("kind", ["residual cnn", "separable cnn", "transformer"])
def test_int8_weights_are_stored_as_int8_with_their_dequantization_alone(kind: str) -> None:
    model = ALL[kind]()
    lowered = lower(model, recipe_for(model, "fp16"))
    weighted = [n for n in quantizable_nodes(model) if n.weight]
    stored = {
        t.name for t in lowered.graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) > 1
    }
    assert len(stored) == len(weighted)
    quantized = [n for n in lowered.graph.node if n.op_type == "QuantizeLinear"]
    assert not any(n.input[0] in stored for n in quantized)
    for described in weighted:
        position = list(named(model, described.name).input).index(described.weight or "")
        maker = GraphView(lowered).maker(named(lowered, described.name).input[position])
        assert maker is not None
        assert maker.op_type == "DequantizeLinear"
        assert maker.input[0] in stored
        assert not constant(lowered, maker.input[2]).any()
    floats = [t for t in lowered.graph.initializer if t.name in {n.weight for n in weighted}]
    assert not floats, "the FP32 weight is still in the file"


def test_scales_have_the_type_around_them_and_are_positive() -> None:
    model = architectures.residual_cnn()
    for base, kind in (("fp32", F), ("fp16", F16)):
        lowered = lower(model, recipe_for(model, base))
        view = GraphView(lowered)
        for n in lowered.graph.node:
            if n.op_type == "DequantizeLinear":
                scale = view.constants[n.input[1]]
                assert scale.data_type == kind
                assert (numpy_helper.to_array(scale) > 0).all()


def test_one_activation_with_many_readers_is_quantized_once() -> None:
    model = architectures.transformer()
    lowered = lower(model, recipe_for(model))
    from_norm = [n for n in lowered.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "l1"]
    assert len(from_norm) == 1
    # Whoever is not quantized still reads the value itself: here the second residual sum.
    assert named(lowered, "Add h").input[1] == "e"


def test_an_fp16_graph_casts_at_its_ends_alone() -> None:
    for make in ALL.values():
        model = make()
        lowered = lower(model, Recipe("fp16"))
        floats_in = sum(v.type.tensor_type.elem_type == F for v in model.graph.input)
        assert kinds(lowered).get("Cast", 0) == floats_in + len(model.graph.output)


def test_readers_of_different_types_quantize_for_themselves() -> None:
    """TensorRT-RTX does not compile two products of one value's integers into different types."""
    model = architectures.transformer()
    recipe = replace(recipe_for(model, "fp16"), fp32=frozenset({"MatMul v"}))
    lowered = lower(model, recipe)
    check(lowered)
    view = GraphView(lowered)
    pairs = {}
    for name in ("MatMul q", "MatMul k", "MatMul v"):
        maker = view.maker(named(lowered, name).input[0])
        assert maker is not None
        pairs[name] = maker.input[0]
    assert pairs["MatMul q"] == pairs["MatMul k"] != pairs["MatMul v"]


def chain(*ops: str, constants: dict[str, np.ndarray] | None = None) -> ModelProto:
    """x [n, 4] → a chain of operators, each reading the value before it."""
    nodes, value = [], "x"
    for index, op in enumerate(ops):
        out = "y" if index == len(ops) - 1 else f"v{index}"
        inputs = [value, f"k{index}"] if f"k{index}" in (constants or {}) else [value]
        nodes.append(helper.make_node(op, inputs, [out], name=f"n{index}"))
        value = out
    model = make_model(nodes, {"x": (F, ["n", 4])}, {"y": (F, ["n", 4])}, constants)
    return clean(model, {}, [])


def test_neighbours_kept_in_fp32_have_no_cast_between_them() -> None:
    model = chain("Tanh", "Mul", "Add", "Tanh", constants={"k1": np.float32([3e5]), "k2": np.float32([-3e5])})
    lowered = lower(model, Recipe("fp16"))
    assert kinds(lowered)["Cast"] == 4  # in, up before the Mul, down after the Add, out
    assert named(lowered, "n2").input[0] == named(lowered, "n1").output[0]


def test_a_constant_that_fp16_cannot_hold_is_never_clamped() -> None:
    for value in (75_445.0, -1e30, 1e-8):
        model = chain("Tanh", "Mul", "Tanh", constants={"k1": np.array([value], np.float32)})
        lowered = lower(model, Recipe("fp16"))
        assert constant(lowered, "k1")[0] == np.float32(value)
        assert type_of(lowered, named(lowered, "n1").output[0]) == F
        assert type_of(lowered, named(lowered, "n2").output[0]) == F16
    infinite = lower(chain("Tanh", "Add", constants={"k1": np.float32([-np.inf])}), Recipe("fp16"))
    assert np.isneginf(constant(infinite, "k1.fp16"))


def test_a_scale_that_fp16_cannot_hold_keeps_its_node_in_fp32() -> None:
    model = architectures.recommender()
    recipe = recipe_for(model, "fp16")
    lowered = lower(model, replace(recipe, ranges={**recipe.ranges, "dense": 1e6}))
    assert all(np.isfinite(numpy_helper.to_array(t)).all() for t in lowered.graph.initializer)
    assert type_of(lowered, named(lowered, "Gemm d").output[0]) == F
    assert type_of(lowered, named(lowered, "Gemm h").output[0]) == F16


def test_movement_between_fp32_nodes_stays_fp32() -> None:
    nodes = [
        node("Tanh", ["x"], "a"),
        node("Transpose", ["a"], "b", perm=[1, 0]),
        node("Identity", ["b"], "c"),
        node("Tanh", ["c"], "y"),
    ]
    model = make_model(nodes, {"x": (F, [3, 4])}, {"y": (F, [4, 3])})
    model = clean(model, {}, [])
    lowered = lower(model, Recipe("fp16", fp32=frozenset({"Tanh a", "Tanh y"})))
    assert "Cast" not in kinds(lowered)
    lowered = lower(model, Recipe("fp16", fp32=frozenset({"Tanh a"})))
    assert kinds(lowered)["Cast"] == 2


def test_an_int8_node_may_give_its_result_in_fp32() -> None:
    model = architectures.residual_cnn()
    recipe = replace(recipe_for(model, "fp16"), fp32=frozenset({"Conv c1"}))
    lowered = lower(model, recipe)
    check(lowered)
    conv = named(lowered, "Conv c1")
    assert type_of(lowered, conv.output[0]) == F
    assert [type_of(lowered, name) for name in conv.input] == [F, F]
    assert type_of(lowered, named(lowered, "Conv c2").output[0]) == F16


def test_a_shortcut_is_quantized_only_beside_a_quantized_convolution() -> None:
    model = architectures.residual_cnn()
    recipe = recipe_for(model)
    both = named(lower(model, recipe), "Add s1")
    assert both.input[1] != "r0"
    without = replace(recipe, int8=recipe.int8 - {"Conv c2"})
    assert list(named(lower(model, without), "Add s1").input) == ["c2", "r0"]


@pytest.mark.parametrize("base", ["fp32", "fp16"])
def test_bias_corrections_reach_the_output(base: str) -> None:
    nodes = [
        node("Gemm", ["x", "w0", "b"], "a", alpha=0.5, beta=2.0),
        node("Gemm", ["a", "w1"], "g", transB=1, beta=0.0),
        node("MatMul", ["g", "w2"], "y"),
    ]
    constants = {"w0": weights(4, 4), "b": weights(1, seed=7), "w1": weights(4, 4), "w2": weights(4, 4)}
    model = clean(make_model(nodes, {"x": (F, ["n", 4])}, {"y": (F, ["n", 4])}, constants), {}, [])
    recipe = recipe_for(model, base)
    recipe = replace(
        recipe, ranges={name: 2 * scale for name, scale in recipe.ranges.items()}
    )  # room to move
    samples = data(model, 8)
    plain = run_model(lower(model, recipe), samples)["y"]
    shift = np.array([1, 2, 3, 4], np.float32) / 4
    for name in ("Gemm a", "Gemm g", "MatMul y"):
        weight = replace(recipe.weights[name], bias_correction=shift)
        corrected = lower(model, replace(recipe, weights={**recipe.weights, name: weight}))
        check(corrected)
        moved = run_model(corrected, samples)["y"] - plain
        after = {"Gemm a": ["w1", "w2"], "Gemm g": ["w2"], "MatMul y": []}[name]
        expected = shift
        for later in after:
            expected = expected @ (constants[later].T if later == "w1" else constants[later])
        assert np.allclose(moved, expected, atol=0.12)


def test_a_correction_of_a_convolution_without_bias_becomes_its_bias() -> None:
    model = architectures.separable_cnn()
    recipe = recipe_for(model)
    shift = np.array([0.5, -0.5, 0.25, 0], np.float32)
    weight = replace(recipe.weights["Conv d"], bias_correction=shift)
    lowered = lower(model, replace(recipe, weights={**recipe.weights, "Conv d": weight}))
    check(lowered)
    assert np.array_equal(constant(lowered, named(lowered, "Conv d").input[2]), shift)
    assert kinds(lowered).get("Add", 0) == 0


def test_two_nodes_share_one_stored_weight() -> None:
    nodes = [node("MatMul", ["x", "w"], "a"), node("MatMul", ["a", "w"], "y")]
    model = clean(make_model(nodes, {"x": (F, ["n", 4])}, {"y": (F, ["n", 4])}, {"w": weights(4, 4)}), {}, [])
    recipe = recipe_for(model)
    lowered = lower(model, recipe)
    assert sum(len(t.dims) == 2 for t in lowered.graph.initializer) == 1
    # With one of them back in float, both forms are there.
    lowered = lower(model, replace(recipe, int8=frozenset({"MatMul a"})))
    assert sorted(t.data_type for t in lowered.graph.initializer if len(t.dims) == 2) == [F, TensorProto.INT8]


def test_a_transposed_weight_is_stored_as_its_reader_sees_it() -> None:
    from vernier.builder.graphs.simplify import infer_shapes

    nodes = [node("Transpose", ["w"], "t", perm=[1, 0]), node("MatMul", ["x", "t"], "y")]
    model = make_model(nodes, {"x": (F, ["n", 4])}, {"y": (F, ["n", 6])}, {"w": weights(6, 4)})
    infer_shapes(model)
    recipe = recipe_for(model)
    assert recipe.weights["MatMul y"].values.shape == (4, 6)
    assert recipe.weights["MatMul y"].scales.shape == (6,)
    lowered = lower(model, recipe)
    assert "Transpose" not in kinds(lowered)
    samples = data(model, 16)
    assert np.allclose(run_model(lowered, samples)["y"], run_model(model, samples)["y"], atol=0.05)


def test_what_a_loop_body_reads_from_outside_keeps_name_and_type() -> None:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["going"]),
            helper.make_node("Add", ["state", "a"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", F, ["n", 4]),
        ],
        [
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", F, ["n", 4]),
        ],
    )
    nodes = [
        node("MatMul", ["x", "w"], "a"),
        helper.make_node("Loop", ["turns", "", "a"], ["l"], name="loop", body=body),
        node("MatMul", ["l", "w"], "y"),
    ]
    constants = {"w": weights(4, 4), "turns": np.array(3)}
    model = clean(make_model(nodes, {"x": (F, ["n", 4])}, {"y": (F, ["n", 4])}, constants), {}, [])
    names = frozenset(n.name for n in quantizable_nodes(model))
    assert names == {"MatMul a", "MatMul y"}
    samples = data(model, 8)
    exact = run_model(model, samples)["y"]
    for recipe in (Recipe("fp16"), replace(recipe_for(model, "fp16"), int8=frozenset({"MatMul a"}))):
        lowered = lower(model, recipe)
        check(lowered)
        assert np.allclose(run_model(lowered, samples)["y"], exact, atol=0.05)


def test_forms_have_the_opsets_that_their_readers_know() -> None:
    model = architectures.residual_cnn()
    assert (opset_of(model), opset_of(lower(model, recipe_for(model)))) == (17, 17)
    mixed = lower(model, recipe_for(model, "fp16"))
    assert (opset_of(mixed), mixed.ir_version) == (19, 9)
    assert opset_of(lower(model, Recipe("fp16"))) == 17
    brain = lower(model, Recipe("bf16"))
    assert (opset_of(brain), brain.ir_version) == (22, 10)
    old = lower(model, recipe_for(model, "fp16"), "trt8")
    assert (opset_of(old), old.ir_version) == (17, 8)


def test_the_form_for_old_tensorrt_is_fp32_with_whole_pairs_and_a_list_of_pinned_nodes() -> None:
    model = architectures.residual_cnn()
    recipe = replace(recipe_for(model, "fp16"), fp32=frozenset({"Conv c1", "Relu r1"}))
    old = lower(model, recipe, "trt8")
    check(old)
    assert all(t.data_type in (F, TensorProto.INT8, TensorProto.INT64) for t in old.graph.initializer)
    assert "Cast" not in kinds(old)
    metadata = {entry.key: entry.value for entry in old.metadata_props}
    assert set(json.loads(metadata["vernier.fp32_nodes"])) == {"Conv c1", "Relu r1"}
    assert metadata["vernier.base"] == "fp16"
    samples = data(model, 16)
    strong = run_model(lower(model, replace(recipe, base="fp32", fp32=frozenset())), samples)["y"]
    assert np.array_equal(run_model(old, samples)["y"], strong)


def test_nodes_that_fp16_cannot_hold_are_pinned_for_old_tensorrt_too() -> None:
    model = chain("Tanh", "Mul", "Tanh", constants={"k1": np.float32([1e6])})
    old = lower(model, Recipe("fp16"), "trt8")
    metadata = {entry.key: entry.value for entry in old.metadata_props}
    assert json.loads(metadata["vernier.fp32_nodes"]) == ["n1"]


def test_lowering_is_deterministic() -> None:
    model = architectures.transformer()
    recipe = recipe_for(model, "fp16")
    first, second = (lower(model, recipe).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base": "fp12"}, "'fp12' is no base type"),
        ({"int8": frozenset({"nobody"})}, "no node 'nobody'"),
        ({"int8": frozenset({"Relu r0"})}, "cannot run in INT8"),
        ({"ranges": {}}, "no calibrated range for 'r0'"),
        ({"weights": {}}, "no quantized weight"),
        ({"fp8": frozenset({"Conv c0"})}, "to INT8 and to FP8"),
    ],
)
def test_an_impossible_assignment_is_refused_in_words(change: dict[str, object], words: str) -> None:
    model = architectures.residual_cnn()
    with pytest.raises(BuildError, match=words):
        lower(model, replace(recipe_for(model), **change))  # type: ignore[arg-type]


def test_old_tensorrt_gets_neither_bf16_nor_fp8() -> None:
    model = architectures.residual_cnn()
    for recipe in (Recipe("bf16"), Recipe("fp16", fp8=frozenset({"Conv c0"}), ranges={"x": 0.1})):
        with pytest.raises(BuildError, match="TensorRT 10 or newer"):
            lower(model, recipe, "trt8")


def test_scales_are_exact_in_every_float_type_that_reaches_them() -> None:
    wanted = np.geomspace(1e-30, 1e4, 1997)
    scales = round_scale(wanted)
    assert scales.dtype == np.float32
    assert (scales >= wanted.astype(np.float32)).all()
    assert (scales <= wanted * 1.0079).all()
    assert np.array_equal(round_scale(scales, up=False), scales)
    assert np.array_equal(scales.astype(ml_dtypes.bfloat16).astype(np.float32), scales)
    normal = scales >= 2.0**-14
    assert np.array_equal(scales[normal].astype(np.float16).astype(np.float32), scales[normal])
    half = fp16_scale(scales)
    assert (half >= scales).all()
    assert (half > 0).all()
    assert np.array_equal(half.astype(np.float16).astype(np.float32), half)
    assert np.array_equal(half[normal], scales[normal])
    assert 1e-3 < round_scale(0.0) < 1


def test_channels_with_tiny_weights_keep_their_values_in_fp32_and_their_size_in_fp16() -> None:
    weight = weights(4, 3)
    weight[:, 1] *= 1e-6
    weight[:, 2] = 0
    nodes = [node("Gemm", ["x", "w"], "y")]
    model = clean(make_model(nodes, {"x": (F, ["n", 4])}, {"y": (F, ["n", 3])}, {"w": weight}), {}, [])
    recipe = recipe_for(model, "fp16")
    samples = data(model, 16)
    exact = run_model(model, samples)["y"]
    for fp32 in (frozenset(), frozenset({"Gemm y"})):
        lowered = lower(model, replace(recipe, fp32=fp32))
        for tensor in lowered.graph.initializer:
            if "scale" in tensor.name:
                assert (numpy_helper.to_array(tensor) > 0).all()
        got = run_model(lowered, samples)["y"]
        assert np.allclose(got[:, 0], exact[:, 0], atol=0.02)
        # In FP16 as good as an FP16 weight would be; in FP32 as good as any other channel.
        assert np.allclose(got[:, 1], exact[:, 1], atol=2e-8 if fp32 else 5e-7)
        assert not got[:, 2].any()


def test_an_activation_too_small_for_fp16_is_quantized_in_fp32() -> None:
    model = architectures.recommender()
    recipe = recipe_for(model, "fp16")
    lowered = lower(model, replace(recipe, ranges={**recipe.ranges, "dense": 1e-10}))
    assert type_of(lowered, named(lowered, "Gemm d").output[0]) == F


def test_weights_in_int8_take_less_than_thirty_percent_of_the_file() -> None:
    nodes = [node("Gemm", ["x", "v"], "h"), node("Relu", ["h"], "r"), node("Gemm", ["r", "w"], "y")]
    constants = {"v": weights(128, 512), "w": weights(512, 64)}
    model = clean(make_model(nodes, {"x": (F, ["n", 128])}, {"y": (F, ["n", 64])}, constants), {}, [])
    for base in ("fp32", "fp16"):
        lowered = lower(model, recipe_for(model, base))
        assert len(lowered.SerializeToString()) < 0.3 * len(model.SerializeToString())
