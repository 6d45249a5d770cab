"""What is loaded: GET /v1/models and GET /v1/models/{name}."""

from __future__ import annotations

from fastapi import APIRouter, Request

from vernier.api.formats.schemas import ModelDescription, ModelList, ModelSummary, error_responses
from vernier.border.catalogue import Catalogue, ServedModel

router = APIRouter(prefix="/v1/models", tags=["models"])


def summary(model: ServedModel) -> ModelSummary:
    """One line of a list."""
    return ModelSummary(
        name=model.name,
        version=model.version,
        precision=model.precision,
        runtime=model.runtime,
        state=model.state,
    )


@router.get("", summary="List the loaded models")
async def list_models(request: Request) -> ModelList:
    repository: Catalogue = request.app.state.repository
    return ModelList(models=[summary(model) for model in repository.models()])


@router.get("/{name}", responses=error_responses(404, 503), summary="Describe one model")
async def describe_model(request: Request, name: str, version: str | None = None) -> ModelDescription:
    repository: Catalogue = request.app.state.repository
    model: ServedModel = repository.resolve(name, version)
    return ModelDescription(
        **summary(model).model_dump(), ready=model.state == "ready", **model.description()
    )
