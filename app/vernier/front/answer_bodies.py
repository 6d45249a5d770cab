"""The bodies of many answers at once.

Answers of a batch differ in little: an id and the numbers of a row. So all rows of an output are written as one text,
which is cut, and the bodies are kept as columns beside each other until they are joined with their heads, each in one
step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise, repeat
from operator import add

import numpy as np
import orjson

from vernier.api.formats.codecs import encode_answer
from vernier.api.http.identity import Identities
from vernier.border.batch import Answer, cut
from vernier.tensors import Array

#: Numbers of an output up to which it is worth while to write the rows of many answers together.
_MOST_CUT = 1024
#: The same for answers of several rows, which are put together again.
_MOST_JOINED = 96
_TIMING = b'},"timing":{"queue_ms":%a,"compute_ms":%a,"batch_size":%d}}'


class Bodies:
    """Bodies of `count` answers in pieces.

    Args:
        columns: from left to right; what is the same in all of them stands there once.
    """

    __slots__ = ("_columns", "_count")

    def __init__(self, count: int, columns: Sequence[bytes | Sequence[bytes]]) -> None:
        self._count = count
        self._columns = columns

    def columns(self) -> list[Iterable[bytes]]:
        """To be joined row by row; those that do not end are the same in all rows."""
        return [repeat(column) if isinstance(column, bytes) else column for column in self._columns]

    def lengths(self) -> list[int]:
        """Of each, in bytes."""
        lengths = [sum(len(column) for column in self._columns if isinstance(column, bytes))] * self._count
        for column in self._columns:
            if not isinstance(column, bytes):
                lengths = list(map(add, lengths, map(len, column)))
        return lengths

    def whole(self) -> list[bytes]:
        """Each in one piece."""
        return list(map(b"".join, zip(*self.columns(), strict=False)))


def joined_bodies(ids: Identities, model: str, version: str, answer: Answer, rows: Sequence[int]) -> Bodies:
    """`encode_answer` for requests that were answered together by one answer. `rows`: of each."""
    made = _rows(ids, model, version, answer.precision, answer.outputs, _timing(answer), rows)
    if made is not None:
        return made
    bodies = []
    for identity, mine in zip(ids.texts, cut(answer.outputs, rows), strict=True):
        own = Answer(mine, answer.precision, answer.queue_s, answer.compute_s, answer.batch_size)
        bodies.append(encode_answer(identity, model, version, own))
    return Bodies(len(bodies), [bodies])


def _rows(
    ids: Identities,
    model: str,
    version: str,
    precision: str,
    outputs: Mapping[str, Array],
    timings: bytes | Sequence[bytes],
    rows: Sequence[int],
) -> Bodies | None:
    """Answers of so many rows each, which lie below each other in `outputs`; None when they cannot be cut."""
    count, every, one_each = len(ids.texts), sum(rows), max(rows) == 1
    most = _MOST_CUT if one_each else _MOST_JOINED
    bounds = list(accumulate(rows, initial=0))
    about = orjson.dumps({"model": model, "version": version, "precision": precision})[1:-1]
    between = b'",' + about + b',"outputs":{'
    columns: list[bytes | Sequence[bytes]] = [b'{"id":"', ids.json]
    for name, array in outputs.items():
        depth = array.ndim
        if depth not in (1, 2) or len(array) != every or not 0 < array.size <= most * count:
            return None
        try:
            text = orjson.dumps(np.ascontiguousarray(array), option=orjson.OPT_SERIALIZE_NUMPY)
        except orjson.JSONEncodeError:
            return None
        between_rows = b"],[" if depth == 2 else b","
        column = text[depth:-depth].split(between_rows)
        if len(column) != every:
            return None
        if not one_each:
            column = [between_rows.join(column[start:stop]) for start, stop in pairwise(bounds)]
        columns += (between + orjson.dumps(name) + b":" + b"[" * depth, column)
        between = b"]" * depth + b","
    columns += (between[:-1], timings)
    return Bodies(count, columns)


def _timing(answer: Answer) -> bytes:
    queue_ms, compute_ms = int(answer.queue_s * 1e6) / 1e3, int(answer.compute_s * 1e6) / 1e3
    return _TIMING % (queue_ms, compute_ms, answer.batch_size)
