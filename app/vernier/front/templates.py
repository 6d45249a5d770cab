"""Short cuts for a client that asks the same again with other numbers, as nearly all do.

The first request of a kind goes all the way: parsed, resolved, checked. What was found out about it, all but what
each request has for itself, is its template; a body of the same template needs only that read. A body that differs in
anything else, or whose numbers are in doubt, does not match, and goes all the way itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from math import inf
from typing import NamedTuple
from weakref import ref

import numpy as np

from vernier.api.formats.codecs import Body, PredictRequest
from vernier.api.service import Prepared
from vernier.border.batch import cut
from vernier.border.catalogue import ServedModel
from vernier.tensors import Array, Arrays, is_finite

#: Larger bodies are read where they lie, one by one or with their neighbours; smaller ones are joined and read at once.
_LARGE_BYTES = 16 * 1024
#: Forms that are kept for heads that are alike: their clients may ask several models.
MAX_TEMPLATES = 8
_PATIENCE = 8
_PAUSE = 1000


class Extracted(NamedTuple):
    """What bodies of one template have each for themselves; columns with an item for every body.

    Attributes:
        numbers: of each input, not read yet.
        ids: None when they have none, or all the same.
        timeouts_ms: None when they have none, or all the same.
    """

    numbers: Sequence[Sequence[Body]]
    ids: Sequence[str] | None = None
    timeouts_ms: Sequence[float] | None = None


class Decoded(NamedTuple):
    """The inputs of several bodies, as one request of all their rows.

    Attributes:
        rows: of each.
    """

    arrays: Arrays
    rows: Sequence[int]

    def each(self) -> Iterator[Arrays]:
        """Body by body."""
        count, names = len(self.rows), tuple(self.arrays)
        if min(self.rows) == max(self.rows):
            columns = [
                array.reshape(count, len(array) // count, *array.shape[1:]) for array in self.arrays.values()
            ]
            return (dict(zip(names, mine, strict=True)) for mine in zip(*columns, strict=True))
        return cut(self.arrays, self.rows)


class Template(ABC):
    """What the bodies of a kind have in common.

    Args:
        timeout_ms: of each, or None for no deadline.
        any_rows: whether bodies may have any number of rows.

    Attributes:
        around: the text that all have.
        key: equal for templates that are the same but perhaps for the model.
        envelope: theirs.
        rows: of what was prepared.
        rest: what was prepared of them but for the arrays, their rows and the deadline.
        small: whether several bodies are read quicker together than one by one.
    """

    __slots__ = (
        "_any_rows",
        "_model",
        "_timeout_ms",
        "around",
        "envelope",
        "inputs",
        "key",
        "rest",
        "rows",
        "small",
    )

    def __init__(
        self,
        envelope: PredictRequest,
        timeout_ms: float | None,
        model: ServedModel,
        prepared: Prepared,
        around: tuple[bytes, ...] = (),
        any_rows: bool = False,
    ) -> None:
        arrays, self.rows, outputs, precision, priority, _ = prepared
        self._model = ref(model)  # a template must not keep an unloaded model alive
        self._timeout_ms = timeout_ms
        self._any_rows = any_rows
        self.inputs = [(name, array.dtype, array.shape) for name, array in arrays.items()]
        self.envelope = envelope
        self.rest = outputs, precision, priority
        self.small = sum(array.nbytes for array in arrays.values()) <= _LARGE_BYTES
        asked = envelope.model, envelope.version, envelope.id, timeout_ms
        inputs = [(name, dtype.str, shape[1:] if any_rows else shape) for name, dtype, shape in self.inputs]
        rows = None if any_rows else self.rows
        self.around = around
        self.key = (*asked, *inputs, rows, tuple(outputs), precision, priority, *around)

    @property
    def model(self) -> ServedModel | None:
        """The model that the checks were made with; None when it has gone."""
        return self._model()

    def fits(self, model: ServedModel) -> bool:
        """Whether it was this very model that the checks were made with."""
        return self._model() is model

    @abstractmethod
    def looks_like(self, text: Body, start: int = 0) -> bool:
        """Whether the body that begins at `start` may be of this template; quick, and the last word is `extract`'s."""

    @abstractmethod
    def extract(self, texts: Sequence[Body], starts: Sequence[int]) -> Extracted | None:
        """None when one of the bodies is of another template.

        Args:
            starts: where in each text its body begins.
        """

    @abstractmethod
    def decode(self, extracted: Extracted) -> Decoded | None:
        """None when one of the bodies is in doubt."""

    def decode_joined(self, bodies: Body, count: int) -> Decoded | None:
        """`decode` of bodies that lie one behind the other, where they lie."""
        raise TypeError("bodies are numbers of a raw template")

    def deadlines(self, came: Sequence[float], extracted: Extracted) -> Sequence[float] | None:
        """Of each, in seconds; None for none.

        Args:
            came: when the first byte of each was seen.
        """
        timeouts_ms = extracted.timeouts_ms
        if timeouts_ms is not None:
            return [at + timeout_ms / 1e3 for at, timeout_ms in zip(came, timeouts_ms, strict=True)]
        if self._timeout_ms is None:
            return None
        timeout_s = self._timeout_ms / 1e3
        return [at + timeout_s for at in came]


