"""Every error that Vernier raises on purpose, in one tree.

    VernierError
    ├── RequestError            the client can mend it; `message` is sent to the client
    │   ├── InvalidJson, UnknownInput, MissingInput, WrongDtype, WrongShape,
    │   │   NonFiniteInput, UnknownOutput, UnsupportedPrecision,
    │   │   InvalidHttp                                                  (400)
    │   ├── Unauthorized, Forbidden                                      (401, 403)
    │   ├── UnknownModel, UnknownVersion                                 (404)
    │   ├── RequestTimeout, LoadRefused, BodyTooLarge,
    │   │   UnsupportedMediaType                                           (408, 409, 413, 415)
    │   ├── QueueFull, RateLimited                                       (429)
    │   ├── HeadTooLarge                                                 (431)
    │   ├── NotReady, EngineRestarting, Draining, Overloaded             (503)
    │   └── DeadlineExceeded                                             (504)
    ├── Cancelled               the client went away; nobody is left to read an answer
    ├── EngineError             a runtime or device failed
    │   ├── PlanMismatch        the plan does not fit this GPU, runtime or variant
    │   ├── DeviceFailed        the device is lost until the process restarts
    │   └── SlotConflict        two threads used one slot (a programming error)
    ├── AccuracyError           accuracy cannot be measured: nothing to compare, shapes or labels do not fit
    ├── PackageError            an engine package is damaged, tampered with or of an unknown schema
    ├── BuildInterrupted        build_engine.py was interrupted, and says what it left; exit code 130
    └── BuildError              build_engine.py cannot go on; exit code 2
        ├── DataChanged         a data file changed while it was read
        ├── ResumeError         the file of `--resume` cannot be used
        └── GateRefused         the build ran, and the accuracy gate refused it; exit code 1

Errors outside `RequestError` never reach a client in words: the API answers `internal` and logs
the rest under the request's id. The class carries its wire code, so this file is the only table
from error to HTTP status and gRPC status.
"""

from __future__ import annotations

from typing import ClassVar, Iterator, Optional, Type

MAX_SHOWN_CHARACTERS = 128


def shown(text: str) -> str:
    """A client's own text in quotes for a message, cut after MAX_SHOWN_CHARACTERS so that the sentence stays one."""
    if len(text) > MAX_SHOWN_CHARACTERS:
        text = text[:MAX_SHOWN_CHARACTERS] + "…"
    return f"'{text}'"


class VernierError(Exception):
    """Root of the tree.

    Args:
        message: one sentence that says what is wrong and what to do.
    """

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RequestError(VernierError):
    """Something the client can mend. The message is part of the answer."""

    code = "invalid_request"
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"


class InvalidHttp(RequestError):
    """What arrived is no HTTP request, or one that two servers could read differently. The connection ends."""

    code = "invalid_http"


class InvalidJson(RequestError):
    code = "invalid_json"


class UnknownInput(RequestError):
    code = "unknown_input"


class MissingInput(RequestError):
    code = "missing_input"


class WrongDtype(RequestError):
    code = "wrong_dtype"


class WrongShape(RequestError):
    code = "wrong_shape"


class NonFiniteInput(RequestError):
    code = "non_finite_input"


class UnknownOutput(RequestError):
    code = "unknown_output"


class UnsupportedPrecision(RequestError):
    code = "unsupported_precision"


class Unauthorized(RequestError):
    code = "unauthorized"
    http_status = 401
    grpc_status = "UNAUTHENTICATED"


class Forbidden(RequestError):
    code = "forbidden"
    http_status = 403
    grpc_status = "PERMISSION_DENIED"


class UnknownModel(RequestError):
    code = "unknown_model"
    http_status = 404
    grpc_status = "NOT_FOUND"


class UnknownVersion(RequestError):
    code = "unknown_version"
    http_status = 404
    grpc_status = "NOT_FOUND"


class RequestTimeout(RequestError):
    """The client did not send its request within the time allowed."""

    code = "request_timeout"
    http_status = 408
    grpc_status = "DEADLINE_EXCEEDED"


class LoadRefused(RequestError):
    """An administrator asked for a package that cannot be served; what was served before is served still."""

    code = "load_refused"
    http_status = 409
    grpc_status = "FAILED_PRECONDITION"


class BodyTooLarge(RequestError):
    code = "body_too_large"
    http_status = 413
    grpc_status = "RESOURCE_EXHAUSTED"


class UnsupportedMediaType(RequestError):
    code = "unsupported_media_type"
    http_status = 415


class QueueFull(RequestError):
    """Refused at admission: nothing was queued, so a retry after `retry_after_s` is safe.

    Args:
        reason: as `vernier_requests_rejected_total` counts it: `queue_full`, or `deadline` where the wait is too long.
    """

    code = "queue_full"
    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float = 1.0, reason: str = "queue_full") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason


class RateLimited(QueueFull):
    code = "rate_limited"


class HeadTooLarge(RequestError):
    """The head of a request, or what stands behind the last chunk of its body, does not end in time."""

    code = "head_too_large"
    http_status = 431
    grpc_status = "RESOURCE_EXHAUSTED"


class NotReady(RequestError):
    code = "not_ready"
    http_status = 503
    grpc_status = "UNAVAILABLE"


class EngineRestarting(NotReady):
    """The engine process has died and is being started again: nothing was queued, so a retry is safe."""

    code = "engine_restarting"


class Draining(RequestError):
    code = "draining"
    http_status = 503
    grpc_status = "UNAVAILABLE"


class Overloaded(RequestError):
    """The process holds as many bytes of requests, or decodes as many long ones, as it may. Nothing was queued."""

    code = "overloaded"
    http_status = 503
    grpc_status = "UNAVAILABLE"
    retry_after_s = 1.0


class DeadlineExceeded(RequestError):
    code = "deadline_exceeded"
    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"


class Cancelled(VernierError):
    """The client disconnected. 499 appears in logs and metrics alone: nobody reads the answer."""

    code = "cancelled"
    http_status = 499
    grpc_status = "CANCELLED"


class EngineError(VernierError):
    """A runtime or device failed to load or to execute."""


class PlanMismatch(EngineError):
    """A plan was made for another GPU, another runtime version or another variant."""


class DeviceFailed(EngineError):
    """A sticky device error: every later call on this device fails until the process restarts."""


class SlotConflict(EngineError):
    """Two threads used one slot at the same time."""


class AccuracyError(VernierError):
    """Accuracy cannot be measured: nothing to compare, or shapes, labels and metric do not fit."""


class PackageError(VernierError):
    """An engine package is damaged, tampered with, incomplete or of an unknown schema."""


class BuildInterrupted(VernierError):
    """Ctrl-C. The message says what is left of the build."""


class BuildError(VernierError):
    """build_engine.py cannot go on. `exit_code` is what the command line ends with."""

    exit_code: ClassVar[int] = 2


class DataChanged(BuildError):
    """A data file was truncated or written to while the build read it, so that nothing is known about its samples."""


class ResumeError(BuildError):
    """The file of `--resume` is not one that may be replaced, or it cannot be read or written."""


class GateRefused(BuildError):
    """The accuracy gate refused what was built."""

    exit_code = 1


def all_errors(root: Optional[Type[VernierError]] = None) -> Iterator[Type[VernierError]]:
    """Yields `root` (default: the whole tree) and every class below it, parents first."""
    root = root or VernierError
    yield root
    for child in root.__subclasses__():
        yield from all_errors(child)
