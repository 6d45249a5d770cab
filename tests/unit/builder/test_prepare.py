"""Real-world files become one known form and keep their answers; what cannot be served is refused in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.support.transformer import PAD, masked_transformer
from tests.unit.builder.models import check, make_model, mlp, old_cnn, run, save, weights
from vernier.builder.graphs.prepare import PreparedModel, prepare
from vernier.builder.graphs.shapes import parse_shape
from vernier.errors import BuildError

F, I64 = TensorProto.FLOAT, TensorProto.INT64
node = helper.make_node


def prepared(model: onnx.ModelProto, tmp_path: Path, *shapes: str, **wishes: object) -> PreparedModel:
    return prepare(save(model, tmp_path / "m.onnx"), dict(parse_shape(s) for s in shapes), tmp_path, **wishes)


def ops(found: PreparedModel) -> list[str]:
    return [n.op_type for n in found.model.graph.node]


def test_an_old_model_is_modernised_and_its_fixed_batch_freed(tmp_path: Path) -> None:
    found = prepared(old_cnn(), tmp_path)
    check(found.model)
    assert ops(found) == [
        "Conv", "Relu", "Resize", "Clip", "Pad", "Slice", "GlobalAveragePool", "Reshape", "Gemm", "Softmax"
    ]  # fmt: skip
    assert [i.name for i in found.model.graph.input] == ["x"]
    assert {o.domain: o.version for o in found.model.opset_import} == {"": 17}
    assert 8 <= found.model.ir_version <= 10
    assert found.batching.kind == "dynamic"
    assert found.inputs[0].shape == ("batch", 3, 16, 16)
    assert found.outputs[0].shape == ("batch", 5)
    names = [n.name for n in found.model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    x = weights(4, 3, 16, 16, seed=9)
    expected = np.concatenate([run(old_cnn(), {"x": row[None]})[0] for row in x])
    np.testing.assert_allclose(run(found.model, {"x": x})[0], expected, atol=1e-6)


def fixed_shape_inside(batch: int) -> onnx.ModelProto:
    """A batch that is written into the graph twice, where no rewriting finds it."""
    return make_model(
        [node("Add", ["x", "c"], ["a"]), node("Expand", ["a", "shape"], ["y"])],
        {"x": (F, [batch, 4])},
        {"y": (F, [batch, 4])},
        {"c": weights(1, 4), "shape": np.array([batch, 4], np.int64)},
    )


def test_a_fixed_batch_that_cannot_be_freed_stays_fixed(tmp_path: Path) -> None:
    found = prepared(fixed_shape_inside(2), tmp_path)
    assert (found.batching.kind, found.batching.size) == ("fixed", 2)
    assert found.inputs[0].shape == (2, 4)
    with pytest.raises(BuildError, match="batch is fixed to 2"):
        prepared(fixed_shape_inside(2), tmp_path, "x=1x4:8x4")


def test_a_fixed_batch_whose_rows_depend_on_their_place_is_one_request(tmp_path: Path) -> None:
    model = make_model(
        [node("Add", ["x", "c"], ["y"])], {"x": (F, [2, 4])}, {"y": (F, [2, 4])}, {"c": weights(2, 4)}
    )
    assert prepared(model, tmp_path).batching.kind == "none"
    example = {"x": weights(20, 4, seed=4)}
    assert prepared(model, tmp_path, example=example).batching.kind == "none"
    assert prepared(fixed_shape_inside(2), tmp_path, example=example).batching.kind == "fixed"


def test_rows_that_depend_on_each_other_never_share_a_batch(tmp_path: Path) -> None:
    model = make_model(
        [node("ReduceMax", ["x"], ["m"], axes=[0]), node("Sub", ["x", "m"], ["y"])],
        {"x": (F, ["batch", 4])},
        {"y": (F, ["batch", 4])},
    )
    found = prepared(model, tmp_path)
    assert found.batching.kind == "none"
    assert any("depends on the other rows" in note for note in found.notes)
    fixed = prepared(
        make_model(
            [node("ReduceMax", ["x"], ["m"], axes=[0]), node("Sub", ["x", "m"], ["y"])],
            {"x": (F, [4, 4])},
            {"y": (F, [4, 4])},
        ),
        tmp_path,
    )
    assert fixed.batching.kind == "none"


def test_an_output_without_a_batch_axis_means_no_batching(tmp_path: Path) -> None:
    model = make_model(
        [node("Relu", ["x"], ["y"]), node("ReduceMean", ["x"], ["loss"], keepdims=0)],
        {"x": (F, ["n", 4])},
        {"y": (F, ["n", 4]), "loss": (F, [])},
    )
    found = prepared(model, tmp_path)
    assert found.batching.kind == "none"
    assert found.dims["n"].max >= 1
    assert found.outputs[1].shape == ()


def test_nameless_and_machine_named_dimensions_get_names(tmp_path: Path) -> None:
    model = make_model(
        [node("MatMul", ["a", "b"], ["y"])],
        {"a": (F, ["unk__3", None, 4]), "b": (F, ["unk__4", 4, "s77"])},
        {"y": (F, ["unk__5", None, "s77"])},
    )
    found = prepared(model, tmp_path)
    assert found.inputs[0].shape == ("batch", "a_dim1", 4)
    assert found.inputs[1].shape == ("batch", 4, "b_dim2")
    assert found.outputs[0].shape == ("batch", "a_dim1", "b_dim2")
    assert set(found.dims) == {"batch", "a_dim1", "b_dim2"}


def test_two_named_first_dimensions_are_not_one_batch(tmp_path: Path) -> None:
    model = make_model(
        [node("MatMul", ["a", "t"], ["y"]), node("Transpose", ["b"], ["t"], perm=[1, 0])],
        {"a": (F, ["queries", 4]), "b": (F, ["items", 4])},
        {"y": (F, ["queries", "items"])},
    )
    model.graph.node.reverse()
    found = prepared(model, tmp_path)
    assert found.batching.kind == "none"
    assert found.outputs[0].shape == ("queries", "items")


def test_shapes_set_ranges_and_contradictions_are_named(tmp_path: Path) -> None:
    found = prepared(mlp(), tmp_path, "x=1x8:64x8:500x8")
    assert found.dims["batch"].model_dump() == {"min": 1, "opt": 64, "max": 500}
    assert found.batching.buckets == [1, 2, 4, 8, 16, 32, 64, 128, 256, 500]
    assert prepared(mlp(), tmp_path, max_batch=48).dims["batch"].max == 48
    for shape, message in [
        ("z=1x8", "the model's inputs are x"),
        ("x=1x8x1", "has 3 dimensions"),
        ("x=1x9", "takes 8 only"),
    ]:
        with pytest.raises(BuildError, match=message):
            prepared(mlp(), tmp_path, shape)
    with pytest.raises(BuildError, match="disagree"):
        prepared(mlp(), tmp_path, "x=1x8:64x8", max_batch=32)


@pytest.mark.parametrize("text", ["x", "x=", "x=1xa", "x=0x3", "=1x2", "x=4x2:1x2", "x=1:2:3:4", "x=1x2:3"])
def test_a_malformed_shape_is_explained(text: str) -> None:
    with pytest.raises(BuildError, match="--shape"):
        parse_shape(text)


def test_a_shape_is_split_at_the_last_equals_sign() -> None:
    name, given = parse_shape("a=b:0=1x2:8x2")
    assert name == "a=b:0"
    assert (given.min, given.opt, given.max) == ((1, 2), (8, 2), (8, 2))


def test_several_inputs_of_every_number_type_and_odd_names(tmp_path: Path) -> None:
    names = ["a/b:0", "../up", "naïve \"q'", "mask", "x y"]
    model = make_model(
        [
            node("Cast", [names[1]], ["i"], to=F),
            node("Cast", [names[2]], ["j"], to=F),
            node("Cast", ["mask"], ["m"], to=F),
            node("Mul", [names[0], "m"], ["p"], name="odd / name"),
            node("Add", ["i", "j"], ["q"], name="odd / name"),
            node("Add", ["p", "q"], ["r"]),
            node("Cast", [names[4]], ["h"], to=F),
            node("Add", ["r", "h"], ["out:0/é"]),
            node("Greater", ["out:0/é", "p"], ["flag"]),
        ],
        {
            names[0]: (F, ["b", 3]),
            names[1]: (I64, ["b", 3]),
            names[2]: (TensorProto.INT32, ["b", 3]),
            "mask": (TensorProto.BOOL, ["b", 3]),
            names[4]: (TensorProto.FLOAT16, ["b", 3]),
        },
        {"out:0/é": (F, ["b", 3]), "flag": (TensorProto.BOOL, ["b", 3])},
    )
    found = prepared(model, tmp_path)
    assert [(i.name, i.dtype) for i in found.inputs] == list(
        zip(names, ["float32", "int64", "int32", "bool", "float16"], strict=True)
    )
    assert [(o.name, o.dtype) for o in found.outputs] == [("out:0/é", "float32"), ("flag", "bool")]
    assert found.batching.kind == "dynamic"
    assert len({n.name for n in found.model.graph.node}) == len(found.model.graph.node)


def test_a_scalar_input_is_accepted_and_runs_alone(tmp_path: Path) -> None:
    model = make_model(
        [node("Mul", ["x", "gain"], ["y"])],
        {"x": (F, ["batch", 3]), "gain": (F, [])},
        {"y": (F, ["batch", 3])},
    )
    found = prepared(model, tmp_path)
    assert found.batching.kind == "none"
    assert found.inputs[1].shape == ()


def masked_mean(with_lengths: bool) -> onnx.ModelProto:
    """Mean of x [batch, frames, 4] over its valid frames, or over all of them."""
    if not with_lengths:
        return make_model(
            [node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=0)],
            {"x": (F, ["batch", "frames", 4])},
            {"y": (F, ["batch", 4])},
        )
    nodes = [
        node("Shape", ["x"], ["s"], start=1, end=2),
        node("Squeeze", ["s", "zero1"], ["n"]),
        node("Range", ["zero", "n", "one"], ["positions"]),
        node("Unsqueeze", ["lengths", "one1"], ["l"]),
        node("Less", ["positions", "l"], ["valid"]),
        node("Cast", ["valid"], ["v"], to=F),
        node("Unsqueeze", ["v", "two1"], ["v3"]),
        node("Mul", ["x", "v3"], ["xm"]),
        node("ReduceSum", ["xm", "one1"], ["total"], keepdims=0),
        node("Cast", ["l"], ["lf"], to=F),
        node("Div", ["total", "lf"], ["y"]),
    ]
    constants = {
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "zero1": np.array([0], np.int64),
        "one1": np.array([1], np.int64),
        "two1": np.array([2], np.int64),
    }
    return make_model(
        nodes,
        {"x": (F, ["batch", "frames", 4]), "lengths": (I64, ["batch"])},
        {"y": (F, ["batch", 4])},
        constants,
    )


def test_padding_is_allowed_only_where_it_proves_harmless(tmp_path: Path) -> None:
    found = prepared(masked_mean(True), tmp_path, "x=1x1x4:8x100x4:32x200x4")
    assert [s.dim for s in found.sequence] == ["frames"]
    assert found.sequence[0].lengths_input == "lengths"
    assert found.sequence[0].buckets == [16, 32, 64, 128, 200]
    assert not prepared(masked_mean(False), tmp_path).sequence
    assert not prepared(masked_mean(True), tmp_path, sequence={}).sequence
    chosen = prepared(masked_mean(True), tmp_path, sequence={"frames": [50, 100]})
    assert chosen.sequence[0].buckets == [50, 100]
    with pytest.raises(BuildError, match="padding with zeros changes the answers"):
        prepared(masked_mean(False), tmp_path, sequence={"frames": []})
    with pytest.raises(BuildError, match="the model has frames"):
        prepared(masked_mean(True), tmp_path, sequence={"time": []})


def test_what_a_model_takes_for_padding_is_tried_too(tmp_path: Path) -> None:
    model, shape = masked_transformer(mask_input=False), "ids=1x1:8x24:16x64"
    assert not prepared(model, tmp_path, shape).sequence
    (rule,) = prepared(model, tmp_path, shape, pad_values={"ids": PAD}).sequence
    assert (rule.pad_values, rule.mask_input) == ({"ids": PAD}, None)
    (rule,) = prepared(masked_transformer(), tmp_path).sequence
    assert (rule.pad_values, rule.mask_input) == ({}, "attention_mask")
    with pytest.raises(BuildError, match=r"padding with zeros \(ids with 7\) changes the answers"):
        prepared(model, tmp_path, shape, pad_values={"ids": 7}, sequence={"tokens": []})
    with pytest.raises(BuildError, match="the inputs of dynamic length are ids"):
        prepared(model, tmp_path, shape, pad_values={"words": 1})
    with pytest.raises(BuildError, match="is no int64"):
        prepared(model, tmp_path, shape, pad_values={"ids": 0.5})


def test_real_rows_teach_the_usual_sizes(tmp_path: Path) -> None:
    example = {"x": weights(6, 70, 4), "lengths": np.array([70, 3, 9, 70, 20, 1])}
    found = prepared(masked_mean(True), tmp_path, example=example)
    assert found.dims["frames"].model_dump() == {"min": 1, "opt": 70, "max": 140}


def test_constant_branches_are_folded_and_unused_parts_dropped(tmp_path: Path) -> None:
    model = make_model(
        [
            node("Constant", [], ["k"], value=numpy_helper.from_array(weights(4, 8))),
            node("Transpose", ["k"], ["w"], perm=[1, 0]),
            node("Identity", ["x"], ["same"]),
            node("MatMul", ["same", "w"], ["z"]),
            node("Dropout", ["z"], ["d"]),
            node("Identity", ["d"], ["y"]),
            node("Relu", ["x"], ["nobody"]),
        ],
        {"x": (F, ["batch", 8])},
        {"y": (F, ["batch", 4])},
        {"unused": weights(100)},
    )
    found = prepared(model, tmp_path)
    assert ops(found) == ["MatMul"]
    assert [t.name for t in found.model.graph.initializer] == ["w"]
    x = weights(3, 8, seed=5)
    np.testing.assert_allclose(run(found.model, {"x": x})[0], x @ weights(4, 8).T, atol=1e-6)


@pytest.mark.parametrize("kind", ["ConvTranspose", "Gemm", "GemmT", "MatMul"])
def test_batch_norms_fold_into_every_weighted_operator(tmp_path: Path, kind: str) -> None:
    norm = node("BatchNormalization", ["z", "g", "b", "m", "v"], ["y"])
    constants = {
        "g": weights(6) + 1,
        "b": weights(6, seed=1),
        "m": weights(6, seed=2),
        "v": np.abs(weights(6)) + 1,
    }
    shape: list[int | str] = ["batch", 4]
    if kind == "ConvTranspose":
        nodes = [node("ConvTranspose", ["x", "w"], ["z"], group=2, strides=[2])]
        constants["w"], shape = weights(4, 3, 3, seed=7), ["batch", 4, 5]
    elif kind.startswith("Gemm"):
        transposed = kind == "GemmT"
        nodes = [node("Gemm", ["x", "w", "c"], ["z"], transB=int(transposed))]
        constants |= {
            "w": weights(6, 4, seed=7) if transposed else weights(4, 6, seed=7),
            "c": weights(6, seed=8),
        }
    else:
        nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["c", "p"], ["z"])]
        constants |= {"w": weights(4, 6, seed=7), "c": weights(6, seed=8)}
    model = make_model([*nodes, norm], {"x": (F, shape)}, {"y": (F, None)}, constants)
    found = prepared(model, tmp_path)
    assert "BatchNormalization" not in ops(found)
    x = weights(2, *[int(s) for s in shape[1:]], seed=9)
    np.testing.assert_allclose(run(found.model, {"x": x})[0], run(model, {"x": x})[0], atol=1e-5)


def test_a_weight_used_twice_keeps_its_value_for_the_other_user(tmp_path: Path) -> None:
    constants = {
        "w": weights(4, 4),
        "g": weights(4) + 2,
        "b": weights(4),
        "m": weights(4),
        "v": np.abs(weights(4)) + 1,
    }
    model = make_model(
        [
            node("Gemm", ["x", "w"], ["z"]),
            node("BatchNormalization", ["z", "g", "b", "m", "v"], ["n"]),
            node("Gemm", ["n", "w"], ["y"]),
        ],
        {"x": (F, ["batch", 4])},
        {"y": (F, ["batch", 4])},
        constants,
    )
    found = prepared(model, tmp_path)
    x = weights(3, 4, seed=3)
    np.testing.assert_allclose(run(found.model, {"x": x})[0], run(model, {"x": x})[0], atol=1e-6)


def half_model(kind: int) -> onnx.ModelProto:
    """FP16 or BF16 weights, inputs and outputs, a branch and a Cast of the type."""
    narrow = onnx.helper.tensor_dtype_to_np_dtype(kind)
    value = helper.make_tensor_value_info
    branches = [
        helper.make_graph([node(op, ["m"], [f"{op}_out"])], op, [], [value(f"{op}_out", kind, None)])
        for op in ("Relu", "Neg")
    ]
    return make_model(
        [
            node("MatMul", ["x", "w"], ["m"]),
            node("If", ["flag"], ["i"], then_branch=branches[0], else_branch=branches[1]),
            node("Cast", ["n"], ["nf"], to=kind),
            node("Add", ["i", "nf"], ["y"]),
        ],
        {"x": (kind, ["batch", 8]), "n": (I64, ["batch", 4]), "flag": (TensorProto.BOOL, [])},
        {"y": (kind, ["batch", 4])},
        {"w": weights(8, 4).astype(narrow)},
        opset=16,
    )


def test_an_fp16_model_is_widened_and_keeps_its_interface(tmp_path: Path) -> None:
    found = prepared(half_model(TensorProto.FLOAT16), tmp_path)
    check(found.model)
    assert [s.dtype for s in (*found.inputs, *found.outputs)] == ["float16", "int64", "bool", "float16"]
    assert {t.data_type for t in found.model.graph.initializer} == {F}
    assert any("narrower than FP32" in note for note in found.notes)
    feeds = {"x": weights(3, 8, seed=1).astype(np.float16), "n": np.ones((3, 4), np.int64)}
    for flag in (True, False):
        got, expected = (
            run(m, feeds | {"flag": np.array(flag)})[0]
            for m in (found.model, half_model(TensorProto.FLOAT16))
        )
        np.testing.assert_allclose(got.astype(float), expected.astype(float), atol=4e-3)


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    function = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    model = make_model(
        [node("Twice", ["x"], ["y"], domain="mine")],
        {"x": (F, ["batch", 2])},
        {"y": (F, ["batch", 2])},
        domains={"mine": 1},
    )
    model.functions.append(function)
    found = prepared(model, tmp_path)
    assert ops(found) == ["Add"]
    assert [o.domain for o in found.model.opset_import] == [""]


def test_external_data_is_read_and_missing_or_short_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    onnx.save(mlp(width=64), path, save_as_external_data=True, location="big weights.bin", size_threshold=0)
    found = prepare(path, {}, tmp_path)
    x = weights(3, 8, seed=3)
    np.testing.assert_allclose(run(found.model, {"x": x})[0], run(mlp(width=64), {"x": x})[0], atol=1e-6)
    data = tmp_path / "big weights.bin"
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    with pytest.raises(BuildError, match=r"big weights.bin is truncated"):
        prepare(path, {}, tmp_path)
    changed = bytearray(whole)
    changed[0] ^= 1
    data.write_bytes(bytes(changed))
    assert prepare(path, {}, tmp_path).source_sha256 != found.source_sha256
    data.unlink()
    with pytest.raises(BuildError, match=r"big weights.bin, which is missing"):
        prepare(path, {}, tmp_path)


def string_model() -> onnx.ModelProto:
    return make_model(
        [node("Identity", ["x"], ["y"])],
        {"x": (TensorProto.STRING, ["batch"])},
        {"y": (TensorProto.STRING, ["batch"])},
    )


def sequence_model() -> onnx.ModelProto:
    model = make_model(
        [node("SequenceConstruct", ["x"], ["y"])], {"x": (F, ["batch"])}, {"y": (F, ["batch"])}
    )
    model.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("y", F, None))
    return model


def random_model() -> onnx.ModelProto:
    return make_model(
        [node("RandomNormalLike", ["x"], ["r"]), node("Add", ["x", "r"], ["y"])],
        {"x": (F, ["batch", 3])},
        {"y": (F, ["batch", 3])},
    )


def unknown_operator() -> onnx.ModelProto:
    return make_model([node("Frobnicate", ["x"], ["y"])], {"x": (F, ["batch"])}, {"y": (F, ["batch"])})


def foreign_operator() -> onnx.ModelProto:
    return make_model(
        [node("TRTBatchedNMS", ["x"], ["y"], domain="my.plugins")],
        {"x": (F, ["batch"])},
        {"y": (F, ["batch"])},
        domains={"my.plugins": 1},
    )


def no_inputs() -> onnx.ModelProto:
    return make_model([node("Identity", ["c"], ["y"])], {}, {"y": (F, [2])}, {"c": weights(2)})


def no_shape() -> onnx.ModelProto:
    return make_model([node("Relu", ["x"], ["y"])], {"x": (F, None)}, {"y": (F, None)})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (string_model, "input 'x' holds strings; numbers"),
        (sequence_model, "output 'y' is a sequence_type value; only tensors are served"),
        (random_model, "answers the same input differently"),
        (
            unknown_operator,
            "uses the operator ai.onnx::Frobnicate .* export the model with standard operators",
        ),
        (foreign_operator, "uses the operator my.plugins::TRTBatchedNMS"),
        (no_inputs, "has no inputs"),
        (no_shape, "input 'x' has no shape in the model: give it with --shape"),
    ],
)
def test_what_cannot_be_served_is_refused_in_words(model: object, message: str, tmp_path: Path) -> None:
    assert callable(model)
    with pytest.raises(BuildError, match=message):
        prepared(model(), tmp_path)


def test_an_input_without_a_shape_takes_the_one_that_is_given(tmp_path: Path) -> None:
    found = prepared(no_shape(), tmp_path, "x=1x3:4x3:8x3")
    assert found.inputs[0].shape == ("batch", 3)
    assert found.batching.kind == "dynamic"


def test_files_that_are_no_whole_onnx_model_are_told_apart(tmp_path: Path) -> None:
    whole = old_cnn().SerializeToString()
    path = tmp_path / "m.onnx"

    def refusal(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(BuildError) as caught:
            prepare(path, {}, tmp_path)
        return caught.value.message

    assert "is empty" in refusal(b"")
    assert "is not an ONNX model" in refusal(b"hello, I am a text file\n" * 10)
    assert "zip archive" in refusal(b"PK\x03\x04" + bytes(100))
    assert "pickle" in refusal(b"\x80\x04\x95" + bytes(100))
    assert "git lfs pull" in refusal(b"version https://git-lfs.github.com/spec/v1\n")
    for cut in (len(whole) // 3, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        assert "truncated or damaged" in refusal(whole[:cut])
    with pytest.raises(BuildError, match="cannot read"):
        prepare(tmp_path / "absent.onnx", {}, tmp_path)
    with pytest.raises(BuildError, match="is a folder"):
        prepare(tmp_path, {}, tmp_path)


def test_a_weight_shorter_than_its_shape_is_damage(tmp_path: Path) -> None:
    model = mlp()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-8]
    with pytest.raises(BuildError, match=r"weight 'w1' .* does not have the size of its shape"):
        prepared(model, tmp_path)
