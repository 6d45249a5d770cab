"""What is loaded: GET /v1/models and GET /v1/models/{name}."""

from __future__ import annotations

from fastapi import APIRouter, Request

from vernier.api.schemas import (
    ModelDescription,
    ModelList,
    ModelSummary,
    TensorDescription,
    VariantDescription,
    error_responses,
)
from vernier.package.manifest import TensorEntry
from vernier.serving.repository import LoadedModel, Repository

router = APIRouter(prefix="/v1/models", tags=["models"])


def summary(model: LoadedModel) -> ModelSummary:
    """One line of a list."""
    return ModelSummary(
        name=model.name,
        version=model.version,
        precision=model.precision,
        runtime=model.runtime,
        state=model.state,
    )


def _tensor(entry: TensorEntry) -> TensorDescription:
    spec = entry.spec()
    return TensorDescription(name=spec.name, dtype=spec.dtype, shape=list(spec.wire_shape))


def _latency_ms(model: LoadedModel, precision: str) -> dict[str, float]:
    """Bucket → median milliseconds: as measured on this device, else as measured by the build."""
    here = model.engines.curves.get(precision)
    if here:
        return {str(bucket): round(seconds * 1e3, 4) for bucket, seconds in sorted(here.items())}
    return model.manifest.variants[precision].latency_ms.get(model.runtime, {})


def _variants(model: LoadedModel) -> list[VariantDescription]:
    described = []
    for precision, executor in model.executors.items():
        entry = model.manifest.variants[precision]
        gate = entry.gates.get(model.runtime)
        described.append(
            VariantDescription(
                precision=precision,
                active=precision == model.precision,
                engine_bytes=executor.engine_bytes,
                budget=gate.budget if gate else [],
                error=gate.metrics if gate else {},
                latency_ms=_latency_ms(model, precision),
            )
        )
    return described


@router.get("", summary="List the loaded models")
async def list_models(request: Request) -> ModelList:
    repository: Repository = request.app.state.repository
    return ModelList(models=[summary(model) for model in repository.models()])


@router.get("/{name}", responses=error_responses(404), summary="Describe one model")
async def describe_model(request: Request, name: str, version: str | None = None) -> ModelDescription:
    repository: Repository = request.app.state.repository
    model = repository.resolve(name, version)
    manifest = model.manifest
    return ModelDescription(
        **summary(model).model_dump(),
        inputs=[_tensor(entry) for entry in manifest.inputs],
        outputs=[_tensor(entry) for entry in manifest.outputs],
        max_batch=manifest.max_batch,
        variants=_variants(model),
    )
