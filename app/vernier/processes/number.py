"""How many front and engine processes the service has."""

from __future__ import annotations

import sys

from vernier.cores import available_cores
from vernier.settings import Settings, SettingsError

#: More fronts than this gain nothing: one engine process cannot keep up with them (benchmarks/SCALING.md).
MAX_DEFAULT = 8


def front_count(settings: Settings) -> int:
    """Front processes; 0 for everything in one process. Raises SettingsError where there can be none.

    On one core processes would only take turns; elsewhere half of the cores serve clients and half compute.
    """
    supported = sys.platform == "linux"
    if settings.fronts is not None:
        if settings.fronts and not supported:
            raise SettingsError("VERNIER_FRONTS needs Linux; set it to 0 here")
        return settings.fronts
    cores = available_cores()
    return min(cores // 2, MAX_DEFAULT) if supported and cores > 1 else 0


def engine_count(settings: Settings, fronts: int) -> int:
    """Engine processes: by default one for each GPU. Raises SettingsError where there can be only one."""
    asked = settings.engine_processes
    if fronts:
        return asked or len(settings.devices)
    if asked is not None and asked > 1:
        raise SettingsError(
            f"VERNIER_ENGINE_PROCESSES is {asked}, but without front processes there is only one; "
            "set VERNIER_FRONTS to 1 or more"
        )
    return 1
