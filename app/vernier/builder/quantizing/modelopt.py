"""`--quantizer modelopt`: NVIDIA ModelOpt decides what is quantized and with which ranges.

Only its decisions are taken: the nodes, the ranges, and for FP16 and BF16 the nodes that it would keep in
FP32. The graph is written by `vernier.builder.lowering.lower` as always, so that it has one form for every runtime, is
judged by the same gate and can give nodes back. ModelOpt itself writes no calibration cache, stores FP32
weights, and calibrates on random numbers when it gets no data.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto

from vernier.builder.graphs.store import INLINE_LIMIT_BYTES, weight_bytes, write_model
from vernier.builder.nodes.placement import QuantizableNode
from vernier.builder.samples.data import Samples, limit
from vernier.errors import BuildError

#: The Python of another environment that has ModelOpt; it pins an older onnx and replaces ONNX Runtime.
PYTHON_VARIABLE = "VERNIER_MODELOPT_PYTHON"
PRECISIONS = ("int8", "fp8", "fp16", "bf16")

#: ModelOpt holds all calibration data in memory.
_MAX_SAMPLES = 256
_MAX_BYTES = 256 << 20
_WORKER = Path(__file__).with_name("modelopt_worker.py")


@dataclass(frozen=True)
class Proposal:
    """What ModelOpt would do.

    nodes: to quantize. ranges: value name → INT8 scale; empty for FP8, whose ranges are calibrated here.
    fp32: nodes to keep in FP32 in an FP16 or BF16 graph.
    """

    nodes: frozenset[str]
    ranges: dict[str, float]
    fp32: frozenset[str]


def find_python() -> str:
    """The Python that has ModelOpt: the one that the environment names, or this one. Raises BuildError."""
    named = os.environ.get(PYTHON_VARIABLE)
    if named:
        return named
    if importlib.util.find_spec("modelopt") is None:
        raise BuildError(
            f"--quantizer modelopt needs NVIDIA ModelOpt: install it with pip install 'vernier[modelopt]', or "
            f"name the Python of an environment that has it in {PYTHON_VARIABLE}"
        )
    return sys.executable


def propose(
    model: ModelProto, nodes: Sequence[QuantizableNode], samples: Samples, precision: str
) -> Proposal:
    """Runs ModelOpt on a prepared model.

    Args:
        precision: `int8`, `fp8`, `fp16` or `bf16`.

    Raises:
        BuildError: ModelOpt is not installed, fails, or finds nothing to quantize.
    """
    python = find_python()
    with tempfile.TemporaryDirectory(prefix="vernier-modelopt-") as folder:
        work = Path(folder)
        answer = _ask(python, model, nodes, _some(samples), precision, work)
    if precision in ("int8", "fp8") and not answer["nodes"]:
        raise BuildError(
            f"ModelOpt found nothing in this model that it would quantize to {precision}: "
            f"use --quantizer vernier"
        )
    ranges = {str(name): float(scale) for name, scale in answer["ranges"].items()}
    return Proposal(frozenset(answer["nodes"]), ranges, frozenset(answer["fp32"]))


def _some(samples: Samples) -> Samples:
    one = sum(array.nbytes for array in samples.take([0]).values())
    return limit(samples, max(8, min(_MAX_SAMPLES, _MAX_BYTES // max(one, 1))))


def _ask(
    python: str,
    model: ModelProto,
    nodes: Sequence[QuantizableNode],
    samples: Samples,
    precision: str,
    work: Path,
) -> dict[str, dict[str, float]]:
    data = work / "data.npz"
    with data.open("wb") as stream:
        np.savez(stream, **samples.take(range(len(samples))))  # type: ignore[arg-type]
    request = {
        "model": str(write_model(model, work / "model.onnx")[0]),
        "large": weight_bytes(model) > INLINE_LIMIT_BYTES,
        "data": str(data),
        "precision": precision,
        "nodes": {node.name: list(node.activations) for node in nodes},
        "all_nodes": [node.name for node in model.graph.node],
        "out": str(work / "answer.json"),
    }
    (work / "request.json").write_text(json.dumps(request), "utf-8")
    # Isolated: the worker's own folder has modules of plain names, which must not stand in for others'.
    command = [python, "-I", str(_WORKER), str(work / "request.json")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=work, check=False)
    except OSError as error:
        raise BuildError(
            f"cannot start {python} for ModelOpt: {error.strerror}; check {PYTHON_VARIABLE}"
        ) from error
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise BuildError(
            f"ModelOpt could not make {precision}: {lines[-1] if lines else f'exit code {done.returncode}'}; "
            f"use --quantizer vernier"
        )
    answer: dict[str, dict[str, float]] = json.loads((work / "answer.json").read_text("utf-8"))
    return answer
