"""The template of a JSON body: the text between what each request has for itself, which are the numbers of each input,
perhaps an id, and perhaps a timeout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise, repeat
from operator import mul
from typing import Literal, NamedTuple

import numpy as np

from vernier.api.formats.codecs import TOO_LONG_MS, Body, PredictRequest
from vernier.api.formats.json_tensors import NUMBER_FORMATS, decode_lists
from vernier.api.http.identity import are_plain
from vernier.api.service import Prepared
from vernier.border.catalogue import ServedModel
from vernier.border.signature import Signature
from vernier.front.templates import Decoded, Extracted, Template
from vernier.tensors import Array, Arrays

#: An input: its name, the brackets before its numbers, and these; rows are lists inside a list, or numbers in one.
_INPUT = re.compile(rb'"([^"\\]*)"\s*:\s*(?:(\[\s*\[[\[\s]*)([^"]*?)\]\s*\]|(\[)([^\[\]"]*)\])')
_ID = re.compile(rb'"id"\s*:\s*"([^"\\]*)"')
_TIMEOUT = re.compile(rb'"timeout_ms"\s*:\s*([-+.\deE]+)')
#: A number in JSON that is not negative.
_NUMBER = re.compile(rb"(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
#: No template is looked for in longer bodies: that would hold up the loop, and saves little beside the rest.
_LONGEST_BYTES = 256 * 1024
#: What is kept of a template.
_LONGEST_AROUND_BYTES = 4096

Kind = Literal["numbers", "id", "timeout"]


class Gap(NamedTuple):
    """Where bodies of a template differ: [start, stop) in the body that it was learned from, and what stands there."""

    start: int
    stop: int
    kind: Kind
    name: str = ""  # of the input


class JsonTemplate(Template):
    """A text with gaps, and the same text around them."""

    __slots__ = (
        "_after",
        "_before",
        "_between",
        "_id_at",
        "_numbers_at",
        "_one",
        "_timeout_at",
        "_ways",
    )

    def __init__(
        self,
        envelope: PredictRequest,
        timeout_ms: float | None,
        model: ServedModel,
        prepared: Prepared,
        body: bytes,
        gaps: Sequence[Gap],
        any_rows: bool,
    ) -> None:
        before, after = body[: gaps[0].start], body[gaps[-1].stop :]
        between = [body[gap.stop : following.start] for gap, following in pairwise(gaps)]
        places = {(gap.kind, gap.name): at for at, gap in enumerate(gaps)}
        self._id_at, self._timeout_at = places.get(("id", "")), places.get(("timeout", ""))
        if self._id_at is not None:
            envelope = replace(envelope, id=None)
        if self._timeout_at is not None:
            envelope, timeout_ms = replace(envelope, timeout_ms=None), None
        super().__init__(envelope, timeout_ms, model, prepared, (before, *between, after), any_rows)
        self._one = 1 if self._any_rows else self.rows
        self._numbers_at = [places["numbers", name] for name, _, _ in self.inputs]
        self._ways = [NUMBER_FORMATS[dtype.name] for _, dtype, _ in self.inputs]
        self._before = before
        self._between = between
        self._after = after

    def looks_like(self, text: Body, start: int = 0) -> bool:
        if isinstance(text, memoryview):
            return False
        return text.startswith(self._before, start) and text.endswith(self._after)

    def extract(self, texts: Sequence[Body], starts: Sequence[int]) -> Extracted | None:
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
            return Extracted([rest])
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
        return Extracted([columns[at] for at in self._numbers_at], ids, timeouts_ms)

    def decode(self, extracted: Extracted) -> Decoded | None:
        arrays: Arrays = {}
        rows: Sequence[int] = ()
        for (name, _, shape), way, texts in zip(self.inputs, self._ways, extracted.numbers, strict=True):
            found = decode_lists(texts, way)
            if found is None:
                return None
            numbers, lengths = found
            own: Sequence[int]
            if len(lengths) == len(texts):
                own = lengths if self._any_rows and len(shape) == 1 else [self._one] * len(texts)
            elif self._any_rows and len(shape) == 2:
                own = [1 + bytes(text).count(b"[") for text in texts]
            else:
                return None
            if len(shape) > 1 or not self._any_rows:
                if set(lengths) != {shape[-1]}:
                    return None
                numbers = numbers.reshape(-1, *shape[1:])
            if not all(own) or (rows and rows != own):
                return None
            rows = own
            arrays[name] = numbers
        return Decoded(arrays, rows)


def _ids(texts: Sequence[bytes]) -> list[str] | None:
    """None when one is not plain text."""
    together = b"".join(texts)
    return [text.decode() for text in texts] if together.isascii() and are_plain(together.decode()) else None


def _timeouts_ms(texts: Sequence[bytes]) -> list[float] | None:
    """None when one is no number that a timeout can be."""
    if not all(map(_NUMBER.fullmatch, texts)):
        return None
    timeouts_ms = list(map(float, texts))
    return timeouts_ms if max(timeouts_ms) < TOO_LONG_MS else None


def json_template(
    body: Body, envelope: PredictRequest, timeout_ms: float | None, model: ServedModel, prepared: Prepared
) -> Template | None:
    """The template of a body that was prepared; None when it has none.

    Where all inputs have the batch first and at most one more dimension, bodies may have any number of rows; otherwise
    their lists must be each inside the last, and all bodies as long.

    Args:
        timeout_ms: that holds, be it the request's or the service's own.
    """
    if isinstance(body, memoryview) or len(body) > _LONGEST_BYTES:
        return None
    body = bytes(body)
    any_rows = _may_have_any_rows(model.signature)
    gaps = _gaps(body, envelope, prepared[0], any_rows)
    if gaps is None:
        return None
    template = JsonTemplate(envelope, timeout_ms, model, prepared, body, gaps, any_rows)
    extracted = template.extract([body], [0])
    decoded = None if extracted is None else template.decode(extracted)
    if extracted is None or decoded is None:
        return None
    (read,) = decoded.each()
    is_right = (
        all(np.array_equal(read[name], array) for name, array in prepared[0].items())
        and extracted.ids in (None, [envelope.id])
        and extracted.timeouts_ms in (None, [envelope.timeout_ms])
    )
    return template if is_right else None  # an odd text, which it would read otherwise


def _may_have_any_rows(signature: Signature) -> bool:
    dim = signature.batch_dim
    return dim is not None and all(
        spec.shape[:1] == (dim,) and dim not in spec.shape[1:] for spec in signature.inputs.values()
    )


def _gaps(body: bytes, envelope: PredictRequest, arrays: Arrays, any_rows: bool) -> list[Gap] | None:
    """In their order; None when the text is not one of plain lists."""
    if b"\\" in body or body.count(b'"inputs"') != 1:
        return None  # names could be written in two ways, or a field come twice
    lists = sum(_lists(array) for array in arrays.values()) + (envelope.outputs is not None)
    if body.count(b"[") != lists:
        return None  # other lists, or brackets in a text
    gaps = []
    for found in _INPUT.finditer(body):
        name = found[1].decode("utf-8", "replace")
        group = 3 if found[3] is not None else 5
        array = arrays.get(name)
        if array is None or not found[group].strip():
            continue  # the list of outputs
        may_be_several = any_rows and array.ndim <= 2
        if array.dtype.kind == "b" or not (may_be_several or array.size == array.shape[-1]):
            return None
        if found[group - 1].count(b"[") != array.ndim:
            return None
        gaps.append(Gap(*found.span(group), "numbers", name))
    if sorted(gap.name for gap in gaps) != sorted(arrays):
        return None
    gaps += _found_once(_ID, body, "id") if envelope.id is not None else []
    gaps += _found_once(_TIMEOUT, body, "timeout") if envelope.timeout_ms is not None else []
    if len(body) - sum(gap.stop - gap.start for gap in gaps) > _LONGEST_AROUND_BYTES:
        return None
    return sorted(gaps)


def _lists(array: Array) -> int:
    """How many lists an array is in JSON."""
    above: Sequence[int] = array.shape[:-1]
    opened: Iterable[int] = accumulate(above, mul)
    return 1 + sum(opened)


def _found_once(pattern: re.Pattern[bytes], body: bytes, kind: Kind) -> list[Gap]:
    found = list(pattern.finditer(body))
    return [Gap(*found[0].span(1), kind)] if len(found) == 1 else []
