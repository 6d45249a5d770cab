"""FP16's hazards are found by what the data does, and nothing harmless is kept in FP32 for them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from tests.support.quantized_graphs import full_recipe
from tests.unit.builder.architectures import ALL, data, kinds, node
from tests.unit.builder.models import make_model, weights
from vernier.builder.evaluate import run_model
from vernier.builder.graphs.prepare import clean
from vernier.builder.lowering.lower import Recipe, lower
from vernier.builder.progress import NoProgress
from vernier.builder.quantizing.counting import count
from vernier.builder.quantizing.half import half_hazards, hazard_notes, hazards_of
from vernier.builder.quantizing.watch import RangeObserver
from vernier.builder.samples.data import ArraySamples

F, I64 = TensorProto.FLOAT, TensorProto.INT64


def built(
    nodes: list[NodeProto], constants: dict[str, np.ndarray] | None = None, kind: int = F
) -> ModelProto:
    outputs = {nodes[-1].output[0]: (F, None)}
    return clean(make_model(nodes, {"x": (kind, ["n", 4])}, outputs, constants), {}, [])


def normal(count: int = 64, scale: float = 1.0) -> ArraySamples:
    x = np.random.default_rng(0).standard_normal((count, 4)) * scale
    return ArraySamples({"x": x.astype(np.float32)})


def scalar(value: float) -> np.ndarray:
    return np.array([value], np.float32)


@pytest.mark.parametrize("kind", ALL)
def test_ordinary_networks_have_no_hazards(kind: str) -> None:
    model = ALL[kind]()
    assert half_hazards(model, data(model)) == {}
    assert half_hazards(model, data(model), "bf16") == {}


def overflowing() -> ModelProto:
    """Values pass 65,504 in the middle and are small again at the end."""
    nodes = [
        node("Tanh", ["x"], "t"),
        node("Mul", ["t", "up"], "a"),
        node("Mul", ["a", "up"], "b"),
        node("Mul", ["b", "down"], "c"),
        node("Tanh", ["c"], "y"),
    ]
    return built(nodes, {"up": scalar(1000.0), "down": scalar(1e-6)})


def test_overflow_is_found_and_mended() -> None:
    model, samples = overflowing(), normal()
    found = frozenset(half_hazards(model, samples))
    assert found == {"Mul b", "Mul c"}
    exact = run_model(model, samples)["y"]
    assert not np.allclose(run_model(lower(model, Recipe("fp16")), samples)["y"], exact, atol=0.1)
    mended = lower(model, Recipe("fp16", fp32=found))
    assert np.allclose(run_model(mended, samples)["y"], exact, atol=2e-3)
    assert kinds(mended)["Cast"] == 4  # no cast between the two neighbours, where it would overflow


def test_the_reason_is_given_in_words() -> None:
    hazards = half_hazards(overflowing(), normal())
    assert hazards["Mul b"] == "'b': values reach 9.96e+05"
    (sentence,) = hazard_notes(hazards, "fp16")
    assert sentence.startswith("2 nodes stay FP32 because FP16 cannot hold what they compute: Mul b (")
    assert hazard_notes({}, "fp16") == ()


def test_the_limit_leaves_room_for_data_not_seen() -> None:
    model = built([node("Mul", ["x", "k"], "y")], {"k": scalar(1.0)})
    assert not half_hazards(model, ArraySamples({"x": np.full((2, 4), 16000, np.float32)}))
    assert half_hazards(model, ArraySamples({"x": np.full((2, 4), 17000, np.float32)})).keys() == {"Mul y"}
    assert not half_hazards(model, ArraySamples({"x": np.full((2, 4), 17000, np.float32)}), limit_at=60000.0)


def test_one_sample_is_enough() -> None:
    model = built([node("Mul", ["x", "k"], "y")], {"k": scalar(1.0)})
    x = normal(3000).take(range(3000))
    x["x"][1763, 2] = 3e5
    assert half_hazards(model, ArraySamples(x)).keys() == {"Mul y"}


def test_a_mask_of_minus_infinity_is_harmless_and_one_of_the_lowest_float_is_not() -> None:
    def masked(value: float) -> ModelProto:
        nodes = [
            node("Less", ["x", "zero"], "m"),
            node("Where", ["m", "low", "x"], "w"),
            node("Softmax", ["w"], "y"),
        ]
        return built(nodes, {"zero": scalar(0), "low": scalar(value)})

    assert half_hazards(masked(-np.inf), normal()) == {}
    assert half_hazards(masked(-10000.0), normal()) == {}
    assert set(half_hazards(masked(-3.4e38), normal())) == {"Where w", "Softmax y"}


def test_sums_inside_an_operator_count() -> None:
    nodes = [
        node("Tanh", ["x"], "t"),
        node("Mul", ["t", "up"], "a"),
        helper.make_node("ReduceMean", ["a"], ["y"], name="mean", axes=[1]),
    ]
    model = built(nodes, {"up": scalar(10_000.0)})
    same_sign = ArraySamples({"x": np.ones((4, 4), np.float32)})
    assert set(half_hazards(model, same_sign)) == {"mean"}
    assert half_hazards(model, ArraySamples({"x": np.full((4, 4), 0.1, np.float32)})) == {}


def test_tiny_values_and_tiny_divisors_stay_fp32() -> None:
    shrunk = built(
        [node("Mul", ["x", "k"], "a"), node("Mul", ["a", "u"], "y")], {"k": scalar(1e-3), "u": scalar(1e3)}
    )
    assert set(half_hazards(shrunk, normal(scale=1e-3))) == {"Mul a", "Mul y"}
    assert half_hazards(shrunk, normal()) == {}
    divided = built([node("Abs", ["x"], "a"), node("Div", ["x", "a"], "y")])
    spread = normal().take(range(64))
    spread["x"][5] = 1e-6
    assert set(half_hazards(divided, ArraySamples(spread))) == {"Abs a", "Div y"}
    spread["x"][5] = 0.1
    spread["x"][np.abs(spread["x"]) < 1e-3] = 1e-3
    assert half_hazards(divided, ArraySamples(spread)) == {}


def linear(weight: np.ndarray, bias: np.ndarray | None = None) -> ModelProto:
    constants = {"w": weight} if bias is None else {"w": weight, "b": bias}
    return built([node("Gemm", ["x", *constants], "y")], constants)


def test_weights_below_fp16s_smallest_are_noticed() -> None:
    assert set(half_hazards(linear(weights(4, 3) * 1e-7), normal())) == {"Gemm y"}
    assert half_hazards(linear(weights(4, 3)), normal()) == {}
    one_channel = weights(4, 3)
    one_channel[:, 1] *= 1e-7
    hazards = half_hazards(linear(one_channel), normal())
    assert hazards == {"Gemm y": "1 channels of 'w' are too small for FP16"}
    # A dead channel, as folded normalizations leave them: its bias is all that is seen of it.
    assert half_hazards(linear(one_channel, np.full(3, 0.5, np.float32)), normal()) == {}


def test_whole_numbers_must_stay_exact() -> None:
    model = built(
        [node("Cast", ["x"], "f", to=F), node("Unsqueeze", ["f", "axis"], "u"), node("Mul", ["u", "k"], "y")],
        {"axis": np.array([1]), "k": scalar(0.001)},
        kind=I64,
    )

    def hazards(top: int, base: str) -> set[str]:
        return set(half_hazards(model, ArraySamples({"x": np.full((3, 4), top)}), base))

    everything = {"Cast f", "Unsqueeze u", "Mul y"}
    assert (hazards(2047, "fp16"), hazards(255, "bf16")) == (set(), set())
    assert (hazards(2048, "fp16"), hazards(4096, "fp16")) == (set(), set())
    assert (hazards(2049, "fp16"), hazards(257, "bf16")) == (everything, everything)


def test_numbers_that_came_in_fp16_need_not_be_whole() -> None:
    nodes = [node("Cast", ["x"], "f", to=F), node("Tanh", ["f"], "y")]
    model = built(nodes, kind=TensorProto.FLOAT16)
    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float16)
    assert half_hazards(model, ArraySamples({"x": x})) == {}


def test_hazards_hold_in_int8_graphs_too() -> None:
    """An INT8 product whose result passes FP16's largest number gives it in FP32."""
    nodes = [
        node("MatMul", ["x", "w"], "a"),
        node("Mul", ["a", "down"], "b"),
        node("Softmax", ["b"], "y"),
    ]
    model = built(nodes, {"w": weights(4, 4) * 4e4, "down": scalar(1e-5)})
    samples = normal(scale=5.0)
    exact = run_model(model, samples)["y"]
    recipe = full_recipe(model, samples.take(range(64)), "fp16")
    unprotected = run_model(lower(model, recipe), samples)["y"]
    assert not np.isfinite(unprotected).all()
    protected = replace(recipe, fp32=frozenset(half_hazards(model, samples)))
    assert np.allclose(run_model(lower(model, protected), samples)["y"], exact, atol=0.02)


@pytest.mark.parametrize("base", ["fp16", "bf16"])
def test_a_calibration_pass_sees_the_same_hazards(base: str) -> None:
    model, samples = overflowing(), normal()
    observer = RangeObserver(model)
    counted = count(model, ["t"], samples, NoProgress(), observer=observer)
    assert counted.seen is not None
    assert hazards_of(model, observer, counted.seen, base) == half_hazards(model, samples, base)
    assert counted.histograms["t"].total == 64 * 4
