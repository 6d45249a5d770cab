"""Whatever the batching, everybody gets what ONNX Runtime itself would have answered to them alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.support.packages import mlp_model
from vernier.engine.base import default_buckets
from vernier.engine.ort import OnnxRuntimeExecutor
from vernier.metrics import ModelMetrics
from vernier.package.manifest import SequenceDim
from vernier.serving.queueing.admission import Policy
from vernier.serving.queueing.padding import BatchLayout
from vernier.serving.scheduling.scheduler import Answer, Scheduler
from vernier.tensors import Arrays

CLIENTS, ROUNDS = 200, 3


class Padded(OnnxRuntimeExecutor):
    """ONNX Runtime made to run full buckets only, as TensorRT does."""

    exact_batch = False


def masked_mean_model() -> onnx.ModelProto:
    """features [batch, frames, 3], lengths [batch] → the mean over each clip's own frames, times a matrix."""
    weights = {
        "w": np.random.default_rng(3).normal(size=(3, 2)).astype(np.float32),
        "one": np.array(1, np.int64),
        "zero": np.array(0, np.int64),
        "axis": np.array([1], np.int64),
        "last": np.array([2], np.int64),
    }
    nodes = [
        helper.make_node("Shape", ["features"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["frames"]),
        helper.make_node("Range", ["zero", "frames", "one"], ["steps"]),
        helper.make_node("Unsqueeze", ["lengths", "axis"], ["limits"]),
        helper.make_node("Less", ["steps", "limits"], ["real"]),
        helper.make_node("Cast", ["real"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", ["features", "mask3"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "axis"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["limits"], ["count"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("MatMul", ["mean", "w"], ["y"]),
        helper.make_node("MatMul", ["features", "w"], ["each"]),
    ]
    graph = helper.make_graph(
        nodes,
        "masked-mean",
        [
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", "frames", 3]),
            helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2]),
            helper.make_tensor_value_info("each", TensorProto.FLOAT, ["batch", "frames", 2]),
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def random_request(random: Random, kind: str) -> Arrays:
    rows = random.choice([1, 1, 1, 2, 5, 16, 17, 50])
    rng = np.random.default_rng(random.randrange(2**31))
    if kind != "sequence":
        return {"x": rng.normal(size=(rows, 4)).astype(np.float32)}
    frames = random.randint(1, 40)
    return {
        "features": rng.normal(size=(rows, frames, 3)).astype(np.float32),
        "lengths": rng.integers(1, frames + 1, rows),
    }


def layout_of(kind: str, executor: OnnxRuntimeExecutor) -> BatchLayout:
    if kind == "fixed":
        return BatchLayout("fixed", [4], executor.inputs, executor.outputs)
    sequence = [SequenceDim(dim="frames", buckets=[8, 16, 40])] if kind == "sequence" else []
    return BatchLayout(
        "dynamic", default_buckets(16), executor.inputs, executor.outputs, "batch", sequence, {"frames": 16}
    )


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("kind", ["exact", "padded", "fixed", "sequence"])
async def test_two_hundred_clients_get_each_their_own_answer(tmp_path: Path, kind: str, inline: bool) -> None:
    model = masked_mean_model() if kind == "sequence" else mlp_model(batch=4 if kind == "fixed" else "batch")
    onnx.save(model, tmp_path / "model.onnx")
    executor_type = OnnxRuntimeExecutor if kind == "exact" else Padded
    executor = executor_type(tmp_path / "model.onnx", precision="fp32", intra_op_threads=1)
    free = masked_mean_model() if kind == "sequence" else mlp_model()
    reference = onnxruntime.InferenceSession(free.SerializeToString(), providers=["CPUExecutionProvider"])
    metrics = ModelMetrics("m", "1")
    scheduler = Scheduler(
        "m",
        layout_of(kind, executor),
        {"fp32": executor},
        "fp32",
        Policy(queue_limit=10**6),
        2,
        metrics,
        inline=inline,
    )
    await scheduler.started()
    random = Random(kind)

    async def client(requests: list[Arrays]) -> list[Answer]:
        return [await scheduler.predict(r, rows=len(next(iter(r.values())))) for r in requests]

    sent = [[random_request(random, kind) for _ in range(ROUNDS)] for _ in range(CLIENTS)]
    try:
        got = await asyncio.gather(*(client(requests) for requests in sent))
    finally:
        await scheduler.drain(10)
    for requests, answers in zip(sent, got, strict=True):
        for inputs, answer in zip(requests, answers, strict=True):
            names = list(answer.outputs)
            for name, expected in zip(names, reference.run(names, inputs), strict=True):
                np.testing.assert_allclose(answer.outputs[name], expected, atol=1e-6)
    totals = metrics.totals()
    assert totals["admitted"] == totals["answered"] == CLIENTS * ROUNDS
    executions = metrics.serving("fp32", "onnxruntime").executions
    if kind in ("exact", "padded"):
        assert executions < CLIENTS * ROUNDS
