"""HTTPS from the settings."""

from __future__ import annotations

import ssl
from typing import Any

from vernier.settings import Settings, SettingsError


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
