"""Liveness, readiness and metrics: never behind authentication, never waiting for a model."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from vernier.api.formats.codecs import JSON, encode_error
from vernier.exposition_merge import render

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
    request.app.state.readiness()  # brings vernier_ready up to date
    families = await request.app.state.scrape()
    accept = request.headers.get("accept", "")
    body, content_type = await asyncio.to_thread(render, families, accept)
    return Response(body, media_type=content_type)
