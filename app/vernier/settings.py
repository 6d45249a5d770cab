"""Every setting of the service, in one frozen class. Only `vernier.main` reads it.

Sources, the first that names a setting wins: environment variables (`VERNIER_PORT=9000`; nested
fields with two underscores: `VERNIER_MODELS__RANKER__MAX_BATCH=64`), then the file that
`VERNIER_CONFIG` names (TOML or YAML), else `vernier.toml` in the working directory if there is one.
An unknown or impossible setting stops the start with a sentence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
    YamlConfigSettingsSource,
)

from vernier.errors import VernierError

PREFIX = "VERNIER_"
CONFIG_VARIABLE = "VERNIER_CONFIG"
#: Of the command `vernier` when it asks a service; no settings.
URL_VARIABLE, KEY_VARIABLE = "VERNIER_URL", "VERNIER_KEY"
DEFAULT_CONFIG = Path("vernier.toml")

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16", "int8-fp32", "int8", "fp8"]


def _ascending(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise ValueError(
            "buckets must be one or more sizes from 1 on, in ascending order, such as [1, 8, 32]"
        )
    return sizes


#: Allowed sizes, ascending.
Buckets = Annotated[tuple[int, ...], AfterValidator(_ascending)]


#: A service that admits everybody is for its own machine, unless VERNIER_HOST says otherwise.
LOOPBACK = "127.0.0.1"


def _default_host(values: dict[str, Any]) -> str:
    """All addresses once clients have to identify themselves."""
    proofs = ("api_keys_file", "jwt_public_key_file", "tls_client_ca_file")
    return "0.0.0.0" if any(values.get(name) for name in proofs) else LOOPBACK


class SettingsError(VernierError):
    """The service cannot start with these settings."""


class ModelSettings(BaseModel):
    """Per model; each overrides the `serve` section of the package's manifest, which overrides the default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slots: int | None = Field(None, ge=1, le=256)
    max_batch: int | None = Field(None, ge=1)
    max_queue_delay_ms: float | None = Field(None, ge=0)
    latency_objective_ms: float | None = Field(None, gt=0)
    queue_limit: int | None = Field(None, ge=1)
    precision: Precision | None = None
    buckets: Buckets | None = None
    sequence_buckets: dict[str, Buckets] | None = None


class Settings(BaseSettings):
    """See the module. Every field can be set as VERNIER_<FIELD>."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid", case_sensitive=False
    )

    port: int = Field(8000, ge=0, le=65535)
    engines_dir: Path = Path("engines")
    watch_s: float = Field(2.0, ge=0)
    cache_dir: Path | None = None
    runtime: Literal["auto", "tensorrt", "tensorrt-rtx", "tensorrt-lean", "onnxruntime"] = "auto"
    devices: Annotated[tuple[int, ...], NoDecode] = (0,)
    rebuild: Literal["never", "background", "wait"] = "background"

    slots: int | None = Field(None, ge=1, le=256)
    precision: Precision = "auto"
    max_queue_delay_ms: float = Field(2.0, ge=0)
    latency_objective_ms: float | None = Field(None, gt=0)
    queue_limit: int = Field(8192, ge=1)
    models: dict[str, ModelSettings] = Field(default_factory=dict)

    monitor_share: float = Field(0.01, ge=0, le=1)
    monitor_quiet_s: float = Field(10.0, gt=0)
    monitor_cool_down_s: float = Field(300.0, gt=0)

    fronts: int | None = Field(None, ge=0, le=64)
    engine_processes: int | None = Field(None, ge=1, le=64)
    max_body_bytes: int = Field(64 * 2**20, ge=1)
    max_inflight_bytes: int | None = Field(None, ge=1)
    default_timeout_ms: float | None = Field(None, gt=0)
    body_timeout_s: float = Field(30.0, gt=0)
    keep_alive_timeout_s: float = Field(75.0, gt=0)
    drain_delay_s: float = Field(0.0, ge=0)
    drain_timeout_s: float = Field(25.0, gt=0)

    api_keys_file: Path | None = None
    admin_token_file: Path | None = None
    jwt_public_key_file: Path | None = None
    jwt_audience: str | None = None
    jwt_issuer: str | None = None
    tls_certificate_file: Path | None = None
    tls_key_file: Path | None = None
    tls_client_ca_file: Path | None = None
    metrics_port: int | None = Field(None, ge=0, le=65535)
    grpc_port: int | None = Field(None, ge=1, le=65535)
    # after what it depends on
    host: str = Field(default_factory=_default_host)

    log_format: Literal["json", "text"] = "json"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    access_log: bool = False

    @field_validator("devices", mode="before")
    @classmethod
    def _devices(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(int(part) for part in value.split(","))
        return tuple(value) if isinstance(value, Iterable) else (value,)

    @field_validator("devices")
    @classmethod
    def _distinct_devices(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 0 or len(set(value)) != len(value):
            raise ValueError("name each GPU once by CUDA's number, such as 0,1")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = config_file()
        if path is None:
            return init_settings, env_settings
        reader = YamlConfigSettingsSource if path.suffix in (".yaml", ".yml") else TomlConfigSettingsSource
        return init_settings, env_settings, reader(settings_cls, path)

    def for_engine(self, number: int, engines: int) -> Settings:
        """What one of several engine processes is given: its share of the GPUs, one at least."""
        devices = self.devices[number::engines] or (self.devices[number % len(self.devices)],)
        return self.model_copy(update={"devices": devices, "engine_processes": engines})

    def for_model(self, name: str) -> ModelSettings:
        return self.models.get(name, ModelSettings())


def config_file() -> Path | None:
    """The settings file that is in force. Raises SettingsError when VERNIER_CONFIG names none."""
    named = os.environ.get(CONFIG_VARIABLE)
    if named:
        path = Path(named)
        if not path.is_file():
            raise SettingsError(f"{CONFIG_VARIABLE} names {path}, which is not a file")
        return path
    return DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None


def _unknown_variables() -> list[str]:
    fields = {name.upper() for name in Settings.model_fields}
    known = {CONFIG_VARIABLE, URL_VARIABLE, KEY_VARIABLE} | {PREFIX + name for name in fields}
    return [
        name
        for name in os.environ
        if name.startswith(PREFIX) and name not in known and not name.startswith(f"{PREFIX}MODELS__")
    ]


def load_settings() -> Settings:
    """Reads environment and file. Raises SettingsError with one sentence per fault."""
    unknown = _unknown_variables()
    if unknown:
        raise SettingsError(
            f"unknown setting {', '.join(sorted(unknown))}; see docs/settings.md for the names"
        )
    try:
        return Settings()
    except ValidationError as error:
        faults = [
            f"{PREFIX}{'__'.join(str(p) for p in fault['loc']).upper()}: {fault['msg']}"
            for fault in error.errors()
        ]
        raise SettingsError("; ".join(faults)) from error
    except ValueError as error:
        raise SettingsError(f"the settings file {config_file()} cannot be read: {error}") from error
