"""Records between a front and the engine process: batches, answers, errors, and JSON for everything that is rare.

Numbers are little-endian. Arrays stay where they are in shared memory; a record tells where. What the other side wrote
is checked before it is used as an index or a length: a record that makes no sense raises WireError.

    front → engine    SUBMIT, CANCEL, CONSUMED, JSON
    engine → front    ADMITTED, ANSWERED, FAILED, RELEASED, JSON
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from struct import Struct
from struct import error as StructError
from typing import Any, NamedTuple

import numpy as np

from vernier.border.batch import Answer
from vernier.errors import EngineError, QueueFull, VernierError, all_errors
from vernier.package.manifest import PRECISIONS
from vernier.tensors import DTYPES, Array, Arrays, numpy_dtype

SUBMIT, CANCEL, CONSUMED, ANSWERED, FAILED, RELEASED, JSON, ADMITTED = range(1, 9)
MAX_REQUESTS = 4096
#: NumPy's own limit.
_MAX_DIMS = 64
#: Of an error's message; the record with all requests of a batch must still fit into a datagram.
_MAX_MESSAGE = 4096

#: kind, number of the batch, model, requests, priority, precision (0 for the active one), inputs, flags. A precision is
#: its place in PRECISIONS, from 1 on, so that both sides mean the same while variants come and go.
_SUBMIT = Struct("<BQIIbBHB")
_HAS_DEADLINES, _EQUAL_ROWS, _ALL_OUTPUTS, _LAST_TRY = 1, 2, 4, 8
_CANCEL = Struct("<BQI")
#: kind, answers
_CONSUMED = Struct("<BI")
#: kind, answer, batch, first request, behind the last, queue and compute seconds, rows of the execution, outputs,
#: precision
_ANSWERED = Struct("<BQQIIddIHB")
#: kind, batch, requests
_FAILED = Struct("<BQI")
_RELEASED = Struct("<BQ")
#: memory (0 for the arena, else 1 + the position among the file descriptors), offset, dtype, dimensions
_TENSOR = Struct("<BQBB")
_DIMS = [Struct(f"<{n}Q") for n in range(_MAX_DIMS + 1)]

_DTYPES = [numpy_dtype(name) for name in DTYPES]
_DTYPE_NUMBER = {dtype: number for number, dtype in enumerate(_DTYPES)}
_ERRORS = {error.__name__: error for error in all_errors()}


class WireError(Exception):
    """A record that makes no sense; the other side is not what it should be."""


class ArrayPlace(NamedTuple):
    """Where an array lies: in the arena (`memory` 0) or in the memory of a file descriptor sent along."""

    memory: int
    offset: int


class Tensor(NamedTuple):
    """An array by its place."""

    place: ArrayPlace
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Submission(NamedTuple):
    """A batch as it arrives at the engine process.

    Attributes:
        number: of the batch, the front's own.
        model: of the catalogue.
        precision: that must compute them; None for the active one.
        outputs: numbers of the wanted outputs; None for all.
        last_try: whether it was running when an engine process died, and must wait for others of that kind.
    """

    number: int
    model: int
    rows: Sequence[int]
    arrivals: Sequence[float]
    deadlines: Sequence[float] | None
    priority: int
    precision: str | None
    outputs: Sequence[int] | None
    tensors: Sequence[Tensor]
    last_try: bool


class Answered(NamedTuple):
    """An answer as it arrives at a front.

    Attributes:
        answer: its number, under which its memory is given back.
        number: of the batch.
    """

    answer: int
    number: int
    requests: range
    precision: str
    queue_s: float
    compute_s: float
    batch_size: int
    tensors: Sequence[Tensor]


def kind_of(record: memoryview) -> int:
    if not record:
        raise WireError("an empty record")
    return record[0]


# --- tensors --------------------------------------------------------------------------------------
def _write_tensor(place: ArrayPlace, value: Array) -> bytes:
    shape = value.shape
    head = _TENSOR.pack(place.memory, place.offset, _DTYPE_NUMBER[value.dtype], len(shape))
    return head + _DIMS[len(shape)].pack(*shape)


class _Cursor:
    """Reads a record from its front. Raises WireError behind its end."""

    __slots__ = ("at", "record")

    def __init__(self, record: memoryview) -> None:
        self.record = record
        self.at = 0

    def read(self, struct: Struct) -> tuple[Any, ...]:
        try:
            values = struct.unpack_from(self.record, self.at)
        except StructError as error:
            raise WireError("a record is cut off") from error
        self.at += struct.size
        return values

    def column(self, typecode: str, count: int) -> Sequence[Any]:
        column = array(typecode)
        end = self.at + count * column.itemsize
        if end > len(self.record):
            raise WireError("a column is cut off")
        column.frombytes(self.record[self.at : end])
        self.at = end
        return column.tolist()

    def end(self) -> None:
        if self.at != len(self.record):
            raise WireError("a record is longer than what it tells")

    def tensors(self, count: int) -> list[Tensor]:
        found = []
        for _ in range(count):
            memory, offset, dtype, rank = self.read(_TENSOR)
            if dtype >= len(_DTYPES) or rank > _MAX_DIMS:
                raise WireError("a tensor of an unknown type or rank")
            found.append(Tensor(ArrayPlace(memory, offset), _DTYPES[dtype], self.read(_DIMS[rank])))
        return found


# --- batches --------------------------------------------------------------------------------------
def write_submission(
    number: int,
    model: int,
    rows: Sequence[int],
    arrivals: Sequence[float],
    deadlines: Sequence[float] | None,
    priority: int,
    precision: str | None,
    outputs: Sequence[int] | None,
    arrays: Sequence[Array],
    places: Sequence[ArrayPlace],
    last_try: bool = False,
) -> bytes:
    """Args: as of Submission; `places` of the arrays, which are in the order of the model's inputs."""
    count = len(rows)
    equal = min(rows) == max(rows)
    flags = (
        (_HAS_DEADLINES if deadlines is not None else 0)
        | (_EQUAL_ROWS if equal else 0)
        | (_ALL_OUTPUTS if outputs is None else 0)
        | (_LAST_TRY if last_try else 0)
    )
    wanted = 0 if precision is None else _precision_number(precision)
    parts = [
        _SUBMIT.pack(SUBMIT, number, model, count, priority, wanted, len(arrays), flags),
        array("Q", rows[:1] if equal else rows).tobytes(),
        array("d", arrivals).tobytes(),
    ]
    if deadlines is not None:
        parts.append(array("d", deadlines).tobytes())
    if outputs is not None:
        parts.append(array("H", (len(outputs), *outputs)).tobytes())
    parts += map(_write_tensor, places, arrays)
    return b"".join(parts)


