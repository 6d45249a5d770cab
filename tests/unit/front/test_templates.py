"""A template reads what equals its first body but for the numbers, exactly as the long way would; nothing else."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.api.test_json_tensors import signature_of
from vernier.api.formats.codecs import PredictRequest, parse_predict, raw_envelope
from vernier.border.signature import Signature
from vernier.errors import RequestError
from vernier.front.json_templates import json_template
from vernier.front.templates import (
    NO_TEMPLATES,
    Extracted,
    RawTemplate,
    Template,
    TemplateCache,
    raw_template,
)
from vernier.serving.models.repository import LoadedModel
from vernier.tensors import Arrays, TensorSpec, numpy_dtype


class Model(SimpleNamespace):
    """Forms only compare models, and ask for their signature."""

    __slots__ = ("__weakref__",)


def model_of(batch_dim: str | None, *shapes: tuple[str | int, ...]) -> LoadedModel:
    inputs = {str(n): TensorSpec(str(n), "float32", shape) for n, shape in enumerate(shapes)}
    return cast(LoadedModel, Model(signature=SimpleNamespace(batch_dim=batch_dim, inputs=inputs)))


MODEL, ROWLESS = model_of("batch", ("batch", "n"), ("batch",)), model_of(None, ("n",))
TWO = Signature(
    "m",
    {
        "user": TensorSpec("user", "int64", ("batch",)),
        "item": TensorSpec("item", "float32", ("batch", 3)),
    },
    {"y": TensorSpec("y", "float32", ("batch", 1))},
    ranges={},
    batch_dim="batch",
    fixed_batch=None,
    derived={},
)


def learned(
    body: bytes,
    dtype: str = "float32",
    shape: tuple[int | str, ...] = ("batch", "n"),
    signature: Signature | None = None,
    timeout_ms: float | None = None,
    model: LoadedModel = MODEL,
) -> Template | None:
    """timeout_ms: the service's own."""
    envelope, inputs = parse_predict(body)
    arrays = inputs.decode(signature or signature_of(dtype, list(shape)))
    own_ms = timeout_ms if envelope.timeout_ms is None else envelope.timeout_ms
    deadline = None if own_ms is None else 1.0
    return json_template(
        body, envelope, own_ms, model, (arrays, 1, ("y",), None, envelope.priority, deadline)
    )


def read(template: Template, *bodies: bytes) -> tuple[Extracted, list[Arrays]] | None:
    """Of each."""
    extracted = template.extract(bodies, [0] * len(bodies))
    decoded = None if extracted is None else template.decode(extracted)
    return None if extracted is None or decoded is None else (extracted, list(decoded.each()))


def alone(template: Template, body: bytes) -> Arrays | None:
    found = read(template, body)
    return None if found is None else found[1][0]


def text(row: str, id: str = "a") -> bytes:
    return f'{{"model": "m", "inputs": {{"x": [[{row}]]}}, "id": "{id}"}}'.encode()


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "int8", "uint64", "float16"])
def test_the_next_body_gives_its_own_numbers(dtype: str) -> None:
    template = learned(text("1, 2, 3"), dtype)
    assert template is not None
    arrays = alone(template, text(" 40,5 , 6 "))
    assert arrays is not None
    assert (arrays["x"].dtype, arrays["x"].tolist()) == (numpy_dtype(dtype), [[40, 5, 6]])
    assert template.fits(MODEL)


