"""Raising and lowering opsets keeps every answer."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.unit.builder.models import check, make_model, run, weights
from vernier.builder.graphs.opset import ADAPTERS, opset_of, raise_opset
from vernier.builder.graphs.opset_lower import lower_opset
from vernier.builder.graphs.simplify import infer_shapes
from vernier.errors import BuildError

F = TensorProto.FLOAT
X = weights(2, 3, 4, 5)


def unary(op: str, opset: int, outputs: int = 1, **attributes: object) -> onnx.ModelProto:
    names = [f"y{i}" for i in range(outputs)]
    return make_model(
        [helper.make_node(op, ["x"], names, **attributes)],
        {"x": (F, [2, 3, 4, 5])},
        dict.fromkeys(names, (F, None)),
        opset=opset,
    )


def test_every_incompatible_step_of_the_schemas_has_an_adapter() -> None:
    """An old node survives a step unless an attribute went, a default moved, or inputs became required."""
    history: dict[str, dict[int, onnx.defs.OpSchema]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            history.setdefault(schema.name, {})[schema.since_version] = schema
    lacking = []
    for name, versions in history.items():
        for older, newer in zip(sorted(versions), sorted(versions)[1:], strict=False):
            if not 7 < newer <= 19:
                continue
            a, b = versions[older], versions[newer]
            defaults_moved = any(
                key in b.attributes
                and attribute.default_value.SerializeToString()
                != b.attributes[key].default_value.SerializeToString()
                for key, attribute in a.attributes.items()
            )
            breaks = (
                set(a.attributes) - set(b.attributes)
                or defaults_moved
                or b.min_input > a.min_input
                or b.max_output < a.max_output
                or (b.deprecated and newer == 11)
            )
            # Upsample is rewritten one step later, where Resize has its lasting form.
            if breaks and name not in ADAPTERS.get(newer, {}) and name != "Upsample":
                lacking.append(f"{name} at {newer}")
    assert not lacking


@pytest.mark.parametrize(
    ("opset", "op", "attributes"),
    [
        (7, "Softmax", {}),
        (9, "Softmax", {"axis": 2}),
        (12, "LogSoftmax", {"axis": 3}),
        (11, "Hardmax", {"axis": 1}),
        (9, "Squeeze", {}),
        (9, "Unsqueeze", {"axes": [0, 5]}),
        (11, "Unsqueeze", {"axes": [-1]}),
        (7, "ReduceSum", {"axes": [1, 3], "keepdims": 0}),
        (11, "ReduceMean", {"axes": [-1]}),
        (13, "ReduceMax", {}),
        (9, "Slice", {"starts": [0, 1], "ends": [2, -1], "axes": [1, 2]}),
        (9, "Slice", {"starts": [1], "ends": [2]}),
        (6 + 1, "Clip", {"min": -0.2}),
        (9, "Clip", {"min": -0.2, "max": 0.1}),
        (9, "Pad", {"pads": [0, 0, 1, 0, 0, 0, 0, 2], "value": 1.5}),
        (9, "Pad", {"pads": [0, 0, 1, 0, 0, 0, 0, 2], "mode": "reflect"}),
        (7, "Dropout", {"ratio": 0.7}),
        (9, "Upsample", {}),
        (7, "Upsample", {"scales": [1.0, 1.0, 2.0, 3.0], "mode": "nearest"}),
        (8, "Upsample", {"scales": [1.0, 1.0, 2.0, 2.0], "mode": "linear"}),
    ],
)
@pytest.mark.parametrize("target", [17, 19])
def test_a_raised_model_answers_as_before(
    opset: int, op: str, attributes: dict[str, object], target: int
) -> None:
    if op == "Upsample" and not attributes:
        model = make_model(
            [helper.make_node("Upsample", ["x", "s"], ["y0"])],
            {"x": (F, [2, 3, 4, 5])},
            {"y0": (F, None)},
            {"s": np.array([1, 1, 2, 2], np.float32)},
            opset=9,
        )
    else:
        model = unary(op, opset, **attributes)
    expected = run(model, {"x": X})
    infer_shapes(model)
    raise_opset(model, target)
    check(model)
    assert opset_of(model) == target
    np.testing.assert_allclose(run(model, {"x": X})[0], expected[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("target", [17, 19])
def test_split_and_topk_keep_their_sizes(target: int) -> None:
    node = helper.make_node
    model = make_model(
        [
            node("Split", ["x"], ["a", "b"], axis=1, split=[1, 2]),
            node("Split", ["x"], ["c", "d"], axis=2),
            node("TopK", ["b"], ["t", "i"], axis=3, k=2),
        ],
        {"x": (F, [2, 3, 4, 5])},
        {**dict.fromkeys("acdt", (F, None)), "i": (TensorProto.INT64, None)},
        opset=9,
    )
    expected = run(model, {"x": X})
    raise_opset(model, target)
    check(model)
    for before, after in zip(expected, run(model, {"x": X}), strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_bodies_of_an_if_are_raised_too() -> None:
    node = helper.make_node
    value = helper.make_tensor_value_info

    def branch(op: str, **attributes: object) -> onnx.GraphProto:
        return helper.make_graph([node(op, ["x"], [op], **attributes)], op, [], [value(op, F, None)])

    model = make_model(
        [
            node("ReduceSum", ["x"], ["total"], axes=[0, 1], keepdims=0),
            node("Squeeze", ["flag"], ["scalar"], axes=[0]),
            node(
                "If",
                ["scalar"],
                ["y"],
                then_branch=branch("Clip", max=0.1),
                else_branch=branch("LogSoftmax", axis=0),
            ),
        ],
        {"x": (F, [1, 3]), "flag": (TensorProto.BOOL, [1])},
        {"y": (F, None), "total": (F, None)},
        opset=9,
    )
    x = weights(1, 3)
    expected = [run(model, {"x": x, "flag": np.array([flag])}) for flag in (True, False)]
    raise_opset(model, 17)
    for flag, before in zip((True, False), expected, strict=True):
        for a, b in zip(before, run(model, {"x": x, "flag": np.array([flag])}), strict=True):
            np.testing.assert_array_equal(a, b)


def test_an_opset_older_than_seven_is_refused_in_words() -> None:
    with pytest.raises(BuildError, match="opset 6; opsets from 7 on"):
        raise_opset(unary("Relu", 6), 17)


def test_a_late_model_is_lowered_where_that_is_exact() -> None:
    node = helper.make_node
    model = make_model(
        [
            node("ReduceMean", ["x", "axes"], ["m"], keepdims=0),
            node("Split", ["x"], ["a", "b"], axis=2, num_outputs=2),
            node("Cast", ["a"], ["y"], to=F, saturate=1),
        ],
        {"x": (F, [2, 3, 4, 5])},
        {"m": (F, None), "y": (F, None), "b": (F, None)},
        {"axes": np.array([1, 2], np.int64)},
        opset=21,
        ir_version=10,
    )
    expected = run(model, {"x": X})
    assert lower_opset(model, range(17, 21)) == 17
    check(model)
    for before, after in zip(expected, run(model, {"x": X}), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_node_that_no_earlier_opset_knows_keeps_the_opset() -> None:
    model = make_model(
        [helper.make_node("Gelu", ["x"], ["y"])], {"x": (F, [2, 3])}, {"y": (F, None)}, opset=21
    )
    assert lower_opset(model, range(17, 21)) == 20
    model = make_model(
        [helper.make_node("Swish", ["x"], ["y"])], {"x": (F, [2, 3])}, {"y": (F, None)}, opset=24
    )
    assert lower_opset(model, range(17, 24)) == 24
