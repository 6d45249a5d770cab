"""uvicorn's options for the service's ports."""

from __future__ import annotations

import ssl
from typing import Any

import uvicorn
from fastapi import FastAPI

from vernier.border.arena import Arena
from vernier.front.connection import fast_protocol
from vernier.front.timeouts import timeout_protocol
from vernier.settings import Settings, SettingsError


def server_config(app: FastAPI, settings: Settings, arena: Arena | None = None) -> uvicorn.Config:
    """For predictions. Raises SettingsError.

    Args:
        arena: where large bodies are received; None for memory of this process alone.
    """
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=settings.access_log,
        timeout_keep_alive=int(settings.keep_alive_timeout_s),
        timeout_graceful_shutdown=int(settings.drain_timeout_s),
        server_header=False,
        lifespan="auto" if arena is None else "off",
        http=protocol_of(app, settings, arena),
        **tls_options(settings),
    )


def operations_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """For health and metrics on a port of their own."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.metrics_port or 0,
        log_config=None,
        access_log=settings.access_log,  # of all servers in a process, the last one's word counts
        lifespan="off",
        http=timeout_protocol(settings.body_timeout_s),
    )


def protocol_of(app: FastAPI, settings: Settings, arena: Arena | None = None) -> Any:
    """uvicorn's `http` option."""
    if not settings.fast_path:
        return timeout_protocol(settings.body_timeout_s)
    state = app.state
    return fast_protocol(state.predictions, state.metrics, state.guard, settings, arena)


def tls_options(settings: Settings) -> dict[str, Any]:
    """uvicorn's options for HTTPS, and for clients that must show a certificate. Raises SettingsError."""
    certificate, key, client_ca = (
        settings.tls_certificate_file,
        settings.tls_key_file,
        settings.tls_client_ca_file,
    )
    if certificate is None and key is None and client_ca is None:
        return {}
    if certificate is None or key is None:
        raise SettingsError("TLS needs both VERNIER_TLS_CERTIFICATE_FILE and VERNIER_TLS_KEY_FILE")
    for path in (certificate, key, client_ca):
        if path is not None and not path.is_file():
            raise SettingsError(
                f"{path} is not a file; name the PEM file of the certificate, key or authority"
            )
    options: dict[str, Any] = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
    if client_ca is not None:
        options |= {"ssl_ca_certs": str(client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return options
