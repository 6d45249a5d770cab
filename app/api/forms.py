"""Short cuts for a client that asks the same again with other numbers, as nearly all do.

The first request of a kind goes all the way: parsed, resolved, checked. What was found out about it, all but
its numbers, is its form; a body of the same form needs only its numbers read. A body that differs in
anything else, or whose numbers are in doubt, does not match, and goes all the way itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import repeat
from weakref import ref

import numpy as np

from app.api.codecs import Body, PredictRequest
from app.api.json_tensors import WAYS, decode_rows
from app.api.service import Prepared
from app.serving.repository import LoadedModel
from app.tensors import Array, Arrays, is_finite

#: A list that holds no other: the numbers of an input of one row, or the names of the outputs.
_INNERMOST = re.compile(rb"\[([^\[\]]*)\]")
#: Larger bodies are read where they lie, one by one or with their neighbours; smaller ones are joined and read at once.
_LARGE_BYTES = 16 * 1024


class Form:
    """What the bodies of a kind have in common.

    Attributes:
        key: equal for forms that are the same but perhaps for the model.
        envelope: theirs.
        rest: what was prepared of them but for the arrays.
        small: whether several bodies are read quicker together than one by one.
    """

    __slots__ = ("_model", "dtype", "envelope", "key", "name", "rest", "shape", "small")

    def __init__(
        self, envelope: PredictRequest, model: LoadedModel, prepared: Prepared, around: tuple[bytes, ...] = ()
    ) -> None:
        ((self.name, array),) = prepared[0].items()
        self._model = ref(model)  # a form must not keep an unloaded model alive
        self.dtype = array.dtype
        self.shape = array.shape
        self.envelope = envelope
        self.rest = prepared[1:]
        self.small = array.nbytes <= _LARGE_BYTES
        _, outputs, *others = self.rest
        asked = envelope.model, envelope.version, envelope.id
        self.key = (*asked, self.name, self.dtype.str, self.shape, tuple(outputs), *others, *around)

    @property
    def model(self) -> LoadedModel | None:
        """The model that the checks were made with; None when it has gone."""
        return self._model()

    def fits(self, model: LoadedModel) -> bool:
        """Whether it was this very model that the checks were made with."""
        return self._model() is model

    def matches(self, text: Body, start: int = 0) -> bool:
        """Whether the body that begins at `start` is of this form but perhaps for its numbers."""
        raise TypeError("a form is raw or JSON")

    def read(self, body: Body) -> Arrays | None:
        """The arrays of a body of this form; None when it is of another."""
        arrays = self.read_all([body], [0])
        return None if arrays is None else {self.name: arrays[0]}

    def read_all(self, texts: Sequence[Body], starts: Sequence[int]) -> Array | None:
        """The array of each body, along a new first axis; None when one of them is of another form.

        Args:
            starts: where in each text its body begins.
        """
        raise TypeError("a form is raw or JSON")

    def read_joined(self, bodies: Body, count: int) -> Array | None:
        """`read_all` of bodies that lie one behind the other, where they lie."""
        raise TypeError("bodies are numbers of a raw form")

    def join(self, arrays: Array) -> Arrays:
        """What `read_all` gave as one request of all their rows."""
        return {self.name: arrays.reshape(len(arrays) * self.shape[0], *self.shape[1:])}


class RawForm(Form):
    """Bytes; all bodies of one head have one length."""

    __slots__ = ()

    def matches(self, text: Body, start: int = 0) -> bool:
        return True

    def read_all(self, texts: Sequence[Body], starts: Sequence[int]) -> Array | None:
        bodies = [text[start:] if start else text for text, start in zip(texts, starts, strict=True)]
        return self.read_joined(bodies[0] if len(bodies) == 1 else b"".join(bodies), len(bodies))

    def read_joined(self, bodies: Body, count: int) -> Array | None:
        arrays: Array = np.ndarray((count, *self.shape), self.dtype, bodies)
        return arrays if is_finite(arrays) else None


class JsonForm(Form):
    """A text with one list of numbers, and the same text around it."""

    __slots__ = ("_after", "_before", "_way")

    def __init__(
        self, envelope: PredictRequest, model: LoadedModel, prepared: Prepared, before: bytes, after: bytes
    ) -> None:
        super().__init__(envelope, model, prepared, (before, after))
        self._way = WAYS[self.dtype.name]
        self._before = before
        self._after = after

    def matches(self, text: Body, start: int = 0) -> bool:
        if isinstance(text, memoryview):
            return False
        return text.startswith(self._before, start) and text.endswith(self._after)

    def read_all(self, texts: Sequence[Body], starts: Sequence[int]) -> Array | None:
        before, after = self._before, self._after
        skip, stop = len(before), -len(after)
        plain = [text if type(text) is bytes else bytes(text) for text in texts]
        if not (
            all(map(bytes.startswith, plain, repeat(before), starts))
            and all(map(bytes.endswith, plain, repeat(after)))
        ):
            return None
        between = [text[start + skip : stop] for text, start in zip(plain, starts, strict=True)]
        return decode_rows(between, self._way, self.shape)


def raw_form(envelope: PredictRequest, model: LoadedModel, prepared: Prepared) -> Form | None:
    """None for requests with a deadline, which are prepared one by one."""
    return RawForm(envelope, model, prepared) if prepared[-1] is None else None


def json_form(body: Body, envelope: PredictRequest, model: LoadedModel, prepared: Prepared) -> Form | None:
    """The form of a body that was prepared; None when it has none.

    It must have one input of one row: as many lists as the array has dimensions, each inside the last.
    """
    arrays = prepared[0]
    if prepared[-1] is not None or len(arrays) != 1:
        return None
    (array,) = arrays.values()
    if array.dtype.kind == "b" or array.ndim == 0 or array.size != array.shape[-1]:
        return None
    if isinstance(body, memoryview) or body.count(b"[") != array.ndim + (envelope.outputs is not None):
        return None  # other lists, or brackets in a text
    numbers = [found for found in _INNERMOST.finditer(body) if found[1].strip() and b'"' not in found[1]]
    if len(numbers) != 1:
        return None
    start, stop = numbers[0].span(1)
    return JsonForm(envelope, model, prepared, bytes(body[:start]), bytes(body[stop:]))
