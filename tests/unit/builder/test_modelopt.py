"""ModelOpt's decisions are taken, its graphs are not; without it the option is refused in words.

The worker runs for real where an environment with ModelOpt is named (VERNIER_MODELOPT_PYTHON).
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.quantized_graphs import full_recipe
from tests.unit.builder import architectures
from tests.unit.builder.architectures import data
from tests.unit.builder.models import check, save
from vernier.builder.evaluate import run_model
from vernier.builder.lowering.lower import Recipe, lower
from vernier.builder.nodes.placement import quantizable_nodes
from vernier.builder.pipeline import build
from vernier.builder.progress import NoProgress
from vernier.builder.quantizing.modelopt import PYTHON_VARIABLE, find_python, propose
from vernier.builder.quantizing.rehearsal import damage
from vernier.builder.request import BuildRequest
from vernier.errors import BuildError

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


def wanted(folder: Path, *precisions: str) -> BuildRequest:
    model = architectures.residual_cnn()
    save(model, folder / "model.onnx")
    samples = data(model, 96)
    np.savez(folder / "data.npz", **samples.take(range(96)))  # type: ignore[arg-type]
    return BuildRequest(
        model=folder / "model.onnx",
        name="given",
        out=folder / "engines",
        precisions=("fp32", *precisions),
        calibration=str(folder / "data.npz"),
        quantizer="modelopt",
        max_batch=4,
    )


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def test_whatever_modelopt_does_to_its_files_it_does_to_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = wanted(tmp_path, "bf16")
    vandal = tmp_path / "vandal.py"
    vandal.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        "request = json.load(open(sys.argv[-1]))\n"
        "for name in ('model', 'data'):\n"
        "    open(request[name], 'w').write('spoiled')\n"
        "json.dump({'nodes': [], 'ranges': {}, 'fp32': request['all_nodes'][:1]}, open(request['out'], 'w'))\n"
    )
    vandal.chmod(0o755)
    monkeypatch.setenv(PYTHON_VARIABLE, str(vandal))
    before = digests(tmp_path)
    outcome = build(request, NoProgress())
    assert outcome.manifest.variants["bf16"].gates["emulated"].passed
    assert digests(tmp_path) == before


@installed
@pytest.mark.timeout(300)
def test_modelopt_leaves_what_it_was_given_as_it_was(tmp_path: Path) -> None:
    request = wanted(tmp_path, "bf16", "fp16", "int8")
    before = digests(tmp_path)
    outcome = build(request, NoProgress())
    assert {"bf16", "fp16", "int8"} == {v.precision for v in outcome.variants} - {"fp32"}
    assert digests(tmp_path) == before


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
