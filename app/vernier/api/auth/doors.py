"""Who may come in by which door: the one table of paths and methods, whichever protocol they belong to.

What is not named here needs a key, if the service has any.
"""

from __future__ import annotations

from enum import Enum

from vernier.api.auth.security import Guard, Permit


class Permission(Enum):
    """OPEN: probes, scrapes and schemas, since the platform has no key. ADMIN: the administration token."""

    OPEN = "open"
    PREDICT = "predict"
    ADMIN = "admin"


#: Beginnings of paths.
OPEN_PATHS = ("/v2/health/", "/metrics", "/ping", "/docs", "/openapi.json")
ADMIN_PATHS = ("/v2/repository",)

_SERVICE = "/inference.GRPCInferenceService/"
#: Beginnings of gRPC methods.
OPEN_METHODS = (
    f"{_SERVICE}ServerLive",
    f"{_SERVICE}ServerReady",
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1alpha.ServerReflection/",
)
ADMIN_METHODS = (f"{_SERVICE}Repository",)


def permission_of(door: str) -> Permission:
    """Of a path of HTTP, percent-decoded and without a proxy's prefix, or of a method of gRPC, such as
    `/inference.GRPCInferenceService/ModelInfer`."""
    if door.startswith(ADMIN_PATHS + ADMIN_METHODS):
        return Permission.ADMIN
    return Permission.OPEN if door.startswith(OPEN_PATHS + OPEN_METHODS) else Permission.PREDICT


def admit(guard: Guard, permission: Permission, token: str | None) -> Permit:
    """Leave for one request. Raises Unauthorized, Forbidden, RateLimited."""
    if permission is Permission.ADMIN:
        guard.admit_admin(token)
        return Permit()
    if permission is Permission.OPEN:
        return Permit()
    return guard.admit(token)
