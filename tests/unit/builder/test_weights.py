"""Weights in INT8: each method does what it says, and `best` is chosen on what it has not seen."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from tests.unit.builder import architectures
from tests.unit.builder.architectures import ALL, data, node
from tests.unit.builder.models import make_model, run, weights
from vernier.builder.evaluate import run_model
from vernier.builder.graphs.graph import GraphView
from vernier.builder.graphs.prepare import clean
from vernier.builder.lowering.lower import Recipe, lower
from vernier.builder.nodes.placement import quantizable_nodes, weight_axis
from vernier.builder.quantizing.calibrate import calibrate
from vernier.builder.quantizing.patches import operand_rows
from vernier.builder.quantizing.rounding import best_scales, gptq, largest_scales, to_integers
from vernier.builder.quantizing.weights import WEIGHT_METHODS, quantize_weights, without_corrections
from vernier.builder.samples.data import ArraySamples
from vernier.errors import BuildError

F = TensorProto.FLOAT
RANDOM = np.random.default_rng(3)


def restored(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return values * (scales[:, None] if scales.ndim else scales)


# --- rounding a matrix ----------------------------------------------------------------------------
def test_the_largest_magnitude_of_every_row_is_kept() -> None:
    matrix = RANDOM.standard_normal((6, 50)).astype(np.float32) * np.geomspace(1e-4, 10, 6)[:, None]
    scales = largest_scales(matrix.astype(np.float32), True)
    values = to_integers(matrix.astype(np.float32), scales)
    assert values.dtype == np.int8
    assert values.min() >= -127
    assert np.abs(restored(values, scales) - matrix).max(axis=1) == pytest.approx(scales / 2, rel=0.1)
    assert largest_scales(matrix.astype(np.float32), False).shape == ()


def test_dead_channels_get_a_positive_scale_and_zeros() -> None:
    matrix = np.zeros((2, 5), np.float32)
    matrix[0] = 1
    for choose in (largest_scales, best_scales):
        scales = choose(matrix, True)
        assert (scales > 0).all()
        assert not to_integers(matrix, scales)[1].any()


def test_best_scales_clip_what_costs_less_to_clip() -> None:
    matrix = RANDOM.standard_normal((4, 2000)).astype(np.float32)
    matrix[0, 0] = 8.0
    plain, best = largest_scales(matrix, True), best_scales(matrix, True)

    def error(scales: np.ndarray) -> np.ndarray:
        return np.square(restored(to_integers(matrix, scales), scales) - matrix).sum(axis=1)

    assert (error(best) <= error(plain)).all()
    assert best[0] < plain[0]
    # Where that one column matters much more than the others, it is not clipped.
    importance = np.ones((4, 2000), np.float32)
    importance[:, 0] = 1e4
    assert best_scales(matrix, True, importance)[0] > best[0]


def test_long_weights_are_searched_piece_by_piece_with_the_same_result() -> None:
    matrix = RANDOM.standard_normal((40, 16_384)).astype(np.float32)
    importance = RANDOM.uniform(0.1, 1, (40, 16_384)).astype(np.float32)
    whole = best_scales(matrix, True, importance)
    rows = [best_scales(matrix[i : i + 1], True, importance[i : i + 1])[0] for i in range(40)]
    assert np.array_equal(whole, np.array(rows))


def correlated(rows: int, columns: int) -> np.ndarray:
    mixing = RANDOM.standard_normal((columns // 4, columns))
    return (
        RANDOM.standard_normal((rows, columns // 4)) @ mixing + 0.1 * RANDOM.standard_normal((rows, columns))
    ).astype(np.float32)


@pytest.mark.parametrize("columns", [24, 200, 400])
def test_gptq_beats_rounding_to_the_nearest_on_inputs_it_has_not_seen(columns: int) -> None:
    matrix = RANDOM.standard_normal((1, 16, columns)).astype(np.float32)
    inputs = correlated(4000, columns)
    seen, unseen = inputs[:3000], inputs[3000:]
    scales = largest_scales(matrix[0], True)
    rounded = gptq(matrix, scales[None], (seen.T @ seen)[None])[0]
    nearest = to_integers(matrix[0], scales)

    def error(values: np.ndarray) -> float:
        return float(np.square(unseen @ (restored(values, scales) - matrix[0]).T).mean())

    assert np.abs(rounded.astype(int) * scales[:, None] - matrix[0]).max() < 20 * scales.max()
    assert error(rounded) < 0.5 * error(nearest)


def test_gptq_of_independent_inputs_of_equal_size_is_rounding_to_the_nearest() -> None:
    matrix = RANDOM.standard_normal((2, 5, 30)).astype(np.float32)
    scales = np.stack([largest_scales(group, True) for group in matrix])
    rounded = gptq(matrix, scales, np.stack([np.eye(30, dtype=np.float32)] * 2))
    for group in range(2):
        assert np.array_equal(rounded[group], to_integers(matrix[group], scales[group]))


def test_gptq_takes_columns_that_are_never_used() -> None:
    matrix = RANDOM.standard_normal((1, 5, 30)).astype(np.float32)
    inputs = correlated(100, 30)
    inputs[:, ::3] = 0
    rounded = gptq(matrix, largest_scales(matrix[0], True)[None], (inputs.T @ inputs)[None])
    assert np.isfinite(rounded).all()
    empty = gptq(matrix, largest_scales(matrix[0], True)[None], np.zeros((1, 30, 30), np.float32))
    assert np.array_equal(empty[0], to_integers(matrix[0], largest_scales(matrix[0], True)))


# --- the rows that a weight is multiplied with ----------------------------------------------------
@pytest.mark.parametrize(
    ("op", "kernel", "shape", "attributes"),
    [
        ("Conv", (8, 3, 3, 3), (2, 3, 9, 7), {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2]}),
        ("Conv", (8, 2, 3, 3), (2, 4, 9, 7), {"group": 2, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        ("Conv", (8, 1, 3), (2, 8, 9), {"group": 8, "auto_pad": "SAME_LOWER", "strides": [2]}),
        ("Conv", (4, 3, 2, 2), (2, 3, 5, 5), {"auto_pad": "VALID", "pads": [1, 1, 1, 1]}),
        ("Conv", (8, 2, 2, 2, 2), (2, 2, 4, 5, 6), {}),
        (
            "ConvTranspose",
            (4, 6, 3, 3),
            (2, 4, 5, 6),
            {"strides": [2, 3], "pads": [1, 0, 1, 1], "output_padding": [1, 0]},
        ),
        ("ConvTranspose", (4, 6, 3), (2, 4, 5), {"dilations": [2], "strides": [2]}),
        ("MatMul", (4, 6), (2, 3, 4), {}),
        ("Gemm", (6, 4), (3, 4), {"transB": 1}),
        ("Gemm", (4, 6), (4, 3), {"transA": 1}),
    ],
)
def test_rows_times_weight_is_the_operator(
    op: str, kernel: tuple[int, ...], shape: tuple[int, ...], attributes: dict[str, object]
) -> None:
    if attributes.get("auto_pad") == "VALID":
        attributes = {"auto_pad": "VALID"}
    weight, x = weights(*kernel), RANDOM.standard_normal(shape).astype(np.float32)
    model = make_model(
        [helper.make_node(op, ["x", "w"], ["y"], **attributes)],
        {"x": (F, list(shape))},
        {"y": (F, [None] * (len(shape) if op != "Gemm" else 2))},
        {"w": weight},
    )
    expected = run(model, {"x": x})[0]
    rows = operand_rows(model.graph.node[0], x, kernel, 1, 10**9, seed=0)
    assert rows is not None
    axis = weight_axis(GraphView(model), model.graph.node[0]) or 0
    groups = int(attributes.get("group", 1)) if op == "Conv" else 1  # type: ignore[call-overload]
    matrix = np.moveaxis(weight, axis, 0).reshape(groups, kernel[axis] // groups, -1)
    product = rows @ matrix.transpose(0, 2, 1)
    if op in ("Conv", "ConvTranspose"):
        product = product.reshape(groups, shape[0], -1, product.shape[2]).transpose(1, 0, 3, 2)
    assert np.allclose(product.reshape(expected.shape), expected, atol=1e-5)


def test_no_more_rows_are_drawn_than_asked_for() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)
    x = RANDOM.standard_normal((3, 2, 20, 20)).astype(np.float32)
    rows = operand_rows(conv, x, (4, 2, 3, 3), 1, 7, seed=0)
    assert rows is not None
    assert rows.shape == (1, 21, 18)
    again = operand_rows(conv, x, (4, 2, 3, 3), 1, 7, seed=0)
    assert np.array_equal(rows, again)
    grouped = helper.make_node("ConvTranspose", ["x", "w"], ["y"], group=2)
    assert operand_rows(grouped, x, (2, 2, 3, 3), 1, 7, seed=0) is None


# --- models ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_every_weight_is_quantized_in_its_own_shape(kind: str, method: str) -> None:
    model = ALL[kind]()
    nodes, samples = quantizable_nodes(model), data(model, 32)
    ranges = calibrate(model, nodes, samples, "mse").scales
    found = quantize_weights(model, nodes, samples, method, ranges=ranges)  # type: ignore[arg-type]
    assert set(found) == {n.name for n in nodes if n.weight}
    view = GraphView(model)
    for described in nodes:
        if described.weight is None:
            continue
        weight, value = found[described.name], view.constant(described.weight)
        assert value is not None
        assert weight.values.shape == value.shape
        assert weight.values.dtype == np.int8
        axis = weight_axis(view, view.by_name[described.name])
        assert weight.scales.shape == (() if axis is None else (value.shape[axis],))
        assert np.abs(weight.dequantized() - value).max() < 0.2 * np.abs(value).max()


def test_without_data_no_method_needs_any() -> None:
    model = architectures.residual_cnn()
    nodes = quantizable_nodes(model)
    for samples in (None, data(model, 4)):
        found = quantize_weights(model, nodes, samples, "best")
        assert {w.method for w in found.values()} == {"mse"}
        assert all(w.bias_correction is None for w in found.values())


def test_the_same_data_gives_the_same_weights() -> None:
    model = architectures.separable_cnn()
    nodes, samples = quantizable_nodes(model), data(model)
    first, second = (quantize_weights(model, nodes, samples) for _ in range(2))
    for name, weight in first.items():
        assert np.array_equal(weight.values, second[name].values)
        assert np.array_equal(weight.scales, second[name].scales)


def wide_layer() -> tuple[ModelProto, ArraySamples, ArraySamples]:
    """One linear layer on correlated inputs with a mean, and data to learn from and to judge by."""
    model = make_model(
        [node("MatMul", ["x", "w"], "y")],
        {"x": (F, ["n", 96])},
        {"y": (F, ["n", 12])},
        {"w": weights(96, 12)},
    )
    x = correlated(1200, 96) + 2.0
    return clean(model, {}, []), ArraySamples({"x": x[:400]}), ArraySamples({"x": x[400:]})


def test_best_helps_on_data_that_nothing_was_learned_from() -> None:
    model, samples, fresh = wide_layer()
    nodes = quantizable_nodes(model)
    ranges = calibrate(model, nodes, samples, "minmax").scales
    exact = run_model(model, fresh)["y"]

    def error(method: str) -> float:
        found = quantize_weights(model, nodes, samples, method, ranges=ranges)  # type: ignore[arg-type]
        recipe = Recipe("fp32", frozenset(n.name for n in nodes), ranges=ranges, weights=found)
        return float(np.square(run_model(lower(model, recipe), fresh)["y"] - exact).mean())

    nearest = error("nearest")
    assert error("best") < 0.8 * nearest
    assert error("gptq") < 0.9 * nearest


def test_a_correction_takes_out_the_mean_error() -> None:
    model, samples, fresh = wide_layer()
    nodes = quantizable_nodes(model)
    # A range that clips the upper half shifts the layer's mean, which a correction can mend.
    ranges = {"x": 3.0 / 127}
    found = quantize_weights(model, nodes, samples, "best", ranges=ranges)
    assert found["MatMul y"].bias_correction is not None
    exact = run_model(model, fresh)["y"]

    def shift(chosen: dict) -> float:  # type: ignore[type-arg]
        recipe = Recipe("fp32", frozenset(n.name for n in nodes), ranges=ranges, weights=chosen)
        return float(np.abs((run_model(lower(model, recipe), fresh)["y"] - exact).mean(axis=0)).max())

    assert shift(found) < 0.3 * shift(without_corrections(found))


def test_a_wide_layer_is_rounded_in_blocks() -> None:
    """1,500 inputs make three blocks, the last filled up with zeros."""
    model = make_model(
        [node("Gemm", ["x", "w"], "y", transB=1)],
        {"x": (F, ["n", 1500])},
        {"y": (F, ["n", 4])},
        {"w": weights(4, 1500)},
    )
    model = clean(model, {}, [])
    quantizable = quantizable_nodes(model)
    samples = ArraySamples({"x": correlated(300, 1500)})
    found = quantize_weights(model, quantizable, samples, "gptq")["Gemm y"]
    assert found.method == "gptq"
    plain = quantize_weights(model, quantizable, samples, "mse")["Gemm y"]
    assert found.values.shape == (4, 1500)
    assert np.abs(found.dequantized() - weights(4, 1500)).max() < 0.1
    assert (found.values != plain.values).mean() > 0.05


def test_unknown_methods_are_refused() -> None:
    model = architectures.recommender()
    with pytest.raises(BuildError, match="'adaround' is no way to round weights"):
        quantize_weights(model, quantizable_nodes(model), None, "adaround")  # type: ignore[arg-type]
