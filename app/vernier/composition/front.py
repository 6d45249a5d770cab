"""The front side: the FastAPI application and the connections, over a catalogue in whichever process it is."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI

import vernier as package
from vernier.api import docs_page, health, kserve, models, predict, sagemaker
from vernier.api.auth.guarding import GuardMiddleware
from vernier.api.auth.keyfile import make_guard
from vernier.api.auth.security import LimitCounts
from vernier.api.formats.long_json import LongJson
from vernier.api.http.errors import install_error_handlers
from vernier.api.service import Predictions
from vernier.api.v2 import infer, repository
from vernier.api.v2 import models as v2_models
from vernier.border.catalogue import Catalogue
from vernier.exposition import Metrics
from vernier.exposition_merge import Family
from vernier.front.limits import byte_budget
from vernier.serving.lifecycle import Lifecycle
from vernier.settings import Settings

DESCRIPTION = """Inference at the lowest precision that keeps the model's accuracy.

Every variant served here passed an accuracy gate when it was built and a self-test when it was loaded."""

#: Gives the metric families of the whole service, for /metrics and for statistics.
Scrape = Callable[[], Awaitable[Iterable[Family]]]
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_front(
    settings: Settings,
    catalogue: Catalogue,
    lifecycle: Lifecycle,
    metrics: Metrics,
    scrape: Scrape,
    lifespan: Lifespan | None = None,
    counts: LimitCounts | None = None,
    fronts: int = 1,
) -> FastAPI:
    """The application, not yet started. Raises SettingsError.

    Args:
        metrics: where responses are counted.
        scrape: of the whole service.
        counts: of clients' limits, shared by all fronts; None for a service of one process.
        fronts: that share the bytes which may be under way.
    """

    def readiness() -> str | None:
        reason = "the service is shutting down" if lifecycle.draining else catalogue.not_ready_reason()
        metrics.set_ready(reason is None)
        return reason

    app = FastAPI(
        title="Vernier",
        version=package.__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    state: Any = app.state
    state.settings = settings
    state.metrics = metrics
    state.scrape = scrape
    state.lifecycle = lifecycle
    state.repository = catalogue
    state.byte_budget = byte_budget(settings, fronts)
    state.predictions = Predictions(
        catalogue, lifecycle, time.monotonic, settings.default_timeout_ms, LongJson(settings.max_body_bytes)
    )
    state.readiness = readiness
    state.guard = guard = make_guard(settings, counts)
    install_error_handlers(app)
    app.add_middleware(GuardMiddleware, guard=guard)
    for module in (predict, kserve, sagemaker, models, health, infer, v2_models, repository, docs_page):
        app.include_router(module.router)
    return app