@pytest.mark.parametrize(
    "other",
    [
        text("1, 2"),
        text("1, 2, 3, 4"),
        text("1, 2, [3]"),
        text("1], [2, 3"),
        text("1, 2], [3"),
        text("1, 2, 3]], [[4, 5, 6"),
        text('1, 2, "3"'),
        text("1, 2, null"),
        text("1, 2, true"),
        text("1, 2, 1e39"),
        text("1, 2, NaN"),
        text("1, 2, "),
        text(""),
        text("1, 2, 3", id='b"'),
        text("1, 2, 3", id="b\\\\"),
        text("1, 2, 3", id="\u00e9"),
        text("1, 2, 3", id="\n"),
        text("1, 2, 3") + b" ",
        text("1, 2, 3]], " + '"x": [[1, 2, 3'),
        b'{"model": "m", "inputs": {"x": [ ]}, "id": "a"}',
        b'{"model": "m", "inputs": {"x": []}, "id": "a"}',
        b'{"model": "m", "inputs": {"x": []',
        b"",
    ],
)
def test_what_differs_in_more_than_its_numbers_does_not_match(other: bytes) -> None:
    template = learned(text("1, 2, 3"))
    assert template is not None
    assert alone(template, other) is None


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (b'{"inputs": {"x": [[[1, 2]], [[3, 4]]]}}', ("batch", "m", "n")),
        (b'{"inputs": {"x": [[[1, 2], [3, 4]]]}}', ("batch", "m", "n")),
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
    template = learned(around.format("1, 2").encode())
    assert template is not None
    arrays = alone(template, around.format("3, 4").encode())
    assert arrays is not None
    assert arrays["x"].tolist() == [[3, 4]]
    assert alone(template, around.format("3, 4").replace('"outputs"', '"outputz"').encode()) is None
    assert alone(template, around.format("3], [4").encode()) is None


def test_what_stands_between_the_gaps_must_be_there() -> None:
    template = learned(b'{"inputs": {"x": [[1, 2, 3]]}, "id": "a"}')
    assert template is not None
    assert read(template, b'{"inputs": {"x": [[4, 5, 6]]}, "id": ""}') is not None
    assert read(template, b'{"inputs": {"x": [[4, 5, 6"}') is None


def test_each_has_its_own_id() -> None:
    template = learned(text("1, 2, 3"))
    assert template is not None
    found = read(template, text("4, 5, 6", id="b"), text("7, 8, 9", id=""), text("1, 2, 3", id="]], '[["))
    assert found is not None
    extracted, arrays = found
    assert extracted.ids == ["b", "", "]], '[["]
    assert template.envelope.id is None
    assert [mine["x"].tolist() for mine in arrays] == [[[4, 5, 6]], [[7, 8, 9]], [[1, 2, 3]]]


@pytest.mark.parametrize(
    "around",
    [
        '{"timeout_ms": %s, "inputs": {"x": [[%s]]}}',
        '{"inputs": {"x": [[%s]]}, "timeout_ms": %s, "id": "z"}',
        '{"id": "timeout_ms", "timeout_ms":%s,"inputs":{"x":[[%s]]}}',
    ],
)
def test_each_has_its_own_deadline(around: str) -> None:
    def body(timeout: str, row: str) -> bytes:
        in_front = around.index('timeout_ms":') < around.index("inputs")
        return (around % ((timeout, row) if in_front else (row, timeout))).encode()

    template = learned(body("100", "1, 2"))
    assert template is not None
    found = read(template, body("50", "3, 4"), body("2.5e2", "5, 6"), body("0", "7, 8"))
    assert found is not None
    assert template.deadlines([1.0, 2.0, 3.0], found[0]) == pytest.approx([1.05, 2.25, 3.0])
    assert [mine["x"].tolist() for mine in found[1]] == [[[3, 4]], [[5, 6]], [[7, 8]]]
    for odd in ("-1", "1e9", "1e999", "null", "01", "1_0", "", " 5", "1.", "true", '"5"', "NaN"):
        assert read(template, body("50", "3, 4"), body(odd, "3, 4")) is None, odd


def test_a_deadline_may_be_the_services_own() -> None:
    body = text("1, 2, 3")
    template, unlimited = learned(body, timeout_ms=20.0), learned(body)
    assert template is not None
    assert unlimited is not None
    extracted = template.extract([body], [0])
    assert extracted is not None
    assert template.deadlines([1.0], extracted) == pytest.approx([1.02])
    assert unlimited.deadlines([1.0], extracted) is None
    assert template.key != unlimited.key


