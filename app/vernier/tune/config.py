"""Puts a model's settings into a settings file; everything else in it, comments too, stays as it is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import ValidationError
from tomlkit.container import OutOfOrderTableProxy
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AbstractTable, InlineTable

from vernier.settings import PREFIX, ModelSettings, SettingsError


def read(path: Path) -> tomlkit.TOMLDocument:
    """The file, or an empty one where there is none. Raises SettingsError when it cannot be added to."""
    if path.suffix != ".toml":
        raise SettingsError(f"{path} is not a .toml file, and only those are written; name one with --write")
    if not path.parent.is_dir():
        raise SettingsError(f"there is no folder {path.parent}; make it, or name another file with --write")
    try:
        document = tomlkit.parse(path.read_text("utf-8")) if path.exists() else tomlkit.document()
    except (OSError, UnicodeDecodeError, TOMLKitError) as error:
        raise SettingsError(f"the settings file {path} cannot be read: {error}") from error
    models = document.get("models", {})
    if not isinstance(models, Mapping) or not all(isinstance(m, Mapping) for m in models.values()):
        raise SettingsError(f"`models` in {path} must hold a table for each model; correct it first")
    return document


def set_model(document: tomlkit.TOMLDocument, name: str, settings: Mapping[str, Any]) -> None:
    """Sets what is given under `models.<name>`, and takes out what is None there."""
    models = document.get("models")
    if models is None:
        models = document["models"] = tomlkit.table(is_super_table=True)
    section = models.get(name)
    if section is None:
        models[name] = tomlkit.table() if not _inline(models) else tomlkit.inline_table()
        section = models[name]
    # a table or a view of one that is written in several places; both can be changed
    assert isinstance(section, AbstractTable | OutOfOrderTableProxy)
    for key, value in settings.items():
        if value is None:
            section.pop(key, None)
        elif isinstance(value, Mapping):
            table = tomlkit.inline_table()
            table.update(value)
            section[key] = table
        else:
            section[key] = value
    try:
        ModelSettings.model_validate(section.unwrap())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("models", name, *first["loc"]))
        raise SettingsError(f"{where} would not be valid: {first['msg']}") from error


def _inline(table: Any) -> bool:
    return isinstance(table, InlineTable)


def write(path: Path, document: tomlkit.TOMLDocument) -> None:
    """Replaces the file in one step; its permissions stay. Raises SettingsError."""
    try:
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(tomlkit.dumps(document))
            os.chmod(temporary, mode)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror or error}") from error


def section_text(name: str, settings: Mapping[str, Any]) -> str:
    """The settings as a section of their own, to be pasted."""
    document = tomlkit.document()
    set_model(document, name, settings)
    return tomlkit.dumps(document)


def shadowing(name: str, settings: Mapping[str, Any]) -> list[str]:
    """Environment variables that win over these settings of the model."""
    start = f"{PREFIX}MODELS__{name}__".upper()
    keys = {key.upper() for key in settings}
    return sorted(v for v in os.environ if v.upper().startswith(start) and v.upper()[len(start) :] in keys)
