"""What the Open Inference Protocol tells of the server and its models, as the JSON of both REST and gRPC."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import vernier as package
from vernier.api.v2.requests import DEFAULT_PRIORITY, PRIORITY_LEVELS
from vernier.border.catalogue import Catalogue, ServedModel
from vernier.tensors import TensorSpec, protocol_dtype

SERVER_NAME = "vernier"
EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)
#: Triton's names: platform and backend.
_PLATFORMS = {"onnxruntime": ("onnxruntime_onnx", "onnxruntime")}
_TENSORRT = ("tensorrt_plan", "tensorrt")


def server_metadata() -> dict[str, Any]:
    return {"name": SERVER_NAME, "version": package.__version__, "extensions": list(EXTENSIONS)}


def platform_of(model: ServedModel) -> tuple[str, str]:
    return _PLATFORMS.get(model.runtime, _TENSORRT)


def _wire_shape(model: ServedModel, spec: TensorSpec) -> list[int]:
    """−1 for a dynamic dimension; a fixed batch is one too, since the service splits and pads."""
    shape = list(spec.wire_shape)
    if model.signature.fixed_batch is not None and shape:
        shape[0] = -1
    return shape


def model_metadata(model: ServedModel, catalogue: Catalogue) -> dict[str, Any]:
    """`model` and the versions beside it that may be named."""

    def tensors(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
        return [
            {"name": spec.name, "datatype": protocol_dtype(spec.dtype), "shape": _wire_shape(model, spec)}
            for spec in specs
        ]

    signature = model.signature
    return {
        "name": model.name,
        "versions": [other.version for other in catalogue.models() if other.name == model.name],
        "platform": platform_of(model)[0],
        "inputs": tensors(signature.inputs.values()),
        "outputs": tensors(signature.outputs.values()),
    }


def model_config(model: ServedModel) -> dict[str, Any]:
    """Triton's ModelConfig. Dimensions leave out the batch; what a request may leave out is optional."""
    signature = model.signature
    platform, backend = platform_of(model)

    def tensors(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
        skipped = 1 if signature.has_batch else 0
        return [
            {
                "name": spec.name,
                "data_type": f"TYPE_{protocol_dtype(spec.dtype)}",
                "dims": list(spec.wire_shape[skipped:]),
            }
            for spec in specs
        ]

    inputs = tensors(signature.inputs.values())
    for entry in inputs:
        entry["optional"] = entry["name"] in signature.derived
    config = {
        "name": model.name,
        "platform": platform,
        "backend": backend,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": model.description()["max_batch"] if signature.has_batch else 0,
        "input": inputs,
        "output": tensors(signature.outputs.values()),
        "model_transaction_policy": {"decoupled": False},
    }
    if signature.has_batch:
        config["dynamic_batching"] = {
            "priority_levels": PRIORITY_LEVELS,
            "default_priority_level": DEFAULT_PRIORITY,
        }
    return config


def repository_index(catalogue: Catalogue) -> list[dict[str, str]]:
    """The versions that are served. What is not loaded is not listed: the packages lie with the engine process."""
    return [
        {"name": model.name, "version": model.version, "state": "READY", "reason": ""}
        for model in catalogue.models()
    ]
