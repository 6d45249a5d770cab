"""A small text model whose padding is masked, as exporters write them."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper

from tests.unit.builder.models import make_model, weights

#: The id that stands for no token; its embedding is as large as any other.
PAD = 1


def masked_transformer(mask_input: bool = True) -> ModelProto:
    """ids [batch, tokens] → hidden [batch, tokens, 8] and score [batch, 1]: one block of attention, a masked mean.

    mask_input: `attention_mask` [batch, tokens] tells the tokens from the padding; without it the model
        takes every id but `PAD` for a token.
    """
    node = helper.make_node
    inputs = {"ids": (TensorProto.INT64, ["batch", "tokens"])}
    if mask_input:
        inputs["attention_mask"] = (TensorProto.INT64, ["batch", "tokens"])
        mask = [node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT)]
    else:
        mask = [
            node("Equal", ["ids", "pad"], ["padding"]),
            node("Not", ["padding"], ["real"]),
            node("Cast", ["real"], ["m"], to=TensorProto.FLOAT),
        ]
    nodes = [
        *mask,
        node("Sub", ["one", "m"], ["absent"]),
        node("Mul", ["absent", "low"], ["b2"]),
        node("Unsqueeze", ["b2", "axis1"], ["bias"]),
        node("Gather", ["table", "ids"], ["e"]),
        node("MatMul", ["e", "wq"], ["q"]),
        node("MatMul", ["e", "wk"], ["k"]),
        node("MatMul", ["e", "wv"], ["v"]),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["s"]),
        node("Add", ["s", "bias"], ["sb"]),
        node("Softmax", ["sb"], ["p"], axis=-1),
        node("MatMul", ["p", "v"], ["a"]),
        node("Add", ["a", "e"], ["hidden"]),
        node("Unsqueeze", ["m", "axis2"], ["m3"]),
        node("Mul", ["hidden", "m3"], ["hm"]),
        node("ReduceSum", ["hm", "axis1"], ["total"], keepdims=0),
        node("ReduceSum", ["m", "axis1"], ["count"], keepdims=1),
        node("Div", ["total", "count"], ["mean"]),
        node("MatMul", ["mean", "wo"], ["score"]),
    ]
    constants = {
        "table": weights(40, 8, seed=4) * 3,
        "wq": weights(8, 8, seed=1),
        "wk": weights(8, 8, seed=2),
        "wv": weights(8, 8, seed=3),
        "wo": weights(8, 1, seed=5),
        "one": np.array(1.0, np.float32),
        "low": np.array(-1e4, np.float32),
        "axis1": np.array([1], np.int64),
        "axis2": np.array([2], np.int64),
        "pad": np.array(PAD, np.int64),
    }
    used = {name for n in nodes for name in n.input}
    return make_model(
        nodes,
        inputs,
        {
            "hidden": (TensorProto.FLOAT, ["batch", "tokens", 8]),
            "score": (TensorProto.FLOAT, ["batch", 1]),
        },
        {name: value for name, value in constants.items() if name in used},
    )
