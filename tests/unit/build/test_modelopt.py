"""ModelOpt's decisions are taken, its graphs are not; without it the option is refused in words.

The worker runs for real where an environment with ModelOpt is named (VERNIER_MODELOPT_PYTHON).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from app.build.evaluate import run_model
from app.build.lower import Recipe, lower
from app.build.modelopt import PYTHON_VARIABLE, find_python, propose
from app.build.placement import quantizable_nodes
from app.build.rehearsal import damage
from app.errors import BuildError
from tests.support.quantized_graphs import full_recipe
from tests.unit.build import architectures
from tests.unit.build.architectures import data
from tests.unit.build.models import check

installed = pytest.mark.skipif(
    PYTHON_VARIABLE not in os.environ, reason=f"{PYTHON_VARIABLE} names no environment"
)


def test_the_environment_names_the_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON_VARIABLE, "/opt/modelopt/bin/python")
    assert find_python() == "/opt/modelopt/bin/python"


def test_a_python_that_cannot_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON_VARIABLE, "/nowhere/python")
    model = architectures.residual_cnn()
    with pytest.raises(BuildError, match=r"cannot start /nowhere/python.*check VERNIER_MODELOPT_PYTHON"):
        propose(model, quantizable_nodes(model), data(model), "int8")


def test_a_python_without_modelopt_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    pytest.importorskip("onnx")
    if any((Path(p) / "modelopt").exists() for p in sys.path):
        pytest.skip("ModelOpt is installed here")
    model = architectures.residual_cnn()
    with pytest.raises(
        BuildError, match=r"could not make int8: .*No module named 'modelopt'.*quantizer vernier"
    ):
        propose(model, quantizable_nodes(model), data(model), "int8")


@installed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("precision", ["int8", "fp8", "fp16", "bf16"])
def test_a_proposal_lowers_to_a_valid_graph(precision: str) -> None:
    model = architectures.residual_cnn()
    nodes, samples = quantizable_nodes(model), data(model, 64)
    try:
        proposal = propose(model, nodes, samples, precision)
    except BuildError as error:
        assert "found nothing" in error.message
        return
    assert proposal.nodes <= {n.name for n in nodes}
    full = full_recipe(model, samples.take(range(64)), "fp16")
    ranges = {**full.ranges, **proposal.ranges}
    recipe = {
        "int8": Recipe("fp16", int8=proposal.nodes, ranges=ranges, weights=full.weights),
        "fp8": Recipe("fp16", fp8=proposal.nodes, ranges=ranges),
    }.get(precision, Recipe(precision, fp32=proposal.fp32))
    lowered = lower(model, recipe)
    check(lowered)
    exact, got = (
        {n: a.reshape(len(a), -1) for n, a in run_model(m, samples).items()} for m in (model, lowered)
    )
    assert damage(exact, got) < 0.2
    assert all(np.isfinite(a).all() for a in got.values())
