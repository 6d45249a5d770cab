"""`python -m app`: the service with every setting from VERNIER_… and the settings file."""

from __future__ import annotations

import signal
import sys

import uvicorn

from app.logs import configure_logging
from app.main import create_app
from app.settings import SettingsError, load_settings


def main() -> None:
    try:
        settings = load_settings()
    except SettingsError as error:
        sys.exit(f"vernier: {error.message}")
    configure_logging(settings.log_format, settings.log_level)
    # uvicorn raises the signal again after its shutdown; a drain that went well should end with 0
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=settings.access_log,
        timeout_keep_alive=int(settings.keep_alive_timeout_s),
        timeout_graceful_shutdown=int(settings.drain_timeout_s),
        server_header=False,
    )


if __name__ == "__main__":
    main()
