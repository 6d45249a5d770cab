"""What the Open Inference Protocol and Triton's extensions tell of the server and its models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request

from vernier.api.formats.schemas import error_responses
from vernier.api.v2.descriptions import model_config, model_metadata, server_metadata
from vernier.api.v2.statistics import statistics
from vernier.border.catalogue import Catalogue, ServedModel

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

_ERRORS = error_responses(404, 503)
_MODEL, _VERSION = "/models/{name}", "/models/{name}/versions/{version}"


def _catalogue(request: Request) -> Catalogue:
    catalogue: Catalogue = request.app.state.repository
    return catalogue


def _resolve(request: Request, name: str, version: str | None) -> ServedModel:
    model: ServedModel = _catalogue(request).resolve(name, version)
    return model


def models_of(catalogue: Catalogue, name: str | None, version: str | None) -> Sequence[ServedModel]:
    """All served versions, of one model where it is named. Raises UnknownModel, UnknownVersion, NotReady."""
    if version is not None:
        return [catalogue.resolve(name, version)]
    if name is not None:
        catalogue.resolve(name, None)
    return [model for model in catalogue.models() if name in (None, model.name)]


@router.get("", summary="Name, version and extensions of the server")
async def server() -> dict[str, Any]:
    return server_metadata()


@router.get("/models/stats", summary="Statistics of all models")
async def all_statistics(request: Request) -> dict[str, Any]:
    return await _statistics(request, None, None)


@router.get(_MODEL, responses=_ERRORS, summary="Inputs and outputs of a model")
async def metadata(request: Request, name: str) -> dict[str, Any]:
    return model_metadata(_resolve(request, name, None), _catalogue(request))


@router.get(_VERSION, responses=_ERRORS, summary="Inputs and outputs of a version")
async def version_metadata(request: Request, name: str, version: str) -> dict[str, Any]:
    return model_metadata(_resolve(request, name, version), _catalogue(request))


@router.get(f"{_MODEL}/ready", responses=_ERRORS, summary="Whether a model takes requests")
async def ready(request: Request, name: str) -> dict[str, Any]:
    return _ready(_resolve(request, name, None))


@router.get(f"{_VERSION}/ready", responses=_ERRORS, summary="Whether a version takes requests")
async def version_ready(request: Request, name: str, version: str) -> dict[str, Any]:
    return _ready(_resolve(request, name, version))


def _ready(model: ServedModel) -> dict[str, Any]:
    return {"name": model.name, "ready": True}


@router.get(f"{_MODEL}/config", responses=_ERRORS, summary="A model as Triton's ModelConfig")
async def config(request: Request, name: str) -> dict[str, Any]:
    return model_config(_resolve(request, name, None))


@router.get(f"{_VERSION}/config", responses=_ERRORS, summary="A version as Triton's ModelConfig")
async def version_config(request: Request, name: str, version: str) -> dict[str, Any]:
    return model_config(_resolve(request, name, version))


@router.get(f"{_MODEL}/stats", responses=_ERRORS, summary="Statistics of a model's versions")
async def stats(request: Request, name: str) -> dict[str, Any]:
    return await _statistics(request, name, None)


@router.get(f"{_VERSION}/stats", responses=_ERRORS, summary="Statistics of a version")
async def version_stats(request: Request, name: str, version: str) -> dict[str, Any]:
    return await _statistics(request, name, version)


async def _statistics(request: Request, name: str | None, version: str | None) -> dict[str, Any]:
    models = models_of(_catalogue(request), name, version)
    return {"model_stats": statistics(await request.app.state.scrape(), models)}
