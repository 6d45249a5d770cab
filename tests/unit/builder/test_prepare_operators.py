"""ONNX's own operator tests as models: each is prepared and answers as before, or is refused in words.

`prepare` itself runs both forms and compares them, so being accepted means being equal.
"""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases

from vernier.builder.graphs.prepare import prepare
from vernier.errors import BuildError


def outcomes(models: list[onnx.ModelProto], folder: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    path = folder / "operator.onnx"
    for model in models:
        path.write_bytes(model.SerializeToString())
        try:
            made = prepare(path, {}, folder)
        except BuildError as error:
            assert ": " in error.message or ";" in error.message, f"what to do is not said: {error.message}"
            found["refused"] += 1
        else:
            onnx.checker.check_model(made.model)
            found["prepared"] += 1
    return found


@pytest.fixture(scope="module")
def models() -> list[onnx.ModelProto]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases provoke overflows on purpose
        return [case.model for case in collect_testcases(None) if case.model is not None]


def test_every_fifteenth_operator_test_is_prepared_or_refused(
    models: list[onnx.ModelProto], tmp_path: Path
) -> None:
    found = outcomes(models[::15], tmp_path)
    assert found["prepared"] > 2 * found["refused"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_operator_tests_are_prepared_or_refused(models: list[onnx.ModelProto], tmp_path: Path) -> None:
    found = outcomes(models, tmp_path)
    assert found["prepared"] > 2 * found["refused"]
