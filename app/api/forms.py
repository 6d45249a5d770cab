"""Short cuts for a client that asks the same again with other numbers, as nearly all do.

The first request of a kind goes all the way: parsed, resolved, checked. What was found out about it, all but
its numbers, is its form; a body of the same form needs only its numbers read. A body that differs in
anything else, or whose numbers are in doubt, does not match, and goes all the way itself.
"""

from __future__ import annotations

from weakref import ref

import numpy as np

from app.api.codecs import Body, PredictRequest
from app.api.json_tensors import WAYS, decode_row
from app.api.service import Prepared
from app.serving.repository import LoadedModel
from app.tensors import Array, Arrays, is_finite


class Form:
    """What the bodies of a kind have in common.

    Attributes:
        envelope: theirs.
        rest: what was prepared of them but for the arrays.
    """

    __slots__ = ("_model", "dtype", "envelope", "name", "rest", "shape")

    def __init__(self, envelope: PredictRequest, model: LoadedModel, prepared: Prepared) -> None:
        ((self.name, array),) = prepared[0].items()
        self._model = ref(model)  # a form must not keep an unloaded model alive
        self.dtype = array.dtype
        self.shape = array.shape
        self.envelope = envelope
        self.rest = prepared[1:]

    def fits(self, model: LoadedModel) -> bool:
        """Whether it was this very model that the checks were made with."""
        return self._model() is model

    def read(self, body: Body) -> Arrays | None:
        """The arrays of a body of this form; None when it is of another."""
        array = self._numbers(body)
        return None if array is None else {self.name: array}

    def _numbers(self, body: Body) -> Array | None:
        raise TypeError("a form is raw or JSON")


class RawForm(Form):
    """Bytes; all bodies of one head have one length."""

    __slots__ = ()

    def _numbers(self, body: Body) -> Array | None:
        array = np.ndarray(self.shape, self.dtype, body)
        return array if is_finite(array) else None


class JsonForm(Form):
    """A text with one list of numbers, and the same text around it."""

    __slots__ = ("_after", "_before", "_way")

    def __init__(
        self, envelope: PredictRequest, model: LoadedModel, prepared: Prepared, before: bytes, after: bytes
    ) -> None:
        super().__init__(envelope, model, prepared)
        self._way = WAYS[self.dtype.name]
        self._before = before
        self._after = after

    def _numbers(self, body: Body) -> Array | None:
        if not (body.startswith(self._before) and body.endswith(self._after)):
            return None
        row = body[len(self._before) : len(body) - len(self._after)]
        return decode_row(row, self._way, self.shape)


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
    if body.count(b"[") != array.ndim:
        return None
    before, after = bytes(body[: body.rindex(b"[")]), bytes(body[body.index(b"]") + 1 :])
    return JsonForm(envelope, model, prepared, before, after)
