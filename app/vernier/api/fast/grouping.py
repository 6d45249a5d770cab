"""Which of the predictions that came in one turn of the loop are read and run together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vernier.api.forms import Form

if TYPE_CHECKING:
    from vernier.api.fast.exchange import Asked, Exchange

#: Small bodies that are read at once: more gain nothing, and would share more memory.
MOST_TOGETHER = 64
#: Of bodies that are read at once; one may be longer than that.
_MOST_BYTES = 2**20


def in_order(asked: Sequence[Asked]) -> Iterator[Sequence[Asked]]:
    """Small predictions of one form, by as many as are worth joining."""
    for start in range(0, len(asked), MOST_TOGETHER):
        part = asked[start : start + MOST_TOGETHER]
        if len(part) * max([head.length for _, head, _, _, _ in part]) <= _MOST_BYTES:
            yield part
        else:  # some have many rows
            yield from ([one] for one in part)


def side_by_side(exchanges: Sequence[Exchange], form: Form) -> Iterator[Sequence[Exchange]]:
    """Large bodies of one form that lie in one piece of memory, from its beginning; they came from its end.

    As many as can run at once, where any can: they are joined for that.
    """
    model, (_, precision, _) = form.model, form.rest
    most = model.scheduler.room_for_joined(precision) // form.rows if model is not None else 0
    run: list[Exchange] = []
    for exchange in reversed(exchanges):
        if run and (len(run) == most or not _lies_above(exchange, run[-1])):
            yield run
            run = []
        run.append(exchange)
    yield run


def _lies_above(exchange: Exchange, other: Exchange) -> bool:
    return exchange.room is not None and other.room is not None and exchange.room.is_above(other.room)
