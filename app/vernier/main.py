"""The whole service in one process: `uvicorn vernier.main:app` with uvicorn's own options.

`python -m vernier` reads VERNIER_HOST, VERNIER_PORT and the limits of the settings, and starts processes of their own
for fronts and engine where that pays.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

import vernier as package
from vernier.composition.engine import create_repository, start
from vernier.composition.front import create_front
from vernier.composition.grpc import start_grpc
from vernier.composition.operations import operations_server
from vernier.exposition import Metrics, register_process
from vernier.exposition_merge import Family, families_of
from vernier.logs import configure_logging
from vernier.serving.lifecycle import Lifecycle
from vernier.settings import Settings, SettingsError, load_settings

logger = logging.getLogger("vernier")


def create_app(settings: Settings) -> FastAPI:
    """The whole service, not yet started. Raises SettingsError."""
    registry = CollectorRegistry()
    register_process(registry)
    metrics = Metrics(registry, package.__version__)
    lifecycle = Lifecycle(settings.drain_delay_s)
    repository = create_repository(settings, metrics, registry)

    async def scrape() -> Iterable[Family]:
        return families_of(registry)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        lifecycle.take_signals(asyncio.get_running_loop())
        grpc = await start_grpc(app, settings, shared=False)
        async with operations_server(app, settings.metrics_port):
            loading = asyncio.create_task(start(repository, lifecycle, settings))
            yield
            await grpc.stop()
            lifecycle.stopped()
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            totals = {f"{m.name}/{m.version}": m.metrics for m in repository.models()}
            await repository.close()
            app.state.predictions.close()
        lifecycle.release_signals()
        logger.info("stopped", extra={"requests": {name: m.totals() for name, m in totals.items()}})

    return create_front(settings, repository, lifecycle, metrics, scrape, lifespan)


def _settings_or_exit() -> Settings:
    try:
        return load_settings()
    except SettingsError as error:
        sys.exit(f"vernier: {error.message}")


def __getattr__(name: str) -> object:
    """`app` is made on first use, so that importing this module reads no environment."""
    if name == "app":
        settings = _settings_or_exit()
        configure_logging(settings.log_format, settings.log_level, settings.access_log)
        try:
            made = create_app(settings)
        except SettingsError as error:
            sys.exit(f"vernier: {error.message}")
        globals()["app"] = made
        return made
    raise AttributeError(name)
