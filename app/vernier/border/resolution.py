"""Which version of which model a request means."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from vernier.errors import NotReady, UnknownModel, UnknownVersion, shown
from vernier.package.integrity import read_version

M = TypeVar("M")

Awaited = Mapping[str, Collection[int]]


def find_model(
    served: Mapping[str, Mapping[int, M]],
    awaited: Awaited,
    name: str | None,
    version: str | None,
    not_ready_reason: Callable[[], str | None],
) -> M:
    """The version asked for, or the newest.

    Args:
        served: by name and version.
        awaited: name → versions that were found on disk and have not been tried yet.
        not_ready_reason: why nothing is served, in a sentence.

    Raises UnknownModel, UnknownVersion, NotReady.
    """
    if name is None:
        name = _only_name(served, awaited, not_ready_reason)
    versions = served.get(name)
    if versions is None and name not in awaited:
        raise _unknown(served, awaited, name, not_ready_reason)
    if version is None:
        if versions is None:
            raise NotReady(f"model '{name}' is still loading; send the request again soon")
        return versions[max(versions)]
    number = read_version(version)
    if versions is not None and number is not None and number in versions:
        return versions[number]
    coming = awaited.get(name, ())
    if number in coming:
        raise NotReady(f"version {number} of model '{name}' is still loading; send the request again soon")
    offered = ", ".join(str(v) for v in sorted({*coming, *(versions or ())}))
    raise UnknownVersion(f"model '{name}' has no version {shown(version)}; it has {offered}")


def _only_name(
    served: Mapping[str, object], awaited: Awaited, not_ready_reason: Callable[[], str | None]
) -> str:
    """The model of a request that names none. Raises UnknownModel, NotReady."""
    if len(served) == 1 and not awaited:
        return next(iter(served))
    names = sorted(served.keys() | awaited.keys())
    if not names:
        raise _nothing_served(not_ready_reason)
    if len(names) == 1:
        return names[0]
    if len(served) < 2:  # packages may still be refused until a single model is left
        raise NotReady(
            f"models are still loading; name one of {', '.join(names)} as 'model', or send the request again soon"
        )
    raise UnknownModel(f"say which model: 'model' must be one of {', '.join(names)}")


def _unknown(
    served: Mapping[str, object], awaited: Awaited, name: str, not_ready_reason: Callable[[], str | None]
) -> NotReady | UnknownModel:
    """For a model that is neither served nor about to be."""
    names = sorted(served.keys() | awaited.keys())
    if not names:
        return _nothing_served(not_ready_reason)
    return UnknownModel(f"there is no model {shown(name)} here; there are {', '.join(names)}")


def _nothing_served(not_ready_reason: Callable[[], str | None]) -> NotReady:
    return NotReady(not_ready_reason() or "no model is loaded yet; try again soon")
