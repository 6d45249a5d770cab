"""Whether an engine, on the device that loaded it, still gives the answers that were proven at build time."""

from __future__ import annotations

from typing import Dict, List, Mapping, Optional

import numpy as np

from vernier.budget import Budget
from vernier.engine.base import Executor, run_once
from vernier.errors import EngineError
from vernier.package.golden import GoldenVectors
from vernier.tensors import Arrays

#: FP32 is computed in another order on another machine, so even it is not equal to the last bit.
FP32_LIMITS: Mapping[str, float] = {"rel_l2": 1e-3}


def _has_no_batch_axis(executor: Executor, golden: GoldenVectors) -> bool:
    """Golden inputs then have one axis more than the model's: the one that counts samples."""
    return any(golden.inputs[spec.name].ndim == len(spec.shape) + 1 for spec in executor.inputs)


def run_golden(executor: Executor, golden: GoldenVectors, max_rows: int = 16) -> Arrays:
    """The variant's outputs on the golden inputs, in order, samples first; a fixed batch divides the samples.

    Raises EngineError.
    """
    alone = _has_no_batch_axis(executor, golden)
    fixed = {spec.shape[0] for spec in executor.inputs if spec.shape and isinstance(spec.shape[0], int)}
    rows = 1 if alone else min(fixed.pop() if fixed else max_rows, golden.samples)
    slot = executor.open_slot()
    try:
        parts: Dict[str, List[np.ndarray]] = {name: [] for name in golden.outputs}
        for start in range(0, golden.samples, rows):
            batch = {name: array[start : start + rows] for name, array in golden.inputs.items()}
            inputs = {name: array[0] for name, array in batch.items()} if alone else batch
            for name, array in run_once(slot, inputs).items():
                if name in parts:
                    parts[name].append(array[None] if alone else array)
    finally:
        slot.close()
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def self_test(
    executor: Executor, golden: GoldenVectors, limits: Mapping[str, float], max_rows: int = 16
) -> Optional[str]:
    """Runs the golden vectors and holds every error metric against its limit.

    Args:
        limits: as a variant's `budget` in the manifest; FP32_LIMITS when that gives none.
        max_rows: the most rows that one execution of this model takes.

    Returns:
        None when the engine passed; else one sentence.
    """
    try:
        outputs = run_golden(executor, golden, min(16, max_rows))
    except EngineError as error:
        return f"it could not run the golden vectors: {error.message}"
    for name, array in outputs.items():
        if (
            array.dtype.kind == "f"
            and np.isfinite(golden.outputs[name]).all()
            and not np.isfinite(array).all()
        ):
            return f"output '{name}' of the golden vectors is not finite on {executor.device}"
    verdict = Budget.from_limits(limits or FP32_LIMITS).judge(golden.outputs, outputs)
    return None if verdict.passed else f"on the golden vectors, on {executor.device}: {verdict.reason}"