def several(user: object, item: object, id: str = "a") -> bytes:
    return f'{{"model": "m", "id": "{id}", "inputs": {{"item": {item}, "user": {user}}}}}'.encode()


def test_several_inputs_are_read_each_for_itself() -> None:
    template = learned(several([7], [[1, 2, 3]]), signature=TWO)
    assert template is not None
    found = read(template, several([8], [[4, 5, 6]], "b"), several([9], [[0.5, 0, -1]], "c"))
    assert found is not None
    extracted, arrays = found
    assert extracted.ids == ["b", "c"]
    assert [mine["user"].tolist() for mine in arrays] == [[8], [9]]
    assert [mine["item"].tolist() for mine in arrays] == [[[4, 5, 6]], [[0.5, 0, -1]]]
    assert arrays[0]["user"].dtype == np.int64
    decoded = template.decode(extracted)
    assert decoded is not None
    assert decoded.arrays["user"].tolist() == [8, 9]
    assert decoded.arrays["item"].shape == (2, 3)
    assert list(decoded.rows) == [1, 1]


@pytest.mark.parametrize(
    "other",
    [
        several([8, 9], [[4, 5, 6]]),
        several([8], [[4, 5, 6], [1, 2, 3]]),
        several([8, 9], [[4, 5, 6], [1, 2]]),
        several([8, 9], [[4, 5, 6], [[1, 2, 3]]]),
        several([[8], [9]], [[4, 5, 6], [1, 2, 3]]),
        several([], []),
        several([8.5], [[4, 5, 6]]),
        several([8], [[4, 5]]),
        several([[8]], [[4, 5, 6]]),
        several(8, [[4, 5, 6]]),
        several([8], [[4, 5, 6]]).replace(b"user", b"item"),
        several([8], [[4, 5, 6]]).replace(b"], ", b"] ,"),
        b'{"model": "m", "id": "a", "inputs": {"user": [8], "item": [[4, 5, 6]]}}',
        b'{"model": "m", "id": "a", "inputs": {"item": [[4, 5, 6]], "user": [8], "user": [8]}}',
        b'{"model": "m", "id": "a", "inputs": {"item": [[4, 5, 6]], "user": [8], "item": [[4, 5, 6]], "user": [8]}}',
    ],
)
def test_of_several_inputs_none_may_differ_in_more_than_its_numbers(other: bytes) -> None:
    template = learned(several([7], [[1, 2, 3]]), signature=TWO)
    assert template is not None
    assert read(template, several([7], [[1, 2, 3]]), other) is None


@pytest.mark.parametrize(
    "body",
    [
        several([7], [[1, 2, 3]]).replace(b"user", b"\\u0075ser"),
        b'{"inputs": {"item": [[1, 2, 3]], "user": [7]}, "id": "["}',
    ],
)
def test_several_inputs_without_a_form(body: bytes) -> None:
    assert learned(body, signature=TWO) is None


def test_each_has_its_own_rows() -> None:
    template = learned(several([7, 8], [[1, 2, 3], [4, 5, 6]]), signature=TWO)
    assert template is not None
    found = read(
        template,
        several([9], [[7, 8, 9]]),
        several([1, 2, 3], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]).replace(b"], [", b"],["),
        several([4, 5], [[0, 0, 0], [1, 1, 1]]),
    )
    assert found is not None
    extracted, arrays = found
    assert [mine["user"].tolist() for mine in arrays] == [[9], [1, 2, 3], [4, 5]]
    assert [mine["item"][:, 0].tolist() for mine in arrays] == [[7], [1, 4, 7], [0, 1]]
    decoded = template.decode(extracted)
    assert decoded is not None
    assert list(decoded.rows) == [1, 3, 2]


