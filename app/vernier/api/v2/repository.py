"""Loading and unloading models while the service runs, by Triton's routes. Needs the administration token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request

from vernier.api.formats.codecs import parse_json
from vernier.api.formats.schemas import error_responses
from vernier.api.http.body import read_body
from vernier.api.v2.descriptions import repository_index
from vernier.border.catalogue import Catalogue
from vernier.errors import EngineError, InvalidJson, LoadRefused, PackageError, WrongShape, shown
from vernier.package.integrity import read_version

router = APIRouter(prefix="/v2/repository", tags=["administration"])

_ERRORS = error_responses(400, 401, 403, 404, 409, 413)
#: Of what comes with a call; Triton's clients may put a whole model there, which is refused.
_MAX_BODY_BYTES = 64 * 1024
_KNOWN = ("version", "unload_dependents")


def read_version_parameter(parameters: Mapping[str, Any]) -> int | None:
    """The version to load or unload, None for the newest or for all.

    Raises WrongShape when it is no version, InvalidJson for parameters that cannot be followed.
    """
    for name in parameters:
        if name not in _KNOWN:
            raise InvalidJson(
                f"{shown(name)} cannot be set here: a model is loaded as its package says; "
                f"the parameters are {', '.join(_KNOWN)}"
            )
    text = parameters.get("version")
    if text is None:
        return None
    version = read_version(str(text))
    if version is None:
        raise WrongShape(f"{shown(str(text))} is no version; versions are numbers such as 3")
    return version


async def load_model(catalogue: Catalogue, name: str, version: int | None) -> None:
    """Raises LoadRefused, UnknownModel."""
    try:
        await catalogue.load(name, version)
    except (PackageError, EngineError) as error:
        raise LoadRefused(error.message) from error


async def _body_of(request: Request) -> dict[str, Any]:
    body = await read_body(request, _MAX_BODY_BYTES, request.app.state.settings.body_timeout_s)
    data = parse_json(body) if body else {}
    if not isinstance(data, dict):
        raise InvalidJson("the body must be a JSON object, or be left out")
    return data


async def _version(request: Request, version: str | None) -> int | None:
    parameters = (await _body_of(request)).get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidJson("'parameters' must be an object")
    return read_version_parameter(parameters if version is None else {**parameters, "version": version})


@router.post("/index", responses=_ERRORS, summary="List the loaded models")
async def index(request: Request) -> list[dict[str, str]]:
    await _body_of(request)  # whether `ready` is asked for or not: all that is listed is ready
    return repository_index(request.app.state.repository)


@router.post(
    "/models/{name}/load", responses=_ERRORS, summary="Load a model, or replace it by its newest package"
)
async def load(request: Request, name: str, version: str | None = None) -> dict[str, str]:
    """Requests go to the old engines until the new ones have proven themselves; none is lost."""
    await load_model(request.app.state.repository, name, await _version(request, version))
    return {}


@router.post("/models/{name}/unload", responses=_ERRORS, summary="Take a model out of service")
async def unload(request: Request, name: str, version: str | None = None) -> dict[str, str]:
    """Returns when what had been admitted is answered and the engines are released."""
    repository: Catalogue = request.app.state.repository
    await repository.unload(name, await _version(request, version))
    return {}
