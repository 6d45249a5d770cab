"""Any small graph under any precision assignment lowers to a valid graph that means what was assigned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.quantized_graphs import Grower, full_recipe, run_by_hand, values_of
from tests.unit.builder.models import check
from vernier.builder.graphs.probe import open_session
from vernier.builder.lowering.emulate import emulate
from vernier.builder.lowering.lower import Recipe, lower


@st.composite
def graphs(draw: st.DrawFn) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    grower = Grower(draw(st.integers(0, 2**16)))
    for _ in range(draw(st.integers(2, 9))):
        grower.grow(draw(st.sampled_from(grower.choices())))
    if not grower.nodes:
        grower.grow("conv")
    return grower.finish(), {"x": grower.image}


def drawn_recipe(
    data: st.DataObject, model: onnx.ModelProto, feed: dict[str, np.ndarray], base: str
) -> Recipe:
    recipe = full_recipe(model, feed, base)
    nodes = sorted(recipe.int8)
    int8 = data.draw(st.sets(st.sampled_from(nodes)) if nodes else st.just(set()), label="int8")
    names = [node.name for node in model.graph.node]
    fp32 = data.draw(st.sets(st.sampled_from(names)), label="fp32") if base != "fp32" else set()
    weights = dict(recipe.weights)
    for name in sorted(int8 & weights.keys()):
        if weights[name].scales.ndim and data.draw(st.booleans(), label=f"correct {name}"):
            shift = np.linspace(-0.1, 0.1, weights[name].scales.size).astype(np.float32)
            weights[name] = replace(weights[name], bias_correction=shift)
    return replace(recipe, int8=frozenset(int8), fp32=frozenset(fp32), weights=weights)


def answers(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    # ONNX Runtime's optimizer would fuse Q/DQ pairs in its own way, with other results.
    session = open_session(emulate(model), Path(), optimize=False)
    return dict(zip([o.name for o in model.graph.output], session.run(None, feed), strict=True))


@settings(max_examples=40, deadline=None)
@given(st.data(), graphs())
def test_an_int8_graph_computes_what_numpy_computes(
    data: st.DataObject, drawn: tuple[onnx.ModelProto, dict[str, np.ndarray]]
) -> None:
    model, feed = drawn
    recipe = drawn_recipe(data, model, feed, "fp32")
    lowered = lower(model, recipe)
    check(lowered)
    expected = run_by_hand(model, recipe, feed)
    # Values on the edge between two levels may round either way, by one level of one number.
    for name, got in answers(lowered, feed).items():
        spread = np.abs(expected[name]).max() + 1e-3
        assert np.abs(got - expected[name]).max() <= 0.03 * spread
        assert np.median(np.abs(got - expected[name])) <= 1e-4 * spread
    older = lower(model, recipe, "trt8")
    check(older)
    assert max(o.version for o in older.opset_import) <= 17
    for name, got in answers(older, feed).items():
        assert np.allclose(got, answers(lowered, feed)[name], atol=1e-5 + 0.03 * np.abs(got).max())


@settings(max_examples=40, deadline=None)
@given(st.data(), graphs(), st.sampled_from(["fp16", "bf16"]))
def test_a_mixed_graph_is_valid_keeps_its_interface_and_stays_close(
    data: st.DataObject, drawn: tuple[onnx.ModelProto, dict[str, np.ndarray]], base: str
) -> None:
    model, feed = drawn
    recipe = drawn_recipe(data, model, feed, base)
    before = model.SerializeToString(deterministic=True)
    lowered = lower(model, recipe)
    assert model.SerializeToString(deterministic=True) == before
    check(lowered)
    for mine, theirs in zip(
        [*lowered.graph.input, *lowered.graph.output], [*model.graph.input, *model.graph.output], strict=True
    ):
        assert (mine.name, mine.type) == (theirs.name, theirs.type)
    expected = run_by_hand(model, recipe, feed)
    tolerance = 0.05 if base == "fp16" else 0.2
    for name, got in answers(lowered, feed).items():
        assert got.dtype == np.float32
        assert np.abs(got - expected[name]).max() <= tolerance * (np.abs(expected[name]).max() + 0.05)


@settings(max_examples=15, deadline=None)
@given(graphs())
def test_fp8_graphs_are_valid_and_close(drawn: tuple[onnx.ModelProto, dict[str, np.ndarray]]) -> None:
    model, feed = drawn
    recipe = full_recipe(model, feed)
    lowered = lower(model, Recipe("fp16", fp8=recipe.int8, ranges=recipe.ranges))
    check(lowered)
    exact = values_of(model, feed)
    for name, got in answers(lowered, feed).items():
        assert np.isfinite(got).all()
        # In the mean: three bits of mantissa, several layers and a steep function can move a single number by its half.
        assert np.linalg.norm(got - exact[name]) <= 0.5 * (np.linalg.norm(exact[name]) + 0.05)