def test_rows_may_be_numbers_and_there_is_one_at_least() -> None:
    template = learned(b'{"inputs": {"x": [1, 2]}}', shape=("batch",))
    assert template is not None
    found = read(template, b'{"inputs": {"x": [3]}}', b'{"inputs": {"x": [4, 5, 6]}}')
    assert found is not None
    assert [mine["x"].tolist() for mine in found[1]] == [[3], [4, 5, 6]]
    assert read(template, b'{"inputs": {"x": []}}', b'{"inputs": {"x": [4]}}') is None


@pytest.mark.parametrize(
    "shapes", [(("batch", "n"), (3,)), (("batch", "n"), ("batch", "batch")), (("n", "batch"),)]
)
def test_rows_are_fixed_where_an_input_is_not_made_of_them(shapes: tuple[tuple[str | int, ...], ...]) -> None:
    model = model_of("batch", *shapes)
    template = learned(text("1, 2, 3"), model=model)
    assert template is not None
    assert read(template, text("4, 5, 6")) is not None
    assert read(template, text("4, 5, 6], [7, 8, 9")) is None
    assert learned(text("1, 2, 3], [4, 5, 6"), model=model) is None


@pytest.mark.parametrize(
    "body",
    [
        b'{"id": "a", "\\u0069d": "real", "inputs": {"x": [[1, 2]]}}',
        b'{"id": "a", "\\u0069d": "a", "inputs": {"x": [[1, 2]]}}',
        b'{"id": "a", "id": "r\\u0065al", "inputs": {"x": [[1, 2]]}}',
        b'{"timeout_ms": 9, "timeout\\u005fms": 50, "inputs": {"x": [[1, 2]]}}',
        b'{"inputs": {"x": [[5, 6]]}, "inputs": {"x": [[1, 2]]}}',
        b'{"inputs": {"y": [5]}, "inputs": {"x": [[1, 2]]}}',
        b"{" + b" " * 5000 + b'"inputs": {"x": [[1, 2]]}}',
        b'{"inputs": {"x": [[' + b"1, " * 100_000 + b"2]]}}",
    ],
)
def test_texts_that_are_odd_or_long_have_no_form(body: bytes) -> None:
    assert learned(body) is None


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_field_that_comes_twice_is_read_as_the_long_way_reads_it(first: str) -> None:
    body = f'{{"id": "{first}", "id": "b", "timeout_ms": 5, "timeout_ms": 9, "inputs": {{"x": [[1, 2]]}}}}'.encode()
    template = learned(body)
    assert template is not None
    found = read(template, body)
    assert found is not None
    assert found[0].ids is None
    assert template.envelope.id == "b"
    assert template.deadlines([0.0], found[0]) == [0.009]
    assert read(template, body.replace(b'"b"', b'"c"')) is None


def test_a_raw_body_without_a_dimension_has_no_form() -> None:
    prepared = ({"x": np.zeros((), np.float32)}, 1, ("y",), None, 0, None)
    assert raw_template(PredictRequest(), None, MODEL, prepared) is None


def test_a_model_without_a_batch_keeps_its_shape() -> None:
    vector = learned(b'{"inputs": {"x": [1, 2, 3]}}', shape=("n",), model=ROWLESS)
    assert vector is not None
    found = read(vector, b'{"inputs": {"x": [4, 5, 6]}}', b'{"inputs": {"x": [7, 8, 9]}}')
    assert found is not None
    assert [mine["x"].tolist() for mine in found[1]] == [[4, 5, 6], [7, 8, 9]]
    assert read(vector, b'{"inputs": {"x": [1, 2]}}') is None
    matrix = learned(text("1, 2, 3"), model=ROWLESS)
    assert matrix is not None
    assert read(matrix, text("4, 5, 6")) is not None
    assert read(matrix, text("4, 5, 6], [7, 8, 9")) is None
    assert learned(text("1, 2, 3], [4, 5, 6"), model=ROWLESS) is None