def read_submission(record: memoryview) -> Submission:
    """Raises WireError."""
    cursor = _Cursor(record)
    _, number, model, count, priority, precision, inputs, flags = cursor.read(_SUBMIT)
    if not 0 < count <= MAX_REQUESTS:
        raise WireError(f"a batch of {count} requests")
    rows = cursor.column("Q", 1) * count if flags & _EQUAL_ROWS else cursor.column("Q", count)
    arrivals = cursor.column("d", count)
    deadlines = cursor.column("d", count) if flags & _HAS_DEADLINES else None
    outputs = None
    if not flags & _ALL_OUTPUTS:
        (wanted,) = cursor.column("H", 1)
        outputs = cursor.column("H", wanted)
    tensors = cursor.tensors(inputs)
    cursor.end()
    last_try = bool(flags & _LAST_TRY)
    if min(rows) < 1 or (last_try and count > 1):
        raise WireError("a batch with a request without rows, or of several that must run alone")
    named = None if precision == 0 else _precision(precision)
    return Submission(number, model, rows, arrivals, deadlines, priority, named, outputs, tensors, last_try)


def _precision_number(precision: str) -> int:
    return 1 + PRECISIONS.index(precision)


def _precision(number: int) -> str:
    if not 0 < number <= len(PRECISIONS):
        raise WireError(f"a precision of number {number}")
    return PRECISIONS[number - 1]


def submission_number(record: memoryview) -> int | None:
    """The batch's number in a submission that cannot be read; None when not even that can."""
    try:
        return int(_Cursor(record).read(_SUBMIT)[1])
    except WireError:
        return None


def write_cancel(number: int, index: int) -> bytes:
    return _CANCEL.pack(CANCEL, number, index)


def read_cancel(record: memoryview) -> tuple[int, int]:
    """The batch's number and the request's. Raises WireError."""
    cursor = _Cursor(record)
    _, number, index = cursor.read(_CANCEL)
    cursor.end()
    return number, index


def write_consumed(answers: Sequence[int]) -> bytes:
    """Numbers of answers that nothing refers to any more: their memory is free."""
    return _CONSUMED.pack(CONSUMED, len(answers)) + array("Q", answers).tobytes()


def read_consumed(record: memoryview) -> Sequence[int]:
    """Raises WireError."""
    cursor = _Cursor(record)
    _, count = cursor.read(_CONSUMED)
    answers = cursor.column("Q", count)
    cursor.end()
    return answers


