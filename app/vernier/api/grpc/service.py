"""The methods of GRPCInferenceService but for predictions: what REST answers too, in messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.json_format import ParseDict

from vernier.api.grpc.calls import CallAdmission, Context, abort
from vernier.api.grpc.codec import parameters_of
from vernier.api.grpc.schema import SERVICE, message_class, parse
from vernier.api.v2.descriptions import model_config, model_metadata, repository_index, server_metadata
from vernier.api.v2.models import models_of
from vernier.api.v2.repository import load_model, read_version_parameter
from vernier.api.v2.statistics import statistics
from vernier.border.catalogue import Catalogue
from vernier.errors import NotReady, RequestError

#: From a request's message to the fields of the answer.
Method = Callable[[Any], Awaitable[dict[str, Any]]]


class Descriptions:
    """Belongs to the event loop's thread.

    Args:
        readiness: why the service is not ready; None when it is.
        scrape: gives the metric families of the whole service.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        readiness: Callable[[], str | None],
        scrape: Callable[[], Awaitable[Any]],
    ) -> None:
        self._catalogue = catalogue
        self._readiness = readiness
        self._scrape = scrape

    def methods(self) -> dict[str, Method]:
        return {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._config,
            "ModelStatistics": self._statistics,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
        }

    async def _live(self, request: Any) -> dict[str, Any]:
        return {"live": True}

    async def _ready(self, request: Any) -> dict[str, Any]:
        return {"ready": self._readiness() is None}

    def _resolve(self, request: Any) -> Any:
        if not request.name:
            raise RequestError("'name' is missing; name the model")
        return self._catalogue.resolve(request.name, request.version or None)

    async def _model_ready(self, request: Any) -> dict[str, Any]:
        try:
            self._resolve(request)
        except NotReady:
            return {"ready": False}
        return {"ready": True}

    async def _metadata(self, request: Any) -> dict[str, Any]:
        return server_metadata()

    async def _model_metadata(self, request: Any) -> dict[str, Any]:
        return model_metadata(self._resolve(request), self._catalogue)

    async def _config(self, request: Any) -> dict[str, Any]:
        return {"config": model_config(self._resolve(request))}

    async def _statistics(self, request: Any) -> dict[str, Any]:
        models = models_of(self._catalogue, request.name or None, request.version or None)
        return {"model_stats": statistics(await self._scrape(), models)}

    async def _index(self, request: Any) -> dict[str, Any]:
        return {"models": repository_index(self._catalogue)}

    async def _load(self, request: Any) -> dict[str, Any]:
        version = read_version_parameter(parameters_of(request.parameters))
        await load_model(self._catalogue, request.model_name, version)
        return {}

    async def _unload(self, request: Any) -> dict[str, Any]:
        version = read_version_parameter(parameters_of(request.parameters))
        await self._catalogue.unload(request.model_name, version)
        return {}


def unary(
    name: str, method: Method, admission: CallAdmission
) -> Callable[[bytes, Context], Awaitable[bytes | None]]:
    """The method as gRPC calls it: bytes in, bytes out, errors as statuses."""
    takes, gives = message_class(f"inference.{name}Request"), message_class(f"inference.{name}Response")

    async def call(data: bytes, context: Context) -> bytes | None:
        try:
            with admission.request(f"/{SERVICE}/{name}", context, len(data)):
                fields = await method(parse(takes, data))
                answer: bytes = ParseDict(fields, gives(), ignore_unknown_fields=True).SerializeToString()
                return answer
        except Exception as error:  # every failure is answered here
            await abort(context, error)
            return None

    return call
