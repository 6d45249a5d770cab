"""Records between processes: what is written is read, and whatever else comes is refused in one way."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vernier.border.batch import Answer
from vernier.border.memory.arena import CHUNK_BYTES, Arena, ArenaReader, create_memfd
from vernier.border.memory.placement import PlacedReader, place
from vernier.border.records import wire
from vernier.errors import QueueFull, RateLimited, VernierError, all_errors
from vernier.package.manifest import PRECISIONS
from vernier.tensors import DTYPES, numpy_dtype

NUMBERS = st.integers(0, 2**64 - 1)
SMALL = st.integers(0, 2**32 - 1)
TIMES = st.floats(allow_nan=False)
PLACES = st.builds(wire.ArrayPlace, st.integers(0, 255), st.integers(0, 2**64 - 1))
SHAPES = st.lists(st.integers(0, 4), max_size=6)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = numpy_dtype(draw(st.sampled_from(DTYPES)))
    return np.zeros(draw(SHAPES), dtype)


@st.composite
def submissions(draw: st.DrawFn) -> tuple[dict[str, Any], list[np.ndarray], list[wire.ArrayPlace]]:
    count = draw(st.integers(1, 70))
    same = draw(st.booleans())
    rows = [draw(st.integers(1, 2**63))] * count if same else draw(_list(st.integers(1, 2**63), count))
    sent = draw(st.lists(arrays(), max_size=4))
    fields = {
        "number": draw(NUMBERS),
        "model": draw(SMALL),
        "rows": rows,
        "arrivals": draw(_list(TIMES, count)),
        "deadlines": draw(st.none() | _list(TIMES, count)),
        "priority": draw(st.integers(-128, 127)),
        "precision": draw(st.none() | st.sampled_from(PRECISIONS)),
        "outputs": draw(st.none() | st.lists(st.integers(0, 2**16 - 1), max_size=300)),
        "last_try": count == 1 and draw(st.booleans()),
    }
    return fields, sent, draw(_list(PLACES, len(sent)))


def _list(values: st.SearchStrategy[Any], count: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, min_size=count, max_size=count)


@given(submissions())
def test_submissions(drawn: tuple[dict[str, Any], list[np.ndarray], list[wire.ArrayPlace]]) -> None:
    fields, sent, places = drawn
    found = wire.read_submission(memoryview(wire.write_submission(**fields, arrays=sent, places=places)))
    for name, value in fields.items():
        assert getattr(found, name) == value, name
    assert [tensor.place for tensor in found.tensors] == places
    assert [(tensor.dtype, tensor.shape) for tensor in found.tensors] == [(a.dtype, a.shape) for a in sent]


@given(NUMBERS, st.integers(0, 4095), st.lists(arrays(), max_size=4), st.sampled_from(PRECISIONS), st.data())
def test_answers(
    number: int, start: int, sent: list[np.ndarray], precision: str, data: st.DataObject
) -> None:
    requests = range(start, data.draw(st.integers(start + 1, 4096)))
    places = data.draw(_list(PLACES, len(sent)))
    answer = Answer({}, precision, data.draw(TIMES), data.draw(TIMES), data.draw(SMALL))
    found = wire.read_answered(memoryview(wire.write_answered(5, number, requests, answer, sent, places)))
    assert found[:7] == (
        5,
        number,
        requests,
        precision,
        answer.queue_s,
        answer.compute_s,
        answer.batch_size,
    )
    assert [tensor.place for tensor in found.tensors] == places
    assert [(tensor.dtype, tensor.shape) for tensor in found.tensors] == [(a.dtype, a.shape) for a in sent]


@given(NUMBERS, st.lists(SMALL, max_size=300), st.sampled_from(sorted(all_errors(), key=str)), st.text())
def test_failures(number: int, requests: list[int], kind: type[VernierError], message: str) -> None:
    error = kind(message, 2.5, "deadline") if issubclass(kind, QueueFull) else kind(message)
    found_number, found, told = wire.read_failed(memoryview(wire.write_failed(number, requests, error)))
    assert (found_number, list(found)) == (number, requests)
    assert (type(told), told.message) == (kind, message)
    if isinstance(told, QueueFull):
        assert (told.retry_after_s, told.reason) == (2.5, "deadline")


def test_what_tells_of_every_request_and_all_its_reason_fits_into_a_datagram() -> None:
    record = wire.write_failed(1, range(wire.MAX_REQUESTS), RateLimited("\N{GRINNING FACE}" * 10**6))
    assert len(record) < 200_000
    assert len(wire.read_failed(memoryview(record))[1]) == wire.MAX_REQUESTS


@given(NUMBERS, SMALL, st.lists(NUMBERS, max_size=100))
def test_short_records(number: int, index: int, answers: list[int]) -> None:
    assert wire.read_cancel(memoryview(wire.write_cancel(number, index))) == (number, index)
    assert wire.read_consumed(memoryview(wire.write_consumed(answers))) == answers
    for record in (wire.write_admitted(number), wire.write_released(number)):
        assert wire.read_number(memoryview(record)) == number


READERS: list[Callable[[memoryview], Any]] = [
    wire.read_submission,
    wire.read_answered,
    wire.read_failed,
    wire.read_cancel,
    wire.read_consumed,
    wire.read_number,
    wire.read_json,
    wire.kind_of,
    wire.submission_number,
]


def _good() -> list[bytes]:
    sent = [np.zeros((2, 3), np.float32), np.zeros((2,), np.int64)]
    places = [wire.ArrayPlace(0, 64), wire.ArrayPlace(1, 0)]
    error = QueueFull("full", 1.0)
    return [
        wire.write_submission(1, 2, [1, 1], [0.0, 1.0], [2.0, 3.0], 0, "int8", [0, 1], sent, places),
        wire.write_submission(7, 2, [2], [0.0], None, 1, None, None, sent, places, True),
        wire.write_answered(5, 1, range(2), Answer({}, "fp32", 0.1, 0.2, 8), sent, places),
        wire.write_failed(1, [0, 1], error),
        wire.write_cancel(1, 1),
        wire.write_consumed([1, 2, 3]),
        wire.write_released(3),
        wire.write_json({"type": "taken", "generation": 3}),
    ]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@settings(max_examples=400)
@given(st.data())
def test_whatever_makes_no_sense_is_a_wire_error(
    reader: Callable[[memoryview], Any], data: st.DataObject
) -> None:
    record = bytearray(data.draw(st.sampled_from(_good()) | st.binary(max_size=80)))
    for _ in range(data.draw(st.integers(0, 4))):
        if record:
            at = data.draw(st.integers(0, len(record) - 1))
            record[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(record)))
    piece = bytes(record[:cut]) + data.draw(st.just(b"") | st.binary(max_size=8))
    try:
        found = reader(memoryview(piece))
    except wire.WireError:
        return
    if isinstance(
        found, (wire.Submission, wire.Answered)
    ):  # where its arrays lie is checked when they are read
        fd = create_memfd("test", CHUNK_BYTES)
        try:
            reading = PlacedReader(ArenaReader(fd), ())
            wire.arrays_of([str(n) for n in range(len(found.tensors))], found.tensors, reading.read)
        except wire.WireError:
            pass
        finally:
            os.close(fd)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["type", "message", "reason"]), inner),
)


@given(st.dictionaries(st.sampled_from(["type", "message", "retry_after_s", "reason"]), JSON))
def test_an_error_of_any_fields_is_an_error_or_a_wire_error(fields: dict[str, Any]) -> None:
    for kind in (fields.get("type"), "QueueFull"):
        with contextlib.suppress(wire.WireError):
            assert isinstance(wire.error_of({**fields, "type": kind}), VernierError)
    head = wire.write_failed(1, [], VernierError(""))[: -len(json.dumps(wire.error_fields(VernierError(""))))]
    with pytest.raises(wire.WireError):
        wire.read_failed(memoryview(head + b"[" * 100_000))


@settings(max_examples=60, deadline=None)
@given(st.lists(arrays(), min_size=1, max_size=5), st.booleans(), st.randoms())
def test_arrays_are_read_as_they_were_placed(sent: list[np.ndarray], full: bool, random: Any) -> None:
    """Every type, empty ones and those without dimensions, in the arena and in memory of their own."""
    for array in sent:
        array.reshape(-1).view(np.uint8)[...] = random.randrange(2)
    given_arrays = [array.T if random.random() < 0.3 else array for array in sent]
    fd = create_memfd("test", CHUNK_BYTES)
    try:
        arena = Arena(fd, CHUNK_BYTES)
        hoard = arena.take(CHUNK_BYTES) if full else None
        placed = place(given_arrays, arena)
        assert len(placed.fds) <= 1
        record = wire.write_answered(5, 1, range(1), Answer({}, "fp32", 0, 0, 1), given_arrays, placed.places)
        answered = wire.read_answered(memoryview(record))
        names = [str(n) for n in range(len(sent))]
        found = wire.arrays_of(names, answered.tensors, PlacedReader(ArenaReader(fd), placed.fds).read)
        for name, array in zip(names, given_arrays, strict=True):
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(found[name], array)
            assert not found[name].flags.writeable or not found[name].size
        for own in placed.fds:
            os.close(own)
        del hoard
    finally:
        os.close(fd)
