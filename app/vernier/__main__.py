"""`python -m vernier`: the service with every setting from VERNIER_… and the settings file."""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import suppress

from vernier.api.auth.keyfile import make_guard
from vernier.composition.tls import tls_options
from vernier.descriptors import raise_descriptor_limit
from vernier.logs import configure_logging
from vernier.processes.number import engine_count, front_count
from vernier.settings import LOOPBACK, Settings, SettingsError, load_settings

logger = logging.getLogger("vernier")

#: uvicorn's exit code for a service that could not start.
NOT_STARTED = 3


def main() -> None:
    try:
        settings = load_settings()
        configure_logging(settings.log_format, settings.log_level, settings.access_log)
        raise_descriptor_limit()
        if settings.host == LOOPBACK and "host" not in settings.model_fields_set:
            logger.info(
                "only this machine is served, since everybody may predict: set VERNIER_API_KEYS_FILE, or "
                "VERNIER_HOST=0.0.0.0 to serve everybody"
            )
        fronts = front_count(settings)
        engines = engine_count(settings, fronts)
        if fronts:
            from vernier.processes.supervisor import supervise

            # what is wrong with keys and certificates is told before anything is started
            tls_options(settings)
            guard = make_guard(settings)
            sys.exit(supervise(settings, fronts, engines, [key.name for key in guard.keys]))
        serve_in_process(settings)
    except SettingsError as error:
        sys.exit(f"vernier: {error.message}")


def serve_in_process(settings: Settings) -> None:
    """Everything in this process. Raises SettingsError."""
    from vernier.composition.operations import AcceptingServer
    from vernier.composition.server import server_config
    from vernier.heap import limit_arenas
    from vernier.main import create_app

    limit_arenas()
    config = server_config(create_app(settings), settings)
    # uvicorn raises the signal again after its shutdown; a drain that went well should end with 0
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    server = AcceptingServer(config)
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(NOT_STARTED)


if __name__ == "__main__":
    main()
