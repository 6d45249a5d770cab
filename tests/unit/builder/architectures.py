"""One small network of each kind that the placement rules speak of, with inputs that look like data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from tests.unit.builder.models import make_model, weights
from vernier.builder.graphs.prepare import clean
from vernier.builder.samples.data import ArraySamples

F, I64 = TensorProto.FLOAT, TensorProto.INT64


def node(op: str, inputs: list[str], output: str, **attributes: object) -> NodeProto:
    return helper.make_node(op, inputs, [output], name=f"{op} {output}", **attributes)


def residual_cnn() -> ModelProto:
    """x [n, 3, 8, 8] → y [n, 5]: a block with an identity shortcut, one with a projection."""
    nodes = [
        node("Conv", ["x", "w0", "b0"], "c0", pads=[1] * 4),
        node("Relu", ["c0"], "r0"),
        node("Conv", ["r0", "w1"], "c1", pads=[1] * 4),
        node("Relu", ["c1"], "r1"),
        node("Conv", ["r1", "w2"], "c2", pads=[1] * 4),
        node("Add", ["c2", "r0"], "s1"),
        node("Relu", ["s1"], "r2"),
        node("Conv", ["r2", "wp"], "p", strides=[2, 2]),
        node("Conv", ["r2", "w3"], "c3", pads=[1] * 4, strides=[2, 2]),
        node("Add", ["c3", "p"], "s2"),
        node("GlobalAveragePool", ["s2"], "g"),
        node("Flatten", ["g"], "f"),
        node("Gemm", ["f", "wl", "bl"], "y", transB=1),
    ]
    constants = {
        "w0": weights(8, 3, 3, 3),
        "b0": weights(8),
        "w1": weights(8, 8, 3, 3, seed=1),
        "w2": weights(8, 8, 3, 3, seed=2),
        "wp": weights(8, 8, 1, 1, seed=3),
        "w3": weights(8, 8, 3, 3, seed=4),
        "wl": weights(5, 8, seed=5),
        "bl": weights(5),
    }
    return clean(make_model(nodes, {"x": (F, ["n", 3, 8, 8])}, {"y": (F, ["n", 5])}, constants), {}, [])


def separable_cnn() -> ModelProto:
    """x [n, 4, 8, 8] → y [n, 3, 16, 16]: depthwise and pointwise, then transposed."""
    nodes = [
        node("Conv", ["x", "wd"], "d", pads=[1] * 4, group=4),
        node("Clip", ["d", "low", "high"], "k"),
        node("Conv", ["k", "wp", "bp"], "p"),
        node("Relu", ["p"], "r"),
        node("ConvTranspose", ["r", "wt", "bt"], "y", strides=[2, 2]),
    ]
    constants = {
        "wd": weights(4, 1, 3, 3),
        "low": np.float32(0).reshape(()),
        "high": np.float32(6).reshape(()),
        "wp": weights(6, 4, 1, 1),
        "bp": weights(6),
        "wt": weights(6, 3, 2, 2),
        "bt": weights(3),
    }
    outputs = {"y": (F, ["n", 3, 16, 16])}
    return clean(make_model(nodes, {"x": (F, ["n", 4, 8, 8])}, outputs, constants), {}, [])


def transformer() -> ModelProto:
    """ids [n, 6] → y [n, 6, 8]: embedding, one head of attention, a feed-forward block, LayerNorm."""
    nodes = [
        node("Gather", ["table", "ids"], "e"),
        node("LayerNormalization", ["e", "g1", "b1"], "l1", axis=-1),
        node("MatMul", ["l1", "wq"], "q"),
        node("MatMul", ["l1", "wk"], "k"),
        node("MatMul", ["l1", "wv"], "v"),
        node("Transpose", ["k"], "kt", perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], "scores"),
        node("Mul", ["scores", "scale"], "scaled"),
        node("Softmax", ["scaled"], "p", axis=-1),
        node("MatMul", ["p", "v"], "o"),
        node("MatMul", ["o", "wo"], "oo"),
        node("Add", ["oo", "e"], "h"),
        node("LayerNormalization", ["h", "g2", "b2"], "l2", axis=-1),
        node("MatMul", ["l2", "wf"], "f"),
        node("Add", ["f", "bf"], "fb"),
        node("Relu", ["fb"], "fr"),
        node("MatMul", ["fr", "wg"], "fg"),
        node("Add", ["fg", "h"], "y"),
    ]
    square = {name: weights(8, 8, seed=i) for i, name in enumerate(["wq", "wk", "wv", "wo"])}
    constants = {
        **square,
        "table": weights(20, 8, seed=9),
        "scale": np.array(0.35, np.float32),
        "wf": weights(8, 32),
        "bf": weights(32),
        "wg": weights(32, 8, seed=3),
        "g1": weights(8) + 1,
        "b1": weights(8),
        "g2": weights(8) + 1,
        "b2": weights(8),
    }
    outputs = {"y": (F, ["n", 6, 8])}
    return clean(make_model(nodes, {"ids": (I64, ["n", 6])}, outputs, constants), {}, [])


def recurrent() -> ModelProto:
    """x [n, 5, 4] → y [n, 3]: an LSTM over time, then a linear layer on its last state."""
    nodes = [
        node("Transpose", ["x"], "t", perm=[1, 0, 2]),
        helper.make_node("LSTM", ["t", "w", "r", "b"], ["", "hidden"], name="LSTM hidden", hidden_size=6),
        node("Squeeze", ["hidden", "first"], "last"),
        node("Gemm", ["last", "wl", "bl"], "y"),
    ]
    constants = {
        "w": weights(1, 24, 4),
        "r": weights(1, 24, 6),
        "b": weights(1, 48),
        "first": np.array([0], np.int64),
        "wl": weights(6, 3),
        "bl": weights(3),
    }
    return clean(make_model(nodes, {"x": (F, ["n", 5, 4])}, {"y": (F, ["n", 3])}, constants), {}, [])


def recommender() -> ModelProto:
    """ids [n, 2], dense [n, 4] → y [n, 1]: an embedding table and an MLP."""
    nodes = [
        node("Gather", ["table", "ids"], "e"),
        node("Flatten", ["e"], "ef"),
        node("Gemm", ["dense", "wd", "bd"], "d"),
        node("Relu", ["d"], "dr"),
        node("Concat", ["ef", "dr"], "c", axis=1),
        node("Gemm", ["c", "w1", "b1"], "h", transB=1),
        node("Relu", ["h"], "hr"),
        node("MatMul", ["hr", "w2"], "z"),
        node("Sigmoid", ["z"], "y"),
    ]
    constants = {
        "table": weights(30, 8),
        "wd": weights(4, 8),
        "bd": weights(8),
        "w1": weights(16, 24, seed=2),
        "b1": weights(16),
        "w2": weights(16, 1, seed=3),
    }
    inputs = {"ids": (I64, ["n", 2]), "dense": (F, ["n", 4])}
    return clean(make_model(nodes, inputs, {"y": (F, ["n", 1])}, constants), {}, [])


ALL = {
    "residual cnn": residual_cnn,
    "separable cnn": separable_cnn,
    "transformer": transformer,
    "recurrent": recurrent,
    "recommender": recommender,
}


def data(model: ModelProto, count: int = 64, seed: int = 0) -> ArraySamples:
    """Normal numbers, and whole numbers below 20."""
    random = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for value in model.graph.input:
        shape = [count, *[d.dim_value for d in value.type.tensor_type.shape.dim[1:]]]
        if value.type.tensor_type.elem_type == I64:
            arrays[value.name] = random.integers(0, 20, shape)
        else:
            arrays[value.name] = random.standard_normal(shape).astype(np.float32)
    return ArraySamples(arrays)


def kinds(model: ModelProto) -> Mapping[str, int]:
    """Operator → how many nodes."""
    counts: dict[str, int] = {}
    for n in model.graph.node:
        counts[n.op_type] = counts.get(n.op_type, 0) + 1
    return counts
