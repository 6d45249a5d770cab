"""Bodies of many answers, and their heads: byte for byte what each would be alone."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest

from vernier.api.formats.codecs import encode_answer
from vernier.api.http.identity import Identities
from vernier.border.batch import Answer
from vernier.front.answer_bodies import Bodies, joined_bodies
from vernier.front.response_heads import LONG_BODY, ResponseHeads

IDS = Identities(["a", "b"])
DEFAULTS = [(b"date", b"Thu, 26 Nov 2026 08:00:00 GMT")]


@pytest.mark.parametrize("seconds", [0.0, 1e-6, 0.0004, 12.3456789, 1e5])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "uint8", "bool"])
def test_answers_written_together_are_those_written_alone(dtype: str, seconds: float) -> None:
    values = np.random.default_rng(0).normal(size=(5, 3)) * [1e-9, 1.0, 100.0]
    if dtype == "float32":
        values[2] = np.inf, np.nan, -0.0
    score, top = (np.abs(values) if dtype == "uint8" else values).astype(dtype), np.arange(5)
    ids = ["a", 'quote " and \\', "é", "%b", "e"]
    answers = [
        Answer({"score": score[i : i + 1], 't"op%': top[i : i + 1]}, "int8", seconds, seconds, 5)
        for i in range(5)
    ]
    whole = Answer({"score": score, 't"op%': top}, "int8", seconds, seconds, 5)
    together = joined_bodies(Identities(ids), "ranker%d", "3", whole, [1] * 5)
    assert together.whole() == [
        encode_answer(i, "ranker%d", "3", a) for i, a in zip(ids, answers, strict=True)
    ]


@pytest.mark.parametrize("rows", [(1, 1, 1), (2, 2, 2), (1, 3, 2), (5, 1, 1)])
@pytest.mark.parametrize("row", [(), (4,), (2, 2), (2000,), (0,)])
def test_an_answer_to_joined_requests_is_written_as_each_would_be_alone(
    rows: tuple[int, ...], row: tuple[int, ...]
) -> None:
    total = sum(rows)
    whole = {"score": np.random.default_rng(0).normal(size=(total, *row)), "top": np.arange(total)}
    joined = Answer(whole, "int8", 0.0, 0.00123, total)
    ids = ["a", "é", "b"]
    together = joined_bodies(Identities(ids), "m", "1", joined, rows)
    bounds = pairwise([0, *accumulate(rows)])
    for name, text, (start, stop) in zip(ids, together.whole(), bounds, strict=True):
        mine = {n: array[start:stop] for n, array in whole.items()}
        assert text == encode_answer(name, "m", "1", Answer(mine, "int8", 0.0, 0.00123, total))


@pytest.mark.parametrize("odd", ["b", 'a "quote"', "back\\slash", "é", "x" * 200, "a\nb", ""])
def test_heads_and_bodies_of_many_are_those_of_each(odd: str) -> None:
    texts = ["plain", odd]
    whole = {"y": np.arange(6.0).reshape(2, 3), "z": np.arange(2)}
    ids, heads = Identities(texts), ResponseHeads()
    bodies = joined_bodies(ids, "m", "1", Answer(whole, "fp16", 0.0, 0.5, 2), [1, 1])
    messages = heads.ok_all(DEFAULTS, bodies, ids)
    assert messages is not None
    for at, (text, message) in enumerate(zip(texts, messages, strict=True)):
        mine = {name: array[at : at + 1] for name, array in whole.items()}
        body = encode_answer(text, "m", "1", Answer(mine, "fp16", 0.0, 0.5, 2))
        assert message == heads.make(DEFAULTS, 200, len(body), text, {}) + body


def test_a_long_body_among_them_gets_its_head_elsewhere() -> None:
    short, long = b"x" * (LONG_BODY - 1), b"x" * LONG_BODY
    assert ResponseHeads().ok_all(DEFAULTS, Bodies(2, [[short, short]]), IDS) is not None
    assert ResponseHeads().ok_all(DEFAULTS, Bodies(2, [[short, long]]), IDS) is None