ROWS = st.lists(
    st.lists(st.integers(-9, 9), min_size=2, max_size=2).map(lambda row: ", ".join(map(str, row))),
    min_size=1,
    max_size=4,
).map("], [".join)
ODD_ROWS = st.lists(
    st.sampled_from(["1, 2", "3", "],[", "], [", "]", "[", ", ", ",", "]]", "[["]), max_size=6
).map("".join)


@settings(max_examples=1500)
@given(st.lists(st.one_of(ROWS, ODD_ROWS), min_size=1, max_size=4))
def test_rows_that_are_read_together_are_those_of_the_long_way(rows: list[str]) -> None:
    template = learned(text("1, 2], [3, 4"))
    assert template is not None
    bodies = [text(row) for row in rows]
    found = read(template, *bodies)
    if found is None:
        return
    for body, arrays in zip(bodies, found[1], strict=True):
        _, inputs = parse_predict(body)
        np.testing.assert_array_equal(
            arrays["x"], inputs.decode(signature_of("float32", ["batch", "n"]))["x"]
        )


@given(st.lists(ROWS, min_size=1, max_size=4))
def test_plain_rows_are_always_read(rows: list[str]) -> None:
    template = learned(text("1, 2], [3, 4"))
    assert template is not None
    assert read(template, *map(text, rows)) is not None


FIELDS = st.permutations(
    [
        '"model": "m"',
        '"id": "%s"',
        '"timeout_ms": %s',
        '"inputs": {"item": [[%s]], "user": [%s]}',
        '"outputs": ["y"]',
        '"priority": 3',
    ]
)
GAPS = st.tuples(
    st.sampled_from(["a", "", "b\\\"", '"', '", "id": "', "é", "[", "]", "timeout_ms", '\\"id\\": \\"x', "x" * 200]),
    st.sampled_from(["5", "5.5", "1e2", "0", "-1", "1e9", "null", "[1]", "5, 5", "05", "5 ", '5, "id": "b"']),
    st.sampled_from(["1, 2, 3", "4,5,6.5", "1, 2", "1, 2, 3], [4, 5, 6",
        "1], [2", '1, 2, 3]], "user": [[7', "null, 2, 3", "", "1e39, 2"]),
    st.sampled_from(["7", "8 ", "8.5", "7, 8", "true", "7], \"item\": [1", "99999999999999999999", "1, 2"]),
)  # fmt: skip


def fill(fields: list[str], gaps: tuple[str, str, str, str]) -> bytes:
    values = dict(zip(("id", "timeout_ms", "inputs"), (gaps[:1], gaps[1:2], gaps[2:]), strict=True))
    return ("{" + ", ".join(f % values.get(f[1 : f.index('"', 1)], ()) for f in fields) + "}").encode()


@settings(max_examples=1500)
@given(FIELDS, GAPS)
def test_whatever_stands_in_the_gaps_says_the_same_as_the_long_way(
    fields: list[str], gaps: tuple[str, str, str, str]
) -> None:
    template = learned(fill(fields, ("a", "50", "1, 2, 3", "7")), signature=TWO)
    assert template is not None
    body = fill(fields, gaps)
    found = read(template, body)
    if found is None:
        return
    extracted, arrays = found
    envelope, inputs = parse_predict(body)
    long_way = inputs.decode(TWO)
    for name, array in arrays[0].items():
        np.testing.assert_array_equal(array, long_way[name])
    assert extracted.ids == [envelope.id]
    assert extracted.timeouts_ms == [envelope.timeout_ms]
    assert envelope == replace(template.envelope, id=envelope.id, timeout_ms=envelope.timeout_ms)


