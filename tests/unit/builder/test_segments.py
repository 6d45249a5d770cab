"""A model in pieces computes what it does whole, and a change in a piece reaches the outputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto

from tests.unit.builder.architectures import ALL, F, data, node, residual_cnn, transformer
from tests.unit.builder.models import make_model, weights
from vernier.builder import sessions
from vernier.builder.evaluate import run_model
from vernier.builder.nodes import segments
from vernier.builder.nodes.placement import quantizable_nodes
from vernier.builder.nodes.segments import Chain, cut
from vernier.builder.samples.data import ArraySamples


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("most", [2, 5, 16])
def test_pieces_hold_every_node_once_and_compute_the_same(kind: str, most: int) -> None:
    model = ALL[kind]()
    pieces = cut(model, most)
    assert [n.name for p in pieces for n in p.graph.node] == [n.name for n in model.graph.node]
    assert len(pieces) <= most
    samples = data(model, 11)
    found = Chain(pieces, model).remember(samples, 4)
    for name, expected in run_model(model, samples).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


def one_matmul() -> ModelProto:
    nodes = [node("MatMul", ["x", "w"], "y")]
    return make_model(nodes, {"x": (F, ["n", 4])}, {"y": (F, ["n", 4])}, {"w": weights(4, 4)})


def of_unknown_types() -> ModelProto:
    """Deep enough to be cut, but nothing tells the types of the values between pieces."""
    model = residual_cnn()
    del model.graph.value_info[:]
    return model


@pytest.mark.parametrize("kind", [one_matmul, of_unknown_types, residual_cnn])
def test_changing_the_pieces_leaves_the_model_as_it_was(kind: Callable[[], ModelProto]) -> None:
    model = kind()
    before = model.SerializeToString(deterministic=True)
    pieces = cut(model)
    assert (len(pieces) > 1) == (kind is residual_cnn)
    for piece in pieces:
        piece.graph.node[0].input[0] = "another"
        piece.graph.input.add(name="more")
        for tensor in piece.graph.initializer:
            tensor.raw_data = b""
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("kind", [residual_cnn, transformer])
def test_deep_models_are_cut_and_their_nodes_stay_quantizable(kind: Callable[[], ModelProto]) -> None:
    model = kind()
    pieces = cut(model)
    assert len(pieces) > 2
    found = [node.name for piece in pieces for node in quantizable_nodes(piece)]
    assert found == [node.name for node in quantizable_nodes(model)]


def test_what_comes_before_a_change_is_not_run_again() -> None:
    model = residual_cnn()
    pieces = cut(model)
    chain = Chain(pieces, model)
    samples = data(model, 6)
    exact = chain.remember(samples, 3)
    assert all(np.array_equal(chain.run(i, {})[n], exact[n]) for i in range(len(pieces)) for n in exact)
    last = len(pieces) - 1
    for tensor in pieces[last].graph.initializer:
        if tensor.data_type == tensor.FLOAT:
            tensor.raw_data = bytes(len(tensor.raw_data))
    changed = chain.run(last, {last: sessions.load(pieces[last])})
    assert any(not np.array_equal(changed[n], exact[n]) for n in exact)
    again = chain.run(0, {})
    assert all(np.array_equal(again[n], exact[n]) for n in exact)


def test_samples_may_be_remembered_anew() -> None:
    model = residual_cnn()
    chain = Chain(cut(model), model)
    few, more = data(model, 3), data(model, 20)
    chain.remember(few, 8)
    found = chain.remember(more, 8)
    assert all(len(array) == 20 for array in found.values())
    assert all(len(array) == 20 for array in chain.run(1, {}).values())
    assert isinstance(few, ArraySamples)


@pytest.mark.parametrize("kept", [0, 2000, 1 << 30])
def test_what_cannot_be_kept_is_run_again(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_KEPT_BYTES", kept)
    model = residual_cnn()
    pieces = cut(model)
    chain = Chain(pieces, model)
    exact = chain.remember(data(model, 6), 3)
    for first in range(len(pieces)):
        found = chain.run(first, {})
        assert all(np.array_equal(found[name], exact[name]) for name in exact)
