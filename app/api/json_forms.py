"""The form of a JSON body: the text between what each request has for itself, which are the numbers of each input,
perhaps an id, and perhaps a timeout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, repeat
from typing import Literal, NamedTuple

import numpy as np

from app.api.codecs import Body, PredictRequest
from app.api.forms import Apart, Form
from app.api.json_tensors import WAYS, decode_rows
from app.api.service import Prepared
from app.serving.repository import LoadedModel
from app.tensors import Arrays

#: An input of one row: its name, the brackets around its numbers, and these.
_INPUT = re.compile(rb'"([^"\\]*)"\s*:\s*(\[[\[\s]*)([^\[\]"]*)\]')
_ID = re.compile(rb'(?<!\\)"id"\s*:\s*"([^"\\]*)"')
_TIMEOUT = re.compile(rb'(?<!\\)"timeout_ms"\s*:\s*([-+.\deE]+)')
#: A number in JSON that is not negative.
_NUMBER = re.compile(rb"(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_LONGEST_TIMEOUT_MS = 1e9

Kind = Literal["numbers", "id", "timeout"]


class Gap(NamedTuple):
    """Where bodies of a form differ: [start, stop) in the body that it was learned from, and what stands there."""

    start: int
    stop: int
    kind: Kind
    name: str = ""  # of the input


class JsonForm(Form):
    """A text with gaps, and the same text around them."""

    __slots__ = ("_after", "_before", "_between", "_id_at", "_numbers_at", "_timeout_at")

    def __init__(
        self,
        envelope: PredictRequest,
        timeout_ms: float | None,
        model: LoadedModel,
        prepared: Prepared,
        body: bytes,
        gaps: Sequence[Gap],
    ) -> None:
        before, after = body[: gaps[0].start], body[gaps[-1].stop :]
        between = [body[gap.stop : following.start] for gap, following in pairwise(gaps)]
        places = {(gap.kind, gap.name): at for at, gap in enumerate(gaps)}
        self._id_at, self._timeout_at = places.get(("id", "")), places.get(("timeout", ""))
        if self._id_at is not None:
            envelope = replace(envelope, id=None)
        if self._timeout_at is not None:
            envelope, timeout_ms = replace(envelope, timeout_ms=None), None
        super().__init__(envelope, timeout_ms, model, prepared, (before, *between, after))
        self._numbers_at = [places["numbers", name] for name, _, _ in self.inputs]
        self._before = before
        self._between = between
        self._after = after

    def looks_like(self, text: Body, start: int = 0) -> bool:
        if isinstance(text, memoryview):
            return False
        return text.startswith(self._before, start) and text.endswith(self._after)

    def take_apart(self, texts: Sequence[Body], starts: Sequence[int]) -> Apart | None:
        before, after = self._before, self._after
        skip, stop = len(before), -len(after)
        plain = [text if type(text) is bytes else bytes(text) for text in texts]
        if not (
            all(map(bytes.startswith, plain, repeat(before), starts))
            and all(map(bytes.endswith, plain, repeat(after)))
        ):
            return None
        rest: Sequence[bytes] = [text[start + skip : stop] for text, start in zip(plain, starts, strict=True)]
        if not self._between:
            return Apart([rest])
        columns: list[Sequence[bytes]] = []
        for text in self._between:
            column, found, rest = zip(*map(bytes.partition, rest, repeat(text)), strict=True)
            if not all(found):
                return None
            columns.append(column)
        columns.append(rest)
        ids = timeouts_ms = None
        if self._id_at is not None and (ids := _ids(columns[self._id_at])) is None:
            return None
        if self._timeout_at is not None and (timeouts_ms := _timeouts_ms(columns[self._timeout_at])) is None:
            return None
        return Apart([columns[at] for at in self._numbers_at], ids, timeouts_ms)

    def decode(self, apart: Apart) -> Arrays | None:
        arrays: Arrays = {}
        for (name, dtype, shape), texts in zip(self.inputs, apart.numbers, strict=True):
            array = decode_rows(texts, WAYS[dtype.name], shape)
            if array is None:
                return None
            arrays[name] = array
        return arrays


def _ids(texts: Sequence[bytes]) -> list[str] | None:
    """None when one is not plain text."""
    together = b"".join(texts)
    if (
        together.isascii()
        and together.decode().isprintable()
        and b'"' not in together
        and b"\\" not in together
    ):
        return [text.decode() for text in texts]
    return None


def _timeouts_ms(texts: Sequence[bytes]) -> list[float] | None:
    """None when one is no number that a timeout can be."""
    if not all(map(_NUMBER.fullmatch, texts)):
        return None
    timeouts_ms = list(map(float, texts))
    return timeouts_ms if max(timeouts_ms) < _LONGEST_TIMEOUT_MS else None


def json_form(
    body: Body, envelope: PredictRequest, timeout_ms: float | None, model: LoadedModel, prepared: Prepared
) -> Form | None:
    """The form of a body that was prepared; None when it has none.

    Every input must have one row: as many lists as the array has dimensions, each inside the last.

    Args:
        timeout_ms: that holds, be it the request's or the service's own.
    """
    if isinstance(body, memoryview):
        return None
    body = bytes(body)
    gaps = _gaps(body, envelope, prepared[0])
    if gaps is None:
        return None
    form = JsonForm(envelope, timeout_ms, model, prepared, body, gaps)
    apart = form.take_apart([body], [0])
    read = None if apart is None else form.decode(apart)
    if read is None or not all(np.array_equal(read[name][0], array) for name, array in prepared[0].items()):
        return None  # an odd text, which it would read otherwise
    return form


def _gaps(body: bytes, envelope: PredictRequest, arrays: Arrays) -> list[Gap] | None:
    """In their order; None when the text is not one of plain lists."""
    lists = sum(array.ndim for array in arrays.values()) + (envelope.outputs is not None)
    if body.count(b"[") != lists:
        return None  # other lists, or brackets in a text
    gaps = []
    for found in _INPUT.finditer(body):
        name = found[1].decode("utf-8", "replace")
        array = arrays.get(name)
        if array is None or not found[3].strip():
            continue  # the list of outputs
        if array.dtype.kind == "b" or array.size != array.shape[-1] or found[2].count(b"[") != array.ndim:
            return None
        gaps.append(Gap(*found.span(3), "numbers", name))
    if sorted(gap.name for gap in gaps) != sorted(arrays):
        return None
    gaps += _found_once(_ID, body, "id") if envelope.id is not None else []
    gaps += _found_once(_TIMEOUT, body, "timeout") if envelope.timeout_ms is not None else []
    return sorted(gaps)


def _found_once(pattern: re.Pattern[bytes], body: bytes, kind: Kind) -> list[Gap]:
    found = list(pattern.finditer(body))
    return [Gap(*found[0].span(1), kind)] if len(found) == 1 else []