@given(st.integers(0, 99), st.sampled_from(["id", "timeout"]))
def test_most_gaps_are_read(number: int, what: str) -> None:
    fields = ['"id": "%s"', '"timeout_ms": %s', '"inputs": {"item": [[%s]], "user": [%s]}']
    template = learned(fill(fields, ("a", "50", "1, 2, 3", "7")), signature=TWO)
    assert template is not None
    assert (
        read(template, fill(fields, (f"r-{number}", f"{number}", f"{number}, 2, 3", f"{number}"))) is not None
    )


def test_a_raw_form_reads_bytes_and_leaves_what_is_not_finite() -> None:
    prepared = ({"x": np.zeros((2, 3), np.float32)}, 2, ("y",), None, 0, None)
    template = RawTemplate(raw_envelope({"model": "m"}), None, MODEL, prepared)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    arrays = alone(template, x.tobytes())
    assert arrays is not None
    np.testing.assert_array_equal(arrays["x"], x)
    x[1, 1] = np.inf
    assert alone(template, x.tobytes()) is None


def test_a_form_does_not_keep_a_model_alive() -> None:
    model = Model()
    prepared = ({"x": np.zeros((1, 3), np.float32)}, 1, ("y",), None, 0, None)
    template = RawTemplate(PredictRequest(), None, cast(LoadedModel, model), prepared)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert template.model is None
    assert not template.fits(MODEL)


PIECES = st.sampled_from(
    ["1", "-2.5e3", "0", "1e400", "[", "]", ",", " ", "null", '"', "{", "}", ":", "\\", "1e39"]
)


@settings(max_examples=500)
@given(st.lists(PIECES, max_size=9))
def test_whatever_stands_between_a_form_says_the_same_as_the_long_way(pieces: list[str]) -> None:
    template = learned(text("1, 2, 3"))
    assert template is not None
    body = text("".join(pieces))
    arrays = alone(template, body)
    if arrays is None:
        return
    envelope, inputs = parse_predict(body)
    long_way = inputs.decode(signature_of("float32", ["batch", "n"]))
    np.testing.assert_array_equal(arrays["x"], long_way["x"])
    assert replace(envelope, id=None) == template.envelope


@settings(max_examples=500)
@given(st.lists(st.lists(PIECES, max_size=9).map("".join), min_size=2, max_size=4))
def test_bodies_read_together_give_what_each_gives_alone(rows: list[str]) -> None:
    template = learned(text("1, 2, 3"))
    assert template is not None
    bodies = [text("4, 5, 6"), *map(text, rows)]
    found = read(template, *bodies)
    if found is None:
        return
    for body, arrays in zip(bodies, found[1], strict=True):
        own = alone(template, body)
        assert own is not None
        np.testing.assert_array_equal(arrays["x"], own["x"])


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
    template = learned(text("1, 2, 3"))
    assert template is not None
    bodies = [f'{{"model": "m", "inputs": {{"x": [{row}]}}, "id": "a"}}'.encode() for row in (one, other)]
    assert read(template, text("1, 2, 3"), *bodies) is None
    assert read(template, text("1, 2, 3"), text("4, 5, 6")) is not None


def test_large_raw_bodies_are_read_where_they_lie() -> None:
    prepared = ({"x": np.zeros((1, 10_000), np.float32)}, 1, ("y",), None, 0, None)
    template = RawTemplate(PredictRequest(), None, MODEL, prepared)
    bodies = [np.full(10_000, n, np.float32).tobytes() for n in range(2)]
    arrays = [alone(template, body) for body in bodies]
    for n, (body, mine) in enumerate(zip(bodies, arrays, strict=True)):
        assert mine is not None
        assert np.shares_memory(mine["x"], np.frombuffer(body, np.uint8))
        assert (mine["x"] == n).all()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
def test_every_number_comes_back(row: list[float]) -> None:
    template = learned(text("1, 2, 3"))
    assert template is not None
    arrays = alone(template, text(orjson.dumps(row).decode()[1:-1]))
    assert arrays is not None
    assert arrays["x"].tolist() == [row]


def test_a_body_that_is_refused_teaches_nothing() -> None:
    with pytest.raises(RequestError):
        learned(text("1, x"))


