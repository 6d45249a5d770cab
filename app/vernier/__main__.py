"""`python -m vernier`: the service with every setting from VERNIER_… and the settings file."""

from __future__ import annotations

import signal
import ssl
import sys
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI

from vernier.front.connection import service_protocol
from vernier.heap import limit_arenas
from vernier.logs import configure_logging
from vernier.main import create_app
from vernier.server import AcceptingServer
from vernier.settings import Settings, SettingsError, load_settings

#: uvicorn's exit code for a service that could not start.
_NOT_STARTED = 3


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


def protocol_of(app: FastAPI, settings: Settings) -> Any:
    """uvicorn's `http` option."""
    state = app.state
    return service_protocol(
        state.predictions, state.metrics, state.guard, settings, state.lifecycle, state.byte_budget
    )


def main() -> None:
    limit_arenas()
    try:
        settings = load_settings()
        configure_logging(settings.log_format, settings.log_level, settings.access_log)
        app = create_app(settings)
        tls = tls_options(settings)
    except SettingsError as error:
        sys.exit(f"vernier: {error.message}")
    # uvicorn raises the signal again after its shutdown; a drain that went well should end with 0
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=settings.access_log,
        timeout_keep_alive=int(settings.keep_alive_timeout_s),
        timeout_graceful_shutdown=int(settings.drain_timeout_s),
        server_header=False,
        http=protocol_of(app, settings),
        **tls,
    )
    server = AcceptingServer(config)
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(_NOT_STARTED)


if __name__ == "__main__":
    main()
