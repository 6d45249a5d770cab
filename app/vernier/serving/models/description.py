"""What `GET /v1/models/{name}` tells of a loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vernier.engine.base import Executor
from vernier.package.manifest import Manifest, TensorEntry


def describe(
    manifest: Manifest,
    executors: Mapping[str, Executor],
    curves: Mapping[str, Mapping[int, float]],
    active: str,
    runtime: str,
) -> dict[str, Any]:
    """Inputs, outputs, the largest batch, and each variant with its budget, error and latency.

    Args:
        curves: precision → bucket → seconds, as measured on this device.
        active: the variant that new batches take.
    """
    return {
        "inputs": [_tensor(entry) for entry in manifest.inputs],
        "outputs": [_tensor(entry) for entry in manifest.outputs],
        "max_batch": manifest.max_batch,
        "warnings": [warning.model_dump() for warning in manifest.warnings],
        "variants": [
            _variant(manifest, precision, executor, curves.get(precision), active, runtime)
            for precision, executor in executors.items()
        ],
    }


def _tensor(entry: TensorEntry) -> dict[str, Any]:
    spec = entry.spec()
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.wire_shape)}


def _variant(
    manifest: Manifest,
    precision: str,
    executor: Executor,
    curve: Mapping[int, float] | None,
    active: str,
    runtime: str,
) -> dict[str, Any]:
    entry = manifest.variants[precision]
    gate = entry.gates.get(runtime)
    if curve:  # as measured here, else as measured by the build
        latency_ms = {str(bucket): round(seconds * 1e3, 4) for bucket, seconds in sorted(curve.items())}
    else:
        latency_ms = dict(entry.latency_ms.get(runtime, {}))
    return {
        "precision": precision,
        "active": precision == active,
        "engine_bytes": executor.engine_bytes,
        "budget": list(gate.budget) if gate else [],
        "error": dict(gate.metrics) if gate else {},
        "latency_ms": latency_ms,
    }
