"""Loading and unloading models while the service runs, by Triton's routes. Needs the administration token."""

from __future__ import annotations

from fastapi import APIRouter, Request

from vernier.api.models import summary
from vernier.api.schemas import ModelList, ModelSummary, error_responses
from vernier.border.catalogue import Catalogue
from vernier.errors import EngineError, LoadRefused, PackageError, WrongShape, shown
from vernier.package.integrity import read_version

router = APIRouter(prefix="/v2/repository", tags=["administration"])

_ERRORS = error_responses(400, 401, 403, 404, 409)


def _version(text: str | None) -> int | None:
    if text is None:
        return None
    version = read_version(text)
    if version is None:
        raise WrongShape(f"{shown(text)} is no version; versions are numbers such as 3")
    return version


@router.post("/index", responses=_ERRORS, summary="List the loaded models")
async def index(request: Request) -> ModelList:
    repository: Catalogue = request.app.state.repository
    return ModelList(models=[summary(model) for model in repository.models()])


@router.post(
    "/models/{name}/load", responses=_ERRORS, summary="Load a model, or replace it by its newest package"
)
async def load(request: Request, name: str, version: str | None = None) -> ModelSummary:
    """Requests go to the old engines until the new ones have proven themselves; none is lost."""
    repository: Catalogue = request.app.state.repository
    try:
        return summary(await repository.load(name, _version(version)))
    except (PackageError, EngineError) as error:
        raise LoadRefused(error.message) from error


@router.post(
    "/models/{name}/unload", responses=_ERRORS, status_code=204, summary="Take a model out of service"
)
async def unload(request: Request, name: str, version: str | None = None) -> None:
    """Returns when what had been admitted is answered and the engines are released."""
    repository: Catalogue = request.app.state.repository
    await repository.unload(name, _version(version))
