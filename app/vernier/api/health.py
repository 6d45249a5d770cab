"""Liveness, readiness and metrics: never behind authentication, never waiting for a model."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from vernier.api.codecs import JSON, encode_error

router = APIRouter(tags=["operations"])


@router.get("/v2/health/live", summary="The process runs its event loop")
async def live() -> Response:
    return Response(b'{"live":true}', media_type=JSON)


@router.get("/v2/health/ready", summary="Models are loaded and their last executions succeeded")
async def ready(request: Request) -> Response:
    """200 when requests may come; 503 with the reason when not."""
    reason = request.app.state.readiness()
    if reason is None:
        return Response(b'{"ready":true}', media_type=JSON)
    code = "draining" if request.app.state.lifecycle.draining else "not_ready"
    return Response(encode_error(reason, code), 503, media_type=JSON)


@router.get("/metrics", summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    registry: CollectorRegistry = request.app.state.registry
    request.app.state.readiness()  # brings vernier_ready up to date
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), media_type=content_type)