# --- what a client asks, over time ----------------------------------------------------------------
def of_model(name: str) -> Template:
    template = learned(f'{{"model": "{name}", "inputs": {{"x": [[1, 2]]}}}}'.encode())
    assert template is not None
    return template


def asks(name: str) -> bytes:
    return f'{{"model": "{name}", "inputs": {{"x": [[3, 4]]}}}}'.encode()


def test_a_client_that_asks_several_models_in_turns_has_a_form_for_each() -> None:
    cache = TemplateCache()
    templates = {name: of_model(name) for name in ("a", "b", "c")}
    for template in templates.values():
        assert cache.should_learn()
        cache.learn(template)
    for name, template in templates.items():
        assert cache.template_of(asks(name)) is template
        cache.record_hit()
    assert cache.template_of(asks("d")) is None


def test_the_number_of_forms_is_bounded_and_the_first_ones_stay() -> None:
    cache = TemplateCache()
    templates = [of_model(str(n)) for n in range(20)]
    for template in templates:
        cache.learn(template)
        cache.record_hit()
    assert [cache.first, *cache.others] == [*templates[:7], templates[-1]]


def test_a_form_of_a_model_that_has_gone_makes_room() -> None:
    cache, gone = TemplateCache(), Model()
    prepared: tuple[Any, ...] = ({"x": np.zeros((1, 2), np.float32)}, 1, ("y",), None, 0, None)
    old = RawTemplate(PredictRequest(model="old"), None, cast(LoadedModel, gone), prepared)
    same, new = of_model("a"), of_model("a")
    for template in (old, same):
        cache.learn(template)
    del gone
    gc.collect()
    cache.learn(new)
    assert (cache.first, [*cache.others]) == (new, [])


def test_the_last_form_of_a_text_counts() -> None:
    """As when a client changes to longer rows, or a raw body comes for another version."""
    cache = TemplateCache()
    short, long, other = learned(text("1, 2")), learned(text("1, 2, 3")), of_model("b")
    assert short is not None
    assert long is not None
    for template in (short, other, long):
        cache.learn(template)
    assert cache.template_of(text("4, 5, 6")) is long
    assert cache.template_of(asks("b")) is other
    prepared: tuple[Any, ...] = ({"x": np.zeros((1, 2), np.float32)}, 1, ("y",), None, 0, None)
    raw = [RawTemplate(PredictRequest(version=v), None, MODEL, prepared) for v in ("1", "2")]
    cache = TemplateCache()
    for raw_one in raw:
        cache.learn(raw_one)
    assert cache.template_of(b"12345678") is raw[1]


def test_bodies_that_are_all_different_are_not_looked_at_for_ever() -> None:
    cache = TemplateCache()
    looked = 0
    for n in range(2500):
        if cache.should_learn():
            looked += 1
            cache.learn(of_model(str(n)))
    assert 8 <= looked <= 3 * 8


def test_odd_bodies_do_not_cost_others_their_form() -> None:
    cache, template = TemplateCache(), of_model("a")
    cache.learn(template)
    for n in range(3000):
        if cache.should_learn():
            cache.learn(None if n % 2 else of_model(str(n)))
    assert cache.template_of(asks("a")) is template
    while not cache.should_learn():
        pass
    new = of_model("new")
    cache.record_hit(64)
    cache.learn(new)
    assert cache.template_of(asks("new")) is new


def test_lengths_that_always_differ_are_not_tried_in_vain() -> None:
    cache = TemplateCache()
    for n in range(100):
        template = learned(text(", ".join("1" * (2 + n))))
        assert template is not None
        if cache.should_learn():
            cache.learn(template)
    assert cache.first is None


def test_heads_that_are_not_remembered_have_no_forms() -> None:
    assert not any(NO_TEMPLATES.should_learn() for _ in range(3000))
    assert NO_TEMPLATES.first is None
