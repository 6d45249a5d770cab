"""A form reads what equals its first body but for the numbers, exactly as the long way would; nothing else."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import cast

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.codecs import PredictRequest, parse_predict, raw_envelope
from app.api.forms import Form, json_form, raw_form
from app.errors import RequestError
from app.serving.repository import LoadedModel
from app.tensors import numpy_dtype
from tests.unit.api.test_json_tensors import signature_of


class Model(SimpleNamespace):
    """Forms only compare models."""

    __slots__ = ("__weakref__",)


MODEL = cast(LoadedModel, Model())


def learned(
    body: bytes, dtype: str = "float32", shape: tuple[int | str, ...] = ("batch", "n")
) -> Form | None:
    envelope, inputs = parse_predict(body)
    arrays = inputs.decode(signature_of(dtype, list(shape)))
    return json_form(body, envelope, MODEL, (arrays, 1, ("y",), None, envelope.priority, None))


def text(row: str, id: str = "a") -> bytes:
    return f'{{"model": "m", "inputs": {{"x": [[{row}]]}}, "id": "{id}"}}'.encode()


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "int8", "uint64", "float16"])
def test_the_next_body_gives_its_own_numbers(dtype: str) -> None:
    form = learned(text("1, 2, 3"), dtype)
    assert form is not None
    arrays = form.read(text(" 40,5 , 6 "))
    assert arrays is not None
    assert (arrays["x"].dtype, arrays["x"].tolist()) == (numpy_dtype(dtype), [[40, 5, 6]])
    assert form.envelope.id == "a"
    assert form.fits(MODEL)


@pytest.mark.parametrize(
    "other",
    [
        text("1, 2"),
        text("1, 2, 3, 4"),
        text("1, 2, [3]"),
        text("1], [2, 3"),
        text("1, 2], [3"),
        text('1, 2, "3"'),
        text("1, 2, null"),
        text("1, 2, true"),
        text("1, 2, 1e39"),
        text("1, 2, NaN"),
        text("1, 2, "),
        text(""),
        text("1, 2, 3", id="b"),
        text("1, 2, 3") + b" ",
        text("1, 2, 3]], " + '"x": [[1, 2, 3'),
        b'{"model": "m", "inputs": {"x": [ ]}, "id": "a"}',
        b'{"model": "m", "inputs": {"x": []}, "id": "a"}',
        b'{"model": "m", "inputs": {"x": []',
        b"",
    ],
)
def test_what_differs_in_more_than_its_numbers_does_not_match(other: bytes) -> None:
    form = learned(text("1, 2, 3"))
    assert form is not None
    assert form.read(other) is None


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (b'{"inputs": {"x": [[1, 2], [3, 4]]}}', ("batch", "n")),
        (b'{"inputs": {"x": [[1, 2]]}, "outputs": ["[", "y"]}', ("batch", "n")),
        (b'{"inputs": {"x": [[1, 2]]}, "outputs": null, "id": "["}', ("batch", "n")),
        (b'{"inputs": {"x": [[1, 2]]}, "id": "[["}', ("batch", "n")),
        (b'{"inputs": {"x": 5}}', ()),
    ],
)
def test_bodies_without_a_form(body: bytes, shape: tuple[str, ...]) -> None:
    assert learned(body, shape=shape) is None


@pytest.mark.parametrize(
    "around",
    [
        '{{"outputs": ["y"], "inputs": {{"x": [[{}]]}}}}',
        '{{"inputs": {{"x": [[{}]]}}, "outputs": ["y", "z"]}}',
        '{{"inputs": {{"x": [[{}]]}}, "outputs": []}}',
        '{{"inputs": {{"x": [[{}]]}}, "outputs": [ ]}}',
        '{{"id": "]", "inputs": {{"x": [[{}]]}}, "outputs": null}}',
    ],
)
def test_the_names_of_outputs_may_stand_beside_the_numbers(around: str) -> None:
    form = learned(around.format("1, 2").encode())
    assert form is not None
    arrays = form.read(around.format("3, 4").encode())
    assert arrays is not None
    assert arrays["x"].tolist() == [[3, 4]]
    assert form.read(around.format("3, 4").replace('"outputs"', '"outputz"').encode()) is None
    assert form.read(around.format("3], [4").encode()) is None


def test_a_request_with_a_deadline_has_no_form() -> None:
    prepared = ({"x": np.zeros((1, 2), np.float32)}, 1, ("y",), None, 0, 123.0)
    assert json_form(b'{"inputs": {"x": [[0, 0]]}}', PredictRequest(), MODEL, prepared) is None
    assert raw_form(PredictRequest(), MODEL, prepared) is None


def test_a_raw_form_reads_bytes_and_leaves_what_is_not_finite() -> None:
    prepared = ({"x": np.zeros((2, 3), np.float32)}, 2, ("y",), None, 0, None)
    form = raw_form(raw_envelope({"model": "m"}), MODEL, prepared)
    assert form is not None
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    arrays = form.read(x.tobytes())
    assert arrays is not None
    np.testing.assert_array_equal(arrays["x"], x)
    x[1, 1] = np.inf
    assert form.read(x.tobytes()) is None


def test_a_form_does_not_keep_a_model_alive() -> None:
    model = Model()
    prepared = ({"x": np.zeros((1, 3), np.float32)}, 1, ("y",), None, 0, None)
    form = raw_form(PredictRequest(), cast(LoadedModel, model), prepared)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert form is not None
    assert not form.fits(MODEL)


PIECES = st.sampled_from(
    ["1", "-2.5e3", "0", "1e400", "[", "]", ",", " ", "null", '"', "{", "}", ":", "\\", "1e39"]
)


@settings(max_examples=500)
@given(st.lists(PIECES, max_size=9))
def test_whatever_stands_between_a_form_says_the_same_as_the_long_way(pieces: list[str]) -> None:
    form = learned(text("1, 2, 3"))
    assert form is not None
    body = text("".join(pieces))
    arrays = form.read(body)
    if arrays is None:
        return
    envelope, inputs = parse_predict(body)
    long_way = inputs.decode(signature_of("float32", ["batch", "n"]))
    np.testing.assert_array_equal(arrays["x"], long_way["x"])
    assert envelope == form.envelope


@settings(max_examples=500)
@given(st.lists(st.lists(PIECES, max_size=9).map("".join), min_size=2, max_size=4))
def test_bodies_read_together_give_what_each_gives_alone(rows: list[str]) -> None:
    form = learned(text("1, 2, 3"))
    assert form is not None
    bodies = [text("4, 5, 6"), *map(text, rows)]
    together = form.read_all(bodies, [0] * len(bodies))
    if together is None:
        return
    for body, array in zip(bodies, together, strict=True):
        alone = form.read(body)
        assert alone is not None
        np.testing.assert_array_equal(array, alone["x"])
    np.testing.assert_array_equal(form.join(together)["x"], together.reshape(-1, 3))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("[1, 2, 3, 4]", "[5, 6]"),
        ("[1, 2, 3", "[4, 5, 6]]"),
        ("[1, 2, 3, [4", "5, 6]"),
        ('[1, 2, "', '", 5, 6]'),
        ("[1, 2,", "3, 4, 5, 6]"),
    ],
)
def test_bodies_read_together_lend_each_other_nothing(one: str, other: str) -> None:
    form = learned(text("1, 2, 3"))
    assert form is not None
    bodies = [f'{{"model": "m", "inputs": {{"x": [{row}]}}, "id": "a"}}'.encode() for row in (one, other)]
    assert form.read_all([text("1, 2, 3"), *bodies], [0] * (1 + len(bodies))) is None
    assert form.read_all([text("1, 2, 3"), text("4, 5, 6")], [0, 0]) is not None


def test_large_raw_bodies_are_read_where_they_lie() -> None:
    prepared = ({"x": np.zeros((1, 10_000), np.float32)}, 1, ("y",), None, 0, None)
    form = raw_form(PredictRequest(), MODEL, prepared)
    assert form is not None
    bodies = [np.full(10_000, n, np.float32).tobytes() for n in range(2)]
    arrays = [form.read(body) for body in bodies]
    for n, (body, mine) in enumerate(zip(bodies, arrays, strict=True)):
        assert mine is not None
        assert np.shares_memory(mine["x"], np.frombuffer(body, np.uint8))
        assert (mine["x"] == n).all()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
def test_every_number_comes_back(row: list[float]) -> None:
    form = learned(text("1, 2, 3"))
    assert form is not None
    arrays = form.read(text(orjson.dumps(row).decode()[1:-1]))
    assert arrays is not None
    assert arrays["x"].tolist() == [row]


def test_a_body_that_is_refused_teaches_nothing() -> None:
    with pytest.raises(RequestError):
        learned(text("1, x"))