# --- answers --------------------------------------------------------------------------------------
def write_answered(
    answer_number: int,
    number: int,
    requests: range,
    answer: Answer,
    outputs: Sequence[Array],
    places: Sequence[ArrayPlace],
) -> bytes:
    """Args: `places` of the outputs, which are in the order of the batch's."""
    head = _ANSWERED.pack(
        ANSWERED,
        answer_number,
        number,
        requests.start,
        requests.stop,
        answer.queue_s,
        answer.compute_s,
        answer.batch_size,
        len(outputs),
        _precision_number(answer.precision),
    )
    return b"".join((head, *map(_write_tensor, places, outputs)))


def read_answered(record: memoryview) -> Answered:
    """Raises WireError."""
    cursor = _Cursor(record)
    _, answer, number, start, stop, queue_s, compute_s, rows, outputs, precision = cursor.read(_ANSWERED)
    if not start < stop <= MAX_REQUESTS:
        raise WireError("an answer to no request")
    tensors = cursor.tensors(outputs)
    cursor.end()
    requests = range(start, stop)
    return Answered(answer, number, requests, _precision(precision), queue_s, compute_s, rows, tensors)


def write_failed(number: int, requests: Sequence[int], error: VernierError) -> bytes:
    text = json.dumps(error_fields(error)).encode()
    return _FAILED.pack(FAILED, number, len(requests)) + array("I", requests).tobytes() + text


def read_failed(record: memoryview) -> tuple[int, Sequence[int], VernierError]:
    """The batch's number, the requests', and the error. Raises WireError."""
    cursor = _Cursor(record)
    _, number, count = cursor.read(_FAILED)
    if count > MAX_REQUESTS:
        raise WireError(f"{count} requests of a batch failed")
    requests = cursor.column("I", count)
    return number, requests, error_of(_json_object(record[cursor.at :]))


def error_fields(error: VernierError) -> dict[str, Any]:
    """What `error_of` makes the error of."""
    fields: dict[str, Any] = {"type": type(error).__name__, "message": error.message[:_MAX_MESSAGE]}
    if isinstance(error, QueueFull):
        fields |= {"retry_after_s": error.retry_after_s, "reason": error.reason}
    return fields


def error_of(fields: dict[str, Any]) -> VernierError:
    """The error that `type`, `message` and perhaps `retry_after_s` and `reason` tell of. Raises WireError."""
    name, message = fields.get("type"), fields.get("message")
    if not isinstance(name, str) or not isinstance(message, str):
        raise WireError("an error without type and message")
    kind = _ERRORS.get(name, EngineError)
    if not issubclass(kind, QueueFull):
        return kind(message)
    retry_after_s, reason = fields.get("retry_after_s"), fields.get("reason")
    if not isinstance(retry_after_s, (int, float)) or not isinstance(reason, str):
        raise WireError("a refusal that does not tell when to come back")
    return kind(message, retry_after_s, reason)


def write_admitted(number: int) -> bytes:
    """The requests of a batch that have not ended wait or run."""
    return _RELEASED.pack(ADMITTED, number)


def write_released(number: int) -> bytes:
    return _RELEASED.pack(RELEASED, number)


def read_number(record: memoryview) -> int:
    """Of the batch that an ADMITTED or RELEASED record tells of. Raises WireError."""
    cursor = _Cursor(record)
    _, number = cursor.read(_RELEASED)
    cursor.end()
    return int(number)


# --- everything that is rare ----------------------------------------------------------------------
def write_json(message: dict[str, Any]) -> bytes:
    return bytes((JSON,)) + json.dumps(message).encode()


def read_json(record: memoryview) -> dict[str, Any]:
    """Raises WireError."""
    return _json_object(record[1:])


def _json_object(text: memoryview) -> dict[str, Any]:
    try:
        message = json.loads(bytes(text))
    except (ValueError, RecursionError) as error:
        raise WireError("a message is not JSON") from error
    if not isinstance(message, dict):
        raise WireError("a message is no object")
    return message


def arrays_of(names: Sequence[str], tensors: Sequence[Tensor], read: Callable[[Tensor], Array]) -> Arrays:
    """Arrays by name. Raises WireError when their number or their place is wrong."""
    if len(names) != len(tensors):
        raise WireError(f"{len(tensors)} arrays for {len(names)} names")
    try:
        return {name: read(tensor) for name, tensor in zip(names, tensors, strict=True)}
    except (ValueError, IndexError, OverflowError, OSError, MemoryError) as error:
        raise WireError(f"an array cannot be read where it should lie: {error}") from error
