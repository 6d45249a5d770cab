"""TF32's rounding, written into a graph, is the rounding of the format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.unit.builder.models import check, mlp, run, save, weights
from vernier.builder.graphs.prepare import prepare
from vernier.builder.lowering.tf32 import emulate_tf32, round_to_tf32


def test_rounding_leaves_ten_bits_and_takes_the_nearest() -> None:
    values = weights(10_000) * np.float32(37)
    rounded = round_to_tf32(values)
    assert not (rounded.view(np.uint32) & 0x1FFF).any()
    assert (np.abs(rounded - values) <= np.abs(values) * 2.0**-11).all()
    assert (rounded != values).any()
    np.testing.assert_array_equal(round_to_tf32(rounded), rounded)
    large = np.array([3e38, -3e38, 0, np.inf], np.float32)
    np.testing.assert_array_equal(round_to_tf32(large), large)


def test_the_graph_rounds_both_operands_of_every_product(tmp_path: Path) -> None:
    model = prepare(save(mlp(), tmp_path / "m.onnx"), {}, tmp_path).model
    emulated = emulate_tf32(model)
    check(emulated)
    x = weights(6, 8, seed=4)
    constants = {"w1": weights(8, 16), "b1": weights(16, seed=1), "w2": weights(16, 1, seed=2)}
    hidden = np.maximum(round_to_tf32(x) @ round_to_tf32(constants["w1"]) + constants["b1"], 0).astype(
        np.float32
    )
    expected = 1 / (1 + np.exp(-(round_to_tf32(hidden) @ round_to_tf32(constants["w2"]))))
    got = run(emulated, {"x": x})[0]
    np.testing.assert_allclose(got, expected, atol=2e-6)
    assert np.abs(got - run(model, {"x": x})[0]).max() > 1e-6