class RawTemplate(Template):
    """Bytes of one input; all bodies of one head have one length."""

    __slots__ = ()

    def looks_like(self, text: Body, start: int = 0) -> bool:
        return True

    def extract(self, texts: Sequence[Body], starts: Sequence[int]) -> Extracted | None:
        return Extracted(
            [[text[start:] if start else text for text, start in zip(texts, starts, strict=True)]]
        )

    def decode(self, extracted: Extracted) -> Decoded | None:
        (bodies,) = extracted.numbers
        return self.decode_joined(bodies[0] if len(bodies) == 1 else b"".join(bodies), len(bodies))

    def decode_joined(self, bodies: Body, count: int) -> Decoded | None:
        ((name, dtype, shape),) = self.inputs
        array: Array = np.ndarray((count * shape[0], *shape[1:]), dtype, bodies)
        return Decoded({name: array}, [self.rows] * count) if is_finite(array) else None


def raw_template(
    envelope: PredictRequest, timeout_ms: float | None, model: ServedModel, prepared: Prepared
) -> Template | None:
    """The template of a raw body; None for one that is a single number without a dimension."""
    (array,) = prepared[0].values()
    return RawTemplate(envelope, timeout_ms, model, prepared) if array.ndim else None


class TemplateCache:
    """The templates of the bodies that come behind heads which are alike, whoever sends them.

    Attributes:
        first: the only one, for nearly all clients; None for none.
        others: those of clients that ask several models, or one in several ways.
    """

    __slots__ = ("_patience", "_pause", "first", "others")

    def __init__(self, pause: float = 0) -> None:
        self.first: Template | None = None
        self.others: Sequence[Template] = ()
        self._patience = _PATIENCE  # how many bodies may still be learned from without one that was known
        self._pause = pause  # bodies until it is tried again

    def template_of(self, text: Body, start: int = 0) -> Template | None:
        """The one that the body which begins at `start` may have."""
        first = self.first
        if not self.others or first is None or first.looks_like(text, start):
            return first
        return next((template for template in self.others if template.looks_like(text, start)), None)

    def record_hit(self, count: int = 1) -> None:
        """So many bodies had a template."""
        if self._patience < _PATIENCE:
            self._patience = min(_PATIENCE, self._patience + count)

    def should_learn(self) -> bool:
        """Whether to look for the template of a body that had none; in vain where every body is of its own."""
        if self._pause:
            self._pause -= 1
            return False
        return True

    def learn(self, template: Template | None) -> None:
        """What a body had that was looked at. It takes the place of one with the same text, which did not fit."""
        self._patience -= 1
        if template is not None:
            known = [] if self.first is None else [self.first, *self.others]
            kept = [other for other in known if other.model is not None and other.around != template.around]
            kept = kept[: MAX_TEMPLATES - 1]
            if self._patience > 0 or len(kept) == len(known):
                kept.append(template)  # else it would be the next to be tried in vain
            self.first, self.others = (kept[0], kept[1:]) if kept else (None, ())
        if self._patience <= 0:
            self._patience, self._pause = _PATIENCE, _PAUSE


#: For heads that are not remembered.
NO_TEMPLATES = TemplateCache(pause=inf)
